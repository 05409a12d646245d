"""PixelEncoder: image → mean and log-variance of a latent, the convolutional encoder of LDM (Rombach et al. 2022).

image ─conv_in─▶ levels, fine to coarse, ÷2 between them ─▶ middle ─norm, conv_out─▶ parameters
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from psvae.config import Config
from psvae.hub.mixin import HubMixin
from psvae.nn.conv import Downsample, MiddleBlock, ResidualBlock, SpatialAttention, silu
from psvae.shapes import Images, check_dtype, check_images

__all__ = ["PixelEncoder", "PixelEncoderConfig"]


@dataclass(frozen=True)
class PixelEncoderConfig(Config):
    """The encoder of Stable Diffusion's f8 VAE by default; the stride is 2 to the number of levels less one.

    Attributes:
        latent_channels: Z; the output has 2Z channels.
        in_channels: C.
        base_channels: width at full resolution.
        channel_multipliers: width of each level over the base, fine to coarse: LDM's ``ch_mult``.
        num_res_blocks: of each level.
        attention_levels: how many of the coarsest levels attend after each block (SD: 0, LDM f16: 1).
        middle_attention: whether the middle attends.
        norm_groups, norm_eps: of every GroupNorm.
    """

    latent_channels: int = 4
    in_channels: int = 3
    base_channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_levels: int = 0
    middle_attention: bool = True
    norm_groups: int = 32
    norm_eps: float = 1e-6

    def validate(self) -> None:
        for name in ("latent_channels", "in_channels", "base_channels", "num_res_blocks", "norm_groups"):
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
        """Pixels per latent cell, on each axis."""
        return 2 ** (len(self.channel_multipliers) - 1)


class PixelEncoder(nn.Module, HubMixin):
    """Images ``B C H W`` in [-1, 1] → parameters ``B 2Z h w`` of the posterior. H and W are multiples of the stride.

    Activations are channels-last throughout, as in `PixelDecoder`.
    """

    config_class = PixelEncoderConfig

    def __init__(self, config: PixelEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        groups, eps = config.norm_groups, config.norm_eps
        widths = [config.base_channels * m for m in config.channel_multipliers]
        self.conv_in = nn.Conv2d(config.in_channels, config.base_channels, 3, padding=1)
        self.levels = nn.ModuleList()
        width, last = config.base_channels, len(widths) - 1
        for index, channels in enumerate(widths):
            attends = index > last - config.attention_levels
            self.levels.append(
                EncoderLevel(width, channels, config.num_res_blocks, groups, eps, attends, downsamples=index < last)
            )
            width = channels
        self.middle = MiddleBlock(width, groups, eps, config.middle_attention)
        self.norm_out = nn.GroupNorm(groups, width, eps=eps)
        self.conv_out = nn.Conv2d(width, 2 * config.latent_channels, 3, padding=1)

    def forward(self, images: Images) -> Float[Tensor, "B ZZ h w"]:
        """Encode images.

        Raises:
            ShapeError: wrong rank, channels or size, or NaN. DtypeError: integer images, or halves for float32 weights.
        """
        check_images(images, self.config.stride, self.config.in_channels)
        check_dtype(images, self.conv_in, "images")
        x = self.conv_in(images.contiguous(memory_format=torch.channels_last))
        for level in self.levels:
            x = level(x, self.gradient_checkpointing and torch.is_grad_enabled())
        return self.conv_out(silu(self.norm_out(self.middle(x)))).contiguous()

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the residual blocks in backward instead of keeping their activations."""
        self.gradient_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        """Keep activations again."""
        self.gradient_checkpointing = False

    def extra_repr(self) -> str:
        return f"Z={self.config.latent_channels}, stride={self.config.stride}"


class EncoderLevel(nn.Module):
    """Residual blocks at one resolution, each followed by attention where the level attends, then ÷2."""

    def __init__(
        self, in_channels: int, channels: int, depth: int, groups: int, eps: float, attends: bool, downsamples: bool
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ResidualBlock(in_channels if i == 0 else channels, channels, groups, eps) for i in range(depth)
        )
        self.attentions = nn.ModuleList(SpatialAttention(channels, groups, eps) for _ in range(depth if attends else 0))
        self.downsample = Downsample(channels) if downsamples else nn.Identity()

    def forward(self, x: Tensor, recompute: bool) -> Tensor:
        for index, block in enumerate(self.blocks):
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
            if len(self.attentions):
                x = self.attentions[index](x)
        return self.downsample(x)
