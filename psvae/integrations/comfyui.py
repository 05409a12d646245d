"""What ComfyUI must know of a latent: a descriptor of any VAE, as JSON or as a Python class. ComfyUI is not imported.

ComfyUI asks a class, the latent format, what stands between the VAE and the generator: ``process_in`` of what the VAE's
encode gives, ``process_out`` of what the generator made, before the VAE's decode. A linear map to RGB (`fit_preview`)
draws previews of what the generator makes. The names are ComfyUI's, its spelling too.
"""

import json
import keyword
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from psvae.config import Config, one_of
from psvae.errors import ConfigError
from psvae.latents import LatentSpec
from psvae.shapes import Latents, check_images, check_map

__all__ = ["LatentFormat", "Preview", "fit_preview", "latent_format"]

RGB = tuple[float, float, float]
By = Literal["statistics", "constants"]


class Preview(NamedTuple):
    """A linear map from the generator's latents to colours in [-1, 1].

    Attributes:
        factors: a row for each latent channel. bias: added to the sum.
        explained: share of the colours' variance that it accounts for: 1 is all of it, 0 a grey picture.
    """

    factors: tuple[RGB, ...]
    bias: RGB
    explained: float


@dataclass(frozen=True)
class LatentFormat(Config):
    """The descriptor; `latent_format` makes it.

    Attributes:
        latent_channels: Z.
        spacial_downscale_ratio: the stride.
        applied: what ``process_in`` applies. None: nothing, the VAE's encode already gives what a generator sees.
            ``"constants"``: (z − shift) · scale. ``"statistics"``: (z − mean) / std, per channel.
        scale_factor, shift_factor, latents_mean, latents_std: of that; 1, 0 and None where it is not applied.
        latent_rgb_factors, latent_rgb_factors_bias: of the preview; None for no preview.
    """

    latent_channels: int
    spacial_downscale_ratio: int
    applied: By | None = None
    scale_factor: float = 1.0
    shift_factor: float = 0.0
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    latent_rgb_factors: tuple[RGB, ...] | None = None
    latent_rgb_factors_bias: RGB | None = None

    def validate(self) -> None:
        self.require(self.scale_factor != 0, "scale_factor", "a number to divide by")
        for name in ("latents_mean", "latents_std", "latent_rgb_factors"):
            values, needed = getattr(self, name), self.applied == "statistics" and name != "latent_rgb_factors"
            fits = not needed if values is None else len(values) == self.latent_channels
            self.require(fits, name, f"{self.latent_channels} rows, one per latent channel")
        self.require(min(self.latents_std or (1.0,)) > 0, "latents_std", "positive numbers")

    def process_in(self, latent: Latents) -> Latents:
        """What the VAE's encode gives → what the generator sees."""
        check_map(latent, self.latent_channels, "latents")
        if self.applied == "statistics":
            mean, std = self._statistics(latent)
            return (latent - mean) / std
        return (latent - self.shift_factor) * self.scale_factor if self.applied == "constants" else latent

    def process_out(self, latent: Latents) -> Latents:
        """`process_in`, undone: what the VAE's decode takes."""
        check_map(latent, self.latent_channels, "latents")
        if self.applied == "statistics":
            mean, std = self._statistics(latent)
            return latent * std + mean
        return latent / self.scale_factor + self.shift_factor if self.applied == "constants" else latent

    def _statistics(self, like: Tensor) -> list[Tensor]:
        values = (self.latents_mean, self.latents_std)
        return [torch.tensor(x, dtype=like.dtype, device=like.device).view(1, -1, 1, 1) for x in values]

    def to_json(self) -> str:
        """All of it, with the two formulas in words, which `from_dict` does not take."""
        kind = _KINDS[self.applied]
        content = {**self.to_dict(), "process_in": kind.process_in, "process_out": kind.process_out}
        return json.dumps(content, indent=2) + "\n"

    def to_python(self, name: str = "PSVAELatent") -> str:
        """The text of a file with one class, a subclass of ComfyUI's LatentFormat where that can be imported.

        Raises:
            ConfigError: the name is no name of a class.
        """
        if not name.isidentifier() or keyword.iskeyword(name):
            raise ConfigError(f"the class's name is {name!r}; wanted a Python name, such as PSVAELatent")
        values = {field: value for field, value in self.to_dict().items() if field != "applied"}
        fields = "\n".join(f"    {field} = {_literal(value)}" for field, value in values.items())
        kind = _KINDS[self.applied]
        return (
            f'"""A latent format of ComfyUI. {kind.meaning}\n\nWritten by psvae: psvae descriptor."""\n\n'
            "import torch\n\n"
            "try:\n    from comfy.latent_formats import LatentFormat\n"
            "except ModuleNotFoundError:  # outside ComfyUI\n    LatentFormat = object\n\n\n"
            f"class {name}(LatentFormat):\n    latent_dimensions = 2\n{fields}\n\n"
            f"    def process_in(self, latent):\n{kind.names}        return {kind.process_in}\n\n"
            f"    def process_out(self, latent):\n{kind.names}        return {kind.process_out}\n{kind.helper}"
        )


class _Kind(NamedTuple):
    """What is written of one kind.

    Attributes:
        process_in, process_out: formulas, for people, and for Python after the line ``names``.
    """

    meaning: str
    process_in: str
    process_out: str
    names: str = ""
    helper: str = ""


_KINDS = {
    None: _Kind("The VAE's encode gives latents as the generator sees them: nothing is applied.", "latent", "latent"),
    "constants": _Kind(
        "The VAE's latents are raw: the generator sees (z - shift) * scale.",
        "(latent - shift_factor) * scale_factor",
        "latent / scale_factor + shift_factor",
        names="        shift_factor, scale_factor = self.shift_factor, self.scale_factor\n",
    ),
    "statistics": _Kind(
        "The VAE's latents are raw: the generator sees (z - mean) / std.",
        "(latent - latents_mean) / latents_std",
        "latent * latents_std + latents_mean",
        names="        latents_mean, latents_std = self._statistics(latent)\n",
        helper="""
    def _statistics(self, latent):
        values = (self.latents_mean, self.latents_std)
        return (torch.tensor(x, dtype=latent.dtype, device=latent.device).view(1, -1, 1, 1) for x in values)
""",
    ),
}


def _literal(value: Any) -> str:
    """As Python, a row of the preview's factors to a line."""
    if isinstance(value, list) and value and isinstance(value[0], list):
        return "[\n" + "".join(f"        {row!r},\n" for row in value) + "    ]"
    return repr(value)


def latent_format(source: Any, *, by: By | None = None, preview: Preview | None = None) -> LatentFormat:
    """The descriptor of a VAE's latents, or of a `LatentSpec` alone.

    A `PSVAE` normalises inside encode and decode, so nothing is left to apply. A `PixelVAE` gives raw latents, and its
    generator sees them either by ``config.scaling_factor`` and ``config.shift_factor`` (SD, FLUX), or by the
    statistics in ``latent_spec`` (VA-VAE, REPA-E, ReaLS), never by both.

    Args:
        source: `PSVAE`, `PixelVAE`, or a `LatentSpec`, which knows of no constants.
        by: of a `PixelVAE` that has both, which its generator was trained on. None: what there is.
        preview: from `fit_preview`.

    Raises:
        ConfigError: something else came; both are there and ``by`` does not choose; the one asked for is not there; the
            statistics are per element, which hold for one grid alone.
    """
    spec = getattr(source, "latent_spec", source)
    if not isinstance(spec, LatentSpec):
        raise ConfigError(f"a {type(source).__name__} came; wanted a PSVAE, a PixelVAE or a LatentSpec, loaded")
    fields: dict[str, Any] = {"latent_channels": spec.channels, "spacial_downscale_ratio": spec.stride}
    if preview is not None:
        fields |= {"latent_rgb_factors": preview.factors, "latent_rgb_factors_bias": preview.bias}
    applied = _applied(source, spec, by)
    if applied == "constants":
        fields |= {"scale_factor": source.config.scaling_factor, "shift_factor": source.config.shift_factor or 0.0}
    elif applied == "statistics":
        if spec.grid is not None:
            raise ConfigError(
                f"the statistics are per element at grid {spec.grid}; wanted per channel: ComfyUI samples at any size, "
                "fit statistics with statistics_grid=None"
            )
        fields |= {f"latents_{name}": tuple(getattr(spec, name).flatten().tolist()) for name in ("mean", "std")}
    return LatentFormat(applied=applied, **fields)


def _applied(source: Any, spec: LatentSpec, by: By | None) -> By | None:
    """What is left to the caller."""
    if by is not None:
        one_of("by", by, By)
    has = []
    if spec.applied_by == "caller":
        config = getattr(source, "config", None)
        if config is not None and (config.scaling_factor, config.shift_factor or 0.0) != (1.0, 0.0):
            has.append("constants")
        if ((spec.mean != 0) | (spec.std != 1)).any():
            has.append("statistics")
    if len(has) == 2 and by is None:
        raise ConfigError(
            f"the VAE has both scaling_factor {source.config.scaling_factor} and statistics; a generator was trained "
            "on one of them: say which, by='constants' or by='statistics'"
        )
    if by is not None and by not in has:
        whose = "its encode normalises" if spec.applied_by == "encode" else f"it has {has[0] if has else 'neither'}"
        raise ConfigError(f"by is {by!r}, which this VAE does not leave to callers ({whose}); leave by out")
    return by or (has[0] if has else None)  # type: ignore[return-value]


@torch.no_grad()
def fit_preview(vae: Any, batches: Tensor | Iterable[Tensor], *, by: By | None = None) -> Preview:
    """The linear map from latents, as the generator sees them, to colours, by least squares over the pictures' cells.

    A cell's colour is the mean over its stride × stride pixels. Sums are kept in float64, one batch at a time. A
    channel that does not vary gets zeros.

    Args:
        vae: a `PSVAE` or `PixelVAE`, in the mode it is to be used in. Their posterior's mean is taken.
        batches: images ``B 3 H W`` in [-1, 1], one batch or several, of any sizes; a dozen photographs are enough.
        by: as in `latent_format`.

    Raises:
        ConfigError: no VAE came; fewer cells than unknowns. ShapeError, DtypeError: images that the VAE does not take.
    """
    known = latent_format(vae, by=by)
    if isinstance(vae, LatentSpec):
        raise ConfigError("a LatentSpec came; wanted a PSVAE or a PixelVAE, whose latents are fitted")
    Z, stride = known.latent_channels, known.spacial_downscale_ratio
    count, moments, square = 0, torch.zeros(Z + 4, Z + 4, dtype=torch.float64), slice(Z, Z + 3)
    for images in [batches] if isinstance(batches, Tensor) else batches:
        check_images(images, stride)
        latents = known.process_in(vae.encode(images).latent_dist.mode())
        colours = F.avg_pool2d(images.float(), stride)
        columns = [latents, colours, torch.ones_like(colours[:, :1])]
        rows = torch.cat([x.cpu().double() for x in columns], dim=1).movedim(1, -1).flatten(0, 2)
        moments += rows.T @ rows
        count += len(rows)
    if count <= Z + 1:
        raise ConfigError(f"the pictures have {count} latent cells; wanted more than {Z + 1}, and better thousands")
    mean = moments[-1, :-1] / count
    covariance = moments[:-1, :-1] / count - mean.outer(mean)
    shared = covariance[:Z, square]
    factors = torch.linalg.pinv(covariance[:Z, :Z], rtol=1e-9, hermitian=True) @ shared  # below it is fp32's rounding
    bias = mean[square] - mean[:Z] @ factors
    variance = covariance[square, square].trace()
    explained = float((factors * shared).sum() / variance) if variance > 0 else 1.0
    digits = 6 - math.ceil(math.log10(max(float(factors.abs().max()), 1e-9)))  # six of the largest
    rounded: Any = [[round(x, digits) for x in row] for row in torch.cat([factors, bias[None]]).tolist()]
    return Preview(tuple(map(tuple, rounded[:-1])), tuple(rounded[-1]), explained)
