"""image → features."""

from psvae.encoders.semantic_encoder import EncoderTokens, SemanticEncoder, SemanticEncoderConfig

__all__ = ["EncoderTokens", "SemanticEncoder", "SemanticEncoderConfig"]
