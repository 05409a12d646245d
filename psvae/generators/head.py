"""The heads: trunk tokens, noisy latents → velocity or clean latents, per token.

`WideHead` is RAE's (arXiv 2510.11690, DiT-DH): two wide blocks that read the noisy latents again, so that the trunk
need not carry the noise through, with the trunk's tokens as each token's own modulation (PS-VAE section 3.4).
"""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from psvae.nn.attention import Backend, attention
from psvae.nn.decoder import RMSNorm, SwiGLU
from psvae.nn.rope import Rope, axial_rope, rotate
from psvae.shapes import Latents, Tokens

__all__ = ["LinearHead", "WideHead", "image_of", "patches_of"]

Patches = Float[Tensor, "B N ppZ"]
Grid = tuple[int, int]


def patches_of(latents: Latents, patch_size: int) -> tuple[Patches, Grid]:
    """``B Z h w`` → ``B N p²Z`` row by row, and how many rows and columns."""
    grid = (latents.shape[2] // patch_size, latents.shape[3] // patch_size)
    return rearrange(latents, "B Z (h p) (w q) -> B (h w) (p q Z)", p=patch_size, q=patch_size), grid


def image_of(patches: Patches, grid: Grid, patch_size: int) -> Latents:
    """`patches_of`, undone."""
    return rearrange(patches, "B (h w) (p q Z) -> B Z (h p) (w q)", h=grid[0], w=grid[1], p=patch_size, q=patch_size)


class LinearHead(nn.Module):
    """One linear layer on the trunk's tokens (BAGEL)."""

    def __init__(self, trunk_width: int, patch_channels: int) -> None:
        super().__init__()
        self.gradient_checkpointing = False  # there is nothing to recompute
        self.out = nn.Linear(trunk_width, patch_channels)

    def forward(
        self, patches: Patches, condition: Tokens, time: Tensor | None, grid: Grid, backend: Backend
    ) -> Patches:
        return self.out(condition)


class WideHead(nn.Module):
    """RAE's DDT head.

    Args:
        final_modulation: RAE modulates the last norm too; the paper's parameter count says that PS-VAE does not.
    """

    def __init__(
        self,
        trunk_width: int,
        patch_channels: int,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
        *,
        norm_eps: float,
        rope_theta: float,
        final_modulation: bool,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.rope = (width // heads, rope_theta)
        self.condition = nn.Linear(trunk_width, width) if trunk_width != width else nn.Identity()
        self.embed = nn.Linear(patch_channels, width)
        self.blocks = nn.ModuleList(WideBlock(width, heads, hidden, norm_eps) for _ in range(depth))
        self.norm = RMSNorm(width, norm_eps)
        self.modulation = nn.Linear(width, 2 * width) if final_modulation else None
        self.out = nn.Linear(width, patch_channels)

    def forward(
        self,
        patches: Patches,
        condition: Tokens,
        time: Float[Tensor, "B D"] | None,
        grid: Grid,
        backend: Backend,
    ) -> Patches:
        """Noisy latents ``B N p²Z`` and the trunk's tokens → ``B N p²Z``.

        Args:
            time: the embedding of σ, added to the trunk's tokens.
        """
        summed = condition if time is None else condition + time[:, None]
        # SiLU before the projection and again before each modulation, as in RAE
        condition = F.silu(self.condition(F.silu(summed)))
        x = self.embed(patches)
        rope = axial_rope(grid, *self.rope, device=x.device)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, condition, rope, backend, use_reentrant=False)
            else:
                x = block(x, condition, rope, backend)
        x = self.norm(x)
        if self.modulation is not None:
            x = _modulate(x, *self.modulation(condition).chunk(2, dim=-1))
        return self.out(x)


class WideBlock(nn.Module):
    """x + g₁ attention(norm(x) (1 + s₁) + b₁), then x + g₂ mlp(norm(x) (1 + s₂) + b₂), token by token."""

    def __init__(self, width: int, heads: int, hidden: int, norm_eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.norm1 = RMSNorm(width, norm_eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = RMSNorm(width, norm_eps)
        self.mlp = SwiGLU(width, hidden, bias=True)

    def forward(self, x: Tokens, condition: Tokens, rope: Rope, backend: Backend) -> Tokens:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=-1)
        y = _modulate(self.norm1(x), shift1, scale1)
        q, k, v = rearrange(self.qkv(y), "B N (three heads d) -> three B heads N d", three=3, heads=self.heads)
        y = attention(rotate(q, rope), rotate(k, rope), v, backend=backend)
        x = torch.addcmul(x, gate1, self.proj(rearrange(y, "B heads N d -> B N (heads d)")))
        return torch.addcmul(x, gate2, self.mlp(_modulate(self.norm2(x), shift2, scale2)))


def _modulate(x: Tokens, shift: Tokens, scale: Tokens) -> Tokens:
    return torch.addcmul(x + shift, x, scale)
