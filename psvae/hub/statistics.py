"""Latent statistics as other projects keep them, read into a `LatentSpec`."""

import json
import math
import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from psvae.errors import CheckpointError, ConfigError
from psvae.hub.reading import read_pickle
from psvae.hub.writing import write_json
from psvae.latents import LatentSpec

__all__ = ["MEAN_STD", "RAE_EPS", "load_latent_statistics", "pooled_statistics", "read_statistics", "write_mean_std"]

MEAN_STD = "mean_std.json"  # ReaLS: one number each, for all channels
RAE_EPS = 1e-5  # RAE: (z − mean) / √(var + ε)
_LAYOUTS = {
    "RAE": {"mean", "var"},
    "LightningDiT": {"mean", "std"},
    "REPA-E": {"latents_scale", "latents_bias"},
}


def load_latent_statistics(
    spec: LatentSpec, file: str | os.PathLike[str], *, eps: float = RAE_EPS, allow_pickle: bool = False
) -> str:
    """Fill ``spec.mean`` and ``spec.std`` from a statistics file of RAE, LightningDiT, REPA-E or ReaLS.

    Args:
        spec: the model's ``latent_spec``; per channel or per element, as the file is; ReaLS' numbers fill either.
        file: ``.safetensors``, a pickle where ``allow_pickle``, or ReaLS' ``mean_std.json``.
        eps: RAE's ε, added once, to the variance; the other layouts need none.

    Returns:
        The layout that was recognised: ``"RAE"``, ``"LightningDiT"``, ``"REPA-E"`` or ``"ReaLS"``.

    Raises:
        CheckpointError: unreadable, a mixture of layouts, of another shape, or not positive and finite.
    """
    layout, mean, std = read_statistics(file, eps=eps, allow_pickle=allow_pickle)
    wanted = tuple(spec.mean.shape)
    if layout != "ReaLS" and tuple(std.shape) != wanted:
        grid = tuple(std.shape[1:])
        field = "statistics_grid=None" if grid == (1, 1) else f"statistics_grid={grid}"
        raise CheckpointError(
            f"{file} holds statistics of shape {tuple(std.shape)}; the model wants {wanted}: build it with {field} and "
            f"{std.shape[0]} latent channels, or choose the file that belongs to it"
        )
    with torch.no_grad():
        spec.mean.copy_(mean)
        spec.std.copy_(std)
    return layout


def read_statistics(
    file: str | os.PathLike[str], *, eps: float = RAE_EPS, allow_pickle: bool = False
) -> tuple[str, Tensor, Tensor]:
    """(layout, mean, std) of a statistics file; mean and std are ``Z 1 1`` or ``Z h w``, in fp32; of ReaLS ``1 1 1``.

    Raises:
        CheckpointError: as `load_latent_statistics`.
    """
    path = Path(file)
    if not path.is_file():
        raise CheckpointError(f"there is no statistics file {str(path)!r}")
    if path.suffix == ".json":
        return "ReaLS", *_mean_std(path)
    content = _load(path, allow_pickle)
    names = set(content)
    layout = next((layout for layout, keys in _LAYOUTS.items() if names == keys), None)
    if layout is None and names == {"var"}:  # RAE's released file has no mean
        layout = "RAE"
    if layout is None:
        known = "; ".join(f"{layout} {sorted(keys)}" for layout, keys in _LAYOUTS.items())
        raise CheckpointError(f"{path} holds {sorted(map(str, names))}; wanted exactly one of: {known}")
    if layout == "REPA-E":
        mean, std = content["latents_bias"], content["latents_scale"]
    else:
        mean, std = content.get("mean"), content["var" if layout == "RAE" else "std"]
    std = _as_map(path, std)
    if not (std.isfinite().all() and (std >= 0).all()):
        raise CheckpointError(f"{path} holds a negative or non-finite spread; wanted positive numbers")
    if layout == "RAE":
        std = (std + eps).sqrt()
    elif not (std > 0).all():
        raise CheckpointError(f"{path} holds a spread of 0; wanted positive numbers")
    elif layout == "REPA-E":
        std = 1.0 / std
    mean = torch.zeros_like(std) if mean is None else _as_map(path, mean)
    if not std.isfinite().all():
        raise CheckpointError(f"{path} holds a spread so small or large that it overflows; wanted numbers near 1")
    if mean.shape != std.shape or not mean.isfinite().all():
        raise CheckpointError(
            f"{path} holds a mean of shape {tuple(mean.shape)} and a spread of {tuple(std.shape)}; wanted "
            "one finite shape"
        )
    return layout, mean, std


def pooled_statistics(spec: LatentSpec) -> tuple[float, float]:
    """ReaLS' (mean, std): of all channels and cells taken together.

    Raises:
        ConfigError: the statistics are still 0 and 1: nothing was measured.
    """
    mean, std = spec.mean.double(), spec.std.double()
    if ((mean == 0) & (std == 1)).all():
        raise ConfigError(
            f"the latents' statistics are not measured, so {MEAN_STD} would say nothing; wanted them for the "
            "generator: psvae.fit_latent_statistics(vae, batches) first"
        )
    total = mean.mean()
    spread = (std.square() + (mean - total).square()).mean().sqrt()
    return total.item(), spread.item()


def write_mean_std(spec: LatentSpec, file: str | os.PathLike[str]) -> tuple[float, float]:
    """Write ReaLS' ``mean_std.json``: one mean and one std, those of all channels and cells taken together.

    Returns:
        (mean, std) as written.

    Raises:
        ConfigError: the statistics are still 0 and 1: nothing was measured. CheckpointError: it cannot be written.
    """
    mean, std = pooled_statistics(spec)
    write_json(Path(file), {"mean": mean, "std": std})
    return mean, std


def _mean_std(path: Path) -> tuple[Tensor, Tensor]:
    """ReaLS' two numbers, each ``1 1 1``."""
    wanted = (
        'wanted {"mean": number, "std": number}, one each for all channels, finite in float32 and std above 0: fetch '
        "the file again from where the weights came from, or measure it with psvae.fit_latent_statistics(vae, batches) "
        "and psvae.save_reals"
    )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not JSON that can be read ({error}); {wanted}") from error
    found = content if isinstance(content, dict) else {}
    mean, std = (_number(found.get(name)) for name in ("mean", "std"))
    if not mean.isfinite() or not std.isfinite() or std <= 0:
        raise CheckpointError(f"{path} holds {reprlib.repr(content)}; {wanted}")
    return mean, std


def _number(value: Any) -> Tensor:
    """``1 1 1`` in fp32, of all that float() takes, as the authors read it; NaN of the rest."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    return torch.tensor(number).view(1, 1, 1)


def _load(path: Path, allow_pickle: bool) -> Mapping[str, Any]:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is not a whole safetensors file ({error}); download it again") from error
    content = read_pickle(path, allow_pickle)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; wanted a dict of mean and variance")
    return content


def _as_map(path: Path, values: Any) -> Tensor:
    """``Z``, ``Z h w`` or ``1 Z h w`` → ``Z h w`` in fp32."""
    if not isinstance(values, Tensor):
        raise CheckpointError(f"{path} holds a {type(values).__name__} where a tensor was wanted")
    shape = tuple(values.shape)
    if not values.is_floating_point():
        raise CheckpointError(f"{path} holds statistics of {values.dtype}; wanted floating point")
    values = values.float()
    if values.ndim == 4 and shape[0] == 1:
        values = values[0]
    if values.ndim == 1:
        values = values[:, None, None]
    if values.ndim != 3 or 0 in shape:
        raise CheckpointError(f"{path} holds statistics of shape {shape}; wanted (Z,), (Z, h, w) or (1, Z, h, w)")
    return values
