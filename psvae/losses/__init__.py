"""Losses: pure functions of tensors first, thin modules where a network must be held. They know no model."""

from psvae.losses.adversarial import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_hinge_loss,
    generator_hinge_loss,
    gradient_ratio,
)
from psvae.losses.alignment import alignment_loss, margin_cosine_loss, margin_similarity_loss
from psvae.losses.kl import kl_loss
from psvae.losses.pixel import pixel_loss
from psvae.losses.semantic import cosine_similarity_map, semantic_loss

__all__ = [
    "PatchDiscriminator",
    "adaptive_weight",
    "alignment_loss",
    "cosine_similarity_map",
    "discriminator_hinge_loss",
    "generator_hinge_loss",
    "gradient_ratio",
    "kl_loss",
    "margin_cosine_loss",
    "margin_similarity_loss",
    "pixel_loss",
    "semantic_loss",
]
