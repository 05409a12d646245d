"""What the benchmarks share: a row of one repetition, and a file that a crash does not lose."""

import importlib
import json
import sys

import pytest

from tests.examples.generator_world import REPOSITORY


@pytest.fixture(scope="module")
def measure():
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    try:
        return importlib.import_module("measure")
    finally:
        sys.path.pop(0)


def test_one_repetition_is_its_own_median_and_quartiles(measure):
    row = measure.Row.of("step", [2.0], "s", target=3.0)
    assert (row.low, row.value, row.high, row.met) == (2.0, 2.0, 2.0, True)
    row = measure.Row.of("step", [1.0, 2.0, 3.0, 4.0, 9.0], "s")
    assert (row.low, row.value, row.high) == (2.0, 3.0, 4.0)


def test_rows_before_a_crash_are_kept(measure, tmp_path, capsys):
    def rows():
        yield measure.Row("first", 1.0, "s")
        yield measure.Row("second", 2.0, "s")
        raise RuntimeError("the third crashes")

    path = tmp_path / "results" / "rows.json"
    with pytest.raises(RuntimeError, match="the third crashes"):
        measure.report(rows(), path, batch=4)
    record = json.loads(path.read_text())
    assert [row["name"] for row in record["rows"]] == ["first", "second"]
    assert record["batch"] == 4
    assert record["machine"]["cpu"]
    assert [file.name for file in path.parent.iterdir()] == ["rows.json"]
    assert "second: 2 s" in capsys.readouterr().out
