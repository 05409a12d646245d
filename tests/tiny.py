"""The smallest real modules: the same classes and code paths as the presets, in milliseconds on one core.

One encoder (stride 8, D = 48), one SemanticVAE (Z = 8), one PixelDecoder, and the PSVAEs made of them.
Builders take the configuration's fields to change, draw the initial weights under a fixed seed without
touching the global one, and return the module in eval mode.
"""

import math
import zlib
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from psvae import (
    PSVAE,
    PixelDecoder,
    PixelDecoderConfig,
    PixelVAE,
    PixelVAEConfig,
    PSVAEConfig,
    SemanticEncoder,
    SemanticEncoderConfig,
    SemanticVAE,
    SemanticVAEConfig,
)
from psvae.encoders import PixelEncoderConfig

STRIDE, FEATURE_DIM, LATENT_CHANNELS = 8, 48, 8

M = TypeVar("M", bound=nn.Module)


def tiny_encoder_config(**fields: Any) -> SemanticEncoderConfig:
    """A ViT of two blocks with a class token; patch 8, stride 8, D = 48, native at 32 x 32."""
    model_args = {"img_size": 32, "patch_size": 8, "embed_dim": FEATURE_DIM, "depth": 2, "num_heads": 3}
    default = {"name": "vit_tiny_patch16_224", "model_args": model_args, "stride": STRIDE}
    return SemanticEncoderConfig(**{**default, **fields})


def tiny_vae_config(**fields: Any) -> SemanticVAEConfig:
    """One block on each side; D = 48, Z = 8."""
    default = {
        "feature_dim": FEATURE_DIM,
        "latent_channels": LATENT_CHANNELS,
        "depth": 1,
        "num_heads": 3,
        "mlp_dim": 96,
    }
    return SemanticVAEConfig(**{**default, **fields})


def tiny_decoder_config(**fields: Any) -> PixelDecoderConfig:
    """Four levels, so stride 8; Z = 8."""
    default = {
        "latent_channels": LATENT_CHANNELS,
        "base_channels": 16,
        "channel_multipliers": (1, 1, 2, 2),
        "norm_groups": 8,
    }
    return PixelDecoderConfig(**{**default, **fields})


def tiny_psvae_config(**fields: Any) -> PSVAEConfig:
    """The paper's wiring (S-VAE until it is trained on pixels): the decoder reads the latent."""
    default = {
        "encoder": tiny_encoder_config(),
        "vae": tiny_vae_config(),
        "decoder": tiny_decoder_config(),
        "sample_size": 32,
    }
    return PSVAEConfig(**{**default, **fields})


def tiny_rae_config(**fields: Any) -> PSVAEConfig:
    """RAE: no SemanticVAE, the features are the latents."""
    return tiny_psvae_config(**{"vae": None, "decoder": tiny_decoder_config(latent_channels=FEATURE_DIM), **fields})


def tiny_features_config(**fields: Any) -> PSVAEConfig:
    """The decoder reads the rebuilt features (Table 5)."""
    decoder = tiny_decoder_config(latent_channels=FEATURE_DIM)
    return tiny_psvae_config(**{"decoder": decoder, "decoder_reads": "features", **fields})


def tiny_mlp_config(**fields: Any) -> PSVAEConfig:
    """No blocks in the SemanticVAE, its two-layer MLPs alone (Table 5)."""
    return tiny_psvae_config(**{"vae": tiny_vae_config(depth=0), **fields})


PSVAE_VARIANTS = {
    "psvae": tiny_psvae_config,
    "rae": tiny_rae_config,
    "features": tiny_features_config,
    "mlp": tiny_mlp_config,
}


def tiny_pixel_vae_config(**fields: Any) -> PixelVAEConfig:
    """SD's architecture in small: stride 8, Z = 8, no attention but the middle's."""
    shape = {"latent_channels": 8, "base_channels": 16, "channel_multipliers": (1, 1, 2, 2), "norm_groups": 8}
    shape |= {"num_res_blocks": 1, "attention_levels": 0}
    default = {"encoder": PixelEncoderConfig(**shape), "decoder": PixelDecoderConfig(**shape), "sample_size": 32}
    return PixelVAEConfig(**{**default, **fields})


def build(module_class: type[M], config: Any, seed: int = 0) -> M:
    """``module_class(config)`` in eval mode, with initial weights drawn under ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return module_class(config).eval()


def tiny_encoder(**fields: Any) -> SemanticEncoder:
    return build(SemanticEncoder, tiny_encoder_config(**fields))


def tiny_vae(**fields: Any) -> SemanticVAE:
    return build(SemanticVAE, tiny_vae_config(**fields))


def tiny_decoder(**fields: Any) -> PixelDecoder:
    return build(PixelDecoder, tiny_decoder_config(**fields))


def tiny_pixel_vae(**fields: Any) -> PixelVAE:
    return build(PixelVAE, tiny_pixel_vae_config(**fields))


def tiny_psvae(variant: str = "psvae", **fields: Any) -> PSVAE:
    """``variant``: a key of ``PSVAE_VARIANTS``."""
    return build(PSVAE, PSVAE_VARIANTS[variant](**fields))


def images(batch: int = 2, height: int = 32, width: int = 32, seed: int = 0) -> Tensor:
    """``B 3 H W``, uniform in [-1, 1]."""
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2.0 - 1.0


def features(batch: int = 2, height: int = 4, width: int = 4, seed: int = 0) -> Tensor:
    """``B D h w``, standard normal."""
    return torch.randn(batch, FEATURE_DIM, height, width, generator=torch.Generator().manual_seed(seed))


def latents(batch: int = 2, height: int = 4, width: int = 4, seed: int = 0, channels: int = LATENT_CHANNELS) -> Tensor:
    """``B Z h w``, standard normal."""
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def fill_weights(module: M) -> M:
    """Set every parameter to a fixed function of its name and index, so that stored numbers outlive the
    random number generators and initialisers of torch and timm.

    Norm weights, LayerScales and position tables get values that matter (not 1 and 0): an implementation that
    ignores one of them gives other numbers.
    """
    for name, parameter in module.named_parameters():
        index = torch.arange(parameter.numel(), dtype=torch.float64)
        phase = zlib.crc32(name.encode()) % 1000
        wave = torch.sin(index * 12.9898 + phase) * 43758.5453  # the shader-writer's hash, in float64
        noise = (wave - wave.floor()).view(parameter.shape) * 2.0 - 1.0  # in [-1, 1)
        if parameter.ndim >= 2 and not name.endswith(("pos_embed", "token")):
            fan_in = parameter[0].numel()
            value = noise * math.sqrt(3.0 / fan_in)
        elif name.endswith(("weight", "gamma")):  # of a norm or a LayerScale
            value = 1.0 + 0.3 * noise
        else:  # biases, tokens, position tables
            value = 0.3 * noise
        parameter.copy_(value)
    return module
