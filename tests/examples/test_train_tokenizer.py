"""The training example: both stages, exact resumption after SIGKILL, every kind of data, two processes."""

import json
import os
import shlex
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

from psvae import PSVAE
from tests.tiny import tiny_psvae_config

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "examples" / "train_tokenizer.py"
SHORT = shlex.split(
    "--data.size 32 --data.crop random --data.resize 36 --data.workers 0 --encoder-weights random "
    "--losses.perceptual 0 --losses.adversarial-start 3 --batch-size 2 --mixed-precision no --steps1 4 --steps2 8 "
    "--warmup 2 --checkpoint-every 1 --validate-every 4 --sample-every 4 --validation-count 2 --statistics-batches 2 "
    "--log-every 2 --tracker none"
)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Seven small images, one broken one, and a tiny model's configuration."""
    folder = tmp_path_factory.mktemp("training")
    (folder / "images").mkdir()
    random = np.random.default_rng(0)
    for number in range(7):
        pixels = random.integers(0, 255, (40 + number, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
    (folder / "images" / "broken.png").write_bytes(b"not an image")
    (folder / "model.json").write_text(json.dumps(tiny_psvae_config().to_dict()))
    return folder


def command(workspace, output, *more, data="images"):
    paths = ["--data.path", str(workspace / data), "--model", str(workspace / "model.json"), "--output", str(output)]
    return [sys.executable, str(SCRIPT), *paths, *SHORT, *more]


def environment():
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "1",
        "PYTHONPATH": str(REPOSITORY),
    }


def run(arguments, expect=0):
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def unbroken(workspace):
    text = run(command(workspace, workspace / "unbroken"))
    return workspace / "unbroken", text


def test_both_stages_leave_loadable_models_pictures_and_numbers(unbroken):
    folder, text = unbroken
    for stage in ("stage1", "stage2"):
        model = PSVAE.from_pretrained(folder / stage)
        assert not torch.equal(model.latent_spec.std, torch.ones_like(model.latent_spec.std))
        assert (folder / stage / "samples" / "final.png").stat().st_size > 1000
        assert {"psnr", "ssim", "feature_cosine", "active_channels"} <= json.loads(
            (folder / stage / "metrics.json").read_text()
        ).keys()
        assert "train_tokenizer.py" in (folder / stage / "README.md").read_text()
    assert "broken.png" in text
    assert "1 images could not be read" in text


def test_stage_one_leaves_the_encoder_and_stage_two_moves_it(unbroken):
    folder, _ = unbroken
    one, two = (load_file(folder / stage / "model.safetensors") for stage in ("stage1", "stage2"))
    encoder = [key for key in one if key.startswith("encoder.")]
    assert encoder
    assert any(not torch.equal(one[key], two[key]) for key in encoder)


def test_a_killed_run_continues_bit_exactly(workspace, unbroken):
    folder, output = unbroken[0], workspace / "killed"
    process = subprocess.Popen(
        command(workspace, output), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 300
    while not (output / "stage2" / "checkpoints" / "step0000005").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.time() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "stage2" / "metrics.json").exists()
    text = run(command(workspace, output, "--resume"))
    assert "stage 1 is already in" in text
    assert "stage 2 continues from step" in text
    expected, resumed = (load_file(path / "stage2" / "model.safetensors") for path in (folder, output))
    assert expected.keys() == resumed.keys()
    different = [key for key in expected if not torch.equal(expected[key], resumed[key])]
    assert not different


def test_starting_over_checkpoints_is_refused(workspace, unbroken):
    before = (unbroken[0] / "options.json").read_bytes()
    text = run(command(workspace, unbroken[0], "--stage", "2", "--lr", "1"), expect=1)
    assert "pass --resume, or another --output" in text
    assert (unbroken[0] / "options.json").read_bytes() == before


def quick(workspace, output, *more, data="images"):
    return command(
        workspace, output, "--stage", "1", "--steps1", "2", "--checkpoint-every", "99", "--sample-every", "99",
        "--validate-every", "99", *more, data=data,
    )  # fmt: skip


def test_two_processes_train_together(workspace):
    output = workspace / "ddp"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = command(workspace, output, "--steps1", "2", "--steps2", "4", "--checkpoint-every", "99")
    text = run([*launch, *arguments[1:]])
    assert "2 process(es)" in text
    assert PSVAE.from_pretrained(output / "stage2").latent_spec.channels == 8


def test_hugging_face_and_webdataset_sources(workspace):
    import io
    import tarfile

    import datasets

    files = sorted((workspace / "images").glob("[0-9].png"))
    contents = [file.read_bytes() for file in files]
    rows = {"image": [{"bytes": content, "path": None} for content in contents]}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image()}))
    (workspace / "parquet").mkdir()
    table.to_parquet(workspace / "parquet" / "train-0.parquet")
    (workspace / "shards").mkdir()
    for number in range(2):
        with tarfile.open(workspace / "shards" / f"{number}.tar", "w") as tar:
            for file, content in zip(files[number::2], contents[number::2], strict=True):
                record = tarfile.TarInfo(file.name)
                record.size = len(content)
                tar.addfile(record, io.BytesIO(content))
    for name, *options, data in (
        ("hf", "--data.kind", "huggingface", "parquet"),
        ("hf-stream", "--data.kind", "huggingface", "--data.streaming", "parquet"),
        ("wds", "--data.kind", "webdataset", "shards/{0..1}.tar"),
    ):
        run(quick(workspace, workspace / name, *options, data=data))
        assert PSVAE.from_pretrained(workspace / name / "stage1").latent_spec.channels == 8


def test_a_later_start_gives_the_same_stream(workspace):
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        from data import DataOptions, batches
    finally:
        sys.path.pop(0)
    for options in (
        DataOptions(str(workspace / "images"), size=32, crop="zoom", workers=0),
        DataOptions(str(workspace / "images"), size=32, crop="random", resize=40, workers=2),
    ):
        whole = batches(options, batch_size=2, seed=3, rank=0, world=1)
        first = [next(whole).images for _ in range(7)]
        late = batches(options, batch_size=2, seed=3, rank=0, world=1, start=4)
        for expected in first[4:]:
            torch.testing.assert_close(next(late).images, expected, rtol=0, atol=0)
        halves = [next(batches(options, batch_size=1, seed=3, rank=rank, world=2)).images for rank in (0, 1)]
        torch.testing.assert_close(torch.cat(halves), first[0], rtol=0, atol=0)
