"""Tiled decoding: a large image in the memory of a small one.

Overlapping tiles are decoded one by one and blended with a linear ramp. The result is close to the
untiled one, not equal: group norms and attention see one tile at a time. ``benchmarks/tokenizer.py``
prints the largest difference.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from psvae.errors import ConfigError
from psvae.shapes import Images, Latents

__all__ = ["Tiling", "decode_tiled"]


@dataclass(frozen=True)
class Tiling:
    """Size of a tile and step between tiles, in latent cells, (height, width).

    Raises:
        ConfigError: a step is not between 1 and the tile's size.
    """

    tile: tuple[int, int]
    step: tuple[int, int]

    def __post_init__(self) -> None:
        for tile, step in zip(self.tile, self.step, strict=True):
            if not 1 <= step <= tile:
                raise ConfigError(
                    f"tiling has step {self.step} for tiles of {self.tile} cells; wanted 1 <= step <= tile"
                )


def decode_tiled(decoder: Callable[[Latents], Images], latents: Latents, stride: int, tiling: Tiling) -> Images:
    """Decode ``latents`` tile by tile.

    Tiles all have the full size (the last one on each axis is shifted back to the edge), so any decoder
    that takes that size will do.

    Args:
        decoder: ``B Z h w`` → ``B C stride·h stride·w``.
        stride: pixels per cell.
    """
    height, width = latents.shape[-2:]
    tile_h, tile_w = min(tiling.tile[0], height), min(tiling.tile[1], width)
    rows, columns = _starts(height, tile_h, tiling.step[0]), _starts(width, tile_w, tiling.step[1])
    if len(rows) == len(columns) == 1:
        return decoder(latents)
    ramp_h = _ramp(tile_h, tile_h - tiling.step[0], stride, latents)[:, None]
    ramp_w = _ramp(tile_w, tile_w - tiling.step[1], stride, latents)
    weight = ramp_h * ramp_w
    image = total = latents.new_empty(0)  # their shape waits for the first tile
    for top in rows:
        for left in columns:
            tile = decoder(latents[..., top : top + tile_h, left : left + tile_w]).float() * weight
            if image.numel() == 0:
                image = tile.new_zeros(*tile.shape[:2], height * stride, width * stride)
                total = tile.new_zeros(height * stride, width * stride)
            window = (..., slice(top * stride, (top + tile_h) * stride), slice(left * stride, (left + tile_w) * stride))
            image[window] += tile
            total[window] += weight
    return (image / total).to(latents.dtype)


def _starts(size: int, tile: int, step: int) -> list[int]:
    """First cell of each tile on one axis; the last tile ends at the edge."""
    return [*range(0, size - tile, step), size - tile]


def _ramp(tile: int, overlap: int, stride: int, like: Tensor) -> Tensor:
    """Weights of one axis in pixels: rise over the overlap, 1, fall over the overlap; never 0."""
    distance = torch.arange(tile * stride, device=like.device, dtype=torch.float32) + 0.5
    distance = torch.minimum(distance, distance.flip(0))
    return (distance / max(overlap * stride, 1)).clamp(max=1.0)
