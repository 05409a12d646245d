"""The orderings that the papers claim, looked for in our numbers, seed by seed. All were written before any result."""

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
        kind: ``space``, of measures after training; ``generator``, of the generators' last ones; ``kept``, of the
            shortcut test.
        metric: of the results.
        names: from the smallest to the largest value; ``a - b`` is a difference of two.
    """

    says: str
    kind: str
    metric: str
    names: tuple[str, ...]


def made(says: str, *best_first: str) -> tuple[Ordering, Ordering]:
    """A claim on generation, in both measures."""
    return (
        Ordering(f"{says}: Fréchet distance", "generator", "frechet", best_first),
        Ordering(f"{says}: class right", "generator", "class_accuracy", best_first[::-1]),
    )


LESS, MORE = (f"ps-vae-{b} - ps-vae-{a}" for a, b in (SWEEP[-2:], SWEEP[:2]))
ORDERINGS = (
    Ordering("Tables 2, 4, 6: PSNR of S-VAE < RAE < PS-VAE < RAE-HD", "space", "psnr",
             ("s-vae", "rae", PS_VAE, "rae-hd")),
    Ordering("Table 4: PSNR of PS-VAE < P-VAE", "space", "psnr", (PS_VAE, "p-vae")),
    Ordering("Tables 2, 4: rFID of RAE-HD < PS-VAE < P-VAE < RAE < S-VAE", "space", "frechet",
             ("rae-hd", PS_VAE, "p-vae", "rae", "s-vae")),
    Ordering("Table 4: probe of P-VAE < PS-VAE < S-VAE < RAE", "space", "probe", ("p-vae", PS_VAE, "s-vae", "rae")),
    Ordering("Table 4: probe of the plain VAE < PS-VAE", "space", "probe", ("plain", PS_VAE)),
    Ordering("Figure 11: PSNR grows with the channels", "space", "psnr", tuple(f"ps-vae-{z}" for z in SWEEP)),
    Ordering("Figure 11: PSNR saturates: the last doubling gains less than the first", "space", "psnr", (LESS, MORE)),
    Ordering("Table 5: probe of the two MLPs < PS-VAE < the decoder on rebuilt features", "space", "probe",
             ("mlp", PS_VAE, "on-features")),
    Ordering("Table 5: PSNR of PS-VAE < the decoder on rebuilt features", "space", "psnr", (PS_VAE, "on-features")),
    Ordering("Section 5.4: PSNR from the channels that moved least < most", "kept", "psnr", ("still", "moved")),
    Ordering("Section 5.4: PSNR from the same channels of the frozen encoder < tuned", "kept", "psnr",
             ("frozen", "moved")),
    *made("Tables 2, 6: generation of PS-VAE better than RAE better than RAE-HD", PS_VAE, "rae", "rae-hd"),
    *made("Table 4: generation of PS-VAE better than P-VAE better than S-VAE better than RAE",
          PS_VAE, "p-vae", "s-vae", "rae"),
    *made("Table 2: generation of PS-VAE better than the plain VAE", PS_VAE, "plain"),
    *made("Table 5: generation of PS-VAE better than the decoder on rebuilt features better than the two MLPs",
          PS_VAE, "on-features", "mlp"),
    *made("ReaLS: generation better than in the plain VAE", "reals", "plain"),
    Ordering("ReaLS: probe of the plain VAE < ReaLS", "space", "probe", ("plain", "reals")),
)  # fmt: skip


def value(results: Results, kind: str, name: str, metric: str, seed: int) -> float | None:
    """None where that stage has not run."""
    if " - " in name:
        one, other = (value(results, kind, part, metric, seed) for part in name.split(" - "))
        return None if one is None or other is None else one - other
    if kind == "generator":
        curve = results.get(f"generator-{name}-{seed}", {}).get("curve")
        return None if not curve else curve[max(curve, key=int)][metric]
    if kind == "kept":
        return results.get(f"kept-{name}", {}).get(metric) if seed == 0 else None
    return results.get(f"space-{seed}-{name}", {}).get(metric)


def over_seeds(results: Results, kind: str, name: str, metric: str) -> list[float]:
    found = (value(results, kind, name, metric, seed) for seed in SEEDS)
    return [number for number in found if number is not None]


def verdict(results: Results, ordering: Ordering) -> tuple[str, str]:
    """Whether it appeared; and of each neighbouring pair the difference, seed by seed of those that have both."""
    held, shown = [], []
    for a, b in pairwise(ordering.names):
        pairs = [[value(results, ordering.kind, name, ordering.metric, seed) for name in (a, b)] for seed in SEEDS]
        gains = [more - less for less, more in pairs if less is not None and more is not None]
        if gains:
            right = sum(gain > 0 for gain in gains)
            held.append(right == len(gains))
            shown.append(f"{a} < {b} in {right} of {len(gains)}: {spread(gains)}")
    if len(held) < len(ordering.names) - 1:
        return "not measured", "; ".join(shown)
    if all(held):
        return "appears", "; ".join(shown)
    return f"in part: {sum(held)} of {len(held)}" if any(held) else "does not appear", "; ".join(shown)


def spread(numbers: list[float], digits: int = 3) -> str:
    """Mean ± standard deviation, the latter of two seeds or more."""
    if not numbers:
        return "·"
    mean = sum(numbers) / len(numbers)
    if len(numbers) == 1:
        return f"{mean:.{digits}f}"
    deviation = (sum((x - mean) ** 2 for x in numbers) / (len(numbers) - 1)) ** 0.5
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"
