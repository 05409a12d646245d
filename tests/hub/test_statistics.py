"""Statistics files of RAE, LightningDiT and REPA-E."""

import pytest
import torch
from safetensors.torch import save_file

from psvae import LatentSpec, load_latent_statistics
from psvae.errors import CheckpointError
from tests.base import assert_close

MEAN, VAR = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([4.0, 0.25, 1e-6])


def write(tmp_path, content):
    save_file({key: tensor.clone() for key, tensor in content.items()}, tmp_path / "stats.safetensors")
    return tmp_path / "stats.safetensors"


@pytest.mark.parametrize("shape", [(3,), (1, 3, 1, 1), (3, 1, 1)])
def test_lightningdit(tmp_path, shape):
    spec = LatentSpec(3, 16)
    file = write(tmp_path, {"mean": MEAN.view(shape), "std": VAR.sqrt().view(shape)})
    assert load_latent_statistics(spec, file) == "LightningDiT"
    assert_close([spec.mean.flatten(), spec.std.flatten()], [MEAN, VAR.sqrt()])


def test_rae_adds_epsilon_once_to_the_variance(tmp_path):
    spec = LatentSpec(3, 16)
    assert load_latent_statistics(spec, write(tmp_path, {"mean": MEAN, "var": VAR})) == "RAE"
    z = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    wanted = (z - MEAN.view(3, 1, 1)) / (VAR.view(3, 1, 1) + 1e-5).sqrt()
    assert_close([spec.normalize(z)], [wanted])
    assert_close([spec.std[2, 0, 0]], [torch.tensor(1.1e-5).sqrt()])  # at 1e-6 the ε matters


def test_rae_per_element_without_a_mean(tmp_path):
    var = torch.rand(3, 4, 5) + 0.1
    torch.save({"mean": None, "var": var}, tmp_path / "stat.pt")
    spec = LatentSpec(3, 16, (4, 5))
    with pytest.raises(CheckpointError, match=r"stat.pt is a pickle"):
        load_latent_statistics(spec, tmp_path / "stat.pt")
    assert load_latent_statistics(spec, tmp_path / "stat.pt", allow_pickle=True) == "RAE"
    assert_close([spec.mean, spec.std], [torch.zeros(3, 4, 5), (var + 1e-5).sqrt()])


def test_repa_e_scales_by_the_inverse(tmp_path):
    spec = LatentSpec(3, 16)
    scale, bias = 1.0 / VAR.sqrt(), MEAN
    file = write(tmp_path, {"latents_scale": scale.view(1, 3, 1, 1), "latents_bias": bias.view(1, 3, 1, 1)})
    assert load_latent_statistics(spec, file) == "REPA-E"
    z = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert_close([spec.normalize(z)], [(z - bias.view(3, 1, 1)) * scale.view(3, 1, 1)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"mean": MEAN, "std": VAR, "var": VAR}, "wanted exactly one of: RAE"),
        ({"mean": MEAN, "latents_scale": VAR}, "wanted exactly one of"),
        ({"std": VAR}, "wanted exactly one of"),
        ({"mean": MEAN, "std": torch.zeros(3)}, "holds a spread of 0"),
        ({"mean": MEAN, "var": -VAR}, "negative or non-finite"),
        ({"latents_scale": torch.full((3,), 1e-40), "latents_bias": MEAN}, "so small or large that it overflows"),
        ({"mean": MEAN, "var": VAR.long()}, r"statistics of torch\.int64; wanted floating point"),
        ({"mean": MEAN.to(torch.complex64), "std": VAR}, r"statistics of torch\.complex64; wanted floating point"),
        ({"mean": MEAN * float("nan"), "std": VAR}, "wanted one finite shape"),
        ({"mean": MEAN[:2], "std": VAR}, "wanted one finite shape"),
        ({"mean": MEAN.view(1, 1, 3, 1, 1), "std": VAR.view(1, 1, 3, 1, 1)}, r"wanted \(Z,\)"),
        ({"mean": MEAN[:2], "std": VAR[:2]}, r"shape \(2, 1, 1\); the model wants \(3, 1, 1\)"),
        ({"mean": torch.ones(3, 4, 4), "std": torch.ones(3, 4, 4)}, r"build it with statistics_grid=\(4, 4\)"),
    ],
)
def test_faults(tmp_path, content, message):
    spec = LatentSpec(3, 16)
    with pytest.raises(CheckpointError, match=message):
        load_latent_statistics(spec, write(tmp_path, content))
    assert spec.mean.eq(0).all()
    assert spec.std.eq(1).all()


def test_absent_and_damaged_files(tmp_path):
    with pytest.raises(CheckpointError, match="there is no statistics file"):
        load_latent_statistics(LatentSpec(3, 16), tmp_path / "no.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"not one")
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        load_latent_statistics(LatentSpec(3, 16), tmp_path / "x.safetensors")
    torch.save([1, 2], tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="holds a list; wanted a dict"):
        load_latent_statistics(LatentSpec(3, 16), tmp_path / "x.pt", allow_pickle=True)
