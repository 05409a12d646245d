"""PixelDecoder: latent → image, the convolutional decoder of LDM (Rombach et al. 2022; paper, section 4.1, D_P).

latent ─conv_in─▶ middle ─▶ levels, coarse to fine, ×2 between them ─norm, conv_out─▶ image
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from psvae.config import Config
from psvae.hub.mixin import HubMixin
from psvae.nn.conv import MiddleBlock, ResidualBlock, SpatialAttention, Upsample, silu
from psvae.shapes import Images, Latents, check_dtype, check_map

__all__ = ["PixelDecoder", "PixelDecoderConfig"]


@dataclass(frozen=True)
class PixelDecoderConfig(Config):
    """LDM's f16 decoder by default; the stride is 2 to the number of levels less one.

    Attributes:
        latent_channels: channels of what it reads: Z, or D when it reads features.
        out_channels: C.
        base_channels: width at full resolution.
        channel_multipliers: width of each level over the base, fine to coarse, as LDM writes ``ch_mult``.
        num_res_blocks: of the encoder it mirrors; each decoder level has one more.
        attention_levels: how many of the coarsest levels attend after each block (LDM f16: 1).
        middle_attention: whether the middle attends.
        norm_groups, norm_eps: of every GroupNorm.
    """

    latent_channels: int = 96
    out_channels: int = 3
    base_channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    attention_levels: int = 1
    middle_attention: bool = True
    norm_groups: int = 32
    norm_eps: float = 1e-6

    def validate(self) -> None:
        for name in ("latent_channels", "out_channels", "base_channels", "num_res_blocks", "norm_groups"):
            self.require(getattr(self, name) >= 1, name, "at least 1")
        multipliers = self.channel_multipliers
        self.require(len(multipliers) >= 1 and min(multipliers) >= 1, "channel_multipliers", "one or more, each >= 1")
        self.require(self.norm_eps > 0, "norm_eps", "a positive number")
        self.require(0 <= self.attention_levels <= len(multipliers), "attention_levels", f"0 to {len(multipliers)}")
        self.require(
            all(self.base_channels * m % self.norm_groups == 0 for m in multipliers),
            "norm_groups",
            f"a divisor of every level's width, base_channels {self.base_channels} x {multipliers}",
        )

    @property
    def stride(self) -> int:
        """Pixels painted per latent cell, on each axis."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @classmethod
    def small(cls, latent_channels: int = 96) -> "PixelDecoderConfig":
        """Half the width: a quarter of the parameters, for weak GPUs."""
        return cls(latent_channels=latent_channels, base_channels=64)


class PixelDecoder(nn.Module, HubMixin):
    """Latents ``B Z h w`` → images ``B C H W``, nominally in [-1, 1], never clamped. Any grid, rectangles too.

    Activations are channels-last throughout: that is where the convolutions of CPUs and tensor cores
    are fast (``benchmarks/tokenizer.py``).
    """

    config_class = PixelDecoderConfig

    def __init__(self, config: PixelDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        groups, eps = config.norm_groups, config.norm_eps
        widths = [config.base_channels * m for m in config.channel_multipliers]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.middle = MiddleBlock(widths[-1], groups, eps, config.middle_attention)
        self.levels = nn.ModuleList()
        width = widths[-1]
        for index in reversed(range(len(widths))):
            attends = index >= len(widths) - config.attention_levels
            self.levels.append(
                DecoderLevel(width, widths[index], config.num_res_blocks + 1, groups, eps, attends, upsamples=index > 0)
            )
            width = widths[index]
        self.norm_out = nn.GroupNorm(groups, width, eps=eps)
        self.conv_out = nn.Conv2d(width, config.out_channels, 3, padding=1)

    def forward(self, latents: Latents) -> Images:
        """Decode raw latents.

        Raises:
            ShapeError: wrong rank or channel count. DtypeError: integer latents, or halves for float32 weights.
        """
        check_map(latents, self.config.latent_channels, "latents")
        check_dtype(latents, self.conv_in, "latents")
        x = self.conv_in(latents.contiguous(memory_format=torch.channels_last))
        x = self.middle(x)
        for level in self.levels:
            x = level(x, self.gradient_checkpointing and torch.is_grad_enabled())
        return self.conv_out(silu(self.norm_out(x))).contiguous()

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the residual blocks in backward instead of keeping their activations."""
        self.gradient_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        """Keep activations again."""
        self.gradient_checkpointing = False

    def extra_repr(self) -> str:
        return f"Z={self.config.latent_channels}, stride={self.config.stride}"


class DecoderLevel(nn.Module):
    """Residual blocks at one resolution, each followed by attention where the level attends, then ×2."""

    def __init__(
        self, in_channels: int, channels: int, depth: int, groups: int, eps: float, attends: bool, upsamples: bool
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ResidualBlock(in_channels if i == 0 else channels, channels, groups, eps) for i in range(depth)
        )
        self.attentions = nn.ModuleList(SpatialAttention(channels, groups, eps) for _ in range(depth if attends else 0))
        self.upsample = Upsample(channels) if upsamples else nn.Identity()

    def forward(self, x: Tensor, recompute: bool) -> Tensor:
        for index, block in enumerate(self.blocks):
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
            if len(self.attentions):
                x = self.attentions[index](x)
        return self.upsample(x)
