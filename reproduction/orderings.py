"""The orderings that the papers claim, looked for in our numbers, seed by seed."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from reproduction.plan import PS_VAE, SEEDS, SWEEP

Results = dict[str, dict[str, Any]]  # by stage


@dataclass(frozen=True)
class Ordering:
    """One claim.

    Attributes:
        says: as the paper has it, with its place.
        kind: ``space``, of measures after training; ``generator``, of the generators' last ones.
        metric: of the results.
        names: spaces from the smallest to the largest value.
    """

    says: str
    kind: str
    metric: str
    names: tuple[str, ...]


SWEPT = tuple(f"ps-vae-{z}" for z in SWEEP)
ORDERINGS = (
    Ordering("Tables 2, 4, 6: PSNR of S-VAE < RAE < PS-VAE < RAE-HD", "space", "psnr",
             ("s-vae", "rae", PS_VAE, "rae-hd")),
    Ordering("Table 4: PSNR of PS-VAE < P-VAE", "space", "psnr", (PS_VAE, "p-vae")),
    Ordering("Table 4: probe of P-VAE < PS-VAE < S-VAE < RAE", "space", "probe", ("p-vae", PS_VAE, "s-vae", "rae")),
    Ordering("Figure 11: PSNR grows with the channels", "space", "psnr", SWEPT),
    Ordering("Table 5: probe of the two MLPs < PS-VAE", "space", "probe", ("mlp", PS_VAE)),
    Ordering("Table 5: PSNR of PS-VAE < the decoder on rebuilt features", "space", "psnr", (PS_VAE, "on-features")),
    Ordering("Tables 2, 6: generation of PS-VAE better than RAE better than RAE-HD", "generator", "frechet",
             (PS_VAE, "rae", "rae-hd")),
    Ordering("Table 4: generation of PS-VAE better than S-VAE better than RAE", "generator", "frechet",
             (PS_VAE, "s-vae", "rae")),
    Ordering("Table 4: generation of PS-VAE better than P-VAE", "generator", "frechet", (PS_VAE, "p-vae")),
    Ordering("ReaLS: generation better than in the plain VAE", "generator", "frechet", ("reals", "plain")),
    Ordering("ReaLS: probe of the plain VAE < ReaLS", "space", "probe", ("plain", "reals")),
)  # fmt: skip


def value(results: Results, kind: str, name: str, metric: str, seed: int) -> float | None:
    """None where that stage has not run."""
    if kind == "generator":
        curve = results.get(f"generator-{name}-{seed}", {}).get("curve")
        return None if not curve else curve[max(curve, key=int)][metric]
    return results.get(f"space-{seed}-{name}", {}).get(metric)


def over_seeds(results: Results, kind: str, name: str, metric: str) -> list[float]:
    found = (value(results, kind, name, metric, seed) for seed in SEEDS)
    return [number for number in found if number is not None]


def verdict(results: Results, ordering: Ordering) -> tuple[str, str]:
    """Whether it appeared, and in how many seeds; the numbers. Each seed compares the names that it has."""
    held, seeds = 0, 0
    for seed in SEEDS:
        numbers = [value(results, ordering.kind, name, ordering.metric, seed) for name in ordering.names]
        present = [number for number in numbers if number is not None]
        if len(present) < len(numbers):
            continue
        seeds, held = seeds + 1, held + all(a < b for a, b in pairwise(present))
    shown = " < ".join(
        f"{name} {spread(over_seeds(results, ordering.kind, name, ordering.metric))}" for name in ordering.names
    )
    if not seeds:
        return "not measured", shown
    word = "appears" if held == seeds else "does not appear" if not held else "in part"
    return f"{word} ({held} of {seeds} seed{'s' * (seeds > 1)})", shown


def spread(numbers: list[float], digits: int = 3) -> str:
    """Mean ± standard deviation, the latter of two seeds or more."""
    if not numbers:
        return "·"
    mean = sum(numbers) / len(numbers)
    if len(numbers) == 1:
        return f"{mean:.{digits}f}"
    deviation = (sum((x - mean) ** 2 for x in numbers) / (len(numbers) - 1)) ** 0.5
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"
