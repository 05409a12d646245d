"""The orderings that the papers claim, looked for in our numbers, seed by seed."""

from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any, Literal, NamedTuple

from reproduction.plan import COARSE_PS_VAE, GENERATED, LABELS, PS_VAE, SEEDS, SWEEP

Results = dict[str, dict[str, Any]]  # by stage
MADE = {"frechet": -1, "frechet_turns": -1, "frechet_blurred": -1, "frechet_decoded": -1, "class_accuracy": 1}
"""Measures of generators; 1 where more is better."""


@dataclass(frozen=True)
class Ordering:
    """One claim.

    Attributes:
        where: in the paper.
        names: from the smallest to the largest value; of generators from the best to the worst. ``a - b`` is a
            difference of two.
        metric: of the results; generators are compared in each of `MADE`, their measures.
        kind: of stages: ``kept`` are those of the shortcut test, ``coarse`` those of larger cells, ``longer`` those of
            more steps.
        later: written after the first seed's results, before those of the others and of the coarse ones; of the longer
            ones after PS-VAE's reconstructions.
    """

    where: str
    names: tuple[str, ...]
    metric: str = ""
    kind: Literal[
        "space", "generator", "kept", "coarse", "coarse-generator", "longer", "longer-generator"
    ] = "space"  # fmt: skip
    later: bool = False


LESS, MORE = (f"ps-vae-{b} - ps-vae-{a}" for a, b in (SWEEP[-2:], SWEEP[:2]))
SPACES = (
    Ordering("Tables 2, 4, 6", ("s-vae", "rae", PS_VAE, "rae-hd"), "psnr"),
    Ordering("Tables 2, 4, 6", ("s-vae", "rae", PS_VAE, "rae-hd"), "ssim", later=True),
    Ordering("Table 4", (PS_VAE, "p-vae"), "psnr"),
    Ordering("Table 4", (PS_VAE, "p-vae"), "ssim", later=True),
    Ordering("Tables 2, 4", ("rae", "plain", PS_VAE), "psnr", later=True),
    Ordering("Tables 2, 4", ("plain", "p-vae"), "psnr", later=True),
    Ordering("Tables 2, 4, 6", ("rae-hd", PS_VAE, "p-vae", "rae", "s-vae"), "frechet"),
    Ordering("Tables 2, 4", (PS_VAE, "plain", "rae"), "frechet", later=True),
    Ordering("Tables 2, 4", ("p-vae", "plain"), "frechet", later=True),
    Ordering("Table 4", ("p-vae", PS_VAE, "s-vae", "rae"), "probe"),
    Ordering("Table 4", ("plain", PS_VAE), "probe"),
    Ordering("Table 4", ("plain", "p-vae"), "probe", later=True),
    Ordering("Figure 11", tuple(f"ps-vae-{z}" for z in SWEEP), "psnr"),
    Ordering("Figure 11", (LESS, MORE), "psnr"),
    Ordering("Table 5", ("mlp", PS_VAE, "on-features"), "probe"),
    Ordering("Table 5", (PS_VAE, "on-features"), "psnr"),
    Ordering("Table 5", (PS_VAE, "mlp"), "psnr", later=True),
    Ordering("Table 5", ("mlp", PS_VAE, "on-features"), "ssim", later=True),
    Ordering("Table 5", ("on-features", "mlp", PS_VAE), "frechet", later=True),
    Ordering("Section 5.4", ("still", "moved"), "psnr", "kept"),
    Ordering("Section 5.4", ("frozen", "moved"), "psnr", "kept"),
    Ordering("Tables 2, 6, coarse", ("rae", COARSE_PS_VAE, "rae-hd"), "psnr", "coarse", later=True),
    Ordering("Tables 2, 6, longer", ("rae", PS_VAE), "psnr", "longer", later=True),
    Ordering("Tables 2, 6, longer", ("rae", PS_VAE), "ssim", "longer", later=True),
    Ordering("Tables 2, 6, longer", (PS_VAE, "rae"), "frechet", "longer", later=True),
    Ordering("ReaLS", ("plain", "reals"), "probe"),
)
GENERATORS = (
    Ordering("Tables 2, 6", (PS_VAE, "rae", "rae-hd"), kind="generator"),
    Ordering("Table 4", (PS_VAE, "p-vae", "s-vae", "rae"), kind="generator"),
    Ordering("Table 2", (PS_VAE, "plain"), kind="generator"),
    Ordering("Table 2", ("plain", "rae"), kind="generator", later=True),
    Ordering("Table 5", (PS_VAE, "on-features", "mlp"), kind="generator"),
    Ordering("Tables 2, 6, coarse", (COARSE_PS_VAE, "rae", "rae-hd"), kind="coarse-generator", later=True),
    Ordering("Tables 2, 6, longer", (PS_VAE, "rae"), kind="longer-generator", later=True),
    Ordering("ReaLS", ("reals", "plain"), kind="generator"),
)
SAID = LABELS | {
    "moved": "the channels that moved most", "still": "those that moved least", "frozen": "the same ones, frozen",
    LESS: f"gain from {SWEEP[-2]} to {SWEEP[-1]} channels", MORE: f"gain from {SWEEP[0]} to {SWEEP[1]}",
}  # fmt: skip


def value(results: Results, kind: str, name: str, metric: str, seed: int) -> float | None:
    """None where that stage has not run."""
    if " - " in name:
        one, other = (value(results, kind, part, metric, seed) for part in name.split(" - "))
        return None if one is None or other is None else one - other
    if kind in ("space", "generator"):
        stage = results.get({"space": f"space-{seed}-{name}", "generator": f"generator-{name}-{seed}"}[kind], {})
    else:
        stage = results.get(f"{kind}-{name}", {}) if seed == SEEDS[0] else {}
    return last_of(stage).get(metric) if kind.endswith("generator") else stage.get(metric)


def last_of(stage: dict[str, Any]) -> dict[str, float]:
    """Of a generator, its measures at the last step; none where it has not run."""
    curve = stage.get("curve", {})
    return curve[max(curve, key=int)] if curve else {}


def over_seeds(results: Results, kind: str, name: str, metric: str) -> list[float]:
    found = (value(results, kind, name, metric, seed) for seed in SEEDS)
    return [number for number in found if number is not None]


class Pair(NamedTuple):
    """Two neighbours of an ordering.

    Attributes:
        names: of the first and the second, to be read.
        gains: by how much they differ, seed by seed; positive as in the paper.
        error: standard error of their mean, from the variance that all have in common.
    """

    names: tuple[str, str]
    gains: list[float]
    error: float

    @property
    def verdict(self) -> str:
        if not self.gains:
            return "not measured"
        mean = fmean(self.gains)
        return "undecided" if abs(mean) <= 2 * self.error else "appears" if mean > 0 else "the opposite"

    def __str__(self) -> str:
        return f"{self.verdict}: {spread(self.gains)}" if self.gains else self.verdict


def pairs(results: Results, ordering: Ordering, metric: str) -> list[Pair]:
    """Neighbours of ``ordering``, each in the paper's order.

    Three seeds are few to know one pair's error by, so every number is given the same variance: the mean of those of
    the spaces, or generators, that have several seeds.
    """
    generated = ordering.kind.endswith("generator")
    sign, kind, found = -MADE[metric] if generated else 1, "generator" if generated else "space", []
    several = [numbers for name in GENERATED if len(numbers := over_seeds(results, kind, name, metric)) > 1]
    variance = fmean([deviation(numbers) ** 2 for numbers in several]) if several else 0.0
    for one, other in pairwise(ordering.names):
        both = [[value(results, ordering.kind, name, metric, seed) for name in (one, other)] for seed in SEEDS]
        gains = [sign * (b - a) for a, b in both if a is not None and b is not None]
        numbers = len(f"{one} - {other}".split(" - "))  # that one gain is made of
        error = (variance * numbers / len(gains)) ** 0.5 if gains else 0.0
        found.append(Pair((SAID[one], SAID[other]), gains, error))
    return found


def deviation(numbers: list[float]) -> float:
    """Standard deviation; 0 of one number."""
    return stdev(numbers) if len(numbers) > 1 else 0.0


def spread(numbers: list[float], digits: int = 3) -> str:
    """Mean ± standard deviation, the latter of two seeds or more."""
    if not numbers:
        return "·"
    shown = f"{fmean(numbers):.{digits}f}"
    return shown if len(numbers) == 1 else f"{shown} ± {deviation(numbers):.{digits}f}"
