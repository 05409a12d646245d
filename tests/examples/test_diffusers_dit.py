"""The example of a DiT pipeline runs from its command line, on its own photographs, in a few steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("diffusers", reason="diffusers comes with psvae[diffusers]")


REPOSITORY = Path(__file__).parents[2]


def run(*arguments, expect=0):
    """Standard output and error together, after checking the exit code."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "examples/diffusers_dit.py", *arguments]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_trains_samples_and_saves(tmp_path):
    output = run("--vae-steps", "3", "--steps", "3", "--output", str(tmp_path))
    assert "three draws of astronaut, chelsea, coffee, hubble_deep_field, rocket" in output
    pixels = np.asarray(Image.open(tmp_path / "samples.png"))
    assert pixels.shape == (5 * 128, 5 * 128, 3)
    assert pixels.std() > 10
    index = json.loads((tmp_path / "pipeline/model_index.json").read_text())
    assert index["vae"] == ["psvae", "AutoencoderPSVAE"]


def test_a_folder_without_images(tmp_path):
    assert "holds no images" in run("--data", str(tmp_path), expect=1)
