"""The one attention of the package."""

from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from psvae.config import one_of
from psvae.errors import MissingDependencyError
from psvae.shapes import Tokens

__all__ = ["Backend", "SelfAttention", "attention", "check_backend"]

Backend = Literal["sdpa", "xformers"]


def attention(
    q: Float[Tensor, "B heads N d"],
    k: Float[Tensor, "B kv P d"],
    v: Float[Tensor, "B kv P d"],
    mask: Bool[Tensor, "#B 1 N1 P"] | None = None,
    backend: Backend = "sdpa",
    *,
    causal: bool = False,
) -> Float[Tensor, "B heads N d"]:
    """softmax(q kᵀ / √d) v, by fused kernels; softmax runs in fp32.

    With fewer heads in k and v than in q (grouped queries), the queries of a group are laid one behind the other:
    every kernel takes that, mask or not, and nothing is repeated.

    Args:
        mask: True where a query may look; its third axis is N, or 1 for all queries alike.
        causal: in place of a mask, the last query looks at all keys, the one before it at all but the last, …
    """
    group, N, P = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    if causal and N == P and backend == "sdpa":  # no mask in memory; grouped queries would lose their order
        k, v = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (k, v))
        return scaled_dot_product_attention(q, k, v, is_causal=True)
    if causal:  # causal_lower_right of PyTorch is a prototype, and makes this mask too where no fused kernel fits
        mask = torch.ones(1, 1, N, P, dtype=torch.bool, device=q.device).tril(P - N)
    if group > 1:
        q = rearrange(q, "B (kv group) N d -> B kv (group N) d", group=group)
        if mask is not None and mask.shape[2] > 1:
            mask = mask.repeat(1, 1, group, 1)
    out = _xformers(q, k, v, mask) if backend == "xformers" else scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return rearrange(out, "B kv (group N) d -> B (kv group) N d", group=group) if group > 1 else out


def _xformers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]

    bias = None
    if mask is not None:
        P = k.shape[2]
        bias = torch.zeros(*mask.shape[:3], -(-P // 8) * 8, dtype=q.dtype, device=q.device)  # rows aligned to 8
        bias = bias[..., :P].masked_fill_(~mask, float("-inf")).expand(len(q), q.shape[1], q.shape[2], -1)
    rows = (rearrange(x, "B heads N d -> B N heads d") for x in (q, k, v))
    return rearrange(memory_efficient_attention(*rows, attn_bias=bias), "B N heads d -> B heads N d")


def check_backend(backend: Backend, device: torch.device) -> None:
    """Run one small attention, so that a back-end fails when it is chosen and not in the middle of training.

    Raises:
        ConfigError: of another name. MissingDependencyError: xformers is absent, or does not run on this device.
    """
    one_of("the attention back-end", backend, Backend)
    if backend == "sdpa":
        return
    try:
        x = torch.zeros(1, 1, 8, 64, device=device, dtype=torch.float16)
        _xformers(x, x, x, None)
    except (ImportError, NotImplementedError, RuntimeError) as error:
        raise MissingDependencyError(
            f"xformers was asked for on {device} and cannot run ({error}); "
            "pip install 'psvae[xformers]' on a machine with a GPU, or use \"sdpa\""
        ) from error


class SelfAttention(nn.Module):
    """Multi-head self-attention over tokens ``B N D``. Parameter names are timm's."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tokens) -> Tokens:
        q, k, v = rearrange(self.qkv(x), "B N (three heads d) -> three B heads N d", three=3, heads=self.num_heads)
        return self.proj(rearrange(attention(q, k, v), "B heads N d -> B N (heads d)"))
