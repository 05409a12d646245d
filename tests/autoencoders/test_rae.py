"""RAE: no SemanticVAE, a ViT decoder, noise on the latents in training."""

import json

import pytest
import torch

from psvae import PSVAE, PixelDecoderConfig, PSVAEConfig, ViTPixelDecoderConfig
from psvae.errors import ConfigError, ShapeError
from tests.base import ModuleTests, assert_close, assert_equal
from tests.tiny import FEATURE_DIM, build, fill_weights, images, tiny_psvae_config, tiny_rae_config

VIT = ViTPixelDecoderConfig(FEATURE_DIM, width=24, depth=1, num_heads=3, mlp_dim=40, patch_size=8, grid=(4, 4))


def rae(**fields):
    return fill_weights(build(PSVAE, tiny_rae_config(decoder=VIT, **fields)))


class TestRAEWithViT(ModuleTests):
    module_class = PSVAE
    config = tiny_rae_config(decoder=VIT, statistics_grid=(4, 4))
    good_sizes = ((32, 32), (32, 32))
    bad_sizes = ((33, 32),)
    repr_contains = ("ViTPixelDecoder", "grid=(4, 4)", "per element at 4x4")

    def call(self, module, *inputs):
        output = module(*inputs)
        return [output.sample, output.features, output.latents]

    def inputs(self, height, width):
        return (images(2, height, width),)

    def expected_shapes(self, height, width):
        return [(2, 3, height, width), (2, FEATURE_DIM, 4, 4), (2, FEATURE_DIM, 4, 4)]


def test_both_decoders_survive_json():
    for config in (tiny_rae_config(decoder=VIT), tiny_rae_config(), tiny_psvae_config()):
        again = PSVAEConfig.from_dict(json.loads(json.dumps(config.to_dict())))
        assert again == config
        assert type(again.decoder) is type(config.decoder)
    assert type(PSVAEConfig.from_dict({"decoder": {}}).decoder) is PixelDecoderConfig


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        ({"widht": 24, "depth": 1}, "ViTPixelDecoderConfig has no field 'widht'; did you mean 'width'"),
        ({"base_chanels": 24, "norm_groups": 8}, "PixelDecoderConfig has no field 'base_chanels'; did you mean"),
    ],
)
def test_a_misspelt_field_names_the_nearest_of_its_own_class(decoder, message):
    with pytest.raises(ConfigError, match=message):
        PSVAEConfig.from_dict({"decoder": decoder})


def test_sd_style_callers_find_the_stride():
    config = tiny_rae_config(decoder=VIT)
    assert 2 ** (len(config.block_out_channels) - 1) == config.spatial_compression_ratio == 8
    assert (config.latent_channels, config.out_channels) == (FEATURE_DIM, 3)
    model = rae()
    assert (model.dtype, model.device.type) == (torch.float32, "cpu")


def test_sample_size_and_grid_agree():
    with pytest.raises(ConfigError, match=r"sample_size is 64; wanted that of the decoder's grid \(4, 4\)"):
        tiny_rae_config(decoder=VIT, sample_size=64)


@torch.no_grad()
def test_tiles_are_the_grid():
    model = rae()
    with pytest.raises(ConfigError, match="tiles of 16 x 32 pixels; this decoder paints 32 x 32 alone"):
        model.enable_tiling(tile_sample_min_height=16)
    z = model.encode(images(1, 64, 48)).latent_dist.mode()
    with pytest.raises(ShapeError, match=r"grid \(8, 6\); this decoder paints \(4, 4\) alone"):
        model.decode(z)
    model.enable_tiling()
    assert model.decode(z).sample.shape == (1, 3, 64, 48)
    square = model.encode(images()).latent_dist.mode()
    tiled = model.decode(square).sample
    model.disable_tiling()
    assert_equal([model.decode(square).sample], [tiled])


@torch.no_grad()
def test_noise_comes_in_training_alone():
    model, x = rae(latent_noise=0.8), images(4)
    clean = model(x).latents
    assert_equal([clean], [model(x).features])
    model.train()
    seeded = [model(x, generator=torch.Generator().manual_seed(3)).latents for _ in range(2)]
    assert_equal([seeded[0]], [seeded[1]])
    spread = (seeded[0] - clean).flatten(1).std(dim=1)
    assert (spread > 0).all()
    assert (spread < 0.9).all()
    assert spread.std() > 0.05  # one strength for each item
    alone = [model(x[i : i + 1], generator=[torch.Generator().manual_seed(i)]).latents for i in range(2)]
    assert not (alone[0] - clean[:1]).equal(alone[1] - clean[1:2])
    assert_equal([model.encode(x).latent_dist.mode()], [clean])  # encode never adds it


@torch.no_grad()
def test_noise_is_uniform_up_to_tau():
    model = rae(latent_noise=0.5).train()
    x = images(1).expand(200, -1, -1, -1)
    output = model(x, generator=torch.Generator().manual_seed(0))
    spread = (output.latents - output.features).flatten(1).std(dim=1)
    assert_close([spread.mean()], [torch.tensor(0.25)], tolerance=0.05)
    assert 0.4 < spread.max() < 0.55


def test_negative_noise():
    with pytest.raises(ConfigError, match=r"latent_noise is -1\.0; wanted 0 or a positive number"):
        tiny_rae_config(latent_noise=-1.0)
