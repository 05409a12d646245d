"""A ReaLS folder: the VAE as diffusers has it, the alignment network, and the one mean and std of their latents."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL

from psvae import AlignmentNet, PixelVAE, fit_latent_statistics, load_latent_statistics, load_reals, save_reals
from psvae.errors import CheckpointError, ConfigError
from tests.alignment.test_alignment_net import tiny_net
from tests.tiny import fill_weights, images, latents, tiny_pixel_vae


@pytest.fixture(scope="module")
def pair():
    vae = fill_weights(tiny_pixel_vae())
    fit_latent_statistics(vae, [images(4, seed=seed) for seed in range(3)])
    return vae, tiny_net()


@pytest.fixture
def folder(pair, tmp_path):
    save_reals(tmp_path / "reals", *pair)
    return tmp_path / "reals"


def test_both_come_back(pair, folder):
    vae, alignment = load_reals(folder)
    x = images()
    with torch.no_grad():
        assert vae(x).sample.equal(pair[0](x).sample)
        assert alignment(latents()).patch_features.equal(pair[1](latents()).patch_features)
    assert not vae.training
    assert not alignment.training


def test_one_mean_and_one_std(pair, folder):
    """Of all channels and cells together, in both modules, whatever they were per channel."""
    content = json.loads((folder / "vae" / "mean_std.json").read_text())
    drawn = pair[0].latent_spec.denormalize(torch.randn(50_000, 8, 1, 1, generator=torch.Generator().manual_seed(0)))
    assert content["mean"] == pytest.approx(drawn.mean().item(), abs=0.01 * content["std"])
    assert content["std"] == pytest.approx(drawn.std().item(), rel=0.01)
    for module in load_reals(folder):
        assert module.latent_spec.mean.flatten().tolist() == pytest.approx([content["mean"]] * 8)
        assert module.latent_spec.std.flatten().tolist() == pytest.approx([content["std"]] * 8)


def test_diffusers_opens_the_vae(pair, folder):
    theirs, x = AutoencoderKL.from_pretrained(folder / "vae"), images()
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).sample, pair[0](x).sample, rtol=1e-4, atol=1e-4)


def test_nothing_else_is_applied(pair, folder, tmp_path):
    """SD's 0.18215 is no part of it, and every way to load gives the same numbers to apply."""
    assert pair[0].config.scaling_factor == 0.18215
    for vae in (load_reals(folder).vae, PixelVAE.from_pretrained(folder / "vae")):
        assert (vae.config.scaling_factor, vae.config.shift_factor) == (1.0, None)
        torch.testing.assert_close(vae.latent_spec.std, load_reals(folder).alignment.latent_spec.std)
    alone = AlignmentNet.from_pretrained(folder, subfolder="alignment")
    assert alone.latent_spec.mean.equal(load_reals(folder).vae.latent_spec.mean)
    again = load_reals(folder)
    save_reals(tmp_path / "again", *again)
    first, second = (json.loads((root / "vae" / "mean_std.json").read_text()) for root in (folder, tmp_path / "again"))
    assert second == pytest.approx(first)
    x = again.vae.encode(images()).latent_dist.mode()
    with torch.no_grad():
        torch.testing.assert_close(
            again.alignment(again.vae.latent_spec.normalize(x), normalized=True).patch_features,
            again.alignment(x).patch_features,
        )


def test_the_authors_folder_is_read(folder):
    """Three files side by side, no alignment network."""
    vae = PixelVAE.from_pretrained(folder / "vae", scaling_factor=1.0)
    assert load_latent_statistics(vae.latent_spec, folder / "vae" / "mean_std.json") == "ReaLS"
    assert vae.latent_spec.std.unique().numel() == 1
    with pytest.raises(CheckpointError, match=r"has no config.json; wanted vae/ and alignment/.*PixelVAE"):
        load_reals(folder / "vae")


def test_statistics_are_needed(pair, folder, tmp_path):
    (folder / "vae" / "mean_std.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no mean_std.json.*fit_latent_statistics"):
        load_reals(folder)
    with pytest.raises(ConfigError, match=r"not measured.*fit_latent_statistics"):
        save_reals(tmp_path / "other", tiny_pixel_vae(), pair[1])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", r"is not ReaLS'"),
        ('{"mean": 0.1}', r"is not ReaLS'.*std"),
        ('{"mean": [0.1, 0.2], "std": 1.0}', r"is not ReaLS'"),
        ('{"mean": 0.1, "std": 0.0}', r"std above 0"),
        ('{"mean": NaN, "std": 1.0}', r"wanted finite numbers"),
    ],
)
def test_bad_statistics(folder, content, said):
    (folder / "vae" / "mean_std.json").write_text(content)
    with pytest.raises(CheckpointError, match=said):
        load_reals(folder)


def test_parts_of_two_models_are_refused(pair, folder, tmp_path):
    other = tiny_net(latent_channels=4)
    with pytest.raises(ConfigError, match=r"\(4, 8\) and the VAE makes \(8, 8\)"):
        save_reals(tmp_path / "other", pair[0], other)
    shutil.rmtree(folder / "alignment")
    other.save_pretrained(folder / "alignment")
    with pytest.raises(ConfigError, match=r"they belong to two models"):
        load_reals(folder)
