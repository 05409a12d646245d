"""One training for each KL weight, and the paper's Figure 5 of them: KL weight, distance, spread of the latents."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from checkpoints import refuse_to_start_over, write_text

Numbers = dict[str, float]


def sweep(
    options: Any,
    train: Callable[[Any], Numbers],
    distance: Callable[[Any], float] | None = None,
    features: str | None = None,
) -> dict[str, Numbers]:
    """Train below ``options.output / "kl..."``, then write ``kl_sweep.json`` and ``kl_sweep.png``.

    Args:
        options: of train_reals.py; ``kl`` holds the weights.
        train: its options → the numbers that it leaves in ``metrics.json``.
        distance: the options of a finished run → the Fréchet distance of pictures generated in its space; called on
            every resumption, so it keeps what it found. Without it a run's own ``frechet`` is drawn, where whoever
            measures it adds it to ``metrics.json``.
        features: whose the distance is, for the plot.

    Returns:
        What each run knows, by its folder's name.
    """
    runs = {f"kl{weight:g}": replace(options, kl=(), output=options.output / f"kl{weight:g}") for weight in options.kl}
    for one in runs.values():
        refuse_to_start_over(one.output / "checkpoints", options.resume)  # before the first is trained
        if not options.resume and (one.output / "metrics.json").exists():  # a generator may hang on these weights
            raise SystemExit(f"{one.output} holds a finished run: pass --resume, or another --output")
    found: dict[str, Numbers] = {}
    for (name, one), weight in zip(runs.items(), options.kl, strict=True):
        numbers = train(replace(one, losses=replace(one.losses, kl=weight))) | {"kl": weight}
        found[name] = numbers if distance is None else numbers | {"frechet": distance(one)}
    if PartialState().is_main_process:
        write_text(options.output / "kl_sweep.json", json.dumps(found, indent=2))
        plot(list(found.values()), options.output / "kl_sweep.png", features)
    return found


def plot(runs: list[Numbers], file: Path, features: str | None = None) -> str:
    """Point sizes are the latents' std. Returns what the y axis shows: the distance where all know it, else the error
    of reconstruction."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    if all("frechet" in run for run in runs):
        label, heights = "Fréchet distance of generated pictures", [run["frechet"] for run in runs]
        label += "" if features is None else f"\nin {features}"
    else:
        label = "RMSE of reconstructions, pixels in [0, 1] (no generator was measured)"
        heights = [10 ** (-run["psnr"] / 20) for run in runs]
    figure, axes = plt.subplots(figsize=(6, 4.5), layout="constrained")
    weights, spreads = [run["kl"] for run in runs], [run["latent_std"] for run in runs]
    axes.plot(weights, heights, color="0.7", zorder=1)
    axes.scatter(weights, heights, s=[400 * spread / max(spreads) for spread in spreads], alpha=0.7, zorder=2)
    for weight, height, spread in zip(weights, heights, spreads, strict=True):
        axes.annotate(f"std {spread:.2g}", (weight, height), textcoords="offset points", xytext=(0, 14), ha="center")
    axes.set_xscale("symlog" if min(weights) <= 0 else "log")
    axes.margins(0.15)
    axes.set_xlabel("weight of the KL term (point size: std of the latents)")
    axes.set_ylabel(label)
    figure.savefig(file, dpi=110)
    plt.close(figure)
    return label
