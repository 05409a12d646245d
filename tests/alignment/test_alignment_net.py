"""AlignmentNet: latent → the teacher's features."""

import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from psvae import AlignmentNet, AlignmentNetConfig
from psvae.errors import ConfigError, DtypeError, RangeWarning, ShapeError
from tests.base import ModuleTests
from tests.tiny import LATENT_CHANNELS, build, fill_weights, latents


def tiny_config(**fields):
    default = {"latent_channels": LATENT_CHANNELS, "feature_dim": 24, "hidden_dim": 32, "stride": 8}
    return AlignmentNetConfig(**{**default, **fields})


def tiny_net(**fields):
    return fill_weights(build(AlignmentNet, tiny_config(**fields)))


class TestAlignmentNet(ModuleTests):
    module_class = AlignmentNet
    config = tiny_config()
    good_sizes = ((4, 4), (3, 5), (1, 7))
    repr_contains = ("Z=8", "D=24", "merge=1")
    presets = (("alignment_net_sd", AlignmentNetConfig()), ("alignment_net_merge", AlignmentNetConfig(merge=2)))

    def inputs(self, height, width):
        return (latents(2, height, width),)

    def call(self, module, *inputs):
        return list(module(*inputs))

    def expected_shapes(self, height, width):
        return [(2, 24, height, width), (2, 24)]


class TestMergedCells(TestAlignmentNet):
    config = tiny_config(merge=2, pooling="max", num_layers=2, activation="gelu")
    good_sizes = ((4, 4), (2, 6))
    repr_contains = ("merge=2",)
    presets = ()

    def expected_shapes(self, height, width):
        return [(2, 24, height // 2, width // 2), (2, 24)]


def test_a_patch_feature_depends_on_its_own_cells_alone():
    for merge in (1, 2):
        net, x = tiny_net(merge=merge), latents(1, 4, 4)
        changed = x.clone()
        changed[..., 0, 0] += 1
        with torch.no_grad():
            moved = (net(changed).patch_features != net(x).patch_features).any(dim=1)[0]
        assert moved.nonzero().tolist() == [[0, 0]]


def test_the_global_feature_is_of_the_pooled_latents():
    net, x = tiny_net(), latents(2, 4, 4)
    with torch.no_grad():
        still = net(x).global_feature
        torch.testing.assert_close(net(x.flip(2)).global_feature, still)  # the mean does not know where
        torch.testing.assert_close(net(x.mean((2, 3), keepdim=True)).global_feature, still, rtol=1e-5, atol=1e-6)


def test_the_papers_layers():
    """Three linear layers with SiLU, as a 1 x 1 convolution of each cell."""
    net, x = tiny_net(), latents(1, 2, 3)
    with torch.no_grad():
        cell = x[0, :, 1, 2]
        for layer in net.patch.layers[:-1]:
            cell = torch.nn.functional.silu(cell @ layer.weight.T + layer.bias)
        cell = cell @ net.patch.layers[2].weight.T + net.patch.layers[2].bias
        torch.testing.assert_close(net(x).patch_features[0, :, 1, 2], cell, rtol=1e-5, atol=1e-6)
    assert len(net.patch.layers) == len(net.cls.layers) == 3


def test_statistics_are_undone_on_request():
    net, x = tiny_net(), latents(2, 4, 4)
    net.latent_spec.mean.fill_(0.3)
    net.latent_spec.std.fill_(1.5)
    raw = x * 1.5 + 0.3
    with torch.no_grad():
        torch.testing.assert_close(net(x, normalized=True).patch_features, net(raw).patch_features)


def test_statistics_applied_twice_are_told_by_scale(request):
    net, x = tiny_net(), latents(2, 4, 4)
    with torch.no_grad():
        net(x * 40)  # nothing was measured, so nothing is known
        net.latent_spec.std.fill_(5.0)
        net(x * 5)
        net(x, normalized=True)
        remedies = {True: "raw latents come without it, and .* called once", False: "come with normalized=True"}
        for wrong, normalized in ((x, False), (x * 5, True), (x / 5, True), (x * 25, False)):
            said = f"twice, or not at all; this call has normalized={normalized}: .*{remedies[normalized]}"
            with pytest.warns(RangeWarning, match=said) as caught:
                net(wrong, normalized=normalized)
            wrapped = request.config.getoption("--shapes")  # each call of the package has another frame then
            assert wrapped or caught[0].filename == __file__  # the caller's line


def test_nan_latents_are_told():
    net, x = tiny_net(), latents(2, 4, 4)
    net.latent_spec.std.fill_(5.0)
    x[0, 0, 0, 0] = torch.nan
    with torch.no_grad(), pytest.warns(RangeWarning, match="^latents hold NaN; wanted numbers"):
        net(x)


class CountReads(TorchDispatchMode):
    """How often a value went from the device to Python, which waits for a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("training", "gradients", "warns"), [(True, True, False), (True, False, True), (False, True, True)]
)
def test_a_training_step_reads_no_values(training, gradients, warns):
    net, x = tiny_net().train(training), latents(2, 4, 4)
    net.latent_spec.std.fill_(5.0)
    with warnings.catch_warnings(record=True) as caught, torch.set_grad_enabled(gradients), CountReads() as reads:
        warnings.simplefilter("always")
        net(x)
    assert [warning.category for warning in caught] == [RangeWarning] * warns
    assert bool(reads.count) == warns


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        (torch.zeros(1, 8, 3, 4), ShapeError, r"grid 3 x 4; wanted multiples of merge=2, nearest 4 x 4"),
        (torch.zeros(1, 8, 8, 1), ShapeError, r"nearest 8 x 2"),
        (torch.zeros(1, 4, 4, 4), ShapeError, r"latents have 4 channels.*wanted 8"),
        (torch.zeros(8, 4, 4), ShapeError, r"wanted 4 axes.*unsqueeze"),
        (torch.zeros(1, 8, 4, 4, dtype=torch.long), DtypeError, r"wanted floating point"),
        (torch.zeros(1, 8, 4, 4, dtype=torch.bfloat16), DtypeError, r"torch.autocast"),
    ],
)
def test_bad_latents(given, error, said):
    with pytest.raises(error, match=said):
        tiny_net(merge=2)(given)


@pytest.mark.parametrize("field", ["latent_channels", "feature_dim", "num_layers", "hidden_dim", "stride"])
def test_bad_sizes(field):
    with pytest.raises(ConfigError, match=f"{field}.*at least 1"):
        tiny_config(**{field: 0})


def test_statistics_of_a_far_mean_warn_of_nothing():
    """ReaLS has one mean and one std: channels may lie at different heights, each narrow."""
    net, x = tiny_net(), latents(2, 4, 4)
    heights = torch.linspace(-4, 4, 8).view(8, 1, 1)
    raw = 0.2 * x + heights
    net.latent_spec.mean.fill_(raw.mean())
    net.latent_spec.std.fill_(raw.std())
    with torch.no_grad():  # a RangeWarning would be an error here
        read = net(raw)
        made = net(net.latent_spec.normalize(raw), normalized=True)
    torch.testing.assert_close(made.patch_features, read.patch_features)
