"""What hatchling would put into the wheel and the source archive."""

from pathlib import Path

from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[1]


def packed(builder):
    return {file.distribution_path for file in builder(str(ROOT)).recurse_included_files()}


def test_the_wheel_has_the_trained_model_and_nothing_but_the_package():
    files = packed(WheelBuilder)
    model = {f"psvae/models/psvae-tiny/{name}" for name in ("README.md", "config.json", "model.safetensors")}
    assert model | {"psvae/py.typed", "psvae/__init__.py"} <= files
    assert {name.split("/")[0] for name in files} == {"psvae"}


def test_the_source_archive_has_what_its_own_tests_and_site_read():
    files = packed(SdistBuilder)
    assert {"Makefile", "CONTRIBUTING.md", "docs/index.md", "reproduction/run.py", "tests/conftest.py"} <= files
