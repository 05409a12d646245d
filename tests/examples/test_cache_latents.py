"""Latents cached to shards: the right ones, each once, whatever stops the run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from psvae import PSVAE
from tests.base import assert_close, assert_equal
from tests.tiny import fill_weights, tiny_psvae

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "examples/cache_latents.py"
COUNT, SHARD = 10, 3


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Ten images of two classes, a tiny PSVAE, and a finished run."""
    root = tmp_path_factory.mktemp("cache")
    generator = np.random.default_rng(0)
    for number in range(COUNT):
        folder = root / "images" / ("cat" if number < 6 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    fill_weights(tiny_psvae()).save_pretrained(root / "vae")
    finish(start(root, "whole"))
    return root


def start(root, name, *more, launcher=()):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}
    command = [
        sys.executable, *launcher, str(SCRIPT), "--vae", str(root / "vae"), "--data", str(root / "images"),
        "--output", str(root / name), "--size", "32", "--batch-size", "2", "--shard-size", str(SHARD), "--workers", "0",
        "--moments", *more,
    ]  # fmt: skip
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process, expect=0):
    text, _ = process.communicate(timeout=300)
    assert process.returncode == expect, text
    return text


def shards(folder):
    return sorted(folder.glob("latents_0*.safetensors"))


@torch.no_grad()
def test_contents_equal_direct_encoding(workspace):
    vae = PSVAE.from_pretrained(workspace / "vae")
    files = sorted((workspace / "images").rglob("*.png"))
    images = torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files]) / 127.5 - 1
    stored = [load_file(path) for path in shards(workspace / "whole")]
    assert [len(shard["labels"]) for shard in stored] == [3, 3, 3, 1]
    whole = {name: torch.cat([shard[name] for shard in stored]) for name in stored[0]}
    assert set(whole) == {"latents", "latents_flip", "labels", "mean", "logvar"}
    assert whole["labels"].tolist() == [0] * 6 + [1] * 4
    posterior = vae.encode(images).latent_dist
    assert_close([whole["mean"], whole["logvar"]], [posterior.mean, posterior.logvar])
    drawn = posterior.sample([torch.Generator().manual_seed(place) for place in range(COUNT)])
    assert_close([whole["latents"]], [drawn])
    mirrored = vae.encode(images.flip(-1)).latent_dist
    assert not mirrored.mean.allclose(posterior.mean, atol=1e-2)
    spread = (whole["latents_flip"] - mirrored.mean) / mirrored.std
    assert 0.8 < spread.std() < 1.2
    statistics = load_file(workspace / "whole/latents_stats.safetensors")
    assert_close([statistics["mean"]], [drawn.mean((0, 2, 3), keepdim=True)])
    assert_close([statistics["std"]], [drawn.std((0, 2, 3), keepdim=True, correction=0)])


def test_a_killed_run_goes_on_to_the_same_bytes(workspace):
    process = start(workspace, "killed")
    while not shards(workspace / "killed") and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if len(shards(workspace / "killed")) == 4:  # the kill came late
        shards(workspace / "killed")[2].unlink()
    left = len(shards(workspace / "killed"))
    assert 1 <= left <= 3
    text = finish(start(workspace, "killed"))
    assert f"{COUNT} images in 4 shards, {4 - left} of them written now" in text
    for one, other in zip(shards(workspace / "whole"), shards(workspace / "killed"), strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_two_processes_write_the_same_files(workspace):
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
                "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "29731")  # fmt: skip
    finish(start(workspace, "two", launcher=launcher))
    for one, other in zip(shards(workspace / "whole"), shards(workspace / "two"), strict=True):
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("field", ["vae", "data", "size", "seed", "moments"])
def test_another_run_is_refused(workspace, monkeypatch, field):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from cache_latents import claim

    manifest = json.loads((workspace / "whole/manifest.json").read_text())
    claim(workspace / "whole", manifest)  # the same again is welcome
    with pytest.raises(SystemExit, match=rf"holds latents of another run \({field}: .* before, 'other' now\)"):
        claim(workspace / "whole", {**manifest, field: "other"})


def test_an_unreadable_image_is_named(workspace, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/broken.png").write_bytes(b"no image")
    (tmp_path / "vae").symlink_to(workspace / "vae")
    assert "broken.png cannot be read" in finish(start(tmp_path, "out"), expect=1)
    assert not shards(tmp_path / "out")


def test_the_reader(workspace, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from cache_latents import CachedLatents

    data = CachedLatents(workspace / "whole")
    assert len(data) == COUNT
    stored = torch.cat([load_file(path)["latents"] for path in shards(workspace / "whole")])
    flipped = torch.cat([load_file(path)["latents_flip"] for path in shards(workspace / "whole")])
    assert_equal([data[place][0] for place in range(COUNT)], list(stored))
    assert [label for _, label in data] == [0] * 6 + [1] * 4
    [(batch, labels)] = DataLoader(data, batch_size=COUNT, num_workers=1)
    assert_equal([batch], [stored])
    assert labels.tolist() == [0] * 6 + [1] * 4
    torch.manual_seed(0)
    mixed = [latents for latents, _ in CachedLatents(workspace / "whole", flip=True)]
    kinds = [
        "straight" if x.equal(a) else "flipped" if x.equal(b) else "?"
        for x, a, b in zip(mixed, stored, flipped, strict=True)
    ]
    assert set(kinds) == {"straight", "flipped"}
    normal = torch.stack([latents for latents, _ in CachedLatents(workspace / "whole", normalise=True)])
    assert_close([normal.mean((0, 2, 3)), normal.std((0, 2, 3), correction=0)], [torch.zeros(8), torch.ones(8)], 1e-4)
    with pytest.raises(IndexError):
        data[COUNT]
