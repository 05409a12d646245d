"""SemanticEncoder: image → features."""

import pytest

from psvae import SemanticEncoder, SemanticEncoderConfig
from psvae.errors import ConfigError
from tests.base import ModuleTests
from tests.tiny import build, images, tiny_encoder, tiny_encoder_config

SMALL = {"img_size": 56, "embed_dim": 48, "depth": 2, "num_heads": 3}


class TestSemanticEncoder(ModuleTests):
    module_class = SemanticEncoder
    config = tiny_encoder_config()
    good_sizes = ((32, 32), (24, 40), (8, 56))
    bad_sizes = ((36, 32), (32, 33), (7, 8))
    repr_contains = ("vit_tiny_patch16_224", "D=48", "patch=8", "stride=8")
    presets = (
        ("semantic_encoder_dinov3_small", SemanticEncoderConfig("vit_small_patch16_dinov3.lvd1689m")),
        ("semantic_encoder_mae_base", SemanticEncoderConfig("vit_base_patch16_224.mae")),
    )

    def inputs(self, height, width):
        return (images(2, height, width),)

    def expected_shapes(self, height, width):
        return [(2, 48, height // 8, width // 8)]


class TestEncoderDINOv3(TestSemanticEncoder):
    """Rotary positions, register tokens, and tables that no checkpoint holds."""

    config = SemanticEncoderConfig("vit_small_patch16_dinov3.lvd1689m", {**SMALL, "img_size": 64}, stride=8)
    repr_contains = ("vit_small_patch16_dinov3", "patch=16")
    presets = ()


class TestEncoderDINOv2(TestSemanticEncoder):
    """Register tokens, a patch that is not the stride, and positions resized as configured."""

    config = SemanticEncoderConfig(
        "vit_small_patch14_reg4_dinov2.lvd142m",
        SMALL,
        stride=8,
        final_norm="affine",
        position_antialias=False,
    )
    repr_contains = ("vit_small_patch14_reg4_dinov2", "patch=14")
    presets = ()


class TestEncoderSigLIP2(TestSemanticEncoder):
    """No class token."""

    config = SemanticEncoderConfig(
        "vit_so400m_patch14_siglip_224.v2_webli",
        {**SMALL, "act_layer": "gelu_tanh"},
        stride=8,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
    repr_contains = ("vit_so400m_patch14_siglip_224", "patch=14")
    presets = ()


def test_fewer_images_than_axes_are_no_special_case():
    """One image, and three: nothing depends on the batch being two."""
    for batch in (1, 3):
        for config in (TestEncoderSigLIP2.config, TestEncoderDINOv3.config):
            assert build(SemanticEncoder, config)(images(batch)).shape == (batch, 48, 4, 4)


def test_from_timm_without_weights_has_the_published_statistics():
    encoder = SemanticEncoder.from_timm("vit_so400m_patch14_siglip_224.v2_webli", pretrained=False, model_args=SMALL)
    assert encoder.config == SemanticEncoderConfig(
        "vit_so400m_patch14_siglip_224.v2_webli", SMALL, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
    )
    with pytest.raises(ConfigError, match="has no field 'strid'; did you mean 'stride'"):
        SemanticEncoder.from_timm("vit_base_patch16_224.mae", pretrained=False, strid=8)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("dinov2_base", r"timm .* has no model 'dinov2_base'; nearest: \w+"),
        ("dinov2_base.lvd142m", r"timm .* has no model 'dinov2_base.lvd142m'; nearest: \w+"),
        ("vit_base_patch16_224.none", r"timm publishes no weights named 'vit_base_patch16_224.none'"),
    ],
)
def test_from_timm_with_a_name_that_timm_does_not_publish(name, said):
    with pytest.raises(ConfigError, match=said):
        SemanticEncoder.from_timm(name, pretrained=False)


def test_frozen_encoder_gets_no_gradient_and_passes_one_on():
    encoder, x = tiny_encoder().requires_grad_(False), images().requires_grad_()
    encoder(x).square().mean().backward()
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert x.grad.abs().max() > 0
