"""image ↔ latent: the Stable-Diffusion-style face."""

from psvae.autoencoders.outputs import DecoderOutput, EncoderOutput, PSVAEOutput
from psvae.autoencoders.psvae import PSVAE, PSVAEConfig

__all__ = ["PSVAE", "DecoderOutput", "EncoderOutput", "PSVAEConfig", "PSVAEOutput"]
