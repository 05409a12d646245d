"""The pre-norm ViT block and the MLP, with timm's parameter names so that encoder blocks copy over."""

from typing import Literal

import torch
from torch import Tensor, nn

from psvae.nn.attention import SelfAttention
from psvae.shapes import Tokens

__all__ = ["Activation", "LayerScale", "Mlp", "TransformerBlock"]

Activation = Literal["gelu", "gelu_tanh"]


class Mlp(nn.Module):
    """Linear → GELU → Linear on the last axis."""

    def __init__(self, width: int, hidden: int, out: int, activation: Activation = "gelu") -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU(approximate="tanh" if activation == "gelu_tanh" else "none")
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class LayerScale(nn.Module):
    """x · γ, one learned γ per channel (DINOv2's blocks)."""

    def __init__(self, width: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), init))

    def forward(self, x: Tokens) -> Tokens:
        return x * self.gamma


class TransformerBlock(nn.Module):
    """x + ls1(attention(norm(x))), then x + ls2(mlp(norm(x))): the block of DINOv2 and SigLIP2.

    Args:
        width: D.
        mlp_width: hidden width of the MLP.
        layer_scale: initial γ, or ``None`` for blocks without LayerScale (SigLIP2).
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_width: int,
        layer_scale: float | None,
        activation: Activation,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = SelfAttention(width, num_heads)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = Mlp(width, mlp_width, width, activation)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)

    def forward(self, x: Tokens) -> Tokens:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


def init_linear(module: nn.Module) -> None:
    """ViT initialisation for ``module.apply``: truncated normal of std 0.02, biases at zero."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
