"""PixelDecoder: latent → image."""

from psvae import PixelDecoder, PixelDecoderConfig
from tests.base import ModuleTests
from tests.tiny import latents, tiny_decoder_config


class TestPixelDecoder(ModuleTests):
    module_class = PixelDecoder
    config = tiny_decoder_config()
    good_sizes = ((4, 4), (3, 5), (1, 7), (1, 1))
    repr_contains = ("Z=8", "stride=8")
    presets = (("pixel_decoder_96", PixelDecoderConfig()), ("pixel_decoder_small_96", PixelDecoderConfig.small()))

    def inputs(self, height, width):
        return (latents(2, height, width),)

    def expected_shapes(self, height, width):
        return [(2, 3, 8 * height, 8 * width)]
