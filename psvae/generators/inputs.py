"""What enters the trunk beside latents: σ, and the hidden states of another text model."""

import math

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from psvae.nn.decoder import KeysValues, RMSNorm
from psvae.nn.rope import Rope, rotate
from psvae.shapes import Tokens

__all__ = ["TextProjection", "TimeEmbedding"]

FREQUENCIES = 256  # BAGEL's and DiT's


class TimeEmbedding(nn.Module):
    """σ ``B`` → ``B D``: cosines and sines, then Linear, SiLU, Linear (DiT's, as in BAGEL).

    Args:
        scale: of σ, applied in fp32: bf16 has no room for 0 to 1000.
    """

    def __init__(self, width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.fc1 = nn.Linear(FREQUENCIES, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, sigma: Float[Tensor, " B"], dtype: torch.dtype) -> Float[Tensor, "B D"]:
        half = FREQUENCIES // 2
        rates = torch.exp(-math.log(10000.0) / half * torch.arange(half, device=sigma.device, dtype=torch.float32))
        angles = (sigma.float() * self.scale)[:, None] * rates
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)
        return self.fc2(F.silu(self.fc1(waves)))


class TextProjection(nn.Module):
    """One block's keys and values of a text's hidden states ``B T D`` (Playground v3)."""

    def __init__(self, text_width: int, kv_heads: int, head_dim: int, *, qk_norm: bool, norm_eps: float) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.norm = RMSNorm(text_width, norm_eps)
        self.kv = nn.Linear(text_width, 2 * kv_heads * head_dim)
        self.k_norm = RMSNorm(head_dim, norm_eps) if qk_norm else nn.Identity()

    def forward(self, states: Tokens, rope: Rope) -> KeysValues:
        keys, values = (
            rearrange(part, "B T (kv d) -> B kv T d", d=self.head_dim)
            for part in self.kv(self.norm(states)).chunk(2, dim=-1)
        )
        return rotate(self.k_norm(keys), rope), values
