"""Which tokens of a text are words: the tokenizer's mask, items that go without, and the words' positions."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from psvae.errors import ShapeError
from psvae.shapes import readable

__all__ = ["causal_mask", "read_mask", "without", "word_positions"]


def read_mask(attention_mask: Tensor) -> Bool[Tensor, "B T"]:
    """A tokenizer's mask → True for words. Values are read in eager mode alone.

    Raises:
        ShapeError: other numbers than 0 and 1, such as those of a mask to be added to scores.
    """
    if attention_mask.dtype != torch.bool and readable(attention_mask):
        strange = attention_mask[(attention_mask != 0) & (attention_mask != 1)]
        if len(strange):
            value = strange[0].item()
            hint = ": a mask that is added to scores becomes (mask == 0)" if value < 0 else ""
            raise ShapeError(f"attention_mask holds {value:.4g}; wanted 1 for words, 0 for padding{hint}")
    return attention_mask.bool()


def without(visible: Tensor | None, drop: Tensor | None, length: int) -> Bool[Tensor, "B T"] | None:
    """The visible tokens of the items that keep theirs; None where all are."""
    if drop is None:
        return visible
    kept = (~drop)[:, None].expand(-1, length)
    return kept if visible is None else visible & kept


def word_positions(
    start: Int[Tensor, " B"], length: int, visible: Bool[Tensor, "B T"] | None
) -> tuple[Int[Tensor, "B T 3"], Int[Tensor, " B"]]:
    """Rotary positions of words, padding not counted, and the first one free after them."""
    if visible is None:
        count = torch.arange(1, length + 1, device=start.device).expand(len(start), -1)
    else:
        count = visible.cumsum(dim=1)
    positions = start[:, None] + (count - 1).clamp(min=0)
    return positions[..., None].expand(-1, -1, 3), start + count[:, -1]


def causal_mask(
    before: Bool[Tensor, "B P"], length: int, visible: Bool[Tensor, "B T"] | None
) -> Bool[Tensor, "B 1 T PT"]:
    """What words see: all real keys before them, and of themselves those that are no padding, up to their own place."""
    own = torch.ones(1, length, length, dtype=torch.bool, device=before.device).tril()
    own = own if visible is None else own & visible[:, None]
    own = own | torch.eye(length, dtype=torch.bool, device=before.device)  # padding sees itself, not NaN
    past = before[:, None].expand(-1, length, -1)
    return torch.cat([past, own.expand(len(past), -1, -1)], dim=2)[:, None]
