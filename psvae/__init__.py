"""psvae: image latents that also carry meaning.

The data's path, and the module that walks each step of it::

    image ─SemanticEncoder─▶ features ─SemanticVAE─▶ latent ─PixelDecoder─▶ image
                             [source, text, noisy latent] ─DeepFusionDiT─▶ velocity
    image ─PixelVAE─▶ latent ─AlignmentNet─▶ features

`PSVAE` wires the first three behind the face of a Stable-Diffusion-style VAE; `flow` integrates the velocity.
Names are resolved on first use, so that ``import psvae`` costs no more than ``import torch``.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "PSVAE": "psvae.autoencoders",
    "PSVAEConfig": "psvae.autoencoders",
    "PSVAEOutput": "psvae.autoencoders",
    "PixelVAE": "psvae.autoencoders",
    "PixelVAEConfig": "psvae.autoencoders",
    "PixelVAEOutput": "psvae.autoencoders",
    "SemanticEncoder": "psvae.encoders",
    "SemanticEncoderConfig": "psvae.encoders",
    "SemanticVAE": "psvae.vae",
    "SemanticVAEConfig": "psvae.vae",
    "PixelDecoder": "psvae.decoders",
    "PixelDecoderConfig": "psvae.decoders",
    "ViTPixelDecoder": "psvae.decoders",
    "ViTPixelDecoderConfig": "psvae.decoders",
    "AlignmentNet": "psvae.alignment",
    "AlignmentNetConfig": "psvae.alignment",
    "AlignmentOutput": "psvae.alignment",
    "load_reals": "psvae.autoencoders",
    "save_reals": "psvae.autoencoders",
    "DeepFusionDiT": "psvae.generators",
    "DeepFusionDiTConfig": "psvae.generators",
    "PrefixCache": "psvae.generators",
    "DiagonalGaussian": "psvae.latents",
    "LatentSpec": "psvae.latents",
    "fit_latent_statistics": "psvae.latents",
    "load_latent_statistics": "psvae.hub.statistics",
    "PSVAEError": "psvae.errors",
    "flow": "psvae.flow",
    "losses": "psvae.losses",
}

# Faces for other libraries, under the names that diffusers' pipelines write; they need psvae[diffusers].
_INTEGRATIONS = {
    "AutoencoderPSVAE": "psvae.integrations.diffusers",
    "AutoencoderPixelVAE": "psvae.integrations.diffusers",
    "ModelMixin": "psvae.integrations.diffusers",  # pipelines look it up beside the class that they load
}

__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from psvae import flow as flow
    from psvae import losses as losses
    from psvae.alignment import AlignmentNet as AlignmentNet
    from psvae.alignment import AlignmentNetConfig as AlignmentNetConfig
    from psvae.alignment import AlignmentOutput as AlignmentOutput
    from psvae.autoencoders import PSVAE as PSVAE
    from psvae.autoencoders import PixelVAE as PixelVAE
    from psvae.autoencoders import PixelVAEConfig as PixelVAEConfig
    from psvae.autoencoders import PixelVAEOutput as PixelVAEOutput
    from psvae.autoencoders import PSVAEConfig as PSVAEConfig
    from psvae.autoencoders import PSVAEOutput as PSVAEOutput
    from psvae.autoencoders import load_reals as load_reals
    from psvae.autoencoders import save_reals as save_reals
    from psvae.decoders import PixelDecoder as PixelDecoder
    from psvae.decoders import PixelDecoderConfig as PixelDecoderConfig
    from psvae.decoders import ViTPixelDecoder as ViTPixelDecoder
    from psvae.decoders import ViTPixelDecoderConfig as ViTPixelDecoderConfig
    from psvae.encoders import SemanticEncoder as SemanticEncoder
    from psvae.encoders import SemanticEncoderConfig as SemanticEncoderConfig
    from psvae.errors import PSVAEError as PSVAEError
    from psvae.generators import DeepFusionDiT as DeepFusionDiT
    from psvae.generators import DeepFusionDiTConfig as DeepFusionDiTConfig
    from psvae.generators import PrefixCache as PrefixCache
    from psvae.hub.statistics import load_latent_statistics as load_latent_statistics
    from psvae.integrations.diffusers import AutoencoderPixelVAE as AutoencoderPixelVAE
    from psvae.integrations.diffusers import AutoencoderPSVAE as AutoencoderPSVAE
    from psvae.latents import DiagonalGaussian as DiagonalGaussian
    from psvae.latents import LatentSpec as LatentSpec
    from psvae.latents import fit_latent_statistics as fit_latent_statistics
    from psvae.vae import SemanticVAE as SemanticVAE
    from psvae.vae import SemanticVAEConfig as SemanticVAEConfig


def __getattr__(name: str) -> Any:
    home = _HOME.get(name) or _INTEGRATIONS.get(name)
    if home is None:
        raise AttributeError(f"module 'psvae' has no attribute {name!r}; it has {', '.join(sorted(_HOME))}")
    module = importlib.import_module(home)
    return module if home == f"psvae.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
