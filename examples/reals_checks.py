"""What train_reals.py refuses before it loads or trains anything: options that would fail late, or silently."""

import json
from dataclasses import asdict
from typing import Any

from checkpoints import changed
from equivariance import Turn
from kl_sweep import runs_of
from reals_losses import aligns
from reals_models import config_of

from psvae.hub.source import CONFIG

LEAST = {
    0: ("data.workers", "steps", "sit_steps", "warmup", "clip"),
    1: (
        "data.size", "align_layers", "align_hidden", "batch_size", "accumulate", "log_every", "sample_every",
        "checkpoint_every", "keep_checkpoints", "validation_count", "statistics_batches",
    ),
}  # fmt: skip
SMALLEST = {  # pictures that each term can look at, in pixels, by the term's weight
    "adversarial": ("the discriminator", 24),
    "perceptual": ("LPIPS", 16),
}
FREE = {  # what may be another where a finished run is resumed: its weights are what they are without it
    "output", "kl", "sit_steps", "resume", "allow_pickle", "data.workers", "log_every", "sample_every",
    "checkpoint_every", "keep_checkpoints", "validation", "validation_count", "tracker",
}  # fmt: skip


def check(options: Any) -> None:
    """The options of train_reals.py.

    Raises:
        SystemExit: a number that is too small, a file that is not there, options that do not go together, a finished
            run of other options, an alignment network in the way of a plain VAE.
    """
    weights = options.losses
    numbers = {f"data.{name}": getattr(options.data, name) for name in ("size", "workers")} | vars(options)
    for least, names in LEAST.items():
        for name in names:
            if numbers[name] < least:
                raise SystemExit(f"--{name.replace('_', '-')} is {numbers[name]}; wanted at least {least}")
    folders = [f"{weight:g}" for weight in options.kl]
    twice = sorted({name for name in folders if folders.count(name) > 1})
    if twice:
        raise SystemExit(f"--kl has {', '.join(twice)} more than once; wanted each weight once: its run has a folder")
    if options.vae is None and options.model is not None and not options.model.is_file():
        raise SystemExit(f"--model {options.model} is no file; wanted JSON of a PixelVAEConfig")
    if aligns(weights) or (options.kl and options.sit_steps):
        config_of(options.teacher)
    if weights.adaptive and (weights.detach or not aligns(weights)):
        raise SystemExit("--losses.adaptive weighs gradients that the alignment gives the VAE; here it gives it none")
    if weights.adversarial and options.mixed_precision == "fp16":
        raise SystemExit(
            "--mixed-precision fp16 has one loss scale, which accelerate changes between the steps of the VAE and of "
            "the discriminator; wanted bf16 or no, or --losses.adversarial 0"
        )
    refuse_small_pictures(options)
    for one in runs_of(options).values() if options.kl else [options]:
        refuse_another_training(one, longer=not options.kl)
        if not aligns(weights):
            refuse_to_pair(one)


def refuse_small_pictures(options: Any) -> None:
    """Before a term fails on them; the discriminator's would at the step from which it counts.

    Raises:
        SystemExit: they are too small for the discriminator or LPIPS.
    """
    size, said = options.data.size, f"images are of {options.data.size} px"
    if options.losses.equivariance:
        size = size * Turn.SMALLEST / Turn.PARTS
        said = f"equivariance shrinks images of {options.data.size} px to {size:g} px"
    for term, (whose, least) in SMALLEST.items():
        if getattr(options.losses, term) and size < least:
            raise SystemExit(f"{said}, and {whose} needs {least}: pass --losses.{term} 0, or a larger --data.size")


def refuse_another_training(options: Any, longer: bool) -> None:
    """Before ``--resume`` takes a finished run for what was asked for.

    Args:
        longer: more steps than it had may be asked for.

    Raises:
        SystemExit: it was trained by other options, or cannot go on.
    """
    before = finished_by(options)
    asked = by_name(json.loads(json.dumps(asdict(options), default=str)))
    decisive = {name: value for name, value in asked.items() if name in before and name not in FREE}
    if longer and not changed(before, {**decisive, "steps": before.get("steps")}) and asks_for_more(options):
        refuse_to_go_on(options, before["steps"])
    elif difference := changed(before, decisive):
        raise SystemExit(
            f"{options.output} holds a finished run of other options ({difference}); wanted the same"
            f"{', or more --steps alone' * longer}: or pass another --output"
        )


def finished_by(options: Any) -> dict[str, Any]:
    """The options of the finished run that ``--resume`` finds, by name; empty where there is none that tells them."""
    file = options.output / "options.json"
    if not (options.resume and (options.output / "metrics.json").exists() and file.exists()):
        return {}
    return by_name(json.loads(file.read_text(encoding="utf-8")))


def asks_for_more(options: Any) -> bool:
    """Whether ``--resume`` finds a finished run of fewer steps."""
    return finished_by(options).get("steps", options.steps) < options.steps


def refuse_to_go_on(options: Any, steps: int) -> None:
    """Before a finished run is trained from its first step again, or under a generator that has learnt its latents.

    Raises:
        SystemExit: no checkpoint is left, or such a generator lies there.
    """
    said = f"{options.output} holds a finished run of {steps} steps, and {options.steps} were asked for"
    if not any((options.output / "checkpoints").glob("step*")):
        raise SystemExit(
            f"{said}, but it left no checkpoint to go on from, as where --checkpoint-every is not below the steps: "
            f"wanted another --output, and --vae {options.output / 'vae'} to start from its VAE"
        )
    if generators := sorted(path.name for path in options.output.glob("sit*px-seed*")):
        raise SystemExit(
            f"{said}, but {generators[0]}/ there was trained in its latents, which would be others: wanted another "
            f"--output, or delete {generators[0]}/ first"
        )


def by_name(options: dict[str, Any]) -> dict[str, Any]:
    """Those of data and losses too: ``losses.kl``."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        found |= (
            {f"{name}.{part}": inner for part, inner in value.items()} if isinstance(value, dict) else {name: value}
        )
    return found


def refuse_to_pair(options: Any) -> None:
    """Before a plain VAE is trained that could not be saved: it would be taken for that of another's alignment network.

    Raises:
        SystemExit: the output holds such a network.
    """
    if (options.output / "alignment" / CONFIG).exists():
        raise SystemExit(
            f"{options.output} holds alignment/ of an earlier run, and --losses.patch 0 --losses.cls 0 trains none to "
            "replace it; wanted a folder without one: pass another --output, or delete alignment/ if it is no longer "
            "needed"
        )
