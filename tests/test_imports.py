"""Who may import whom, what ``import psvae`` costs, and what the package never does."""

import ast
import functools
import importlib
import importlib.metadata
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import psvae

PACKAGE = Path(psvae.__file__).parent
EXAMPLES = sorted((PACKAGE.parent / "examples").rglob("*.py"))
MODULES = sorted(module.name for module in pkgutil.walk_packages([str(PACKAGE)], "psvae."))

# Rooms by the names of their modules under psvae, and what each may see besides itself.
VOCABULARY = {"shapes", "errors", "config", "latents"}
LOW = VOCABULARY | {"nn", "hub"}
NOUNS = {"encoders", "vae", "decoders", "alignment", "generators"}
ALLOWED = {
    **dict.fromkeys(VOCABULARY, VOCABULARY),
    "nn": VOCABULARY,
    "hub": VOCABULARY | {"nn"},
    **dict.fromkeys(NOUNS, LOW),
    "generators": LOW | {"flow"},
    "losses": VOCABULARY,
    "flow": VOCABULARY,
    "autoencoders": LOW | NOUNS,
    "adapt": VOCABULARY,
    "cli": LOW | NOUNS | {"autoencoders", "integrations"},
    "integrations": LOW | NOUNS | {"autoencoders"},
}
# Third-party imports that only one file may make, at its top or inside a function.
ONLY_IN = {
    "timm": {"psvae.encoders._timm", "psvae.encoders._positions"},
    "diffusers": {"psvae.integrations.diffusers"},
    "transformers": set(),
}
HEAVY = ("timm", "torchvision", "diffusers", "transformers", "matplotlib", "accelerate")

PUBLIC = [
    "AlignmentNet",
    "AlignmentNetConfig",
    "AlignmentOutput",
    "DeepFusionDiT",
    "DeepFusionDiTConfig",
    "DiagonalGaussian",
    "LatentSpec",
    "PSVAE",
    "PSVAEConfig",
    "PSVAEError",
    "PSVAEOutput",
    "PixelDecoder",
    "PixelDecoderConfig",
    "PixelVAE",
    "PixelVAEConfig",
    "PixelVAEOutput",
    "PrefixCache",
    "SemanticEncoder",
    "SemanticEncoderConfig",
    "SemanticVAE",
    "SemanticVAEConfig",
    "ViTPixelDecoder",
    "ViTPixelDecoderConfig",
    "__version__",
    "fit_latent_statistics",
    "flow",
    "load_latent_statistics",
    "load_reals",
    "losses",
    "save_reals",
]


def path_of(module):
    path = PACKAGE.parent.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def source_of(module):
    return path_of(module).read_text(encoding="utf-8")


def imports_of(path):
    """Full names of all that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{'.' * node.level}{node.module}.{alias.name}" for alias in node.names}
    return found


def room_of(name):
    """``psvae.decoders.tiling.Tiling`` → ``decoders``."""
    return name.split(".")[1]


@pytest.mark.parametrize("module", MODULES)
def test_rooms_import_only_what_they_may(module):
    room = room_of(module)
    assert room in ALLOWED, f"{module} is in no room of the design"
    seen = {room_of(name) for name in imports_of(path_of(module)) if name.startswith("psvae.")}
    assert seen - ALLOWED[room] - {room} == set()


@pytest.mark.parametrize("module", ["psvae", *MODULES])
def test_third_parties_are_imported_in_one_place(module):
    tops = {name.split(".")[0] for name in imports_of(path_of(module))}
    assert "" not in tops, "a relative import"
    for library, places in ONLY_IN.items():
        assert library not in tops or module in places


def declared(*extras):
    """The distributions that an installation with these extras asks for by name."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    return {re.match(r"[\w-]+", line)[0].lower() for line in lines}


@functools.cache
def distributions():
    """Which distributions bring a module, by its name."""
    return importlib.metadata.packages_distributions()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_train_extra_installs_what_the_examples_import(path):
    """Those that build diffusers' DiT, and the one that exports, need an extra more, as examples/README.md says."""
    with_diffusers = {"diffusers_dit", "sit", "train_sit", "sample_sit", "compare_reals"}
    more = ["diffusers"] if path.stem in with_diffusers else ["onnx"] if path.stem == "export_onnx" else []
    names = declared("train", *more)
    beside = {other.stem for other in EXAMPLES} | {"", "psvae", "scenes", *sys.stdlib_module_names}
    tops = {name.split(".")[0] for name in imports_of(path)} - beside
    assert sorted(top for top in tops if not names & {name.lower() for name in distributions()[top]}) == []


@pytest.mark.parametrize("module", MODULES)
def test_importable(module):
    importlib.import_module(module)


def test_import_is_light():
    """In a fresh interpreter, with every public name resolved."""
    code = (
        "import sys, psvae; loaded = set(sys.modules); "
        "[getattr(psvae, name) for name in psvae.__all__]; "
        f"print([[name for name in {HEAVY} if name in seen] for seen in (loaded, sys.modules)])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert result.stdout.strip() == "[[], []]", result.stderr


def test_public_surface():
    assert sorted(psvae.__all__) == PUBLIC
    assert dir(psvae) == PUBLIC
    assert all(hasattr(psvae, name) for name in PUBLIC)
    with pytest.raises(AttributeError, match=r"has no attribute 'PSVAEE'; it has .*PSVAE"):
        psvae.PSVAEE  # noqa: B018


def test_type_checkers_see_the_same_surface():
    """The names under TYPE_CHECKING are the names that ``__getattr__`` resolves."""
    block = next(node for node in ast.parse(source_of("psvae")).body if isinstance(node, ast.If))
    names = [alias.asname for node in block.body for alias in node.names]
    faces = ["AutoencoderPSVAE", "AutoencoderPixelVAE"]
    assert sorted(names) == sorted([*faces, *(name for name in PUBLIC if name != "__version__")])
    assert all(hasattr(psvae, name) for name in faces)


@pytest.mark.parametrize("module", MODULES)
def test_listed_names_exist(module):
    loaded = importlib.import_module(module)
    assert [name for name in getattr(loaded, "__all__", []) if not hasattr(loaded, name)] == []


@pytest.mark.parametrize("module", ["psvae", *MODULES])
def test_everything_public_has_a_docstring(module):
    tree = ast.parse(source_of(module))
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name
            for method in (n for n in node.body if isinstance(node, ast.ClassDef) and isinstance(n, ast.FunctionDef)):
                said_by_the_class = method.name.startswith("_") or method.name in ("forward", "validate", "extra_repr")
                assert said_by_the_class or ast.get_docstring(method), f"{node.name}.{method.name}"


@pytest.mark.parametrize("module", ["psvae", *MODULES])
def test_no_print_and_no_assert(module):
    for node in ast.walk(ast.parse(source_of(module))):
        assert not isinstance(node, ast.Assert), f"{module}:{node.lineno}"
        called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id
        assert called != "print", f"{module}:{node.lineno}"


@pytest.mark.parametrize("module", ["psvae", *MODULES])
def test_a_file_is_read_in_one_sitting(module):
    assert len(source_of(module).splitlines()) < 450
