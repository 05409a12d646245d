"""The convolutional blocks of the LDM autoencoder (Rombach et al. 2022)."""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from psvae.nn.attention import attention

__all__ = ["Downsample", "MiddleBlock", "ResidualBlock", "SpatialAttention", "Upsample", "silu"]


def silu(x: Tensor) -> Tensor:
    """SiLU of a tensor that nobody else holds: in place where no gradient needs the input."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1×1 shortcut where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, norm_groups: int, norm_eps: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups, in_channels, eps=norm_eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(norm_groups, out_channels, eps=norm_eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv1(silu(self.norm1(x))))  # one expression, so that three maps are alive, not four
        return self.conv2(silu(y)).add_(self.shortcut(x))


class SpatialAttention(nn.Module):
    """Single-head self-attention over the cells of a map, residual."""

    def __init__(self, channels: int, norm_groups: int, norm_eps: float) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, channels, eps=norm_eps)
        self.q = nn.Linear(channels, channels)
        self.k = nn.Linear(channels, channels)
        self.v = nn.Linear(channels, channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(self.norm(x), "B D h w -> B 1 (h w) D")
        y = self.proj(attention(self.q(tokens), self.k(tokens), self.v(tokens)))
        return x + rearrange(y, "B 1 (h w) D -> B D h w", h=x.shape[-2])


class Upsample(nn.Module):
    """Nearest-neighbour ×2, then a 3×3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Downsample(nn.Module):
    """3×3 convolution of stride 2, padded below and to the right alone, as LDM does."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class MiddleBlock(nn.Module):
    """Residual block, attention (or none), residual block, at the latent's resolution."""

    def __init__(self, channels: int, groups: int, eps: float, attends: bool) -> None:
        super().__init__()
        self.block1 = ResidualBlock(channels, channels, groups, eps)
        self.attention = SpatialAttention(channels, groups, eps) if attends else nn.Identity()
        self.block2 = ResidualBlock(channels, channels, groups, eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.block2(self.attention(self.block1(x)))
