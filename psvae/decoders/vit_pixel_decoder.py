"""ViTPixelDecoder: latent → image by a Vision Transformer, the decoder of RAE (arXiv 2510.11690), which is ViT-MAE's.

latent ─embed─▶ tokens, [learned token, patches] + positions ─▶ blocks ─norm, predict─▶ patches ─▶ image
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from psvae.config import Config
from psvae.errors import ShapeError
from psvae.hub.keymaps.rae import RAE_DECODER
from psvae.hub.mixin import HubMixin
from psvae.nn.positions import sincos_positions
from psvae.nn.transformer import TransformerBlock, init_linear
from psvae.shapes import Images, Latents, check_dtype, check_map

__all__ = ["ViTPixelDecoder", "ViTPixelDecoderConfig"]

RGB = tuple[float, float, float]


@dataclass(frozen=True)
class ViTPixelDecoderConfig(Config):
    """RAE's ViT-XL decoder for DINOv2-B features by default.

    Attributes:
        latent_channels: Z; RAE's latents are the features, so D.
        width, depth, num_heads, mlp_dim: of the blocks.
        patch_size: pixels painted per token, on each axis: the stride.
        grid: (h, w), the only grid it takes: its position table is fixed.
        norm_eps: of every LayerNorm.
        output_mean, output_std: per colour; it paints images normalised by them, as the encoder reads.
    """

    latent_channels: int = 768
    width: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_dim: int = 4096
    patch_size: int = 16
    grid: tuple[int, int] = (16, 16)
    norm_eps: float = 1e-12
    output_mean: RGB = (0.485, 0.456, 0.406)
    output_std: RGB = (0.229, 0.224, 0.225)

    def validate(self) -> None:
        for name in ("latent_channels", "depth", "num_heads", "mlp_dim", "patch_size"):
            self.require(getattr(self, name) >= 1, name, "at least 1")
        fits = self.width >= 4 and self.width % 4 == 0 and self.width % self.num_heads == 0
        self.require(fits, "width", f"a multiple of 4 and of num_heads {self.num_heads}")
        self.require(min(self.grid) >= 1, "grid", "two numbers of at least 1")
        self.require(self.norm_eps > 0, "norm_eps", "a positive number")
        self.require(min(self.output_std) > 0, "output_std", "three positive numbers")

    @property
    def stride(self) -> int:
        """Pixels painted per latent cell, on each axis."""
        return self.patch_size

    @property
    def out_channels(self) -> int:
        """C."""
        return 3

    @classmethod
    def base(cls, latent_channels: int = 768) -> "ViTPixelDecoderConfig":
        """RAE's ViT-B layout."""
        return cls(latent_channels, width=768, depth=12, num_heads=12, mlp_dim=3072)

    @classmethod
    def large(cls, latent_channels: int = 768) -> "ViTPixelDecoderConfig":
        """RAE's ViT-L layout."""
        return cls(latent_channels, width=1024, depth=24, num_heads=16, mlp_dim=4096)

    @classmethod
    def xlarge(cls, latent_channels: int = 768) -> "ViTPixelDecoderConfig":
        """RAE's ViT-XL layout, the one of its published decoders."""
        return cls(latent_channels)


class ViTPixelDecoder(nn.Module, HubMixin):
    """Latents ``B Z h w`` → images ``B 3 H W``, nominally in [-1, 1], never clamped. One grid only, ``config.grid``.

    `from_pretrained` also reads RAE's decoder files; heads follow from the width there, or are passed as
    ``num_heads=``, and ``output_mean=``, ``output_std=`` where the encoder is not normalised by ImageNet's.

    Attributes:
        positions: ``1 1+N width``, part of the state dict: a checkpoint's own table is kept.
    """

    config_class = ViTPixelDecoderConfig
    foreign_formats = (RAE_DECODER,)
    positions: Tensor
    output_mean: Tensor
    output_std: Tensor

    def __init__(self, config: ViTPixelDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.embed = nn.Linear(config.latent_channels, config.width)
        self.token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.register_buffer("positions", sincos_positions(config.width, config.grid))
        self.blocks = nn.ModuleList(
            TransformerBlock(config.width, config.num_heads, config.mlp_dim, None, "gelu", config.norm_eps)
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.predict = nn.Linear(config.width, config.patch_size**2 * config.out_channels)
        self.apply(init_linear)
        # a build on the meta device must still hold these numbers: no checkpoint brings them
        device = "cpu" if torch.empty(0).is_meta else None  # torch 2.7 does not tell its default in a `with`
        for name in ("output_mean", "output_std"):
            values = torch.tensor(getattr(config, name), device=device).view(3, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def forward(self, latents: Latents) -> Images:
        """Decode raw latents.

        Raises:
            ShapeError: wrong rank, channel count or grid. DtypeError: integer latents, or halves for float32
                weights.
        """
        check_map(latents, self.config.latent_channels, "latents")
        check_dtype(latents, self.embed, "latents")
        grid = tuple(latents.shape[-2:])
        if grid != self.config.grid:
            raise ShapeError(
                f"latents have grid {grid}; this decoder paints {self.config.grid} alone, its position table is fixed: "
                f"use images of {self.config.grid[0] * self.config.stride} x {self.config.grid[1] * self.config.stride}"
            )
        patches = self.embed(rearrange(latents, "B Z h w -> B (h w) Z"))
        tokens = torch.cat([self.token.expand(patches.shape[0], -1, -1), patches], dim=1) + self.positions
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, use_reentrant=False)
            else:
                tokens = block(tokens)
        pixels = self.predict(self.norm(tokens)[:, 1:])
        image = rearrange(pixels, "B (h w) (p q C) -> B C (h p) (w q)", h=grid[0], p=self.config.patch_size, C=3)
        return (image * self.output_std + self.output_mean) * 2.0 - 1.0

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the blocks in backward instead of keeping their activations."""
        self.gradient_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        """Keep activations again."""
        self.gradient_checkpointing = False

    def extra_repr(self) -> str:
        return f"Z={self.config.latent_channels}, grid={self.config.grid}, stride={self.config.stride}"
