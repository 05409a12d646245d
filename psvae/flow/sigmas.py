"""σ: the noise levels to train and to sample at."""

import math

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from psvae.errors import ConfigError

__all__ = ["Sigmas", "dimension_shift", "sample_sigmas", "shift_sigmas", "sigma_schedule"]

Sigmas = Float[Tensor, " B"]


def dimension_shift(channels: int, patch_size: int, tokens: int, base: int = 4096) -> float:
    """√(C p² N / 4096): the more numbers an image has, the more noise hides it (PS-VAE 3.2, RAE).

    Args:
        channels: of the latents. patch_size: of the generator. tokens: after patching.
        base: the dimension that needs no shift.
    """
    return math.sqrt(channels * patch_size**2 * tokens / base)


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """σ ↦ s σ / (1 + (s − 1) σ): towards noise for s > 1.

    Raises:
        ConfigError: shift is not positive, or infinite.
    """
    if not 0 < shift < math.inf:
        raise ConfigError(f"shift is {shift!r}; wanted a positive number, 1 for none")
    shifted = shift * sigmas
    return shifted / (shifted + (1 - sigmas))  # never above 1, as 1 + (s − 1) σ rounded may give


def sigma_schedule(num_steps: int, shift: float = 1.0) -> Float[Tensor, " N1"]:
    """σ from 1 to 0 in ``num_steps`` updates: ``num_steps + 1`` numbers. The paper samples with 50 and shift 3.

    diffusers' `FlowMatchEulerDiscreteScheduler` takes the same steps if it is given
    ``sigmas=np.linspace(1, 1 / N, N)``; by ``num_inference_steps`` alone it shifts twice.

    Raises:
        ConfigError: num_steps is no whole number from 1, or shift not positive.
    """
    if not isinstance(num_steps, int) or num_steps < 1:
        raise ConfigError(f"num_steps is {num_steps!r}; wanted a whole number, at least 1")
    return shift_sigmas(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), shift).float()


def sample_sigmas(
    count: int,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    shift: float = 1.0,
    generator: Generator | None = None,
    device: torch.device | str | None = None,
) -> Sigmas:
    """σ for training: logit-normal, then shifted; for the shift see `dimension_shift`.

    Raises:
        ConfigError: mean or std is not finite, std negative, or shift not positive.
    """
    if not (math.isfinite(mean) and 0 <= std < math.inf):
        raise ConfigError(f"mean is {mean!r} and std {std!r}; wanted finite numbers, std at least 0")
    normal = torch.randn(count, generator=generator, device=generator.device if generator else device)
    return shift_sigmas(torch.sigmoid(normal * std + mean).to(device), shift)
