"""Fixed position tables."""

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["sincos_positions"]


def sincos_positions(width: int, grid: tuple[int, int], span: float | None = None) -> Float[Tensor, "1 N1 D"]:
    """ViT-MAE's fixed table, the column's half first, and a zero row for the learned token.

    Args:
        span: the coordinates of an axis run from 0 to below ``span``, whatever the grid; None: they are 0, 1, 2, ...
    """
    rates = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))

    def wave(coordinate: Tensor) -> Tensor:
        angles = coordinate.flatten()[:, None] * rates
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    axes = [torch.arange(size, dtype=torch.float64) * (1.0 if span is None else span / size) for size in grid]
    row, column = torch.meshgrid(*axes, indexing="ij")
    table = torch.cat([wave(column), wave(row)], dim=1)
    return torch.cat([torch.zeros_like(table[:1]), table])[None].float()
