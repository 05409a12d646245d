"""The one attention of the package."""

from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from psvae.shapes import Tokens

__all__ = ["SelfAttention", "attention"]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v over ``B heads N d``, by PyTorch's fused kernels. Softmax runs in fp32."""
    return scaled_dot_product_attention(q, k, v)


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
