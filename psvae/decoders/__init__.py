"""latent → image."""

from psvae.decoders.pixel_decoder import PixelDecoder, PixelDecoderConfig
from psvae.decoders.tiling import Tiling, decode_tiled

__all__ = ["PixelDecoder", "PixelDecoderConfig", "Tiling", "decode_tiled"]
