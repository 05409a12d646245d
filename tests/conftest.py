"""Options, opt-in markers, and the stored files that tests compare with.

psvae is not imported here: ``--shapes`` must install its import hook first.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.register_assert_rewrite("tests.base")

os.environ["OMP_NUM_THREADS"] = "1"  # for torch, not imported yet: sums of more threads differ in their last bits

HERE = Path(__file__).parent
OPT_IN = {
    "slow": "takes more than ten seconds",
    "network": "needs the network",
    "gpu": "needs a CUDA device",
    "compile": "compiles or exports, which is slow and cannot run under --shapes",
}
STORED = ("manifests", "goldens")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("psvae")
    group.addoption("--shapes", action="store_true", help="check every annotated shape (jaxtyping and beartype)")
    for mark, reason in OPT_IN.items():
        group.addoption(f"--run-{mark}", action="store_true", help=f"also run the tests marked {mark}: {reason}")
    group.addoption("--site", help="the built site to follow the links of; without it tests/test_site.py builds one")
    for kind in STORED:
        group.addoption(f"--update-{kind}", action="store_true", help=f"write tests/{kind} anew instead of comparing")


def pytest_configure(config: pytest.Config) -> None:
    for mark, reason in OPT_IN.items():
        config.addinivalue_line("markers", f"{mark}: {reason}; opt in with --run-{mark}")
    config.addinivalue_line("markers", "bad_input: breaks an annotation on purpose; deselected under --shapes")
    if config.getoption("--shapes"):
        from jaxtyping import install_import_hook

        from tests.shape_checker import check

        install_import_hook("psvae", f"{check.__module__}.{check.__name__}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--shapes"):
        impossible = [item for item in items if any(item.get_closest_marker(mark) for mark in ("bad_input", "compile"))]
        items[:] = [item for item in items if item not in impossible]
        config.hook.pytest_deselected(items=impossible)
    for mark, reason in OPT_IN.items():
        if not config.getoption(f"--run-{mark}"):
            for item in items:
                if item.get_closest_marker(mark):
                    item.add_marker(pytest.mark.skip(reason=f"{reason}; run it with --run-{mark}"))


@pytest.fixture
def stored_json(request: pytest.FixtureRequest) -> Callable[[str, str, str], Any]:
    """``stored_json(kind, name, text)``: the content of ``tests/<kind>/<name>.json``.

    With ``--update-<kind>``, ``text`` is written there first.
    """

    def read(kind: str, name: str, text: str) -> Any:
        path = HERE / kind / f"{name}.json"
        if request.config.getoption(f"--update-{kind}"):
            path.write_text(text, encoding="utf-8")
        if not path.exists():
            pytest.fail(f"{path} does not exist; write it with --update-{kind} and look at it before committing")
        return json.loads(path.read_text(encoding="utf-8"))

    return read
