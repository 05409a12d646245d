"""Which tokens of a text are words: the tokenizer's mask, items that go without, and the words' positions."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from psvae.errors import ConfigError, DtypeError, ShapeError
from psvae.shapes import readable

__all__ = ["causal_mask", "check_mask", "read_mask", "without", "word_positions"]


def check_mask(shape: tuple[int, ...] | None, attention_mask: Tensor | None, drop: Tensor | None) -> Tensor | None:
    """The text's visible tokens ``B T``, those of items that go without left out; None where all are.

    Args:
        shape: of the text, ``(B, T)``; None where none came.
        drop: ``B``, items that go without their text: these may be padding alone.

    Raises:
        ConfigError: a mask without text. DtypeError: no tensor. ShapeError: another shape than the text's, other
            numbers than 0 and 1, an item of padding alone.
    """
    if shape is None:
        if attention_mask is not None:
            raise ConfigError("attention_mask came without text; pass the text too, or neither")
        return None
    if attention_mask is None:
        return without(None, drop, shape[1])
    if not isinstance(attention_mask, Tensor):
        raise DtypeError(
            f"attention_mask came as {type(attention_mask).__name__}; wanted a torch.Tensor: "
            "tokenizer(..., return_tensors='pt')"
        )
    if tuple(attention_mask.shape) != shape:
        raise ShapeError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; wanted {shape}, as the text: 1 for words, 0 for "
            "padding, as the tokenizer returns it"
        )
    visible = read_mask(attention_mask)
    if readable(visible):
        speaks = visible.any(dim=1)
        if not (speaks if drop is None else speaks | drop).all():
            raise ShapeError(
                "attention_mask leaves an item with padding alone; wanted a word in each: an item without text is said "
                "by drop_text=, a batch without text by PrefixCache.empty(...)"
            )
        visible = None if visible.all() else visible
    return without(visible, drop, shape[1])


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
