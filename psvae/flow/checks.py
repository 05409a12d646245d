"""What `psvae.flow` refuses: nothing is broadcast, and σ lies within 0 and 1."""

from typing import Any, get_args

from torch import Tensor

from psvae.errors import ConfigError, DtypeError, ShapeError
from psvae.shapes import readable

__all__ = ["alike", "column", "one_of", "within_0_and_1"]


def one_of(name: str, value: Any, options: Any) -> None:
    """Require a choice that a `Literal` lists."""
    if value not in get_args(options):
        raise ConfigError(f"{name} is {value!r}; wanted {' or '.join(map(repr, get_args(options)))}")


def alike(**tensors: Tensor) -> None:
    """Require floating-point tensors of one shape."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise DtypeError(f"{name} came as {got}; wanted a floating-point torch.Tensor")
    first, *rest = tensors.values()
    if any(x.shape != first.shape for x in rest):
        said = ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())
        raise ShapeError(f"the shapes differ: {said}; wanted one: nothing is broadcast")


def column(sigmas: Tensor, like: Tensor) -> Tensor:
    """σ ``B`` → ``B 1 1 …``."""
    if not isinstance(sigmas, Tensor) or not sigmas.is_floating_point():
        got = sigmas.dtype if isinstance(sigmas, Tensor) else type(sigmas).__name__
        raise DtypeError(f"sigmas came as {got}; {_one_each(like)}")
    if sigmas.shape != like.shape[:1]:
        raise ShapeError(f"sigmas have shape {tuple(sigmas.shape)}; {_one_each(like)}")
    return sigmas.view(-1, *[1] * (like.ndim - 1))


def within_0_and_1(sigmas: Tensor) -> None:
    """Require σ in [0, 1]; values are read in eager mode alone."""
    if readable(sigmas) and not ((sigmas >= 0) & (sigmas <= 1)).all():
        low, high = sigmas.min(), sigmas.max()
        raise ShapeError(
            f"sigmas span [{low:.4g}, {high:.4g}]; wanted σ in [0, 1], 1 for noise: a timestep of 0 to 1000 is divided "
            "by 1000"
        )


def _one_each(like: Tensor) -> str:
    return f"wanted one σ for each item, floating point, shape ({len(like)},): torch.full(({len(like)},), sigma)"
