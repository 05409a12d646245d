"""Fixed position tables."""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

__all__ = ["sincos_grid", "sincos_positions"]


def sincos_grid(
    width: int,
    grid: tuple[int, int],
    span: float | None = None,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "1 N D"]:
    """ViT-MAE's fixed table, row by row, the column's half first.

    Args:
        span: the coordinates of an axis run from 0 to below ``span``, whatever the grid; None: they are 0, 1, 2, ...
    """
    rates = 10000.0 ** -(torch.arange(width // 4, device=device, dtype=dtype) / (width // 4))
    axes = [torch.arange(size, device=device, dtype=dtype) * (1.0 if span is None else span / size) for size in grid]
    h, w = (axis[:, None] * rates for axis in axes)
    row, column = (torch.cat([angles.sin(), angles.cos()], dim=1) for angles in (h, w))
    rows, columns = row.shape[0], column.shape[0]  # len() would be a constant of an exported graph
    table = torch.cat([column[None].expand(rows, -1, -1), row[:, None].expand(-1, columns, -1)], dim=-1)
    return rearrange(table, "h w D -> 1 (h w) D")


def sincos_positions(width: int, grid: tuple[int, int], span: float | None = None) -> Float[Tensor, "1 N1 D"]:
    """`sincos_grid` with a zero row in front, for the learned token, computed in fp64 as ViT-MAE does."""
    table = sincos_grid(width, grid, span, dtype=torch.float64)
    return torch.cat([torch.zeros_like(table[:, :1]), table], dim=1).float()
