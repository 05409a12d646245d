"""features ↔ latent."""

from psvae.vae.semantic_vae import SemanticVAE, SemanticVAEConfig

__all__ = ["SemanticVAE", "SemanticVAEConfig"]
