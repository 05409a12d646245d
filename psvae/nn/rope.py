"""Rotary position embedding (Su et al. 2021), with the two halves of a head as the pairs, as in Llama and Qwen."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from psvae.config import Config

__all__ = ["ImageRope", "Rope", "RopeScaling", "axial_rope", "grid_positions", "rope", "rotate"]

Rope = tuple[Float[Tensor, "#B 1 N half"], Float[Tensor, "#B 1 N half"]]  # cosines and sines, fp32
Positions = Int[Tensor, "B N 3"]  # time, row, column; a word has the same number three times
ImageRope = Literal["shared_index", "1d", "2d", "mrope"]


@dataclass(frozen=True)
class RopeScaling(Config):
    """Llama 3.1's scaling: low frequencies are divided by ``factor``, high ones kept, those between blended."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def validate(self) -> None:
        self.require(self.factor >= 1, "factor", "at least 1")
        self.require(0 < self.low_freq_factor < self.high_freq_factor, "low_freq_factor", "below high_freq_factor")


def rope(
    positions: Positions, head_dim: int, theta: float, image_rope: ImageRope, scaling: RopeScaling | None = None
) -> Rope:
    """Cosine and sine of position times frequency, in fp32: bf16 cannot tell neighbours above 256 apart.

    Each frequency turns by one of the three positions: in ``2d`` row and column in turn, in ``mrope`` Qwen2-VL's
    sections (a quarter time, three eighths row, three eighths column). For words all three are equal, so a
    language model's text is turned as it was in every mode.
    """
    half, device = head_dim // 2, positions.device
    rates = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    if scaling is not None:
        rates = _scaled(rates, scaling)
    index = torch.arange(half, device=device)
    if image_rope == "2d":
        axis = 1 + index % 2
    elif image_rope == "mrope":
        axis = (index >= half // 4).long() + (index >= half // 4 + half * 3 // 8).long()
    else:
        axis = torch.zeros_like(index)
    return _cos_sin(positions.float()[..., axis] * rates)


def _scaled(rates: Tensor, scaling: RopeScaling) -> Tensor:
    turns = scaling.original_max_position_embeddings * rates / (2 * math.pi)  # within the length first trained
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return rates / scaling.factor * (1 - keep) + rates * keep


def grid_positions(
    start: Int[Tensor, " B"], grid: tuple[int, int], image_rope: ImageRope
) -> tuple[Positions, Int[Tensor, " B"]]:
    """Positions of an image's tokens, row by row, and the first one free after it.

    ``shared_index`` gives the whole image one (BAGEL); ``1d`` counts tokens; ``2d`` and ``mrope`` count rows and
    columns from ``start``, and ``mrope`` keeps time there.
    """
    h, w = grid
    row, column = _rows_and_columns(grid, start.device, torch.long)
    still = torch.zeros_like(row)
    if image_rope == "shared_index":
        offsets, length = (still, still, still), 1
    elif image_rope == "1d":
        count = torch.arange(h * w, device=start.device)
        offsets, length = (count, count, count), h * w
    else:
        offsets, length = (still, row, column), max(h, w)
    return start[:, None, None] + torch.stack(offsets, dim=-1), start + length


def axial_rope(grid: tuple[int, int], head_dim: int, theta: float, device: torch.device) -> Rope:
    """RAE's and LightningDiT's: the first half of the frequencies turns by the row, the second by the column."""
    quarter = head_dim // 4
    rates = 1.0 / theta ** (torch.arange(quarter, device=device, dtype=torch.float32) / quarter)
    row, column = _rows_and_columns(grid, device, torch.float32)
    return _cos_sin(torch.cat([row[:, None] * rates, column[:, None] * rates], dim=-1)[None])


def _rows_and_columns(grid: tuple[int, int], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of each token, row by row. By expand: torch.onnx translates repeat_interleave for one grid alone."""
    h, w = (torch.arange(size, device=device, dtype=dtype) for size in grid)
    shape = (h.shape[0], w.shape[0])
    return h[:, None].expand(shape).flatten(), w.expand(shape).flatten()


def _cos_sin(angles: Float[Tensor, "B N half"]) -> Rope:
    return angles.cos()[:, None], angles.sin()[:, None]


def rotate(x: Float[Tensor, "B heads N d"], rope: Rope) -> Float[Tensor, "B heads N d"]:
    """Turn queries or keys. In fp32, returned in their dtype."""
    cos, sin = rope
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
