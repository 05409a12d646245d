"""Guidance: the velocities of several branches, with and without their condition, combined into one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from psvae.config import Config, one_of
from psvae.errors import ConfigError, DtypeError, ShapeError
from psvae.flow.checks import column, one_batch
from psvae.flow.paths import Velocity
from psvae.flow.sigmas import Sigmas
from psvae.shapes import readable

__all__ = ["Guidance", "classifier_free", "dual_guidance", "guided", "renormalise"]

Form = Literal["nested", "additive"]
Over = Literal["global", "channel"]


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
    one_of("form", form, Form)
    if form == "nested":
        return classifier_free(classifier_free(full, image, text_scale), other, image_scale)
    return other + image_scale * (image - other) + text_scale * (full - image)


def renormalise(guided: Tensor, reference: Tensor, minimum: float, over: Over) -> Tensor:
    """v · clamp(‖reference‖ / ‖v‖, minimum, 1), item by item (BAGEL): guidance may not lengthen the velocity.

    Args:
        guided, reference: ``B Z h w``.
        over: the axes of the norm: the whole item, or the channels of each cell.
    """
    one_of("over", over, Over)
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
        interval: guided where ``interval[0] < σ ≤ interval[1]``, elsewhere the velocity is the full branch's. The
            others are not computed in a step whose σ all lie elsewhere, in eager mode.
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
        """The prefixes that it needs, by name; scales of 1 need the full one alone."""
        if self.scale == 1 and self.image_scale in (None, 1):
            return ("full",)
        if self.image_scale is None:
            return ("full", "empty")
        return ("full", "image", "text" if self.form == "nested" else "empty")

    def combine(self, *velocities: Tensor) -> Tensor:
        """The velocities of `branches`, in that order → one."""
        if len(velocities) == 1:
            return velocities[0]
        if self.image_scale is None:
            velocity = classifier_free(velocities[0], velocities[1], self.scale)
        else:
            velocity = dual_guidance(*velocities, text_scale=self.scale, image_scale=self.image_scale, form=self.form)
        if self.renorm is None:
            return velocity
        return renormalise(velocity, velocities[0], self.renorm_minimum, self.renorm)


@runtime_checkable
class Prefix(Protocol):
    """What conditions a batch, such as `PrefixCache`."""

    @property
    def batch_size(self) -> int:
        """B."""
        ...

    @classmethod
    def concat_batch(cls, parts: Sequence[Any]) -> Any:
        """Joined along the batch."""
        ...


@runtime_checkable
class Output(Protocol):
    """What a model returns, such as `DeepFusionOutput`."""

    @property
    def sample(self) -> Tensor:
        """The velocity."""
        ...


P = TypeVar("P", bound=Prefix)


def guided(
    model: Callable[[Tensor, Tensor, P], Output],
    prefixes: Mapping[str, P],
    guidance: Guidance | None,
    *,
    batched: bool = True,
) -> Velocity:
    """The guided velocity of a `DeepFusionDiT`.

    Args:
        model: called as ``model(latents, sigmas, prefix)``, giving ``.sample``.
        prefixes: `PrefixCache` by branch: ``"full"`` and, as ``guidance.branches`` asks, ``"empty"`` (neither text
            nor source), ``"image"`` (the source alone), ``"text"`` (the text alone).
        guidance: None for none, which needs the full branch alone.
        batched: all branches in one forward per step; False runs one after the other, in less memory.

    Raises:
        ConfigError: a branch is missing. DtypeError: no mapping. ShapeError: the branches are of unequal batches.
    """
    guidance = guidance or Guidance(scale=1.0)
    if not isinstance(prefixes, Mapping):
        raise DtypeError(f'prefixes came as {type(prefixes).__name__}; wanted them by branch: {{"full": prefix, ...}}')
    branches = {name: prefixes[name] for name in guidance.branches if prefixes.get(name) is not None}
    missing = [name for name in guidance.branches if name not in branches]
    if missing:
        raise ConfigError(
            f"prefixes came for {', '.join(prefixes) or 'nothing'}; guidance needs {', '.join(guidance.branches)}, of "
            f"which {', '.join(missing)} is missing: "
            '"empty" is PrefixCache.empty(...), "image" and "text" are encode_prefix with that part alone'
        )
    full, sizes = branches["full"], {name: branch.batch_size for name, branch in branches.items()}
    if len(set(sizes.values())) > 1:
        said = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ShapeError(
            f"the prefixes are for batches of unequal size: {said}; wanted one: each item has every branch"
        )
    count = len(branches)
    together = full.concat_batch(list(branches.values())) if batched and count > 1 else None
    low, high = torch.tensor(guidance.interval).tolist()  # in fp32, as σ is: 0.8 is not above 0.8

    def velocity(latents: Tensor, sigmas: Sigmas) -> Tensor:
        one_batch(full.batch_size, len(latents))
        at = column(sigmas, latents)
        inside = (low < at) & (at <= high)
        outside = (low, high) != (0, 1) and readable(at) and not inside.any()  # read where that can save branches
        if count == 1 or outside:
            return model(latents, sigmas, full).sample
        if together is None:
            velocities = [model(latents, sigmas, branch).sample for branch in branches.values()]
        else:
            repeated = latents.repeat(count, *[1] * (latents.ndim - 1))
            velocities = model(repeated, sigmas.repeat(count), together).sample.chunk(count)
        return torch.where(inside, guidance.combine(*velocities), velocities[0])

    return velocity
