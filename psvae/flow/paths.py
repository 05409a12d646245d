"""Noise, velocity and clean latents: from any two of them to the third, and to other conventions."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from psvae.config import one_of
from psvae.flow.checks import alike, column
from psvae.flow.sigmas import Sigmas

__all__ = [
    "Velocity", "add_noise", "clean_latents", "flow_loss", "from_jit", "from_sit", "to_sit", "velocity_from_clean",
    "velocity_target",
]  # fmt: skip

Velocity = Callable[[Tensor, Tensor], Tensor]
Network = Callable[..., Tensor]
Reduction = Literal["mean", "none"]

SIGMA_FLOOR = 0.05  # JiT's: x̂ says nothing of v at σ = 0


def add_noise(latents: Tensor, noise: Tensor, sigmas: Sigmas) -> Tensor:
    """x_σ = (1 − σ) x + σ ε.

    Raises:
        ShapeError: unequal shapes, not one σ for each item, or σ outside [0, 1]. DtypeError: integers.
    """
    alike(latents=latents, noise=noise)
    sigmas = column(sigmas, latents).to(latents.dtype)
    return (1 - sigmas) * latents + sigmas * noise


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """v = ε − x."""
    alike(latents=latents, noise=noise)
    return noise - latents


def flow_loss(velocity: Tensor, latents: Tensor, noise: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Mean of (v − (ε − x))², in fp32; with ``reduction="none"`` one mean per item, ``B``, to be weighed by σ."""
    one_of("reduction", reduction, Reduction)
    alike(velocity=velocity, latents=latents, noise=noise)
    target = noise.float() - latents.float()
    error = F.mse_loss(velocity.float(), target, reduction="none").flatten(1).mean(1)
    return error.mean() if reduction == "mean" else error


def clean_latents(noisy: Tensor, velocity: Tensor, sigmas: Sigmas) -> Tensor:
    """x̂ = x_σ − σ v."""
    alike(noisy=noisy, velocity=velocity)
    sigmas = column(sigmas, noisy).to(noisy.dtype)
    return noisy - sigmas * velocity


def velocity_from_clean(noisy: Tensor, clean: Tensor, sigmas: Sigmas, floor: float = SIGMA_FLOOR) -> Tensor:
    """v = (x_σ − x̂) / max(σ, floor)."""
    alike(noisy=noisy, clean=clean)
    return (noisy - clean) / column(sigmas, noisy).to(noisy.dtype).clamp(min=floor)


def from_sit(network: Network, time_scale: float = 1.0) -> Velocity:
    """The velocity of a network that counts time t = 1 − σ and predicts x − ε.

    SiT, LightningDiT, DDT, Lumina-Image 2.0, Meta's flow_matching and torchcfm do; Z-Image with ``time_scale=1000``.
    """

    def velocity(latents: Tensor, sigmas: Sigmas) -> Tensor:
        column(sigmas, latents)  # refuses what is no σ
        return -network(latents, (1 - sigmas) * time_scale)

    return velocity


def to_sit(velocity: Velocity) -> Network:
    """A velocity for code of SiT's convention: time 1 − σ, output x − ε."""
    return from_sit(velocity)  # the change of convention undoes itself


def from_jit(network: Network, floor: float = SIGMA_FLOOR) -> Velocity:
    """The velocity of a network that counts time t = 1 − σ and predicts the clean latents (JiT)."""

    def velocity(latents: Tensor, sigmas: Sigmas) -> Tensor:
        column(sigmas, latents)  # refuses what is no σ
        return velocity_from_clean(latents, network(latents, 1 - sigmas), sigmas, floor)

    return velocity
