"""What the benchmarks share: a row of one repetition, and a file that a crash does not lose; whole runs in small."""

import importlib
import json
import math
import sys

import pytest
import torch

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


GROUPS = {"cache": 3, "peer": 2, "attention": 1, "guidance": 2, "compile": 1, "training": 3}
OPT_IN = {"compile": pytest.mark.compile, "training": pytest.mark.slow}


@pytest.mark.parametrize("group", [pytest.param(group, marks=OPT_IN.get(group, ())) for group in GROUPS])
def test_the_generator_is_measured(group, monkeypatch, tmp_path):
    """Each group in small: what its rows say depends on the machine."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))  # for the processes that it starts, too
    generator = importlib.import_module("generator")
    options = generator.Options(
        json=tmp_path / "rows.json", only=(group,), preset="tiny", dtypes=("fp32",), batches=(1,), cases=("edit",),
        repetitions=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        generator.main(options)
    rows = json.loads(options.json.read_text())["rows"]
    assert len(rows) >= GROUPS[group]
    assert all(math.isfinite(row["value"]) and row["value"] > 0 for row in rows)


REALS = {"step": 4, "teacher": 4, "alignment": 1}


@pytest.mark.parametrize("group", list(REALS))
def test_reals_is_measured(group, monkeypatch, tmp_path):
    """The step with all of the figure's terms, by the example's own training: one pass of the teacher in each."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    reals = importlib.import_module("reals")
    options = reals.Options(
        json=tmp_path / "rows.json", only=(group,), preset="tiny", dtypes=("fp32",), terms=("all",), latents=(1,),
        repetitions=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        reals.main(options)
    rows = json.loads(options.json.read_text())["rows"]
    assert len(rows) == REALS[group]
    assert all(math.isfinite(row["value"]) and row["value"] > 0 for row in rows)
    targets = {row["name"].split(",")[0]: row["target"] for row in rows if row["target"]}
    assert targets == {
        "step": {"ReaLS step / plain step": 1.25}, "teacher": {}, "alignment": {"AlignmentNet / PixelVAE.decode": 0.05},
    }[group]  # fmt: skip
    shares = [row for row in rows if row["name"].startswith("teacher / ReaLS step")]
    assert all(row["value"] < 1 and "passes in a step: 1;" in row["note"] for row in shares)
