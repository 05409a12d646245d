"""docs/checkpoints.md is what its script writes, and knows every layout."""

import importlib.util
import pkgutil
from pathlib import Path

import pytest

import psvae
from psvae.hub import keymaps
from psvae.hub.formats import Format

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("checkpoints", ROOT / "docs" / "checkpoints.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current(script):
    page = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    assert page == script.page(), "run python docs/checkpoints.py"


def test_every_layout_has_its_facts_and_no_other_is_promised(script):
    whole = {layout.name for name in psvae.__all__ for layout in getattr(getattr(psvae, name), "foreign_formats", ())}
    read = {layout.name for _, layout in script.layouts()}
    assert read == whole | {layout.name for layout in script.PARTS.values()} == script.KNOWN.keys()
    mapped = [
        importlib.import_module(f"{keymaps.__name__}.{module.name}")
        for module in pkgutil.iter_modules(keymaps.__path__)
    ]
    assert {value.name for module in mapped for value in vars(module).values() if isinstance(value, Format)} <= read
    for reader in script.PARTS:
        name, method = reader.split(".")
        assert callable(getattr(getattr(psvae, name), method))
    for facts in script.KNOWN.values():
        assert facts.published
        assert all(ids and licence for ids, licence in facts.published)
        assert facts.verified
        assert (ROOT / facts.tests).is_file()
