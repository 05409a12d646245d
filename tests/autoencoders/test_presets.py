"""The paper's presets and the variants that configuration alone gives: sizes pinned, wiring checked."""

import pytest
import timm
import torch

from psvae import PSVAE, PixelDecoder, PixelDecoderConfig, PSVAEConfig
from psvae.errors import ConfigError
from tests.base import assert_equal
from tests.tiny import fill_weights, images, tiny_encoder, tiny_psvae_config, tiny_vae_config


def millions(module):
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


@pytest.mark.parametrize(
    ("config", "count"),
    [(PixelDecoderConfig(), 41.7), (PixelDecoderConfig(latent_channels=32), 41.4), (PixelDecoderConfig.small(), 10.6)],
    ids=["96", "32", "small"],
)
def test_decoder_parameters(config, count):
    with torch.device("meta"):
        assert millions(PixelDecoder(config)) == pytest.approx(count, abs=0.05)


@pytest.mark.parametrize(
    ("config", "counts"),  # encoder, SemanticVAE, decoder, all
    [
        (PSVAEConfig.dinov2_base(96), (86.58, 43.94, 41.71, 172.24)),
        (PSVAEConfig.dinov2_base(32), (86.58, 43.80, 41.42, 171.79)),
        (PSVAEConfig.siglip2_so400m(), (412.44, 94.43, 41.71, 548.58)),
    ],
    ids=["dinov2_base_96", "dinov2_base_32", "siglip2_so400m_96"],
)
def test_preset_parameters(config, counts):
    with torch.device("meta"):
        model = PSVAE(config)
    parts = (model.encoder, model.vae, model.decoder, model)
    assert [millions(part) for part in parts] == pytest.approx(counts, abs=0.006)


@pytest.mark.parametrize("preset", [PSVAEConfig.dinov2_base(), PSVAEConfig.siglip2_so400m()], ids=["dinov2", "siglip2"])
def test_preset_shapes(preset):
    """256 px → 16 x 16 tokens and back, on the meta device."""
    with torch.device("meta"):
        model = PSVAE(preset).to("meta").eval()
        output = model(torch.empty(2, 3, 256, 256))
    assert output.latents.shape == (2, 96, 16, 16)
    assert output.rebuilt_features.shape == output.features.shape == (2, preset.vae.feature_dim, 16, 16)
    assert output.sample.shape == (2, 3, 256, 256)


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("vit_base_patch14_reg4_dinov2.lvd142m", PSVAEConfig.dinov2_base()),
        ("vit_so400m_patch14_siglip_224.v2_webli", PSVAEConfig.siglip2_so400m()),
    ],
)
def test_presets_agree_with_timm(name, preset):
    """Mean and std as published, and SemanticVAE blocks of the encoder's own kind, so that they can be copied."""
    published = timm.get_pretrained_cfg(name)
    assert preset.encoder.name == name
    assert (preset.encoder.mean, preset.encoder.std) == (published.mean, published.std)
    with torch.device("meta"):
        model = PSVAE(preset)
        last = model.encoder.vit.blocks[-1]
    ours, theirs = (block.state_dict() for block in (model.vae.encoder.blocks[-1], last))
    assert {key: x.shape for key, x in ours.items()} == {key: x.shape for key, x in theirs.items()}
    block = model.vae.encoder.blocks[-1]
    assert (block.attn.num_heads, block.norm1.eps) == (last.attn.num_heads, last.norm1.eps)
    act, tanh = last.mlp.act, preset.vae.activation == "gelu_tanh"
    assert (type(act).__name__ == "GELUTanh" or getattr(act, "approximate", "none") == "tanh") == tanh


def test_encoder_blocks_start_the_vae():
    """``block_init="encoder"``: both halves hold copies of the encoder's last block."""
    config = tiny_psvae_config(
        vae=tiny_vae_config(block_init="encoder", layer_scale=None, mlp_dim=192),
    )
    encoder = fill_weights(tiny_encoder())
    model = PSVAE.from_encoder(encoder, config)
    assert model.encoder is encoder
    for half in (model.vae.encoder, model.vae.decoder):
        copied, source = half.blocks[0].state_dict(), encoder.vit.blocks[-1].state_dict()
        assert_equal(copied.values(), source.values())
        assert half.blocks[0].mlp.fc1.weight.data_ptr() != encoder.vit.blocks[-1].mlp.fc1.weight.data_ptr()
    assert model(images()).sample.shape == (2, 3, 32, 32)
    fresh = PSVAE.from_encoder(encoder, config.replace(vae=config.vae.replace(block_init="fresh")))
    assert not fresh.vae.encoder.blocks[0].mlp.fc1.weight.equal(encoder.vit.blocks[-1].mlp.fc1.weight)


def test_from_encoder_takes_the_encoders_configuration():
    encoder = tiny_encoder(final_norm="affine")
    model = PSVAE.from_encoder(encoder, tiny_psvae_config())
    assert model.config.encoder == encoder.config
    with torch.no_grad():
        assert_equal([model(images()).features], [encoder(images())])


def test_encoder_blocks_that_do_not_fit_raise():
    config = tiny_psvae_config(vae=tiny_vae_config(block_init="encoder"))
    with pytest.raises(
        ConfigError, match="does not fit a SemanticVAE block; match feature_dim, mlp_dim and layer_scale"
    ):
        PSVAE.from_encoder(tiny_encoder(), config)


def test_widths_that_disagree_raise():
    with pytest.raises(ConfigError, match=r"has features of width 48; vae\.feature_dim is 24"):
        PSVAE(tiny_psvae_config(vae=tiny_vae_config(feature_dim=24)))
    with pytest.raises(ConfigError, match=r"has features of width 48; decoder\.latent_channels is 8"):
        PSVAE(tiny_psvae_config(vae=None))
