"""Both papers' tables, small, on CIFAR-10.

    python -m reproduction.run --data cifar10/             # all of it; killed, the same command goes on
    python -m reproduction.run --data cifar10/ --quick     # the same path, a tenth of the work

Stages run one after the other; each leaves its numbers in ``results/`` of --output and is not run again. The page and
its figures are drawn from these numbers.
"""

import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))  # their losses and measures serve here too

from checkpoints import changed, write_text  # noqa: E402

from psvae import PSVAE, DeepFusionDiT, SemanticEncoder  # noqa: E402
from reproduction import cifar, classifiers, figures, generation, measures, report, spaces  # noqa: E402
from reproduction.plan import (  # noqa: E402
    ABLATED_GENERATORS,
    COARSE,
    GENERATED,
    LONGER,
    MEANS,
    ONCE,
    QUICK,
    WHOLE,
    Plan,
    ablations,
    phases_of,
)  # fmt: skip
from reproduction.plan import spaces as all_spaces  # noqa: E402
from reproduction.training import Machine, Recipe  # noqa: E402


@dataclass(frozen=True)
class Options:
    """Reproduce both papers' comparisons on CIFAR-10."""

    data: Path | None = None
    """Folder with train*.parquet and test*.parquet, columns image (or img) and label."""
    download: bool = False
    """Fetch CIFAR-10 from the Hub instead."""
    output: Path = Path("outputs/reproduction")
    """Weights, state and results; --quick has a folder of its own below it."""
    quick: bool = False
    """A tenth of the work."""
    precision: str = "bf16"
    """Of matrix products and convolutions: bf16, or fp32."""
    only: tuple[str, ...] = ()
    """Run the stages whose names start so, whatever they need before them being there, and draw no page; in several
    processes, for instance."""


class Run(NamedTuple):
    """What every stage is given."""

    plan: Plan
    output: Path
    train: cifar.Split
    test: cifar.Split
    machine: Machine

    @property
    def encoder(self) -> Path:
        return self.output / "encoder" / "encoder"

    def spaces(self, seed: int = 0) -> Path:
        return self.output / "spaces" / str(seed)

    def generators(self, label: str, seed: int) -> Path:
        return self.output / "generators" / f"{label}-{seed}"

    def frozen(self) -> SemanticEncoder:
        return SemanticEncoder.from_pretrained(self.encoder).to(self.machine.device).eval().requires_grad_(False)

    def judge(self, which: str) -> classifiers.Judge:
        return classifiers.load_judge(which, self.plan.judge_width, self.output / JUDGES[which], self.machine)

    def judges(self) -> classifiers.Judges:
        return classifiers.Judges(*map(self.judge, JUDGES))


Stage = tuple[str, Callable[[Run], dict[str, Any]]]
JUDGES = {"classes": "judge", "turns": "judge-of-turns"}  # by what each tells apart: its stage
FIRST = ("encoder", *JUDGES.values())  # what all else needs


# The stages


def encoder(run: Run, patch: int = classifiers.PATCH) -> dict[str, Any]:
    plan, folder = run.plan, run.output / "encoder"
    recipe = Recipe(plan.encoder_steps, plan.encoder_batch, 1e-3, seed=100, weight_decay=0.05)
    config = classifiers.encoder_config(plan.width, plan.depth, patch)
    classifiers.train_encoder(run.train, config, recipe, plan.encoder_small_steps, folder, run.machine)
    model = run.frozen()
    known, unknown = (
        measures.batched(model, cifar.to_images(pictures), run.machine)
        for pictures in (run.train.pictures[: plan.probe_pictures], run.test.pictures)
    )
    found = measures.probe(known, run.train.labels[: plan.probe_pictures], unknown, run.test.labels)
    return measures.rounded(found) | {"parameters_m": measures.parameters(model)}


def judge(run: Run, which: str) -> dict[str, Any]:
    seed, folder = 200 + list(JUDGES).index(which), run.output / JUDGES[which]
    recipe = Recipe(run.plan.judge_steps, run.plan.judge_batch, 2e-3, seed, weight_decay=0.05)
    classifiers.train_judge(which, run.train, run.plan.judge_width, recipe, folder, run.machine)
    shown, answers = cifar.to_images(run.test.pictures), run.test.labels
    if which == "turns":
        torch.manual_seed(seed)
        shown, answers = classifiers.turned(shown)
    return {"accuracy": round(classifiers.accuracy(run.judge(which), shown, answers, run.machine), 4)}


def space_recipe(run: Run, seed: int, steps: int) -> Recipe:
    return Recipe(steps, run.plan.space_batch, 1e-3, seed=300 + seed)


def phase(run: Run, name: str, seed: int, steps: int) -> dict[str, Any]:
    """One training of one space, and if it is the last one its measures."""
    folder, recipe = run.spaces(seed), space_recipe(run, seed, steps)
    if name in spaces.CONVOLUTIONAL:
        channels = run.plan.convolutional_channels
        spaces.train_convolutional(name, run.encoder, folder, run.train, recipe, channels, run.machine)
    else:
        spaces.train_phase(name, run.encoder, folder, run.train, recipe, run.machine)
    if name not in (*all_spaces(), *ablations(), *COARSE):
        return {}
    vae = spaces.load_space(name, folder, run.train, run.machine)
    fitted = run.plan.probe_pictures
    numbers = measures.semantics(vae, run.frozen(), run.train, run.test, fitted, run.machine)
    numbers |= measures.reconstruction(measures.painter(vae), run.test, run.judges(), run.machine)
    return {"channels": vae.config.latent_channels, "parameters_m": measures.parameters(vae), **numbers}


def shortcut(run: Run, which: Any) -> dict[str, Any]:
    """Section 5.4: a decoder on the channels of RAE-HD that moved most, or least."""
    recipe = space_recipe(run, 0, run.plan.space_steps)
    model = spaces.train_kept(which, run.plan.kept, run.encoder, run.spaces(), run.train, recipe, run.machine)
    numbers = measures.reconstruction(model.eval(), run.test, run.judges(), run.machine)
    return {"kept": model.channels, "of": run.plan.width, **numbers}


def moved(run: Run) -> dict[str, Any]:
    """How far each channel of RAE-HD is from the frozen encoder's."""
    tuned = PSVAE.from_pretrained(run.spaces() / "rae-hd").to(run.machine.device).encoder.eval()
    images = run.train.images(slice(0, 2000))
    return {"squares": [round(x, 5) for x in spaces.moved(tuned, run.frozen(), images, run.machine).tolist()]}


def generator(
    run: Run, name: str, seed: int, steps: int, cached: dict[Path, generation.Moments], label: str | None = None
) -> dict[str, Any]:
    """One generator in the space ``name``; its measures against training steps.

    Args:
        cached: latents of the last space that was encoded.
        label: of its folder; `MEANS` learns the posterior's means.
    """
    label, sizes = label or name, run.plan.sizes
    vae = spaces.load_space(name, run.spaces(seed), run.train, run.machine)
    if (place := run.spaces(seed) / label) not in cached:
        cached.clear()
        cached[place] = generation.encode(vae, run.train, sizes.pictures, run.machine)
        if label == MEANS:
            cached[place].std.zero_()
    moments, folder = cached[place], run.generators(label, seed)
    file = folder / "curve.json"
    curve: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    measure = generation.Measure(vae, run.test, run.judges(), run.machine)
    shape = moments.mean.shape[1:]

    def look(model: Any, step: int) -> None:
        made = generation.sample(model, vae, (sizes.samples, *shape), sizes.updates, seed, run.machine)
        curve[str(step)] = measure(made)
        write_text(file, json.dumps(curve))

    recipe = Recipe(steps, run.plan.generator_batch, 1e-3, seed=400 + seed, ema=0.995)
    model = generation.train_generator(moments, sizes, recipe, folder, run.machine, look)
    made = generation.sample(model, vae, (40, *shape), sizes.updates, seed, run.machine)
    figures.save_pictures(made, folder / "samples.png")
    return {"curve": curve, "parameters_m": measures.parameters(model)}


def sampler(run: Run) -> dict[str, Any]:
    """The first seed's generators with as many updates as the paper."""
    sizes, numbers = run.plan.sizes, {}
    for name in LONGER:
        vae = spaces.load_space(name, run.spaces(), run.train, run.machine)
        model = DeepFusionDiT.from_pretrained(run.generators(name, 0)).to(run.machine.device).eval()
        latent = vae.encode(run.train.images(slice(0, 1)).to(run.machine.device)).latent_dist.mode()
        shape = (sizes.samples, *latent.shape[1:])
        made = generation.sample(model, vae, shape, sizes.more_updates, 0, run.machine)
        numbers[name] = generation.Measure(vae, run.test, run.judges(), run.machine)(made)
    return numbers


def toy(run: Run) -> dict[str, Any]:
    """Figure 3, by examples/off_manifold.py."""
    import off_manifold

    folder = run.output / "off_manifold"
    every = max(1, run.plan.toy_steps // 10)
    off_manifold.main(off_manifold.Options(steps=run.plan.toy_steps, every=every, output=folder))
    found = json.loads((folder / "off_manifold.json").read_text())
    return {name: found[name] for name in ("tail", "floor", "mean difference", "standard error", "differences")}


def stages(run: Run) -> Iterator[Stage]:
    """In their order; each needs only earlier ones. All of the first seed comes first."""
    cached: dict[Path, generation.Moments] = {}
    steps = run.plan.generator_steps
    yield "encoder", encoder
    for which, name in JUDGES.items():
        yield name, lambda run, which=which: judge(run, which)
    for seed in run.plan.seeds:
        names = all_spaces() if seed == 0 else list(GENERATED)
        for name in dict.fromkeys(part for space in names for part in phases_of(space)):
            yield (
                f"space-{seed}-{name}",
                lambda run, name=name, seed=seed: phase(run, name, seed, run.plan.space_steps),
            )
        for name in GENERATED:
            yield (
                f"generator-{name}-{seed}",
                lambda run, name=name, seed=seed: generator(run, name, seed, steps, cached),
            )
        if seed == 0:
            yield from first_seed_alone(run.plan, cached)


def first_seed_alone(plan: Plan, cached: dict[Path, generation.Moments]) -> Iterator[Stage]:
    steps = plan.generator_steps
    yield "moved", moved
    for which in ("moved", "still", "frozen"):
        yield f"kept-{which}", lambda run, which=which: shortcut(run, which)
    yield "toy", toy
    for label in ONCE:
        name = spaces.PS_VAE if label == MEANS else label
        yield (
            f"generator-{label}-0",
            lambda run, name=name, label=label: generator(run, name, 0, steps, cached, label),
        )
    yield "sampler", sampler
    compared, ablated = (spaces.PS_VAE, *ablations()), (spaces.PS_VAE, *ablations(ABLATED_GENERATORS))
    yield from again("ablation", compared, ablated, plan.ablation_steps, steps // 2, cached)
    yield "coarse-encoder", lambda run: encoder(apart(run, "coarse"), 2 * classifiers.PATCH)
    yield from again("coarse", COARSE, COARSE, plan.space_steps, steps, cached)
    yield from again("longer", LONGER, LONGER, plan.longer * plan.space_steps, steps, cached)


def again(
    folder: str, names: Iterable[str], generated: Iterable[str], space_steps: int, generator_steps: int,
    cached: dict[Path, generation.Moments],
) -> Iterator[Stage]:  # fmt: skip
    """Spaces of other steps or of another encoder, and generators in them, of the first seed."""
    for name in dict.fromkeys(part for space in names for part in phases_of(space)):
        yield f"{folder}-{name}", lambda run, name=name: phase(apart(run, folder), name, 0, space_steps)
    for name in generated:
        yield (
            f"{folder}-generator-{name}",
            lambda run, name=name: generator(apart(run, folder), name, 0, generator_steps, cached),
        )


def apart(run: Run, folder: str) -> Run:
    """The same in a folder below, with the same judges; with the same encoder too, but for the coarse one."""
    there = run._replace(output=run.output / folder)
    there.output.mkdir(exist_ok=True)
    for part in JUDGES.values() if folder == "coarse" else ("encoder", *JUDGES.values()):
        with suppress(FileExistsError):
            (there.output / part).symlink_to((run.output / part).resolve(), target_is_directory=True)
    return there


# The run


def main(options: Options) -> None:
    plan = QUICK if options.quick else WHOLE
    output = options.output / "quick" if options.quick else options.output
    claim(options, plan, output)
    train, test = cifar.load(options.data, output / "data")
    test = cifar.Split(*(part[: plan.test_pictures] for part in test))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = Run(plan, output, train, test, Machine(device, options.precision == "bf16"))
    results, failed = output / "results", []
    planned = [name for name, _ in stages(run)]
    if unknown := [start for start in options.only if not any(name.startswith(start) for name in planned)]:
        raise SystemExit(f"--only {' '.join(unknown)}: no stage is named so; there are {', '.join(planned)}")
    for name, stage in stages(run):
        file = results / f"{name}.json"
        if file.exists() or (options.only and not name.startswith(options.only)):
            continue
        started = time.time()
        try:
            numbers = stage(run)
        except (Exception, SystemExit):  # those that do not need this stage go on
            traceback.print_exc()
            failed.append(name)
            if name in FIRST:
                break
            continue
        numbers["minutes"] = round((time.time() - started) / 60, 2)
        numbers["on"] = f"CPU cores: {torch.get_num_threads()}" if device.type == "cpu" else device.type
        write_text(file, json.dumps(numbers, indent=2) + "\n")
        shown = {key: value for key, value in numbers.items() if isinstance(value, int | float)}
        print(f"{name}: {', '.join(f'{key} {value}' for key, value in shown.items())}", flush=True)
    if not options.only:
        whole = not options.quick and all((results / f"{name}.json").exists() for name in planned)
        remarks = Path(__file__).with_name("remarks.md").read_text(encoding="utf-8") if whole else ""
        folder = ROOT / "docs" if whole else output
        print(f"the page is {report.write(results, output, folder, len(planned), remarks)}")
    if failed:
        raise SystemExit(
            f"{len(failed)} stages failed, see above: {', '.join(failed)}; the same command tries them again"
        )


def claim(options: Options, plan: Plan, output: Path) -> None:
    """Results of one plan alone lie together.

    Raises:
        SystemExit: there is no data, an unknown precision, or results of another plan.
    """
    if options.precision not in ("bf16", "fp32"):
        raise SystemExit(f"--precision is {options.precision!r}; wanted bf16 or fp32")
    if (options.data is None) != options.download:
        raise SystemExit("wanted --data FOLDER or --download, one of the two")
    given = {"precision": options.precision, "phases": spaces.fingerprint(), **asdict(plan)}
    asked = json.loads(json.dumps(given))
    file = output / "plan.json"
    if file.exists() and (difference := changed(json.loads(file.read_text()), asked)):
        raise SystemExit(f"{output} holds results of another plan ({difference}); another --output begins anew")
    write_text(file, json.dumps(asked, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
