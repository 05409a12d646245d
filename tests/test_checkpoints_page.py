"""docs/checkpoints.md is what its script writes, and knows every layout."""

import importlib.util
from pathlib import Path

import pytest

import psvae

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
    read = {layout.name for name in psvae.__all__ for layout in getattr(getattr(psvae, name), "foreign_formats", ())}
    assert read == script.KNOWN.keys()
    for facts in script.KNOWN.values():
        assert facts.published
        assert all(ids and licence for ids, licence in facts.published)
        assert facts.verified
        assert (ROOT / facts.tests).is_file()
