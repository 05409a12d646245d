"""The documents name code that exists."""

import ast
import re
from pathlib import Path

import pytest
import torch

from psvae import PSVAE, PSVAEConfig

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "paper_to_code.md"
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("**/*.md")), ROOT / "examples" / "README.md"]
OPTION_CLASSES = {"": "Options", "losses": "LossOptions", "data": "DataOptions"}


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
    members = re.findall(r"\b((?:PSVAE|Semantic|Pixel|Latent|Diagonal)\w*\.\w+)", " ".join(spans))
    assert members
    assert [name for name in members if name not in names and name.split(".")[1] != "py"] == []


def test_training_options_exist():
    options = names_in(ROOT / "examples" / "train_tokenizer.py") | names_in(ROOT / "examples" / "data.py")
    flags = re.findall(r"--([a-z][\w.-]*\w)", PAGE.read_text(encoding="utf-8"))
    assert flags
    for flag in flags:
        group, _, field = flag.rpartition(".")
        assert f"{OPTION_CLASSES[group]}.{field.replace('-', '_')}" in options, f"--{flag}"


def test_training_defaults_are_the_code_s():
    source = (ROOT / "examples" / "train_tokenizer.py").read_text(encoding="utf-8")
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    section = PAGE.read_text(encoding="utf-8").split("### Training")[1].split("###")[0]
    stated = re.findall(r"`--([\w.-]+) ([^`]+)`", section)
    assert len(stated) > 4
    for flag, value in stated:
        group, _, field = flag.rpartition(".")
        fields = {item.target.id: item.value for item in classes[OPTION_CLASSES[group]].body if hasattr(item, "target")}
        default = ast.literal_eval(fields[field.replace("-", "_")])
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
