"""`make reals` in a few steps: the whole path runs, measures itself, and goes on where it stopped."""

import json
import shutil
from itertools import islice

import datasets
import numpy as np
import pytest
from diffusers import AutoencoderKL
from PIL import Image

from psvae import load_reals
from tests.examples.generator_world import fresh_accelerator, script

MEASURED = {
    "psnr", "ssim", "patch_cosine", "cls_cosine", "latent_std", "active_channels", "linear_probe", "knn",
    "frechet_distance", "class_accuracy", "reconstructed_frechet_distance", "reconstructed_class_accuracy",
}  # fmt: skip
TINY = {"share": 0.002, "train_pictures": 10, "test_pictures": 10}


@pytest.fixture(scope="module")
def compare():
    return script("compare_reals")


def weights(folder):
    return {file.relative_to(folder): file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}


# of a VAE that has learned nothing, means of latents spread far less than their draws
@pytest.mark.filterwarnings("ignore:latents lie")
def test_compares_and_resumes(compare, tmp_path, capsys):
    table = compare.main(compare.Options(output=tmp_path, **TINY))
    assert json.loads((tmp_path / "table.json").read_text()) == table
    assert set(table["plain"]) == set(table["reals"]) == MEASURED
    assert set(table["segmentation"]) == {"teacher", "plain", "reals"}
    assert {"seed", "vae_steps", "share"} < set(table["options"])
    printed = capsys.readouterr().out
    assert "linear probe above plain, points" in printed
    assert "mIoU from latents over the teacher's" in printed
    for name in ("plain", "reals"):
        vae, alignment = load_reals(tmp_path / name)
        assert alignment.config.latent_channels == vae.latent_spec.channels
        assert AutoencoderKL.from_pretrained(tmp_path / name / "vae").config.latent_channels == compare.CHANNELS
    for name in ("generated", "latents", "masks"):
        assert np.asarray(Image.open(tmp_path / f"{name}.png").convert("L")).std() > 5

    before = weights(tmp_path)
    again = compare.main(compare.Options(output=tmp_path, resume=True, **TINY))
    assert weights(tmp_path) == before
    for part in ("judge_accuracy", "plain", "reals", "segmentation"):
        assert again[part] == table[part]

    shutil.rmtree(tmp_path / "plain" / "sit")  # as if killed there, and gone on with in a new process
    shutil.rmtree(tmp_path / "plain" / "samples")
    (tmp_path / "plain" / "samples.npz").unlink()
    fresh_accelerator()
    assert compare.main(compare.Options(output=tmp_path, resume=True, **TINY))["plain"] == table["plain"]

    with pytest.raises(SystemExit, match="--resume goes on with it"):
        compare.main(compare.Options(output=tmp_path, **TINY))
    with pytest.raises(SystemExit, match="seed: 0 before, 1 now"):
        compare.main(compare.Options(output=tmp_path, resume=True, seed=1, **TINY))


def parquet(file, count, names=("image", "label")):
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)) for _ in range(count)]
    columns = {names[0]: pictures, names[1]: [place % 3 for place in range(count)]}
    datasets.Dataset.from_dict(columns).cast_column(names[0], datasets.Image()).to_parquet(file)
    return file


def test_a_data_set_without_masks(compare, tmp_path):
    file = parquet(tmp_path / "some.parquet", 120)
    table = compare.main(compare.Options(data=file, output=tmp_path / "out", **TINY))
    assert set(table["plain"]) == MEASURED
    assert "segmentation" not in table
    assert (tmp_path / "out" / "generated.png").exists()
    assert not (tmp_path / "out" / "masks.png").exists()
    shown = [np.asarray(Image.open(path)).tobytes() for path in (tmp_path / "out" / "data").rglob("*.png")]
    assert len(shown) == len(set(shown)) == 64 + 20  # none in both


def test_columns_of_other_names_are_refused(compare, tmp_path):
    parquet(tmp_path / "some.parquet", 12, ("img", "label"))
    with pytest.raises(SystemExit, match="has the columns img, label; wanted image and label"):
        compare.main(compare.Options(data=tmp_path / "some.parquet", output=tmp_path / "out", **TINY))
    assert not (tmp_path / "out").exists()


def scenes_of(split, count, seed=0):
    return list(islice(script("reals_data").drawn(seed)(split), count))


def test_scenes_and_their_masks_agree(compare):
    for picture, shape, mask in scenes_of("test", 10):
        assert picture.size == mask.size == (compare.SIDE, compare.SIDE)
        numbers = np.unique(np.asarray(mask))
        assert len(numbers) == 2
        assert numbers[0] == 0
        thing = np.asarray(mask) == numbers[1]
        assert compare.SHAPES[numbers[1] - 1] == shape
        pixels = np.asarray(picture).astype(float)
        assert np.abs(pixels[thing].mean(axis=0) - pixels[~thing].mean(axis=0)).max() > 20


def test_no_held_out_scene_has_a_twin():
    train = np.stack([np.asarray(picture).astype(np.int16) for picture, *_ in scenes_of("train", 2000)])
    for picture, *_ in scenes_of("test", 50):  # backgrounds of one name differ by less than 25
        assert np.abs(train - np.asarray(picture)).reshape(2000, -1).max(axis=1).min() > 25


def test_another_seed_draws_other_scenes():
    first, again, other = (
        [picture.tobytes() for picture, *_ in scenes_of("train", 20, seed)] for seed in (0, 0, 1)
    )  # fmt: skip
    assert first == again
    assert not set(first) & set(other)


def test_a_class_that_no_held_out_picture_has(tmp_path):
    data = script("reals_data")
    for split, classes in (("train", "abc"), ("test", "ac")):
        for name in classes:
            data.save(Image.new("RGB", (32, 32)), tmp_path / split / name / "0.png")
    assert data.labelled(tmp_path, "test")[1].tolist() == [0, 2]
