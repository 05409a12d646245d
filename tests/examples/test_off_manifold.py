"""The paper's toy runs from its command line, in a few steps; its measure and its points are what they say."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

REPOSITORY = Path(__file__).parents[2]
TINY = ("--seeds", "2", "--steps", "4", "--every", "2", "--samples", "40")


def run(*arguments, expect=0):
    """Standard output and error together, after checking the exit code."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "examples/off_manifold.py", *arguments]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_writes_curves_and_picture(tmp_path):
    assert "by flipping signs" in run(*TINY, "--output", str(tmp_path))
    record = json.loads((tmp_path / "off_manifold.json").read_text())
    assert record["steps"] == [2, 4]
    assert len(record["differences"]) == len(record["curves"]) == 2
    for curves, difference in zip(record["curves"], record["differences"], strict=True):
        last = [curves["tail"][name][-1] for name in ("8-D", "2-D")]
        assert abs(last[0] - last[1] - difference) < 1e-6
        assert len(curves["residual"]) == 2
        assert all(0 < mean < far for mean, far in zip(curves["residual"], curves["worst residual"], strict=True))
    assert 0 < record["floor"] < 1
    assert np.asarray(Image.open(tmp_path / "off_manifold.png").convert("L")).std() > 10


def test_one_seed_is_no_comparison():
    assert "at least two seeds" in run("--seeds", "1", expect=1)


@pytest.mark.slow
def test_the_paper_s_claim(tmp_path):
    """Figure 3: the flow in eight dimensions strays further, under every seed, and both learn something."""
    run("--seeds", "5", "--steps", "100", "--every", "50", "--samples", "1000", "--output", str(tmp_path))
    record = json.loads((tmp_path / "off_manifold.json").read_text())
    assert min(record["differences"]) > 0
    assert record["p, one-sided, by flipping signs"] == 1 / 32
    assert record["tail"]["8-D"] > 2 * record["tail"]["2-D"]
    assert record["tail"]["2-D"] < 0.7
    for curves in record["curves"]:
        first, last = curves["tail"]["2-D"]
        assert last < first


def test_measure_and_letters(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples"))
    import off_manifold

    distances = torch.arange(100.0)
    assert off_manifold.worst(distances) == 97.0  # of 95 to 99
    points = off_manifold.letters(2000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(points.mean(0), torch.zeros(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(points.square().mean(), torch.tensor(1.0))
    hole, stem = torch.tensor([[-0.95, 0.5]]), torch.tensor([[-1.6, 0.0]])
    assert off_manifold.nearest(hole, points) > 0.1 > off_manifold.nearest(stem, points)


def test_flipping_signs_is_exact(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples"))
    import off_manifold

    def runs(differences):
        tails = [{"2-D": [1.0], "8-D": [1.0 + d]} for d in differences]
        return [{"curves": {"tail": tail, "residual": [0.1], "worst residual": [0.2]}, "floor": 0.0} for tail in tails]

    p = off_manifold.P_VALUE
    assert off_manifold.compare(runs([0.1, 0.2, 0.3, 0.4, 0.5]))[p] == 1 / 32
    for differences in itertools.permutations([0.3, -0.2, 0.1]):
        assert off_manifold.compare(runs(differences))[p] == 3 / 8  # +++, ++-, +-+ reach the mean
