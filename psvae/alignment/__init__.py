"""Latent → features: what a latent says of the picture, read out by two small networks."""

from psvae.alignment.alignment_net import AlignmentNet, AlignmentNetConfig, AlignmentOutput

__all__ = ["AlignmentNet", "AlignmentNetConfig", "AlignmentOutput"]
