"""PSVAE and its variants: image ↔ latent."""

from psvae import PSVAE, PSVAEConfig
from tests.base import ModuleTests
from tests.tiny import images, tiny_features_config, tiny_mlp_config, tiny_psvae_config, tiny_rae_config


class TestPSVAE(ModuleTests):
    module_class = PSVAE
    config = tiny_psvae_config()
    good_sizes = ((32, 32), (24, 40), (8, 56))
    bad_sizes = ((36, 32), (32, 33))
    repr_contains = ("stride=8", "Z=8", "vit_tiny_patch16_224", "statistics=per channel")
    presets = (
        ("psvae_dinov2_base_96", PSVAEConfig.dinov2_base()),
        ("psvae_dinov2_base_32", PSVAEConfig.dinov2_base(32)),
        ("psvae_siglip2_so400m_96", PSVAEConfig.siglip2_so400m()),
    )

    def inputs(self, height, width):
        return (images(2, height, width),)

    def expected_shapes(self, height, width):
        h, w = height // 8, width // 8
        return [(2, 3, height, width), (2, 48, h, w), (2, 48, h, w), (2, 8, h, w), (2, 16, h, w)]

    def call(self, module, *inputs):
        return [x for x in module(*inputs) if x is not None]


class TestRAE(TestPSVAE):
    config = tiny_rae_config()
    repr_contains = ("Z=48",)
    presets = ()

    def expected_shapes(self, height, width):
        h, w = height // 8, width // 8
        return [(2, 3, height, width), (2, 48, h, w), (2, 48, h, w)]


class TestDecoderOnFeatures(TestPSVAE):
    config = tiny_features_config()
    repr_contains = ("decoder_reads='features'",)
    presets = ()


class TestMlpOnly(TestPSVAE):
    config = tiny_mlp_config()
    presets = ()
