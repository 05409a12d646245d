"""image → features, or the parameters of a latent."""

from psvae.encoders.pixel_encoder import PixelEncoder, PixelEncoderConfig
from psvae.encoders.semantic_encoder import EncoderTokens, SemanticEncoder, SemanticEncoderConfig

__all__ = ["EncoderTokens", "PixelEncoder", "PixelEncoderConfig", "SemanticEncoder", "SemanticEncoderConfig"]
