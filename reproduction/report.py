"""docs/reproduction.md and its figures, drawn from the stages' numbers, so that text and numbers cannot part."""

import json
from pathlib import Path
from typing import Any

import matplotlib
from checkpoints import write_text
from torch import Tensor
from torchvision.utils import save_image

from reproduction.orderings import ORDERINGS, Results, over_seeds, spread, verdict
from reproduction.plan import ABLATED_GENERATORS, GENERATED, LONGER, MEANS, ONCE, PS_VAE, SEEDS, SWEEP, WIDEST
from reproduction.spaces import ABLATED, CONVOLUTIONAL

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LABELS = {
    "rae": "RAE", "s-vae": "S-VAE", PS_VAE: "PS-VAE", "rae-hd": "RAE-HD", "p-vae": "P-VAE", "mlp": "2-layer MLPs",
    "on-features": "decoder on rebuilt features", "plain": "plain VAE", "reals": "ReaLS",
    MEANS: "PS-VAE, its posterior's means", WIDEST: f"PS-VAE, {SWEEP[-1]} channels",
}  # fmt: skip
PAPER: dict[str, dict[str, float]] = {  # Tables 4, 5 and 6; psnr, ssim, rFID, linear probe, GenEval
    "rae": {"psnr": 19.20, "ssim": 0.436, "rfid": 0.619, "probe": 83.0, "geneval": 71.3},
    "s-vae": {"psnr": 17.78, "ssim": 0.390, "rfid": 1.407, "probe": 81.1, "geneval": 73.7},
    PS_VAE: {"psnr": 28.79, "ssim": 0.817, "rfid": 0.203, "probe": 79.5, "geneval": 76.6},
    "rae-hd": {"psnr": 33.10, "ssim": 0.916, "rfid": 0.193, "geneval": 60.2},
    "p-vae": {"psnr": 29.81, "ssim": 0.850, "rfid": 0.398, "probe": 11.8, "geneval": 75.2},
    "mlp": {"psnr": 28.94, "ssim": 0.812, "rfid": 0.205, "probe": 44.5, "geneval": 70.3},
    "on-features": {"psnr": 29.64, "ssim": 0.840, "rfid": 0.193, "probe": 80.4, "geneval": 74.4},
    "plain": {"psnr": 26.18, "ssim": 0.715, "rfid": 0.534, "probe": 5.4, "geneval": 75.7},  # MAR-VAE
}
PAPER_REALS = {  # FID without guidance after 400 000 steps, in the plain SD-VAE's latents and in ReaLS'
    "DiT-B/2": (43.5, 35.27), "SiT-B/2": (33.0, 27.53), "SiT-L/2": (18.8, 16.39), "SiT-XL/2": (17.2, 14.24),
}  # fmt: skip
PAPER_SWEEP = {32: 24.53, 48: 25.43, 64: 26.65, 80: 27.38, 96: 28.79, 112: 30.51, 256: 30.30}  # Figure 11, PSNR
COLOURS = plt.get_cmap("tab10").colors


def write(results: Path, output: Path, docs: Path) -> Path:
    """The page, the numbers that it was drawn from, and the figures below ``docs``."""
    found: Results = {file.stem: json.loads(file.read_text()) for file in sorted(results.glob("*.json"))}
    plan = json.loads((output / "plan.json").read_text())
    images = docs / "images"
    images.mkdir(parents=True, exist_ok=True)
    parts = [head(found, plan), spaces_table(found)]
    if draw_sweep(found, images / "reproduction_channels.png"):
        parts.append(sweep_section(found))
    parts += [shortcut_section(found), generation_section(found, output, images)]
    parts += [reals_section(found), toy_section(found)]
    parts += [longer_section(found, plan), orderings_section(found), ablation_section(found), remarks()]
    write_text(docs / "reproduction.json", json.dumps({"plan": plan, "stages": found}, indent=1) + "\n")
    page = docs / "reproduction.md"
    write_text(page, "\n\n".join(part.strip() for part in parts if part) + "\n")
    return page


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None, digits: int = 3) -> str:
    return "·" if value is None else f"{value:.{digits}f}"


def of_seeds(found: Results, name: str, metric: str, digits: int = 3, kind: str = "space") -> str:
    return spread(over_seeds(found, kind, name, metric), digits)


# Sections


def head(found: Results, plan: dict[str, Any]) -> str:
    encoder, judge = found.get("encoder", {}), found.get("judge", {})
    return f"""
# The papers' tables, small

<!-- written by `python -m reproduction.run`; the remarks at the end come from reproduction/remarks.md -->

`python -m reproduction.run --data cifar10/` trains everything below on CIFAR-10 and writes this page and
[its numbers](reproduction.json): {len(found)} stages, {hours(found)}, {plan["precision"]}.
What is trained, and by which of the library's classes: [reproduction/README.md](../reproduction/README.md).

The representation encoder is a Vision Transformer of width {plan["width"]} and depth {plan["depth"]} with 8 × 8
tokens, trained here: linear probe {number(encoder.get("probe"))} (0.75 wanted), {encoder.get("parameters_m", "·")} M
parameters. It learned the labels that the probes and "class right" test afterwards, as DINOv2 did not, so it says more
about classes and less about everything else. RAE, S-VAE, PS-VAE, P-VAE and RAE-HD begin with it, the plain VAE and
ReaLS with random weights.

Reconstructions and generated pictures are judged by an independent convolutional classifier of accuracy
{number(judge.get("accuracy"))}: "Fréchet" is the Fréchet distance in its features, and no FID. The paper's numbers are
of DINOv2-B and ImageNet at 256 px: orders compare, values do not. ± is the standard deviation over seeds; a seed has
spaces of its own, and generators in them.
"""


def hours(found: Results) -> str:
    """Of work, by what did it: stages can run beside each other. One that was killed counts from its last start."""
    minutes: dict[str, float] = {}
    for stage in found.values():
        minutes[stage["on"]] = minutes.get(stage["on"], 0.0) + stage["minutes"]
    return " and ".join(f"{total / 60:.1f} hours ({where})" for where, total in sorted(minutes.items()))


def spaces_table(found: Results) -> str:
    names = ["rae", "s-vae", PS_VAE, "rae-hd", "p-vae", "mlp", "on-features", *CONVOLUTIONAL]
    header = [
        "space", "PSNR", "SSIM", "Fréchet", "probe", "probe, all cells", "kNN", "cosine, encoder",
        "cosine, rebuilt", "active",
        "*paper: PSNR*", "*SSIM*", "*rFID*", "*probe*",
    ]  # fmt: skip
    rows = [
        [
            LABELS[name], of_seeds(found, name, "psnr", 2), of_seeds(found, name, "ssim"),
            of_seeds(found, name, "frechet"), of_seeds(found, name, "probe"), of_seeds(found, name, "probe_cells"),
            of_seeds(found, name, "knn"), of_seeds(found, name, "encoder_cosine"),
            of_seeds(found, name, "feature_cosine"),
            of_seeds(found, name, "active_channels", 2),
            *(
                f"*{PAPER[name][key]}*" if key in PAPER.get(name, {}) else "·"
                for key in ("psnr", "ssim", "rfid", "probe")
            ),
        ]
        for name in names
    ]  # fmt: skip
    return (
        "## The spaces\n\nThe paper's Tables 2, 4, 5 and 6, and ReaLS; its plain VAE is MAR's. The probe reads the "
        "mean over the latent's cells; 20 nearest neighbours likewise. Cosines are with the frozen encoder's features: "
        "of the tuned encoder's, and of those rebuilt from the latent.\n\n" + table(header, rows)
    )


def sweep_section(found: Results) -> str:
    rows = [
        [
            str(z), number(found.get(f"space-0-ps-vae-{z}", {}).get("psnr"), 2),
            *(
                number(found.get(f"space-0-ps-vae-{z}", {}).get(key))
                for key in ("ssim", "frechet", "probe", "feature_cosine", "active_channels")
            ),
        ]
        for z in SWEEP
    ]  # fmt: skip
    shown = ", ".join(f"{z}: {psnr}" for z, psnr in PAPER_SWEEP.items())
    return (
        "## Channels (Figure 11)\n\n![PSNR and probe against channels](images/reproduction_channels.png)\n\n"
        + table(["Z", "PSNR", "SSIM", "Fréchet", "probe", "feature cosine", "active"], rows)
        + f"\n\nThe paper's PSNR by channels: {shown}."
    )


def shortcut_section(found: Results) -> str:
    if "kept-moved" not in found:
        return ""
    rows = [
        [label, *(number(found.get(stage, {}).get(key), 2 if key == "psnr" else 3) for key in ("psnr", "ssim"))]
        for label, stage in (
            ("all of RAE-HD", "space-0-rae-hd"), ("those that moved most", "kept-moved"),
            ("those that moved least", "kept-still"), ("those that moved most, of the frozen encoder", "kept-frozen"),
            ("all of RAE, frozen", "space-0-rae"),
        )
    ]  # fmt: skip
    kept = found["kept-moved"]
    return (
        f"## The shortcut of RAE-HD (section 5.4)\n\nA decoder of its own on {len(kept['kept'])} of the "
        f"{kept['of']} channels:\n\n" + table(["channels read", "PSNR", "SSIM"], rows)
    )


def generation_section(found: Results, output: Path, images: Path) -> str:
    if not draw_curves(found, images / "reproduction_generation.png"):
        return ""
    rows = [
        [
            LABELS[name], of_seeds(found, name, "frechet", 2, "generator"),
            of_seeds(found, name, "class_accuracy", 3, "generator"),
            of_seeds(found, name, "frechet"), of_seeds(found, name, "class_accuracy"),
            f"*{PAPER[name]['geneval']}*" if name in PAPER else "·",
        ]
        for name in (*GENERATED, *ONCE)
    ]  # fmt: skip
    header = [
        "space",
        "Fréchet",
        "class right",
        "Fréchet, reconstructed",
        "class right, reconstructed",
        "*paper: GenEval*",
    ]
    pictures = []
    for name in (PS_VAE, "rae", "rae-hd"):
        made = output / "generators" / f"{name}-0" / "samples.png"
        if made.exists():
            file = images / f"reproduction_made_{name}.png"
            file.write_bytes(made.read_bytes())
            pictures.append(f"{LABELS[name]}:\n\n![Generated pictures](images/{file.name})")
    return (
        "## Generation\n\nOne `DeepFusionDiT` with the wide head in each space, of one size and one budget, the "
        f'paper\'s shift, {len(SEEDS)} seeds, no guidance. "Reconstructed" is what a perfect generator would get; a '
        "random class is right with 0.1. So few pictures put the Fréchet distance too high, everywhere alike.\n\n"
        "![Fréchet distance and class accuracy against steps](images/reproduction_generation.png)\n\n"
        + table(header, rows)
        + "\n\nA column per class, the first seed, the last step.\n\n"
        + "\n\n".join(pictures)
    )


def longer_section(found: Results, plan: dict[str, Any]) -> str:
    if f"longer-{PS_VAE}" not in found:
        return ""
    rows = []
    for name in LONGER:
        for steps, space, made in (
            (1, f"space-0-{name}", f"generator-{name}-0"),
            (plan["longer"], f"longer-{name}", f"longer-generator-{name}"),
        ):
            numbers, last = found.get(space, {}), last_of(found.get(made, {}))
            rows.append(
                [
                    LABELS[name], str(steps * plan["space_steps"]), number(numbers.get("psnr"), 2),
                    number(numbers.get("frechet")), number(numbers.get("probe")), number(last.get("frechet"), 2),
                    number(last.get("class_accuracy")),
                ]
            )  # fmt: skip
    header = ["space", "steps", "PSNR", "Fréchet", "probe", "generated: Fréchet", "class right"]
    return (
        "## Longer\n\nAdded after the first seed's results, as was the generator in the widest PS-VAE: does a longer "
        "training of the spaces change the order of RAE and PS-VAE? The first seed; the generators as above.\n\n"
        + table(header, rows)
    )


def reals_section(found: Results) -> str:
    ours = [over_seeds(found, "generator", name, "frechet") for name in CONVOLUTIONAL]
    if not all(ours):
        return ""
    pairs = {"here, Fréchet": tuple(sum(numbers) / len(numbers) for numbers in ours)}
    pairs |= {f"*the paper, FID, {name}*": pair for name, pair in PAPER_REALS.items()}
    rows = [
        [name, f"{plain:.2f}", f"{reals:.2f}", f"{100 * (reals / plain - 1):+.0f} %"]
        for name, (plain, reals) in pairs.items()
    ]
    return (
        "## ReaLS\n\nThe generators of the table above in the plain latents and in ReaLS', beside the paper's:\n\n"
        + table(["", "plain", "ReaLS", "difference"], rows)
        + "\n\nA longer comparison, with masks read from latents: [docs/reals.md](reals.md)."
    )


def toy_section(found: Results) -> str:
    if "toy" not in found:
        return ""
    toy = found["toy"]
    tails = ", ".join(f"{name} {tail:.3f}" for name, tail in toy["tail"].items())
    return (
        "## The toy (Figure 3)\n\n"
        f"Mean distance of the farthest twentieth from the letters: {tails}, fresh points {toy['floor']:.3f}; the "
        f"difference is {toy['mean difference']:.4f} ± {toy['standard error']:.4f} (standard error, "
        f"{len(toy['differences'])} seeds). More of it: [docs/paper_to_code.md](paper_to_code.md)."
    )


def orderings_section(found: Results) -> str:
    rows = [[ordering.says, *verdict(found, ordering)] for ordering in ORDERINGS]
    return "## Does each ordering appear?\n\n" + table(["the paper", "here", "numbers"], rows)


def ablation_section(found: Results) -> str:
    if not any(name.startswith("ablation-") for name in found):
        return ""
    metrics, rows = ("psnr", "frechet", "probe", "feature_cosine", "active_channels"), []
    for group, phases in ABLATED.items():
        for name in (PS_VAE, *(name for name in phases if not name.endswith("-stage1"))):
            stage = found.get(f"ablation-{name}", {})
            numbers = [number(stage.get(metric), 2 if metric == "psnr" else 3) for metric in metrics]
            if group in ABLATED_GENERATORS:
                last = last_of(found.get(f"ablation-generator-{name}", {}))
                numbers += [number(last.get("frechet"), 2), number(last.get("class_accuracy"))]
            else:
                numbers += ["", ""]
            rows.append([group, "the default" if name == PS_VAE else name, *numbers])
    header = ["question", "choice", "PSNR", "Fréchet", "probe", "cosine, rebuilt", "active"]
    return (
        "## What the paper leaves open\n\nPS-VAE with 16 channels, half the steps, the first seed; for two questions a "
        "generator too, with half its steps. The rule, from before the runs: a default changes where another choice is "
        "better by more than twice the spread over seeds in the table of spaces, and nothing else is worse by as much. "
        "The choice between samples of the posterior and its means is in the table of generation.\n\n"
        + table([*header, "generated: Fréchet", "class right"], rows)
    )


def last_of(stage: dict[str, Any]) -> dict[str, float]:
    """Of a generator, its measures at the last step; none where it has not run."""
    curve = stage.get("curve", {})
    return curve[max(curve, key=int)] if curve else {}


def remarks() -> str:
    file = Path(__file__).with_name("remarks.md")
    return file.read_text(encoding="utf-8") if file.exists() else ""


# Figures


def draw_sweep(found: Results, file: Path) -> bool:
    points = [(z, found[f"space-0-ps-vae-{z}"]) for z in SWEEP if f"space-0-ps-vae-{z}" in found]
    if len(points) < 2:
        return False
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axis, metric, title in zip(axes, ("psnr", "probe"), ("PSNR, dB", "linear probe"), strict=True):
        axis.plot([z for z, _ in points], [stage[metric] for _, stage in points], "o-", color=COLOURS[0])
        for name, colour in (("rae", COLOURS[1]), ("rae-hd", COLOURS[3])):
            if f"space-0-{name}" in found:
                axis.axhline(found[f"space-0-{name}"][metric], color=colour, linestyle="--", label=LABELS[name])
        axis.set_xscale("log", base=2)
        axis.set(xlabel="channels Z", title=title, xticks=[z for z, _ in points], xticklabels=[z for z, _ in points])
        axis.grid(alpha=0.2)
    axes[0].legend(frameon=False)
    figure.savefig(file, dpi=120)
    plt.close(figure)
    return True


def draw_curves(found: Results, file: Path) -> bool:
    if not any(stage.startswith("generator-") for stage in found):
        return False
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for number_, name in enumerate(GENERATED):
        curves = [found[stage]["curve"] for seed in SEEDS if (stage := f"generator-{name}-{seed}") in found]
        if not curves:
            continue
        steps = sorted(map(int, curves[0]))
        for axis, metric in zip(axes, ("frechet", "class_accuracy"), strict=True):
            values = [[curve[str(step)][metric] for curve in curves] for step in steps]
            axis.fill_between(steps, [min(v) for v in values], [max(v) for v in values], alpha=0.15, linewidth=0,
                              color=COLOURS[number_])  # fmt: skip
            axis.plot(steps, [sum(v) / len(v) for v in values], color=COLOURS[number_], label=LABELS[name])
    axes[0].set(title="Fréchet distance (judge's features)", xlabel="training step", yscale="log")
    axes[1].set(title="class right", xlabel="training step")
    for axis in axes:
        axis.grid(alpha=0.2)
    axes[1].legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=120)
    plt.close(figure)
    return True


def save_pictures(images: Tensor, file: Path) -> None:
    """``N 3 H W`` in [-1, 1], ten to a row."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_image(images * 0.5 + 0.5, file, nrow=10, padding=1)
