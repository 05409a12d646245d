"""`make scenes` in a few steps: the whole path runs, scores itself, and goes on where it stopped."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from psvae import PSVAE, DeepFusionDiT
from tests.examples.generator_world import command, environment, run, script

TINY = ("--share", "0.001", "--no-compile", "--prompts", "2", "--edits", "1", "--sampling-steps", "2")


def test_trains_scores_and_resumes(tmp_path):
    printed = run(command("train_scenes", *TINY, "--output", tmp_path))
    table = json.loads((tmp_path / "scores.json").read_text())
    tasks = {"single_object", "two_objects", "counting", "colour", "position", "colour_attribution", "mean"}
    assert set(table["text_to_image"]) == tasks
    assert {"recolour", "replace", "add", "remove", "move", "background"} < set(table["editing"])
    assert 0 < table["editing"]["preserved_psnr"] < 30
    assert f"{table['tokenizer']['psnr']} dB" in printed
    for name in ("text_to_image", "editing"):
        assert np.asarray(Image.open(tmp_path / f"{name}.png").convert("L")).std() > 5
        assert isinstance(DeepFusionDiT.from_pretrained(tmp_path / name / "model"), DeepFusionDiT)
    assert PSVAE.from_pretrained(tmp_path / "tokenizer").latent_spec.mean is not None

    written = (tmp_path / "text_to_image" / "model" / "model.safetensors").stat().st_mtime_ns
    run(command("train_scenes", *TINY, "--resume", "--output", tmp_path))
    again = json.loads((tmp_path / "scores.json").read_text())
    assert again["text_to_image"] == table["text_to_image"]
    assert again["editing"] == table["editing"]
    assert (tmp_path / "text_to_image" / "model" / "model.safetensors").stat().st_mtime_ns == written

    refused = subprocess.run(
        command("train_scenes", *TINY, "--output", tmp_path), env=environment(), capture_output=True, text=True
    )
    assert refused.returncode
    assert "--resume goes on with it" in refused.stderr
    refused = subprocess.run(
        command("train_scenes", *TINY, "--resume", "--seed", "1", "--output", tmp_path),
        env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert refused.returncode
    assert "(seed: 0 before, 1 now)" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_kill_leaves_no_half_written_options(tmp_path, monkeypatch):
    scenes = script("train_scenes")

    def killed(file, text, **_):
        file.write_bytes(text[:9].encode())
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            scenes.claim(scenes.Options(output=tmp_path))
    scenes.claim(scenes.Options(output=tmp_path, resume=True))
    with pytest.raises(SystemExit, match=r"\(seed: 0 before, 1 now\)"):
        scenes.claim(scenes.Options(output=tmp_path, resume=True, seed=1))
