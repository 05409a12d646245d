"""What `psvae.flow` refuses: nothing is broadcast, and σ lies within 0 and 1."""

from torch import Tensor

from psvae.errors import DtypeError, ShapeError
from psvae.shapes import readable

__all__ = ["alike", "column", "one_batch", "within_0_and_1"]

_THOUSAND = "a timestep of 0 to 1000 is divided by 1000"


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


def one_batch(of_prefix: int, of_latents: int) -> None:
    """Require a prefix of as many items as the latents."""
    if of_prefix != of_latents:
        raise ShapeError(
            f"the prefix is for a batch of {of_prefix}; wanted {of_latents}, as the latents: "
            "prefix.repeat_interleave(n) serves n images of each prompt"
        )


def column(sigmas: Tensor, like: Tensor, name: str = "sigmas") -> Tensor:
    """σ ``B``, in [0, 1] → ``B 1 1 …``."""
    if not isinstance(sigmas, Tensor) or not sigmas.is_floating_point():
        got = sigmas.dtype if isinstance(sigmas, Tensor) else type(sigmas).__name__
        raise DtypeError(f"{name} came as {got}; {_one_each(like)}; {_THOUSAND}")
    if sigmas.shape != like.shape[:1]:
        raise ShapeError(f"{name} have shape {tuple(sigmas.shape)}; {_one_each(like)}")
    within_0_and_1(sigmas, name)
    return sigmas.view(-1, *[1] * (like.ndim - 1))


def within_0_and_1(sigmas: Tensor, name: str = "sigmas") -> None:
    """Require σ in [0, 1]; values are read in eager mode alone."""
    if readable(sigmas) and not ((sigmas >= 0) & (sigmas <= 1)).all():
        low, high = sigmas.min(), sigmas.max()
        raise ShapeError(f"{name} span [{low:.4g}, {high:.4g}]; wanted σ in [0, 1], 1 for noise: {_THOUSAND}")


def _one_each(like: Tensor) -> str:
    return f"wanted one σ for each item, floating point, shape ({len(like)},): torch.full(({len(like)},), sigma)"
