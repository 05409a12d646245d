"""One training for each KL weight, and the paper's Figure 5 of them: KL weight, distance, spread of the latents."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from checkpoints import changed, refuse_to_start_over, write_text
from data import validation_images
from reals_models import build_teacher, width_of

from psvae import PixelVAE

Numbers = dict[str, float]


def measured_sweep(options: Any, train: Callable[[Any], Numbers]) -> dict[str, Numbers]:
    """`sweep`, with the distance of pictures generated in each space where a generator is to be trained.

    Raises:
        SystemExit: a generator would learn no classes, or its pictures could not be measured.
    """
    if not options.sit_steps:
        return sweep(options, train)
    import generation  # and with it diffusers, for this alone

    if options.data.kind != "folder":
        raise SystemExit(
            f"--sit-steps reads a folder with one subfolder per class, and --data.kind is {options.data.kind}: pass "
            "such a folder, or --sit-steps 0"
        )
    try:
        generation.check_labelled(Path(options.data.path), options.data.size)
    except SystemExit as error:
        raise SystemExit(f"{error}; or --sit-steps 0") from error
    width = width_of(options.teacher)
    count, whose = options.validation_count, f"--validation-count {options.validation_count} pictures"
    if count > width:
        count = len(validation_images(options.held_out, count))
        whose = f"the {count} readable pictures of {options.held_out.path}"
    if count <= width:
        raise SystemExit(
            f"{whose} say nothing about the distance in the {width} features of {options.teacher}: wanted more than "
            f"{width}, better thousands; or --sit-steps 0"
        )
    return sweep(options, train, generated_distance, f"the pooled features of {options.teacher}")


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
    runs = runs_of(options)
    for one in runs.values():
        refuse_to_start_over(one.output / "checkpoints", options.resume)  # before the first is trained
        if not options.resume and (one.output / "metrics.json").exists():  # a generator may hang on these weights
            raise SystemExit(f"{one.output} holds a finished run: pass --resume, or another --output")
    found: dict[str, Numbers] = {}
    for name, one in runs.items():
        numbers = train(one) | {"kl": one.losses.kl}
        found[name] = numbers if distance is None else numbers | {"frechet": distance(one)}
    if PartialState().is_main_process:
        write_text(options.output / "kl_sweep.json", json.dumps(found, indent=2))
        plot(list(found.values()), options.output / "kl_sweep.png", features)
    return found


def runs_of(options: Any) -> dict[str, Any]:
    """The options of the run of each weight, by its folder's name."""
    return {
        f"kl{weight:g}": replace(
            options, kl=(), output=options.output / f"kl{weight:g}", losses=replace(options.losses, kl=weight)
        )
        for weight in options.kl
    }


def generated_distance(options: Any) -> float:
    """Fréchet, in the teacher's features pooled over the grid, of a small SiT's pictures in a finished run's latents
    from as many validation pictures. Kept beside it as frechet.json."""
    import generation

    state, size = PartialState(), options.data.size
    folder = options.output / f"sit{options.sit_steps}-{size}px-seed{options.seed}"
    real = validation_images(options.held_out, options.validation_count)
    settings = {
        "features": options.teacher, "merge": options.merge, "validation": options.held_out.path, "pictures": len(real),
        "size": size, "seed": options.seed,
    }  # fmt: skip
    file = folder / "frechet.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    state.wait_for_everyone()  # all have looked before one writes
    if known and not changed(known, settings):
        return known["frechet"]
    made = generation.generate(
        generation.Options(
            vae=options.output / "vae", data=Path(options.data.path), output=folder, size=size,
            steps=options.sit_steps, count=len(real), flip=options.data.flip, workers=options.data.workers,
            mixed_precision=options.mixed_precision, seed=options.seed,
        )
    )  # fmt: skip
    found = [0.0]
    if state.is_main_process:
        vae = PixelVAE.from_pretrained(options.output / "vae")
        teacher = build_teacher(options.teacher, vae, size, options.merge).to(state.device)
        found = [generation.distance(real, made, lambda part: teacher(part.to(state.device)).mean(dim=(2, 3)))]
        write_text(file, json.dumps({"frechet": found[0], **settings}, indent=2) + "\n")
    return broadcast_object_list(found)[0]


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
