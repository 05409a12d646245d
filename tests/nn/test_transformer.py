"""TransformerBlock against timm's Block: the SemanticVAE can start from an encoder's weights."""

import pytest
import timm
import torch

from psvae import SemanticVAE
from psvae.errors import ConfigError
from tests.base import assert_close, assert_same_state
from tests.tiny import features, fill_weights, tiny_vae_config

SMALL = {"img_size": 56, "embed_dim": 48, "depth": 3, "num_heads": 3, "mlp_ratio": 2}
FAMILIES = {  # timm's name, and the SemanticVAEConfig that matches its blocks
    "vit_small_patch14_reg4_dinov2.lvd142m": {"layer_scale": 1e-5},
    "vit_so400m_patch14_siglip_224.v2_webli": {"layer_scale": None},
}


def timm_blocks(name, **arguments):
    return fill_weights(timm.create_model(name, **{**SMALL, **arguments})).eval().blocks


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_copied_blocks_equal_the_last_of_timm(name, depth):
    blocks = timm_blocks(name)
    vae = SemanticVAE(tiny_vae_config(depth=depth, **FAMILIES[name])).eval()
    vae.copy_blocks(blocks)
    tokens = features().flatten(2).mT
    for half in (vae.encoder, vae.decoder):
        got = wanted = tokens
        with torch.no_grad():
            for ours, timms in zip(half.blocks, blocks[-depth:], strict=True):
                got, wanted = ours(got), timms(wanted)
        assert_close([got], [wanted])
    assert_same_state(vae.encoder.blocks, vae.decoder.blocks)
    ours, theirs = vae.encoder.blocks[0].attn.qkv.weight, vae.decoder.blocks[0].attn.qkv.weight
    assert ours.data_ptr() != theirs.data_ptr() != blocks[-depth].attn.qkv.weight.data_ptr()  # copies, not ties


def test_tanh_gelu_equals_timm():
    blocks = timm_blocks("vit_so400m_patch14_siglip_224.v2_webli", act_layer="gelu_tanh")
    vae = SemanticVAE(tiny_vae_config(layer_scale=None, activation="gelu_tanh")).eval()
    vae.copy_blocks(blocks)
    tokens = 3.0 * features().flatten(2).mT
    with torch.no_grad():
        assert_close([vae.encoder.blocks[0](tokens)], [blocks[-1](tokens)])


@pytest.mark.parametrize(
    ("name", "arguments", "fields"),
    [
        ("vit_small_patch14_reg4_dinov2.lvd142m", {}, {"layer_scale": None}),
        ("vit_small_patch14_reg4_dinov2.lvd142m", {}, {"mlp_dim": 192, "layer_scale": 1.0}),
        ("vit_so400m_patch14_siglip_224.v2_webli", {}, {"layer_scale": 1.0}),
        ("vit_giant_patch14_reg4_dinov2.lvd142m", {}, {"layer_scale": 1.0}),  # SwiGLU
        ("vit_small_patch14_reg4_dinov2.lvd142m", {"depth": 2}, {"depth": 3, "layer_scale": 1.0}),
    ],
)
def test_blocks_that_do_not_fit_raise(name, arguments, fields):
    vae = SemanticVAE(tiny_vae_config(**fields))
    with pytest.raises(ConfigError, match=r"does not fit a SemanticVAE block|SemanticVAEConfig.depth is 3"):
        vae.copy_blocks(timm_blocks(name, **arguments))


def test_rotary_blocks_raise():
    name = "vit_small_patch16_dinov3.lvd1689m"
    blocks = timm.create_model(name, **{**SMALL, "img_size": 64}).blocks
    with pytest.raises(ConfigError, match="does not fit a SemanticVAE block"):
        SemanticVAE(tiny_vae_config()).copy_blocks(blocks)
