"""What the layouts of Vision Transformers share."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from psvae.errors import CheckpointError
from psvae.hub.formats import Header, Rule

__all__ = [
    "HALF", "IMAGENET", "choice", "cut_blocks", "folded_class_token", "mlp_ratio", "number", "patch_positions",
    "patch_rule", "patch_size", "qkv", "side", "stride_for", "table_side",
]  # fmt: skip

Json = Mapping[str, Any]

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def number(values: Json, name: str, kind: type = int, least: int = 1) -> Any:
    """A positive number of a foreign configuration; 0 too, where ``least`` is 0.

    Raises:
        CheckpointError: it is of another type, or not positive.
    """
    found = values[name]
    right = isinstance(found, (int, float) if kind is float else int) and not isinstance(found, bool)
    if not right or not (0 < found < 2**31 or found == least):
        zero = "" if least else ", or 0"
        raise CheckpointError(f"config.json has {name} {found!r}; wanted a positive {kind.__name__}{zero}")
    return kind(found)


def choice(values: Json, name: str, options: Mapping[Any, Any]) -> Any:
    """What ``options`` hold for a value of a foreign configuration.

    Raises:
        CheckpointError: they do not hold it.
    """
    found = values[name]
    if isinstance(found, list | dict) or found not in options:
        raise CheckpointError(f"config.json has {name} {found!r}; wanted {' or '.join(map(repr, options))}")
    return options[found]


def patch_size(header: Header, name: str) -> int:
    """The side of a square patch, from the kernel that reads it.

    Raises:
        CheckpointError: there is no such kernel for three colours.
    """
    shape = header.get(name, ())
    if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3]:
        raise CheckpointError(f"{name} is {shape or 'missing'}; wanted a kernel of 3 colours and a square patch")
    return shape[2]


def stride_for(patch: int) -> int:
    """Image pixels per token: the paper's 16 for patch 14 (224 px of a 256 px image), else the patch."""
    return 16 if patch == 14 else patch


def side(tokens: int, prefixes: tuple[int, ...]) -> int | None:
    """The side of a square table of positions that may also cover one of these numbers of prefix tokens."""
    for prefix in prefixes:
        if tokens > prefix and math.isqrt(tokens - prefix) ** 2 == tokens - prefix:
            return math.isqrt(tokens - prefix)
    return None


def table_side(header: Header, name: str, prefix: int) -> int:
    """The side of the square table ``name``, ``1 N D``.

    Raises:
        CheckpointError: it is missing or not square.
    """
    shape = header.get(name, ())
    found = side(shape[1], (prefix,)) if len(shape) == 3 else None
    if found is None:
        raise CheckpointError(f"{name} is {shape or 'missing'}; wanted (1, {prefix} + a square number, D)")
    return found


def mlp_ratio(width: int, dim: int) -> float:
    """The ratio of which timm, by ``int(dim * ratio)``, makes ``width`` again."""
    ratio = width / dim
    return ratio if int(dim * ratio) == width else (width + 0.5) / dim


def cut_blocks(config: Json, depth: int, root: str) -> tuple[str, ...]:
    """The beginnings of the blocks' names after the last one that ``config`` keeps."""
    layer = config.get("layer", -1)
    return tuple(f"{root}{index}." for index in range(layer % depth + 1, depth)) if -depth <= layer < depth else ()


def _equal_parts(*parts: Tensor) -> Tensor:
    """Parts of one shape on top of each other; parts of several shapes are a fault."""
    return torch.stack(parts).flatten(0, 1)


def qkv(*names: str) -> Rule:
    """Query, key and value → one tensor."""
    return Rule(names, load=_equal_parts)


def folded_class_token(token: str, table: str) -> Rule:
    """A class token plus the first row of a table → timm's class token, which has no row of its own.

    Back, the row is zero: the sum, which is all that the model sees, is the same.
    """
    return Rule(
        (token, table),
        load=lambda value, rows: torch.stack([value.float(), rows[:, :1].float()]).sum(0),
        save=lambda names, value: {names[0]: value},
    )


def patch_positions(table: str) -> Rule:
    """The rows of a table after that of the class token."""
    return Rule(
        (table,),
        load=lambda rows: rows[:, 1:],
        save=lambda names, rows: {names[0]: torch.cat([torch.zeros_like(rows[:, :1]), rows], dim=1)},
    )


def patch_rule(name: str, patch: int) -> Rule:
    """A kernel that the file holds as a linear layer over flattened patches, ``D (p p 3)``."""
    return Rule(
        (name,),
        load=lambda weight: weight.unflatten(1, (patch, patch, 3)).permute(0, 3, 1, 2),
        save=lambda names, weight: {names[0]: weight.permute(0, 2, 3, 1).flatten(1)},
    )
