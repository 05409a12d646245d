"""The documents name code that exists."""

import ast
import re
from pathlib import Path

import pytest
import torch

from psvae import PSVAE, DeepFusionDiT, DeepFusionDiTConfig, PSVAEConfig

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "paper_to_code.md"
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("**/*.md")), ROOT / "examples" / "README.md"]
# Whose options a section names: the first line's beginning, the files, and their classes by the option's prefix.
TOKENIZER = (["train_tokenizer.py"], {"": ["Options"], "losses": ["LossOptions"], "data": ["DataOptions"]})
GENERATOR = (["train_generator.py"], {"": ["TrainingOptions", "Options"], "data": ["PairOptions"]})
REALS = (["train_reals.py", "reals_losses.py"], TOKENIZER[1])
PROGRAMS = {"Training (": TOKENIZER, "The generator's training": GENERATOR, "The variants": TOKENIZER, "ReaLS (": REALS}


def names_in(path: Path) -> set[str]:
    """Functions and classes of a file, and ``Class.member`` for methods, fields and what methods set on self."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [node]
        names |= {getattr(target, "name", getattr(target, "id", "")) for target in targets}
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{member}" for member in members(node)}
    return names


def members(node: ast.ClassDef) -> set[str]:
    found = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
    found |= {
        item.target.id for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }
    inside = [part for item in node.body for part in ast.walk(item)]
    return found | {part.attr for part in inside if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_linked_files_exist(document):
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text(encoding="utf-8"))
    lost = [target for target in targets if "://" not in target and not (document.parent / target).exists()]
    assert lost == []


def test_linked_names_are_in_the_linked_file():
    links = re.findall(r"\[`([^`]+)`\]\(([^)]+\.py)\)", PAGE.read_text(encoding="utf-8"))
    assert len(links) > 50
    lost = [(name, file) for name, file in links if name not in names_in(PAGE.parent / file)]
    assert lost == []


def test_other_names_exist():
    names = set().union(*(names_in(path) for path in (ROOT / "psvae").glob("**/*.py")))
    spans = re.findall(r"`([^`\n]+)`", PAGE.read_text(encoding="utf-8"))
    members = re.findall(
        r"\b((?:PSVAE|Semantic|Pixel|Latent|Diagonal|DeepFusion|Prefix|Guidance)\w*\.\w+)", " ".join(spans)
    )
    assert members
    assert [name for name in members if name not in names and name.split(".")[1] != "py"] == []


def sections() -> dict[str, str]:
    """The page by headings."""
    parts = re.split(r"^##+ ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {part.partition("\n")[0]: part for part in parts}


def program_of(heading: str) -> tuple[list[str], dict[str, list[str]]] | None:
    return next((program for start, program in PROGRAMS.items() if heading.startswith(start)), None)


def defaults(program: tuple[list[str], dict[str, list[str]]]) -> dict[str, ast.expr | None]:
    """What its options default to, by the option's name."""
    files, prefixes = program
    found: dict[str, ast.expr | None] = {}
    for path in (ROOT / "examples" / name for name in (*files, "data.py", "pairs.py")):
        classes = {node.name: node for node in ast.parse(path.read_text(encoding="utf-8")).body if is_class(node)}
        for prefix, names in prefixes.items():
            for item in (item for name in names if name in classes for item in classes[name].body):
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    found[f"{prefix}.{item.target.id}".lstrip(".").replace("_", "-")] = item.value
    return found


def is_class(node: ast.stmt) -> bool:
    return isinstance(node, ast.ClassDef)


def test_options_exist():
    count = 0
    for heading, text in sections().items():
        flags = re.findall(r"--([a-z][\w.-]*\w)", text)
        program = program_of(heading)
        assert program or not flags, f"whose options does {heading!r} name?"
        known = defaults(program) if program and flags else {}
        assert [flag for flag in flags if flag not in known] == []
        count += len(flags)
    assert count > 20


@pytest.mark.parametrize("start", ["Training (", "The generator's training", "ReaLS ("])
def test_training_defaults_are_the_code_s(start):
    section = next(text for heading, text in sections().items() if heading.startswith(start))
    options = defaults(PROGRAMS[start])
    stated = re.findall(r"`--([\w.-]+) ([^`]+)`", section)
    assert len(stated) > 4
    for flag, value in stated:
        default = ast.literal_eval(options[flag])
        assert default == type(default)(value), f"--{flag}"


def test_variants_build():
    scope: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(block, scope)
    configs = {name: value for name, value in scope.items() if isinstance(value, PSVAEConfig)}
    assert set(configs) == {"rae", "mlp", "on_features"}
    for config in configs.values():
        assert PSVAEConfig.from_dict(config.to_dict()) == config
        with torch.device("meta"):
            PSVAE(config)


def test_generator_designs_have_the_paper_s_size():
    """Table 1 and section 4.3 count BAGEL's stored positions, 64 x 64, which are computed here."""
    scope: dict = {}
    text = PAGE.read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, scope)
    configs = [value for value in scope.values() if isinstance(value, DeepFusionDiTConfig)]
    stated = re.findall(r"^\| [^|]+ \| (\d+) \| ([\d.]+) \|$", text, re.MULTILINE)
    assert len(configs) == len(stated) == 4
    for config, (paper, ours) in zip(configs, stated, strict=True):
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in DeepFusionDiT(config).parameters())
        millions = (count + 64 * 64 * config.hidden_size) / 1e6
        assert f"{millions:.1f}" == ours
        assert millions == pytest.approx(int(paper), rel=0.003)
