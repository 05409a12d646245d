"""The block of a decoder-only language model (Qwen2.5, Qwen3, Llama), and its parts."""

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from psvae.nn.attention import Backend, attention
from psvae.nn.rope import Rope, rotate
from psvae.shapes import Tokens

__all__ = ["DecoderBlock", "KeysValues", "RMSNorm", "SwiGLU"]

KeysValues = tuple[Float[Tensor, "B kv _ d"], Float[Tensor, "B kv _ d"]]


class RMSNorm(nn.Module):
    """x / rms(x) · weight on the last axis, in fp32, returned in the dtype of x."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        # autocast would return fp32 from here on (since PyTorch 2.12), and q and k would no longer match v
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps).to(x.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate) · up), gate and up in one matrix."""

    def __init__(self, width: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class DecoderBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with grouped queries and rotary positions.

    Args:
        width: D. heads, kv_heads, head_dim: of the attention. hidden: of the MLP.
        bias: on q, k and v (Qwen2.5).
        qk_norm: RMSNorm of each head's queries and keys (Qwen3).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        hidden: int,
        *,
        bias: bool,
        qk_norm: bool,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.split = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
        self.head_dim = head_dim
        self.norm1 = RMSNorm(width, norm_eps)
        self.qkv = nn.Linear(width, sum(self.split), bias=bias)
        self.q_norm = RMSNorm(head_dim, norm_eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head_dim, norm_eps) if qk_norm else nn.Identity()
        self.proj = nn.Linear(heads * head_dim, width, bias=False)
        self.norm2 = RMSNorm(width, norm_eps)
        self.mlp = SwiGLU(width, hidden, bias=False)

    def forward(
        self,
        x: Tokens,
        rope: Rope,
        past: KeysValues,
        mask: Bool[Tensor, "#B 1 N1 PN"] | None,
        backend: Backend = "sdpa",
        causal: bool = False,
    ) -> tuple[Tokens, KeysValues]:
        """One segment attends to what came before it and to itself.

        Args:
            past: keys and values of the segments before; P may be 0.
            mask: over past and own tokens; None where all are visible.
            causal: in place of a mask, a token sees the past, those before it and itself.

        Returns:
            The tokens, and their own keys and values.
        """
        q, k, v = (
            rearrange(part, "B N (heads d) -> B heads N d", d=self.head_dim)
            for part in self.qkv(self.norm1(x)).split(self.split, dim=-1)
        )
        q, k = rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope)
        keys, values = (torch.cat([before.to(own.dtype), own], dim=2) for before, own in zip(past, (k, v), strict=True))
        y = attention(q, keys, values, mask, backend, causal=causal)
        x = x + self.proj(rearrange(y, "B heads N d -> B N (heads d)"))
        return x + self.mlp(self.norm2(x)), (k, v)
