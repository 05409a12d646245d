"""docs/checkpoints.md is what its script writes, and knows every layout."""

import importlib.util
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_is_current():
    spec = importlib.util.spec_from_file_location("checkpoints", DOCS / "checkpoints.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = module.page()
    assert (DOCS / "checkpoints.md").read_text(encoding="utf-8") == page, "run python docs/checkpoints.py"
    assert "|  |" not in page, "a layout without examples and verification: add it to KNOWN"
