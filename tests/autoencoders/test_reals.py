"""A ReaLS folder: the VAE as diffusers has it, the alignment network, and the one mean and std of their latents."""

import copy
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderKL

from psvae import AlignmentNet, PixelVAE, fit_latent_statistics, load_latent_statistics, load_reals, save_reals
from psvae.errors import CheckpointError, ConfigError
from tests.alignment.test_alignment_net import tiny_net
from tests.base import assert_same_state
from tests.hub.server import Repository, commit_of, serve
from tests.hub.test_hub import fill_cache
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


def other_pair():
    """Of the same shapes, with other weights and statistics."""
    vae, alignment = fill_weights(tiny_pixel_vae()), tiny_net()
    with torch.no_grad():
        for module in (vae, alignment):
            for weight in module.parameters():
                weight.mul_(0.5)
    fit_latent_statistics(vae, [images(4)])
    return vae, alignment


def test_both_come_back(pair, folder):
    vae, alignment = load_reals(folder)
    x = images()
    with torch.no_grad():
        assert vae(x).sample.equal(pair[0](x).sample)
        assert alignment(latents()).patch_features.equal(pair[1](latents()).patch_features)
    assert not vae.training
    assert not alignment.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_vae_that_diffusers_has_no_class_for(tmp_path, dtype):
    """Its decoder is larger than its encoder: in psvae's own layout, and otherwise the same."""
    decoder = tiny_pixel_vae().config.decoder.replace(num_res_blocks=2)
    vae = fill_weights(tiny_pixel_vae(decoder=decoder)).to(dtype)
    fit_latent_statistics(vae, [images(4).to(dtype)])
    alignment = tiny_net()
    save_reals(tmp_path, vae, alignment)
    assert vae.config.latents_mean is None
    found = load_reals(tmp_path, dtype=dtype)
    with torch.no_grad():
        assert found.vae(images().to(dtype)).sample.equal(vae(images().to(dtype)).sample)
    content = json.loads((tmp_path / "vae" / "mean_std.json").read_text())
    for module in found:
        assert module.latent_spec.std.flatten().tolist() == pytest.approx([content["std"]] * 8, rel=0.01)


def test_one_mean_and_one_std(pair, folder):
    """Of all channels and cells together, in both modules, whatever they were per channel."""
    content = json.loads((folder / "vae" / "mean_std.json").read_text())
    drawn = pair[0].latent_spec.denormalize(torch.randn(50_000, 8, 1, 1, generator=torch.Generator().manual_seed(0)))
    assert content["mean"] == pytest.approx(drawn.mean().item(), abs=0.01 * content["std"])
    assert content["std"] == pytest.approx(drawn.std().item(), rel=0.01)
    for module in load_reals(folder):
        assert module.latent_spec.mean.flatten().tolist() == pytest.approx([content["mean"]] * 8)
        assert module.latent_spec.std.flatten().tolist() == pytest.approx([content["std"]] * 8)


def test_saving_changes_nothing_in_memory(tmp_path):
    """Not even where the file has other numbers: one for all channels, and those of the VAE."""
    vae, alignment = other_pair()
    before = copy.deepcopy((vae, alignment))
    save_reals(tmp_path, vae, alignment)
    assert_same_state(vae, before[0])
    assert_same_state(alignment, before[1])
    assert vae.latent_spec.std.unique().numel() == 8
    assert alignment.latent_spec.std.eq(1).all()


@pytest.mark.parametrize("saved", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("loaded", [torch.bfloat16, torch.float32, torch.float64])
def test_any_precision(pair, tmp_path, saved, loaded):
    """Both get the numbers of the file, whatever the precision of the weights."""
    save_reals(tmp_path, *(copy.deepcopy(module).to(saved) for module in pair))
    content = json.loads((tmp_path / "vae" / "mean_std.json").read_text())
    for module in load_reals(tmp_path, dtype=loaded):
        for name, number in content.items():
            assert getattr(module.latent_spec, name).eq(torch.tensor(number).to(loaded)).all()


@pytest.mark.bad_input
def test_a_vae_of_diffusers_is_opened_first(pair, folder, tmp_path):
    theirs = AutoencoderKL.from_pretrained(folder / "vae")
    with pytest.raises(
        ConfigError, match=r"vae came as AutoencoderKL; .*with PixelVAE.from_pretrained\(folder\), then"
    ):
        save_reals(tmp_path / "out", theirs, pair[1])
    assert not (tmp_path / "out").exists()


def test_a_plain_vae_is_not_paired_with_an_older_network(pair, folder, tmp_path):
    plain = other_pair()[0]
    with pytest.raises(CheckpointError, match=r"holds alignment/, of another VAE.*delete alignment/"):
        save_reals(folder, plain, None)
    assert_same_state(PixelVAE.from_pretrained(folder / "vae").encoder, pair[0].encoder)  # nothing was written
    load_reals(folder)
    shutil.rmtree(folder / "alignment")
    save_reals(folder, plain, None)
    save_reals(folder, plain, None)  # over an older plain one
    assert_same_state(PixelVAE.from_pretrained(folder / "vae").encoder, plain.encoder)


@pytest.mark.parametrize("left", ["vae/config.json", "alignment/model.safetensors"])
def test_parts_of_two_saves_are_refused(folder, tmp_path, left):
    """As a crash between them would leave, or a copy by hand: each part fits, by its shapes."""
    save_reals(tmp_path / "new", *other_pair())
    load_reals(tmp_path / "new")
    shutil.copy(folder / left, tmp_path / "new" / left)
    with pytest.raises(CheckpointError, match=r"have different statistics.*not saved together.*save_reals"):
        load_reals(tmp_path / "new")


def test_the_file_of_statistics_is_what_counts(folder):
    (folder / "vae" / "mean_std.json").write_text('{"mean": 0.5, "std": 2}')
    for module in load_reals(folder):
        assert module.latent_spec.mean.eq(0.5).all()
        assert module.latent_spec.std.eq(2).all()


def test_a_save_that_is_refused_leaves_the_older_one(pair, folder):
    before = load_reals(folder)
    with pytest.raises(ConfigError, match="measure"):
        save_reals(folder, fill_weights(tiny_pixel_vae()), pair[1])
    for module, was in zip(load_reals(folder), before, strict=True):
        assert_same_state(module, was)


def test_a_file_in_the_way(pair, tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(CheckpointError, match="taken"):
        save_reals(tmp_path / "taken", *pair)


def test_a_subfolder(pair, folder):
    vae, alignment = load_reals(folder.parent, subfolder=folder.name)
    assert_same_state(vae.encoder, pair[0].encoder)
    assert_same_state(alignment.patch, pair[1].patch)
    with pytest.raises(CheckpointError, match=r"elsewhere/vae has no config.json"):
        load_reals(folder.parent, subfolder="elsewhere")


def test_misspelt_options_are_refused(folder):
    with pytest.raises(TypeError, match="local_file_only"):
        load_reals(folder, local_file_only=True)


def test_both_parts_are_of_one_commit(pair, folder, tmp_path):
    """The branch moves after the first file was fetched, which takes two looks."""
    save_reals(tmp_path / "next", *other_pair())
    one, two = commit_of(0x1111), commit_of(0x2222)
    moving = Repository({one: folder, two: tmp_path / "next"}, {"main": [one, one, two]})
    client = f"import psvae; psvae.save_reals({str(tmp_path / 'read')!r}, *psvae.load_reals('org/reals'))"
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE"):
        environment.pop(name, None)
    with serve({"org/reals": moving}) as hub:
        environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1"}
        done = subprocess.run([sys.executable, "-c", client], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    vae, alignment = load_reals(tmp_path / "read")
    assert_same_state(vae.encoder, pair[0].encoder)
    assert_same_state(alignment.patch, pair[1].patch)


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


def test_the_folder_above_the_vae_names_it(folder):
    with pytest.raises(CheckpointError, match=r"a VAE in vae/, .*; pass subfolder='vae', or its path .*reals/vae$"):
        PixelVAE.from_pretrained(folder)


def test_statistics_are_needed(pair, folder, tmp_path):
    (folder / "vae" / "mean_std.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no mean_std.json.*fit_latent_statistics"):
        load_reals(folder)
    with pytest.raises(ConfigError, match=r"not measured.*fit_latent_statistics"):
        save_reals(tmp_path / "other", tiny_pixel_vae(), pair[1])


def test_statistics_that_cannot_be_looked_for(folder, tmp_path):
    """Offline, what the cache has not is not what the repository has not, unless the cache remembers so."""
    (folder / "vae" / "mean_std.json").unlink()
    commit, load = commit_of(0x1111), {"cache_dir": tmp_path / "cache", "local_files_only": True}
    fill_cache(tmp_path / "cache", "org/reals", commit, folder)
    said = r"mean_std.json of org/reals/vae is not in the local cache and the Hub cannot be reached: go online once, or"
    with pytest.raises(CheckpointError, match=said):
        load_reals("org/reals", **load)
    absent = tmp_path / "cache" / "models--org--reals" / ".no_exist" / commit / "vae" / "mean_std.json"
    absent.parent.mkdir(parents=True)
    absent.touch()
    with pytest.raises(CheckpointError, match=r"org/reals/vae has no mean_std.json, without which"):
        load_reals("org/reals", **load)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", r"is not JSON that can be read \(Expecting"),
        ("", r"is not JSON that can be read"),
        ("[0.1, 1.0]", r"holds \[0.1, 1.0\]"),
        ('{"mean": 0.1}', r"holds {'mean': 0.1}"),
        ('{"mean": [0.1, 0.2], "std": 1.0}', r"holds {'mean': \[0.1, 0.2\], 'std': 1.0}"),
        ('{"mean": [0.1], "std": [1.0]}', r"holds {'mean': \[0.1\], 'std': \[1.0\]}"),
        ('{"mean": "0.1", "std": "one"}', r"holds {'mean': '0.1', 'std': 'one'}"),
        ('{"mean": 0.1, "std": true}', r"holds {'mean': 0.1, 'std': True}"),
        ('{"mean": null, "std": 1.0}', r"holds {'mean': None, 'std': 1.0}"),
        ('{"mean": 0.1, "std": 0.0}', r"holds {'mean': 0.1, 'std': 0.0}"),
        ('{"mean": 0.1, "std": -2.0}', r"holds .*'std': -2.0}"),
        ('{"mean": 0.1, "std": 1e-50}', r"holds .*'std': 1e-50}"),
        ('{"mean": NaN, "std": 1.0}', r"holds {'mean': nan, 'std': 1.0}"),
        ('{"mean": 0.1, "std": Infinity}', r"holds .*'std': inf}"),
        (f'{{"mean": 0.1, "std": 1{"0" * 400}}}', r"holds .*'std': 1000"),
    ],
    ids=range(15),
)
def test_bad_statistics(folder, content, said):
    """What came, what was wanted and what to do, of each."""
    (folder / "vae" / "mean_std.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"mean_std.json {said}.*; wanted {{.*: fetch .*fit_latent_statistics"):
        load_reals(folder)


def test_whole_numbers_are_statistics(folder):
    (folder / "vae" / "mean_std.json").write_text('{"mean": 0, "std": 2, "of": "elsewhere"}')
    assert load_reals(folder).vae.latent_spec.std.eq(2).all()


def test_parts_of_two_models_are_refused(pair, folder, tmp_path):
    other = tiny_net(latent_channels=4)
    with pytest.raises(ConfigError, match=r"\(4, 8\) and the VAE makes \(8, 8\)"):
        save_reals(tmp_path / "other", pair[0], other)
    shutil.rmtree(folder / "alignment")
    other.save_pretrained(folder / "alignment")
    with pytest.raises(ConfigError, match=r"they belong to two models"):
        load_reals(folder)
