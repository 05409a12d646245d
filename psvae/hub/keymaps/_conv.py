"""What the layouts of convolutional autoencoders share."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from psvae.errors import CheckpointError
from psvae.hub.formats import Rule

__all__ = ["ATTENTION", "as_conv", "as_linear", "coarsest", "multipliers", "statistics_rule"]

ATTENTION = ("q", "k", "v", "proj")  # our names of the four projections


def as_linear(weight: Tensor) -> Tensor:
    """A 1×1 convolution's weight as a linear layer's."""
    return weight.flatten(1) if set(weight.shape[2:]) == {1} else weight


def as_conv(names: tuple[str, ...], tensor: Tensor) -> dict[str, Tensor]:
    """The inverse of `as_linear`."""
    return {names[0]: tensor[..., None, None] if tensor.ndim == 2 else tensor}


def statistics_rule(key: str, config: Mapping[str, Any]) -> Rule:
    """`LatentSpec`'s buffers, which these files do not hold: from the configuration, or 0 and 1."""
    name = "latents_mean" if key.endswith("mean") else "latents_std"
    channels = config["encoder"]["latent_channels"]
    values = config[name] or [0.0 if name == "latents_mean" else 1.0] * channels
    grid = config["statistics_grid"] or (1, 1)
    return Rule((), load=lambda: torch.tensor(values).view(-1, 1, 1).expand(-1, *grid).clone())


def multipliers(widths: Sequence[int], where: str) -> tuple[int, list[int]]:
    """The first width, and every width over it.

    Raises:
        CheckpointError: a width is no multiple of the first.
    """
    if not widths or widths[0] < 1 or any(width % widths[0] for width in widths):
        raise CheckpointError(f"{where} are {list(widths)}; wanted multiples of the first, as in every LDM autoencoder")
    return widths[0], [width // widths[0] for width in widths]


def coarsest(attends: Sequence[bool], where: str) -> int:
    """How many of the coarsest levels attend; levels are listed fine to coarse.

    Raises:
        CheckpointError: a finer level attends and a coarser one does not.
    """
    if list(attends) != sorted(attends):
        raise CheckpointError(f"{where}: levels {list(attends)} attend, fine to coarse; wanted the coarsest ones alone")
    return sum(attends)
