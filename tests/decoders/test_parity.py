"""PixelDecoder against the decoder of diffusers' AutoencoderKL: same weights, same numbers."""

import re

import pytest
import torch

from psvae import PixelDecoder
from tests.base import assert_close
from tests.tiny import fill_weights, latents, tiny_decoder_config

# diffusers' key → ours
RENAMES = (
    (r"mid_block\.resnets\.0\.", "middle.block1."),
    (r"mid_block\.resnets\.1\.", "middle.block2."),
    (r"mid_block\.attentions\.0\.", "middle.attention."),
    (r"up_blocks\.(\d+)\.resnets\.", r"levels.\1.blocks."),
    (r"up_blocks\.(\d+)\.attentions\.", r"levels.\1.attentions."),
    (r"up_blocks\.(\d+)\.upsamplers\.0\.", r"levels.\1.upsample."),
    (r"\.conv_shortcut\.", ".shortcut."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj."),
    (r"conv_norm_out\.", "norm_out."),
)


def our_key(key):
    for pattern, ours in RENAMES:
        key = re.sub(pattern, ours, key)
    return key


def autoencoder_kl(config):
    """diffusers' AutoencoderKL of the same architecture, weights filled."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers comes with psvae[dev]")
    levels = len(config.channel_multipliers)
    attends = config.attention_levels
    model = diffusers.AutoencoderKL(
        latent_channels=config.latent_channels,
        block_out_channels=tuple(config.base_channels * m for m in config.channel_multipliers),
        layers_per_block=config.num_res_blocks,
        norm_num_groups=config.norm_groups,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("AttnUpDecoderBlock2D",) * attends + ("UpDecoderBlock2D",) * (levels - attends),
        use_post_quant_conv=False,
        use_quant_conv=False,
    )
    return fill_weights(model).eval()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"attention_levels": 0},
        {"attention_levels": 2, "num_res_blocks": 1},
        {"channel_multipliers": (1, 2, 4), "latent_channels": 4},
        {"channel_multipliers": (1, 1, 2, 2, 4)},
    ],
    ids=str,
)
def test_equals_autoencoder_kl(fields):
    config = tiny_decoder_config(**fields)
    reference = autoencoder_kl(config)
    decoder = PixelDecoder(config).eval()
    decoder.load_state_dict({our_key(key): value for key, value in reference.decoder.state_dict().items()})
    for grid in ((4, 4), (3, 5)):
        z = latents(2, *grid, channels=config.latent_channels)
        with torch.no_grad():
            wanted = reference.decode(z).sample
            got = decoder(z)
        assert got.shape == (2, 3, config.stride * grid[0], config.stride * grid[1])
        assert wanted.std() > 0.1
        assert_close([got], [wanted])


def test_gradients_equal_autoencoder_kl():
    """The in-place shortcuts of inference are off where a gradient needs the input."""
    config = tiny_decoder_config()
    reference = autoencoder_kl(config)
    decoder = PixelDecoder(config)
    decoder.load_state_dict({our_key(key): value for key, value in reference.decoder.state_dict().items()})
    z = latents()
    reference.decode(z).sample.square().mean().backward()
    decoder(z).square().mean().backward()
    ours = dict(decoder.named_parameters())
    for name, parameter in reference.decoder.named_parameters():
        torch.testing.assert_close(ours[our_key(name)].grad, parameter.grad, rtol=1e-4, atol=1e-5)
