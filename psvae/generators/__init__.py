"""(latents, prefix, σ) → velocity."""

from psvae.generators.config import DeepFusionDiTConfig
from psvae.generators.deep_fusion import DeepFusionDiT, DeepFusionOutput
from psvae.generators.prefix import PrefixCache

__all__ = ["DeepFusionDiT", "DeepFusionDiTConfig", "DeepFusionOutput", "PrefixCache"]
