"""SemanticEncoder: image → features."""

from psvae import SemanticEncoder, SemanticEncoderConfig
from tests.base import ModuleTests
from tests.tiny import images, tiny_encoder_config


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
