"""image ↔ latent: the Stable-Diffusion-style face."""

from psvae.autoencoders.outputs import DecoderOutput, EncoderOutput, PixelVAEOutput, PSVAEOutput
from psvae.autoencoders.pixel_vae import PixelVAE, PixelVAEConfig
from psvae.autoencoders.psvae import PSVAE, PSVAEConfig
from psvae.autoencoders.reals import ReaLS, load_reals, save_reals

__all__ = [
    "PSVAE",
    "DecoderOutput",
    "EncoderOutput",
    "PSVAEConfig",
    "PSVAEOutput",
    "PixelVAE",
    "PixelVAEConfig",
    "PixelVAEOutput",
    "ReaLS",
    "load_reals",
    "save_reals",
]
