"""`make reals` in a few steps: the whole path runs, measures itself, and goes on where it stopped."""

import json

import datasets
import numpy as np
import pytest
from diffusers import AutoencoderKL
from PIL import Image

from psvae import load_reals
from tests.examples.generator_world import script

MEASURED = {
    "psnr", "ssim", "patch_cosine", "cls_cosine", "latent_std", "active_channels", "linear_probe", "knn",
    "frechet_distance", "class_accuracy",
}  # fmt: skip
TINY = {"share": 0.002, "train_pictures": 10, "test_pictures": 10}


@pytest.fixture(scope="module")
def compare():
    return script("compare_reals")


def weights(folder):
    return {file.relative_to(folder): file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}


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

    with pytest.raises(SystemExit, match="--resume goes on with it"):
        compare.main(compare.Options(output=tmp_path, **TINY))
    with pytest.raises(SystemExit, match="seed: 0 before, 1 now"):
        compare.main(compare.Options(output=tmp_path, resume=True, seed=1, **TINY))


def test_a_data_set_without_masks(compare, tmp_path):
    def rows(count):
        rng = np.random.default_rng(0)
        for place in range(count):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            yield {"image": Image.fromarray(pixels), "label": place % 3}

    for split in ("train", "test"):
        table = datasets.Dataset.from_list(list(rows(24))).cast_column("image", datasets.Image())
        (tmp_path / "data").mkdir(exist_ok=True)
        table.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    table = compare.main(compare.Options(data=tmp_path / "data", output=tmp_path / "out", **TINY))
    assert set(table["plain"]) == MEASURED
    assert "segmentation" not in table
    assert (tmp_path / "out" / "generated.png").exists()
    assert not (tmp_path / "out" / "masks.png").exists()


def test_scenes_and_their_masks_agree(compare):
    for picture, shape, mask in compare.drawn("test", 10):
        numbers = np.unique(np.asarray(mask))
        assert len(numbers) == 2
        assert numbers[0] == 0
        thing = np.asarray(mask) == numbers[1]
        assert compare.SHAPES[numbers[1] - 1] == shape
        pixels = np.asarray(picture).astype(float)
        assert np.abs(pixels[thing].mean(axis=0) - pixels[~thing].mean(axis=0)).max() > 20
