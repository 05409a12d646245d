"""latent → image."""

from psvae.decoders.pixel_decoder import PixelDecoder, PixelDecoderConfig
from psvae.decoders.tiling import Tiling, decode_tiled
from psvae.decoders.vit_pixel_decoder import ViTPixelDecoder, ViTPixelDecoderConfig

__all__ = [
    "PixelDecoder",
    "PixelDecoderConfig",
    "Tiling",
    "ViTPixelDecoder",
    "ViTPixelDecoderConfig",
    "decode_tiled",
]
