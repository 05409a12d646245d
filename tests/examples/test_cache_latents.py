"""Latents cached to shards: the right ones, each once, whatever stops the run."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from psvae import PSVAE, AutoencoderPSVAE, PixelVAE
from tests.base import assert_close, assert_equal
from tests.examples.generator_world import script
from tests.tiny import fill_weights, tiny_pixel_vae, tiny_psvae

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
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "cache")}
    command = [
        sys.executable, *launcher, str(SCRIPT), "--vae", str(root / "vae"), "--data", str(root / "images"),
        "--output", str(root / name), "--size", "32", "--batch-size", "2", "--shard-size", str(SHARD), "--workers", "0",
        "--moments", *more,
    ]  # fmt: skip
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process, expect=0):
    text, _ = process.communicate(timeout=300)
    assert process.returncode == expect if expect is not None else process.returncode > 0, text
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
    statistics = torch.load(workspace / "whole/latents_stats.pt", weights_only=True)
    assert_close([statistics["mean"]], [drawn.mean((0, 2, 3), keepdim=True)])
    assert_close([statistics["std"]], [drawn.std((0, 2, 3), keepdim=True, correction=0)])


def test_another_seed_draws_other_noise():
    """PyTorch's generators on the CPU take the lowest 32 bits of a seed alone."""
    of_seed = [script("cache_latents").generators_of(seed, [0, 1]) for seed in (0, 0, 1)]
    first, again, other = ([torch.randn(3, generator=one).tolist() for one in each] for each in of_seed)
    assert first == again
    assert len({tuple(row) for row in first + other}) == 4


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
    (workspace / "killed/.latents_000003.safetensors.1").write_bytes(b"half")  # as a kill in the middle of writing
    text = finish(start(workspace, "killed"))
    assert f"{COUNT} images in 4 shards, {4 - left} of them written now" in text
    for one, other in zip(shards(workspace / "whole"), shards(workspace / "killed"), strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert not list((workspace / "killed").glob(".*"))


def test_two_processes_write_the_same_files(workspace):
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
                "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "29731")  # fmt: skip
    killed = workspace / "two"  # by its first process alone: the two share what is left
    killed.mkdir()
    for name in ("manifest.json", "names.json", "latents_000000.safetensors", "latents_000002.safetensors"):
        shutil.copy(workspace / "whole" / name, killed)
    text = finish(start(workspace, "two", launcher=launcher))
    assert "10 images in 4 shards, 2 of them written now" in text
    for one, other in zip(shards(workspace / "whole"), shards(workspace / "two"), strict=True):
        assert one.read_bytes() == other.read_bytes()


@torch.no_grad()
@pytest.mark.parametrize("labels", ["label", "class_name", None])
def test_a_hugging_face_dataset_gives_the_same(workspace, tmp_path, labels):
    datasets = pytest.importorskip("datasets", reason="datasets comes with psvae[train]")
    files = sorted((workspace / "images").rglob("*.png"))
    columns = {"photo": [{"bytes": file.read_bytes(), "path": None} for file in files]}
    columns |= {"label": [int(f.parent.name == "dog") for f in files], "class_name": [f.parent.name for f in files]}
    table = datasets.Dataset.from_dict(columns).cast_column("photo", datasets.Image())
    (tmp_path / "parquet").mkdir()
    table.to_parquet(tmp_path / "parquet/validation.parquet")
    (tmp_path / "vae").symlink_to(workspace / "vae")
    column = ("--label-column", str(labels))
    more = ("--data", str(tmp_path / "parquet"), "--split", "validation", "--image-column", "photo", *column)
    finish(start(tmp_path, "out", *more))
    for ours, theirs in zip(shards(tmp_path / "out"), shards(workspace / "whole"), strict=True):
        got, wanted = load_file(ours), load_file(theirs)
        if labels is None:
            wanted["labels"] = torch.zeros_like(wanted["labels"])
        assert_equal([got[name] for name in wanted], wanted.values())
    if labels == "label":
        text = finish(start(tmp_path, "out", *more[:4]), expect=1)
        assert (
            "10 rows of columns photo, label, class_name; wanted rows with image and label: see --image-column" in text
        )


def test_the_folder_is_one_for_lightningdit(workspace):
    """Its ImgLatentDataset takes every .safetensors file for a shard, and ``latents_stats.pt`` for the statistics."""
    files = sorted((workspace / "whole").glob("*.safetensors"))
    assert sum(len(load_file(file)["labels"]) for file in files) == COUNT
    statistics = torch.load(workspace / "whole/latents_stats.pt")
    assert {name: tuple(tensor.shape) for name, tensor in statistics.items()} == {
        "mean": (1, 8, 1, 1), "std": (1, 8, 1, 1)
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["rae", "diffusers", "pixel", "kl"])
def test_every_folder_of_a_vae_is_recognised(tmp_path, monkeypatch, kind):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from sampling import load_vae

    if kind == "diffusers":
        pytest.importorskip("diffusers", reason="diffusers comes with psvae[diffusers]")
        AutoencoderPSVAE.from_psvae(tiny_psvae()).save_pretrained(tmp_path)
    elif kind == "kl":
        tiny_pixel_vae().export_diffusers(tmp_path)
    else:
        (tiny_psvae("rae") if kind == "rae" else tiny_pixel_vae()).save_pretrained(tmp_path)
    vae = load_vae(str(tmp_path), torch.device("cpu"))
    assert isinstance(vae, PSVAE if kind in ("rae", "diffusers") else PixelVAE)


def test_a_broken_vae_is_named(tmp_path, monkeypatch):
    """What `PSVAE` says of its own folder is not lost."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from sampling import load_vae

    tiny_psvae().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["decoder.conv_in.bias"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(SystemExit, match=r"1 missing: decoder\.conv_in\.bias"):
        load_vae(str(tmp_path), torch.device("cpu"))


@torch.no_grad()
def test_a_point_has_moments_that_draw_itself(workspace, tmp_path):
    """RAE has no noise; a log-variance of 0 would give a training run noise of std 1."""
    fill_weights(tiny_psvae("rae")).save_pretrained(tmp_path / "vae")
    (tmp_path / "images").symlink_to(workspace / "images")
    finish(start(tmp_path, "out"))
    for path in shards(tmp_path / "out"):
        shard = load_file(path)
        drawn = shard["mean"] + torch.exp(0.5 * shard["logvar"]) * torch.randn_like(shard["mean"])
        assert_close([drawn], [shard["latents"]])


@pytest.mark.parametrize("field", ["vae", "data", "size", "seed", "moments"])
def test_another_run_is_refused(workspace, monkeypatch, field):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from cache_latents import claim

    manifest = json.loads((workspace / "whole/manifest.json").read_text())
    claim(workspace / "whole", manifest, None)  # the same again is welcome
    with pytest.raises(SystemExit, match=rf"holds latents of another run \({field}: .* before, 'other' now\)"):
        claim(workspace / "whole", {**manifest, field: "other"}, None)


@pytest.fixture
def own_copy(workspace, tmp_path):
    """The same images and VAE, to break, and a broken image in the second of four shards."""
    shutil.copytree(workspace / "images", tmp_path / "images")
    (tmp_path / "vae").symlink_to(workspace / "vae")
    whole = (tmp_path / "images/cat/4.png").read_bytes()
    (tmp_path / "images/cat/4.png").write_bytes(whole[: len(whole) // 2])
    return tmp_path


@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_unreadable_image_is_named_and_costs_its_shard_alone(workspace, own_copy, workers):
    text = finish(start(own_copy, "out", "--workers", workers), expect=1)
    assert re.search(r"1 images are unreadable: .*images/cat/4\.png cannot be read \(.*\)\. All other shards", text)
    assert "mend or remove them, and run the same command again" in text
    assert "Traceback" not in text
    assert [path.name[8:14] for path in shards(own_copy / "out")] == ["000000", "000002", "000003"]
    shutil.copy(workspace / "images/cat/4.png", own_copy / "images/cat/4.png")
    assert "10 images in 4 shards, 1 of them written now" in finish(start(own_copy, "out"))
    for one, other in zip(shards(workspace / "whole"), shards(own_copy / "out"), strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_a_row_that_cannot_be_read_is_left_out(workspace, tmp_path, monkeypatch):
    """It cannot be removed as a file can. The others keep their shards; a second run adds nothing."""
    datasets = pytest.importorskip("datasets", reason="datasets comes with psvae[train]")
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from cache_latents import CachedLatents

    files = sorted((workspace / "images").rglob("*.png"))
    broken = (4, 9)  # the second alone in its shard
    columns = {"image": [{"bytes": file.read_bytes(), "path": None} for file in files]}
    columns["image"][4], columns["image"][9] = {"bytes": b"no picture", "path": None}, None
    columns |= {"label": [int(file.parent.name == "dog") for file in files]}
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    (tmp_path / "parquet").mkdir()
    table.to_parquet(tmp_path / "parquet/train.parquet")
    (tmp_path / "vae").symlink_to(workspace / "vae")
    more = ("--data", str(tmp_path / "parquet"), "--split", "train")
    text = finish(start(tmp_path, "out", *more))
    assert re.search(r"row 4 cannot be read \(.*\); left out", text)
    assert "8 images in 3 shards, 4 of them written now" in text
    assert "2 cannot be read and are left out: row 4, row 9. Once mended, take another --output" in text
    whole, cut = CachedLatents(workspace / "whole"), CachedLatents(tmp_path / "out")
    kept = [place for place in range(COUNT) if place not in broken]
    assert_close([latents for latents, _ in cut], [whole[place][0] for place in kept])
    assert [label for _, label in cut] == [whole[place][1] for place in kept]
    assert cut.manifest["left_out"] == list(broken)
    before = {path.name: path.stat().st_mtime_ns for path in shards(tmp_path / "out")}
    assert "8 images in 3 shards, 0 of them written now" in finish(start(tmp_path, "out", *more))
    assert {path.name: path.stat().st_mtime_ns for path in shards(tmp_path / "out")} == before


def test_an_image_that_is_removed_is_left_out_of_its_shard(workspace, own_copy, monkeypatch):
    """The others keep their places, so what was finished stays; the list may not change in another way."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from cache_latents import CachedLatents

    finish(start(own_copy, "out"), expect=1)
    finished = {path.name: path.stat().st_mtime_ns for path in shards(own_copy / "out")}
    (own_copy / "images/cat/4.png").unlink()
    assert "9 images in 4 shards, 1 of them written now" in finish(start(own_copy, "out"))
    assert all((own_copy / "out" / name).stat().st_mtime_ns == time for name, time in finished.items())
    whole, cut = CachedLatents(workspace / "whole"), CachedLatents(own_copy / "out")
    kept = [place for place in range(COUNT) if place != 4]
    assert len(cut) == 9
    assert_close([latents for latents, _ in cut], [whole[place][0] for place in kept])
    assert [label for _, label in cut] == [whole[place][1] for place in kept]

    shutil.copy(workspace / "images/cat/4.png", own_copy / "images/cat/4.png")
    text = " ".join(finish(start(own_copy, "out"), expect=1).split())
    assert "images were removed or came back after their shards were written: cat/4.png. Undo that, or delete" in text
    assert "delete latents_000001.safetensors in" in text
    (own_copy / "out/latents_000001.safetensors").unlink()
    assert "10 images in 4 shards, 1 of them written now" in finish(start(own_copy, "out"))

    (own_copy / "images/cat/new.png").write_bytes((own_copy / "images/cat/4.png").read_bytes())
    before = {path.name: path.read_bytes() for path in (own_copy / "out").iterdir()}
    text = finish(start(own_copy, "out"), expect=1)
    assert "holds 1 images that it did not when" in text
    assert "cat/new.png. What is finished is untouched: take them out" in text
    assert before == {path.name: path.read_bytes() for path in (own_copy / "out").iterdir()}


def test_a_class_that_is_removed_does_not_renumber_the_others(workspace, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from cache_latents import Images, ImageSource, resume

    shutil.copytree(workspace / "images/dog", tmp_path / "images/dog")
    images = Images(ImageSource(str(tmp_path / "images")))
    assert images.labels == [0] * 4
    resume(workspace / "whole", images)
    assert images.labels == [0] * 6 + [1] * 4
    assert images.left_out == set(range(6))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--dtype", "int8"), ("float32", "float16", "bfloat16")),
        (("--size", "30"), ("--size 30 does not fit", "images are 30 x 30; wanted multiples of the stride 8")),
        (("--shard-size", "0"), ("--shard-size is 0; wanted at least 1",)),
        (("--data", "{root}/vae"), ("holds no images",)),
    ],
)
def test_a_run_that_cannot_begin_writes_nothing(workspace, more, said):
    text = finish(start(workspace, "none", *(word.format(root=workspace) for word in more)), expect=None)
    assert all(words in text for words in said), text
    assert not (workspace / "none").exists()


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
    second = load_file(workspace / "whole/latents_000001.safetensors")
    assert_equal(data.moments(SHARD), [second["mean"][0], second["logvar"][0]])


def test_the_reader_in_several_processes_gives_each_sample_once(workspace, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from cache_latents import CachedLatents

    data = CachedLatents(workspace / "whole")
    data[0]  # an open shard does not travel to the loader's processes
    rows = [row for batch, _ in DataLoader(data, batch_size=2, shuffle=True, num_workers=2) for row in batch]
    places = [[bool(row.equal(data[place][0])) for place in range(COUNT)].index(True) for row in rows]
    assert sorted(places) == list(range(COUNT))
