"""Flow matching: pure functions on σ, which is 0 for clean latents and 1 for noise.

    x_σ = (1 − σ) x + σ ε        v = dx_σ/dσ = ε − x        (PS-VAE section 3.2; BAGEL, RAE, SD3 and FLUX agree)

A *velocity* below is any callable (latents ``B …``, σ ``B``) → v, of the latents' shape. `guided` makes one of
a model and its prefixes, `from_sit` and `from_jit` of networks with other conventions; `sample` integrates one.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Generator, Tensor
from torch.nn import functional as F

from psvae.config import Config
from psvae.errors import ConfigError, ShapeError

__all__ = [
    "Guidance",
    "Velocity",
    "add_noise",
    "classifier_free",
    "clean_latents",
    "dimension_shift",
    "dual_guidance",
    "flow_loss",
    "from_jit",
    "from_sit",
    "guided",
    "renormalise",
    "sample",
    "sample_sigmas",
    "shift_sigmas",
    "sigma_schedule",
    "to_sit",
    "velocity_from_clean",
    "velocity_target",
]

Velocity = Callable[[Tensor, Tensor], Tensor]
Network = Callable[..., Tensor]
Sigmas = Float[Tensor, " B"]
Reduction = Literal["mean", "none"]
Form = Literal["nested", "additive"]
Over = Literal["global", "channel"]
Solver = Literal["euler", "heun"]

SIGMA_FLOOR = 0.05  # JiT's: x̂ says nothing of v at σ = 0

# σ: which ones


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
        ConfigError: shift is not positive.
    """
    if not shift > 0:
        raise ConfigError(f"shift is {shift!r}; wanted a positive number, 1 for none")
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def sigma_schedule(num_steps: int, shift: float = 1.0) -> Float[Tensor, " N1"]:
    """σ from 1 to 0 in ``num_steps`` updates: ``num_steps + 1`` numbers. The paper samples with 50 and shift 3.

    diffusers' `FlowMatchEulerDiscreteScheduler` takes the same steps if it is given
    ``sigmas=np.linspace(1, 1 / N, N)``; by ``num_inference_steps`` alone it shifts twice.

    Raises:
        ConfigError: num_steps below 1, or a shift that is not positive.
    """
    if num_steps < 1:
        raise ConfigError(f"num_steps is {num_steps!r}; wanted at least 1")
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
    """σ for training: logit-normal, then shifted; for the shift see `dimension_shift`."""
    normal = torch.randn(count, generator=generator, device=generator.device if generator else device)
    return shift_sigmas(torch.sigmoid(normal * std + mean).to(device), shift)


# Training


def add_noise(latents: Tensor, noise: Tensor, sigmas: Sigmas) -> Tensor:
    """x_σ = (1 − σ) x + σ ε."""
    sigmas = _broadcast(sigmas, latents)
    return (1 - sigmas) * latents + sigmas * noise


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """v = ε − x."""
    return noise - latents


def flow_loss(velocity: Tensor, latents: Tensor, noise: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Mean of (v − (ε − x))², in fp32; with ``reduction="none"`` one mean per item, ``B``, to be weighed by σ."""
    _one_of("reduction", reduction, Reduction)
    target = velocity_target(latents.float(), noise.float())
    error = F.mse_loss(velocity.float(), target, reduction="none").flatten(1).mean(1)
    return error.mean() if reduction == "mean" else error


# From one prediction to another


def clean_latents(noisy: Tensor, velocity: Tensor, sigmas: Sigmas) -> Tensor:
    """x̂ = x_σ − σ v."""
    return noisy - _broadcast(sigmas, noisy) * velocity


def velocity_from_clean(noisy: Tensor, clean: Tensor, sigmas: Sigmas, floor: float = SIGMA_FLOOR) -> Tensor:
    """v = (x_σ − x̂) / max(σ, floor)."""
    return (noisy - clean) / _broadcast(sigmas, noisy).clamp(min=floor)


def from_sit(network: Network, time_scale: float = 1.0) -> Velocity:
    """The velocity of a network that counts time t = 1 − σ and predicts x − ε.

    SiT, LightningDiT, DDT, Lumina-Image 2.0, Meta's flow_matching and torchcfm do; Z-Image with ``time_scale=1000``.
    """

    def velocity(latents: Tensor, sigmas: Sigmas) -> Tensor:
        return -network(latents, (1 - sigmas) * time_scale)

    return velocity


def to_sit(velocity: Velocity) -> Network:
    """A velocity for code of SiT's convention: time 1 − σ, output x − ε."""
    return from_sit(velocity)  # the change of convention undoes itself


def from_jit(network: Network, floor: float = SIGMA_FLOOR) -> Velocity:
    """The velocity of a network that counts time t = 1 − σ and predicts the clean latents (JiT)."""

    def velocity(latents: Tensor, sigmas: Sigmas) -> Tensor:
        return velocity_from_clean(latents, network(latents, 1 - sigmas), sigmas, floor)

    return velocity


# Guidance


def classifier_free(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """v_∅ + s (v_c − v_∅)."""
    return unconditional + scale * (conditional - unconditional)


def dual_guidance(
    full: Tensor,
    image: Tensor,
    other: Tensor,
    *,
    text_scale: float,
    image_scale: float,
    form: Form,
) -> Tensor:
    """Guidance towards the instruction and the source image, in one of the two published forms.

    ``nested`` (BAGEL), with the text-only branch as ``other``::

        a = v_image + s_T (v_full − v_image)        v = v_text + s_I (a − v_text)

    ``additive`` (InstructPix2Pix, OmniGen), with the empty branch as ``other``::

        v = v_∅ + s_I (v_image − v_∅) + s_T (v_full − v_image)

    Args:
        full: of source and text. image: of the source alone.
    """
    _one_of("form", form, Form)
    if form == "nested":
        return classifier_free(classifier_free(full, image, text_scale), other, image_scale)
    return other + image_scale * (image - other) + text_scale * (full - image)


def renormalise(guided: Tensor, reference: Tensor, minimum: float, over: Over) -> Tensor:
    """v · clamp(‖reference‖ / ‖v‖, minimum, 1), item by item (BAGEL): guidance may not lengthen the velocity.

    Args:
        guided, reference: ``B Z h w``.
        over: the axes of the norm: the whole item, or the channels of each cell.
    """
    _one_of("over", over, Over)
    axes = tuple(range(1, guided.ndim)) if over == "global" else (1,)
    wanted, got = (torch.linalg.vector_norm(x.float(), dim=axes, keepdim=True) for x in (reference, guided))
    factor = (wanted / got.clamp(min=1e-8)).clamp(minimum, 1.0)
    return guided * factor.to(guided.dtype)


@dataclass(frozen=True)
class Guidance(Config):
    """How the branches of `guided` are combined.

    Attributes:
        scale: towards the text. The paper samples with 6.5.
        image_scale: towards the source image, for editing; ``None`` for plain classifier-free guidance, the
            paper's, with the empty branch as the unconditional one.
        form: of guidance with ``image_scale``, see `dual_guidance`.
        interval: guided where ``interval[0] < σ ≤ interval[1]``; elsewhere the full branch alone is computed.
        renorm: see `renormalise`; ``None`` for none.
        renorm_minimum: BAGEL's default is 0.
    """

    scale: float = 6.5
    image_scale: float | None = None
    form: Form = "nested"
    interval: tuple[float, float] = (0.0, 1.0)
    renorm: Over | None = None
    renorm_minimum: float = 0.0

    def validate(self) -> None:
        low, high = self.interval
        self.require(0 <= low < high <= 1, "interval", "two values of σ, the smaller first, within 0 to 1")
        self.require(0 <= self.renorm_minimum <= 1, "renorm_minimum", "0 to 1")

    @property
    def branches(self) -> tuple[str, ...]:
        """The prefixes that it needs, by name."""
        if self.image_scale is None:
            return ("full", "empty")
        return ("full", "image", "text" if self.form == "nested" else "empty")

    def combine(self, *velocities: Tensor) -> Tensor:
        """The velocities of `branches`, in that order → one."""
        if self.image_scale is None:
            velocity = classifier_free(velocities[0], velocities[1], self.scale)
        else:
            velocity = dual_guidance(*velocities, text_scale=self.scale, image_scale=self.image_scale, form=self.form)
        if self.renorm is None:
            return velocity
        return renormalise(velocity, velocities[0], self.renorm_minimum, self.renorm)


def guided(model: Any, prefixes: Mapping[str, Any], guidance: Guidance, *, batched: bool = True) -> Velocity:
    """The guided velocity of a `DeepFusionDiT`, one forward per step for all branches.

    Args:
        model: called as ``model(latents, sigmas, prefix)``, giving ``.sample``.
        prefixes: `PrefixCache` by branch: ``"full"`` and, as ``guidance.branches`` asks, ``"empty"`` (neither text
            nor source), ``"image"`` (the source alone), ``"text"`` (the text alone).
        batched: False runs the branches one after the other, in less memory.

    Raises:
        ConfigError: a branch is missing.
    """
    missing = [name for name in guidance.branches if name not in prefixes]
    if missing:
        raise ConfigError(
            f"guidance needs the prefixes {', '.join(guidance.branches)}; {', '.join(missing)} is missing: "
            '"empty" is PrefixCache.empty(...), "image" and "text" are encode_prefix with that part alone'
        )
    branches = [prefixes[name] for name in guidance.branches]
    together = type(branches[0]).concat_batch(branches) if batched else None
    low, high = torch.tensor(guidance.interval).tolist()  # in fp32, as σ is: 0.8 is not above 0.8

    def velocity(latents: Tensor, sigmas: Sigmas) -> Tensor:
        if not low < float(sigmas[0]) <= high:
            return model(latents, sigmas, branches[0]).sample
        if together is None:
            return guidance.combine(*(model(latents, sigmas, branch).sample for branch in branches))
        count = len(branches)
        repeated = latents.repeat(count, *[1] * (latents.ndim - 1))
        return guidance.combine(*model(repeated, sigmas.repeat(count), together).sample.chunk(count))

    return velocity


# Sampling


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
        ShapeError: sigmas are not one descending row within [0, 1].
        ConfigError: another solver.
    """
    _one_of("solver", solver, Solver)
    steps = _descending(sigmas)
    state = noise.float()

    def slope(x: Tensor, sigma: float) -> Tensor:
        return velocity(x.to(noise.dtype), torch.full((len(x),), sigma, device=x.device)).float()

    with torch.no_grad():
        for index, (now, then) in enumerate(itertools.pairwise(steps), start=1):
            first = slope(state, now)
            ahead = state + (then - now) * first
            if solver == "heun" and then > 0:
                ahead = state + (then - now) * 0.5 * (first + slope(ahead, then))
            state = ahead
            if callback is not None:
                callback(index, then, state.to(noise.dtype))
    return state.to(noise.dtype)


def _descending(sigmas: Tensor) -> list[float]:
    steps = sigmas.tolist() if sigmas.ndim == 1 else []
    falls = len(steps) > 1 and all(a > b for a, b in itertools.pairwise(steps))
    if not falls or steps[0] > 1 or steps[-1] < 0:
        raise ShapeError(
            f"sigmas have shape {tuple(sigmas.shape)} and run {steps[:3]} to {steps[-1:]}; wanted one descending row "
            "within [0, 1], as sigma_schedule(50, shift=3.0) makes"
        )
    return steps


def _one_of(name: str, value: Any, options: Any) -> None:
    if value not in get_args(options):
        raise ConfigError(f"{name} is {value!r}; wanted {' or '.join(map(repr, get_args(options)))}")


def _broadcast(sigmas: Tensor, like: Tensor) -> Tensor:
    """``B`` → ``B 1 1 …``, in the dtype of ``like``."""
    return sigmas.to(like.dtype).view(-1, *[1] * (like.ndim - 1))
