"""Sampling: a velocity integrated from noise to clean latents."""

import itertools
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from psvae.config import one_of
from psvae.errors import DtypeError, ShapeError
from psvae.flow.checks import alike, within_0_and_1
from psvae.flow.paths import Velocity
from psvae.shapes import readable

__all__ = ["sample"]

Solver = Literal["euler", "heun"]


def sample(
    velocity: Velocity,
    noise: Tensor,
    sigmas: Float[Tensor, " N1"],
    *,
    solver: Solver = "euler",
    callback: Callable[[int, float, Tensor], None] | None = None,
) -> Tensor:
    """Integrate from noise to clean latents; the state is kept in fp32, the velocity gets ``noise.dtype``.

    Args:
        noise: x_1, such as ``B Z h w`` from N(0, 1).
        sigmas: descending, from `sigma_schedule`: ``N + 1`` of them are N updates.
        solver: Heun evaluates twice per update, but once in the last one, which ends at σ = 0.
        callback: called after each update with its number (from 1), the σ reached, and the latents there.

    Raises:
        ShapeError: sigmas are not one descending row within [0, 1]; the velocity is of another shape than the noise;
            NaN or infinity came out. DtypeError: integers, or no tensor. ConfigError: another solver.
    """
    one_of("solver", solver, Solver)
    alike(noise=noise)
    steps = _descending(sigmas)
    state = noise.float()

    def slope(x: Tensor, sigma: float) -> Tensor:
        found = velocity(x.to(noise.dtype), torch.full((len(x),), sigma, device=x.device))
        if not isinstance(found, Tensor):
            raise DtypeError(
                f"the velocity came as a {type(found).__name__}; wanted a tensor: "
                "guided(model, {'full': prefix}, None) makes a velocity of a model"
            )
        alike(latents=x, velocity=found)
        return found.float()

    with torch.no_grad():
        for index, (now, then) in enumerate(itertools.pairwise(steps), start=1):
            first = slope(state, now)
            ahead = state + (then - now) * first
            if solver == "heun" and then > 0:
                ahead = state + (then - now) * 0.5 * (first + slope(ahead, then))
            state = ahead
            if callback is not None:
                callback(index, then, state.to(noise.dtype))
    if readable(state) and not state.isfinite().all():  # asked once: what is not finite stays so
        raise ShapeError("the samples hold NaN or infinity; wanted finite values: the noise or a velocity held them")
    return state.to(noise.dtype)


def _descending(sigmas: Tensor) -> list[float]:
    if not isinstance(sigmas, Tensor):
        raise DtypeError(f"sigmas came as {type(sigmas).__name__}; wanted a torch.Tensor, as sigma_schedule(50) makes")
    steps = sigmas.tolist() if sigmas.ndim == 1 else []
    falls = len(steps) > 1 and all(a > b for a, b in itertools.pairwise(steps))
    if not falls:
        raise ShapeError(
            f"sigmas have shape {tuple(sigmas.shape)} and run {steps[:3]} to {steps[-1:]}; wanted one descending row "
            "within [0, 1], as sigma_schedule(50, shift=3.0) makes"
        )
    within_0_and_1(sigmas)
    return steps
