"""Latents drawn: what each panel shows is what it says, for VAEs of either kind and other grids, in one picture."""

import importlib
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
import tyro
from PIL import Image
from torch.nn import functional as F

from psvae import PixelVAE, fit_latent_statistics, load_reals, save_reals
from tests.alignment.test_alignment_net import tiny_net
from tests.hub.server import commit_of
from tests.hub.test_hub import fill_cache
from tests.tiny import fill_weights, images, latents, tiny_pixel_vae, tiny_psvae

EXAMPLES = Path(__file__).parents[2] / "examples"
SIZE, CLASSES, EACH = 32, ("dark", "light"), 6


@pytest.fixture(scope="module")
def visualise():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module("visualise_latents")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Pictures of two classes, a PS-VAE, an SD-style VAE and a ReaLS folder."""
    root = tmp_path_factory.mktemp("visualise")
    generator = np.random.default_rng(0)
    for number, name in enumerate(CLASSES):
        (root / "pictures" / name).mkdir(parents=True)
        for place in range(EACH):
            pixels = generator.integers(0, 90, (SIZE, SIZE, 3)) + 160 * number
            Image.fromarray(pixels.astype(np.uint8)).save(root / "pictures" / name / f"{place}.png")
    fill_weights(tiny_psvae()).save_pretrained(root / "psvae")
    vae = fill_weights(tiny_pixel_vae())
    vae.save_pretrained(root / "pixel")
    fit_latent_statistics(vae, [images(4)])
    save_reals(root / "reals", vae, tiny_net())
    return root


def run(visualise, world, output, *vaes, **more):
    options = {"data": world / "pictures", "size": SIZE, "output": output, **more}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    words += [word for vae in vaes for word in ("--vae", str(world / vae))]
    visualise.main(tyro.cli(visualise.Options, args=words))


def test_vaes_side_by_side_in_one_picture(visualise, world, tmp_path, capsys):
    run(visualise, world, tmp_path / "one.png", "psvae", count=8, patch="3,0")
    run(visualise, world, tmp_path / "out" / "three.png", "psvae", "pixel", "reals", count=8, patch="3,0")
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "out" / "three.png") as three:
        assert three.width == 3 * one.width
        assert three.height == one.height
        assert np.asarray(three.convert("L")).std() > 10
    assert "8 pictures, 3 VAEs" in capsys.readouterr().out


def test_pictures_and_classes_are_spread_over_the_data(visualise, world):
    assert visualise.spread(12, 4) == [0, 3, 6, 9]
    assert visualise.spread(3, 500) == [0, 1, 2]
    found, labels, names = visualise.read(visualise.Options(str(world / "pictures"), (), size=SIZE, count=4))
    assert labels == [0, 0, 1, 1]
    assert names == dict(enumerate(CLASSES))
    assert (found[2:].mean((1, 2, 3)) > found[:2].mean((1, 2, 3)) + 0.5).all()


def test_latents_are_a_generator_s(visualise, world):
    """Of a ReaLS folder normalised by its mean_std.json; of SD's kind scaled by its factor."""
    options = visualise.Options("", (), batch_size=3)
    vae = PixelVAE.from_pretrained(world / "pixel")
    with torch.no_grad():
        raw = vae.encode(images(4)).latent_dist.mode() * vae.config.scaling_factor
    torch.testing.assert_close(visualise.latents_of(str(world / "pixel"), images(4), options), raw)
    found = visualise.latents_of(str(world / "reals"), images(4), options)
    vae = load_reals(world / "reals").vae
    with torch.no_grad():
        torch.testing.assert_close(found, vae.latent_spec.normalize(vae.encode(images(4)).latent_dist.mode()))
    assert not torch.allclose(found, raw, atol=0.1)


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_a_release_goes_by_its_statistics(visualise, world, tmp_path, monkeypatch, where):
    """ReaLS' is AutoencoderKL's folder, constant and all, with mean_std.json beside the weights."""
    folder, cache = tmp_path / "release", tmp_path / "cache"
    vae = PixelVAE.from_pretrained(world / "pixel")
    vae.export_diffusers(folder)
    (folder / "mean_std.json").write_text('{"mean": 0.5, "std": 2.0}')
    fill_cache(cache, "org/release", commit_of(1), folder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    found = visualise.latents_of(
        str(folder) if where == "folder" else "org/release", images(4), visualise.Options("", ())
    )
    with torch.no_grad():
        torch.testing.assert_close(found, (vae.encode(images(4)).latent_dist.mode() - 0.5) / 2)


def test_similarity_is_to_the_same_place_of_the_picture(visualise):
    x = latents(2, 4, 8)
    point = visualise.place_of("1,6", (4, 8))
    found = visualise.similarity(x, point)
    expected = [[F.cosine_similarity(b[:, i, j], b[:, 1, 6], dim=0) for i in range(4) for j in range(8)] for b in x]
    torch.testing.assert_close(found, torch.tensor(expected).view(2, 4, 8))
    coarse = visualise.similarity(latents(1, 2, 4), point)
    assert coarse[0].flatten().argmax() == 0 * 4 + 3  # the cell that holds it on a grid of half the sides
    assert visualise.place_of(None, (4, 8)) == (2.5 / 4, 4.5 / 8)


def test_channels_count_alike(visualise):
    x = latents(6, 4, 4) * torch.arange(1.0, 9.0).view(1, 8, 1, 1) + 5
    even = visualise.even(x)
    torch.testing.assert_close(even.mean((0, 2, 3)), torch.zeros(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(even.std((0, 2, 3)), torch.ones(8))


def test_histograms_are_densities(visualise):
    _, axis = visualise.plt.subplots()
    visualise.histograms(latents(16, 16, 16, channels=3) * 0.5, axis)
    assert len(axis.lines) == 3
    for line in axis.lines:
        middles, heights = line.get_data()
        assert heights.sum() * (middles[1] - middles[0]) == pytest.approx(1, abs=0.01)
        assert heights.max() == pytest.approx(1 / (0.5 * (2 * np.pi) ** 0.5), rel=0.2)
    visualise.plt.close("all")


@pytest.mark.parametrize("pooled", [False, True])
def test_t_sne_keeps_classes_apart(visualise, pooled):
    offset = torch.tensor([0.0, 8.0]).repeat_interleave(30).view(60, 1, 1, 1)
    points = visualise.embed(latents(60, 4, 4) + offset, visualise.Options("", (), pooled=pooled))
    assert points.shape == (60, 2)
    distances = torch.cdist(points, points).fill_diagonal_(torch.inf)
    assert (distances.argmin(1) // 30).equal(torch.arange(60) // 30)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"patch": "4,0"}, "wanted row,column, from 0,0 to 3,3"),
        ({"patch": "middle"}, "--patch is 'middle'"),
        ({"patch": "1,2,3"}, "wanted row,column"),
        ({"count": 3}, "--count is 3; wanted at least 4"),
        ({"size": 20}, "20 x 20; wanted multiples of the stride 8"),
        ({"data": "psvae"}, "holds no images"),
    ],
)
def test_bad_input(visualise, world, tmp_path, more, said):
    if "data" in more:
        more = {"data": world / more["data"]}
    with pytest.raises(SystemExit, match=said):
        run(visualise, world, tmp_path / "never.png", "psvae", **more)
    assert not (tmp_path / "never.png").exists()


def test_no_vae_and_no_class(visualise, world, tmp_path, capsys):
    with pytest.raises(SystemExit, match="no VAE came"):
        visualise.main(visualise.Options(str(world / "pictures"), ()))
    with pytest.raises(SystemExit, match="not a folder or file here"):
        run(visualise, world, tmp_path / "never.png", "absent folder")
    run(visualise, world, tmp_path / "one.png", "psvae", data=world / "pictures" / "dark", shown=1)
    assert "are of one class" in capsys.readouterr().out
