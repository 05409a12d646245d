"""docs/reproduction.md and its figures, drawn from the stages' numbers, so that text and numbers cannot part."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from checkpoints import write_text
from torch import Tensor
from torchvision.utils import save_image

from reproduction.orderings import (
    GENERATORS,
    MADE,
    SPACES,
    Pair,
    Results,
    deviation,
    last_of,
    over_seeds,
    pairs,
    spread,
)
from reproduction.plan import (
    ABLATED_GENERATORS,
    COARSE,
    GENERATED,
    LABELS,
    LONGER,
    ONCE,
    PS_VAE,
    SEEDS,
    SWEEP,
)
from reproduction.spaces import ABLATED, COARSE_PS_VAE, CONVOLUTIONAL

matplotlib.use("Agg")
import matplotlib.pyplot as plt

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
EPOCH = 50_000  # pictures
SAID = {  # of the metrics
    "psnr": "PSNR", "ssim": "SSIM", "lpips": "LPIPS", "frechet": "Fréchet", "frechet_turns": "Fréchet, turns",
    "frechet_blurred": "Fréchet, blurred", "frechet_decoded": "Fréchet, decoded",
    "class_accuracy": "class right", "probe": "probe",
}  # fmt: skip
DIGITS = {"psnr": 2, "frechet": 2, "frechet_turns": 2, "frechet_blurred": 2, "frechet_decoded": 2}  # else 3


def write(results: Path, output: Path, docs: Path, planned: int) -> Path:
    """The page, the numbers that it was drawn from, and the figures below ``docs``.

    Args:
        planned: stages; the page says how many of them have run.
    """
    found: Results = {file.stem: json.loads(file.read_text()) for file in sorted(results.glob("*.json"))}
    plan = json.loads((output / "plan.json").read_text())
    images = docs / "images"
    images.mkdir(parents=True, exist_ok=True)
    parts = [head(found, plan, planned), spaces_section(found, plan)]
    if draw_sweep(found, images / "reproduction_channels.png"):
        parts.append(sweep_section(found))
    parts += [shortcut_section(found), generation_section(found, plan, output, images)]
    parts += [coarse_section(found, plan), reals_section(found), toy_section(found), longer_section(found, plan)]
    parts += [orderings_section(found), ablation_section(found, plan), remarks()]
    write_text(docs / "reproduction.json", json.dumps({"plan": plan, "stages": found}, indent=1) + "\n")
    page = docs / "reproduction.md"
    write_text(page, "\n\n".join(part.strip() for part in parts if part) + "\n")
    return page


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None, digits: int = 3) -> str:
    return "·" if value is None else f"{value:.{digits}f}"


def cells(stage: dict[str, Any], *metrics: str) -> list[str]:
    return [number(stage.get(metric), DIGITS.get(metric, 3)) for metric in metrics]


def of_seeds(found: Results, name: str, *metrics: str, kind: str = "space") -> list[str]:
    return [spread(over_seeds(found, kind, name, metric), DIGITS.get(metric, 3)) for metric in metrics]


def of_paper(name: str, *metrics: str) -> list[str]:
    known = PAPER.get(name, {})
    return [f"*{known[metric]:g}*" if metric in known else "·" for metric in metrics]


# Sections


def head(found: Results, plan: dict[str, Any], planned: int) -> str:
    ran = str(planned) if len(found) == planned else f"so far {len(found)} of {planned}"
    encoder, judge, turns = (found.get(name, {}) for name in ("encoder", "judge", "judge-of-turns"))
    return f"""
# The papers' tables, small

<!-- written by `python -m reproduction.run`; the remarks at the end come from reproduction/remarks.md -->

`python -m reproduction.run --data cifar10/` trains everything below on CIFAR-10 and writes this page and
[its numbers](reproduction.json): {ran} stages, {work(found)}, {plan["precision"]}.
What is trained, by which of the library's classes, and what differs from the papers:
[reproduction/](../reproduction/README.md). The orders of the papers are looked for
[below](#does-each-ordering-appear); [remarks](#remarks) say why some do not appear.

The representation encoder is a Vision Transformer of width {plan["width"]} and depth {plan["depth"]} with 8 × 8
tokens, trained here: linear probe {number(encoder.get("probe"))} (0.75 wanted), {encoder.get("parameters_m", "·")} M
parameters. It learned the labels that the probes and "class right" test afterwards, as DINOv2 did not, so it says more
about classes and less about everything else. RAE, S-VAE, PS-VAE, P-VAE and RAE-HD begin with it, the plain VAE and
ReaLS with random weights. One encoder and its judges serve all seeds; ± is the standard deviation over seeds, each with
spaces of its own and generators in them. A number without it is of the first seed alone.

Two judges look at pictures, convolutional classifiers of their own. Fréchet distances are in their features, and are no
FID. The first learned the classes (accuracy {number(judge.get("accuracy"))}), from the same pictures as the encoder;
"turns" is a second one that saw no label: it tells by how many quarters a picture is turned
({number(turns.get("accuracy"))}). The paper's numbers, in italics, are of DINOv2-B and ImageNet at 256 px: orders
compare, values do not.
"""


def work(found: Results) -> str:
    """By what did it; stages can run beside each other. One that was killed counts from its last start."""
    hours: dict[str, float] = {}
    for stage in found.values():
        cores = re.fullmatch(r"CPU cores: (\d+)", stage["on"])
        name, times = ("core hours of a CPU", int(cores[1])) if cores else (f"hours of {stage['on']}", 1)
        hours[name] = hours.get(name, 0.0) + times * stage["minutes"] / 60
    return " and ".join(f"{total:.1f} {name}" for name, total in sorted(hours.items()))


def spaces_section(found: Results, plan: dict[str, Any]) -> str:
    names = ["rae", "s-vae", PS_VAE, "rae-hd", "p-vae", "mlp", "on-features", *CONVOLUTIONAL]
    lpips = ("lpips",) if any("lpips" in stage for stage in found.values()) else ()
    seen = ("psnr", "ssim", *lpips, "detail", "frechet", "frechet_turns", "class_accuracy")
    meant = ("probe", "probe_cells", "knn", "encoder_cosine", "feature_cosine", "active_channels", "noise")
    pictures = [[LABELS[x], *of_seeds(found, x, *seen), *of_paper(x, "psnr", "ssim", "rfid")] for x in names]
    meaning = [[LABELS[x], *of_seeds(found, x, *meant), *of_paper(x, "probe")] for x in names]
    count = plan["space_steps"] * plan["space_batch"]
    return f"""
## The spaces

Tables 2, 4, 5 and 6 of PS-VAE, and ReaLS. Each is trained with {plan["space_steps"]} steps of {plan["space_batch"]}
pictures, {count / EPOCH:.1f} epochs, and an L1 loss of pixels alone. A cell of the 8 × 8 has 48 numbers of pixels. RAE
and RAE-HD keep {plan["width"]} for it, the others {plan["convolutional_channels"]}; in the paper it is 768, 768 and 96.
The paper's plain VAE is MAR's, with 16 channels.

{
        table(
            ["reconstruction", *(SAID.get(x, x) for x in seen), "*paper: PSNR*", "*SSIM*", "*rFID*"],
            pictures,
        )
    }

"detail" is how much energy of waves shorter than a sixth of the picture is left. "class right": how often the first
judge still names the class.

{
        table(
            [
                "meaning",
                "probe",
                "probe, all cells",
                "kNN",
                "cosine, encoder",
                "cosine, rebuilt",
                "active",
                "noise",
                "*paper: probe*",
            ],
            meaning,
        )
    }

The probe is linear and reads the mean over the latent's cells, or all of them; so do the 20 nearest neighbours. Cosines
are with the frozen encoder's features: of the tuned encoder's, and of those rebuilt from the latent. "active" is the
share of channels that carry anything, "noise" the posterior's standard deviation beside the latent's own.
"""


def sweep_section(found: Results) -> str:
    metrics = ("psnr", "ssim", "frechet", "probe", "feature_cosine", "noise")
    rows = [[str(z), *cells(found.get(f"space-0-ps-vae-{z}", {}), *metrics)] for z in SWEEP]
    shown = ", ".join(f"{z}: {psnr}" for z, psnr in PAPER_SWEEP.items())
    return (
        "## Channels (Figure 11)\n\n![PSNR and probe against channels](images/reproduction_channels.png)\n\n"
        + table(["channels", "PSNR", "SSIM", "Fréchet", "probe", "cosine, rebuilt", "noise"], rows)
        + f"\n\nThe paper's PSNR by channels, of 768 numbers of pixels: {shown}."
    )


def shortcut_section(found: Results) -> str:
    if "kept-moved" not in found:
        return ""
    rows = [
        [label, *cells(found.get(stage, {}), "psnr", "ssim")]
        for label, stage in (
            ("all of RAE-HD", "space-0-rae-hd"), ("those that moved most", "kept-moved"),
            ("those that moved least", "kept-still"), ("those that moved most, of the frozen encoder", "kept-frozen"),
            ("all of RAE, frozen", "space-0-rae"),
        )
    ]  # fmt: skip
    kept = found["kept-moved"]
    count, squares = len(kept["kept"]), sorted(found.get("moved", {}).get("squares", [1.0]), reverse=True)
    share = sum(squares[:count]) / sum(squares)
    return (
        f"## The shortcut of RAE-HD (section 5.4)\n\nA decoder of its own on {count} of the {kept['of']} channels, as "
        "the paper on 32 of 768, which reconstruct about as well as all there. Here those that moved most hold "
        f"{100 * share:.0f} % of the movement, of {100 * count / kept['of']:.0f} % of the channels.\n\n"
        + table(["channels read", "PSNR", "SSIM"], rows)
    )


def generation_section(found: Results, plan: dict[str, Any], output: Path, images: Path) -> str:
    if not draw_curves(found, images / "reproduction_generation.png"):
        return ""
    rows = [
        [
            LABELS[name], *of_seeds(found, name, *MADE, kind="generator"),
            *of_seeds(found, name, "frechet", "class_accuracy"), *of_paper(name, "geneval"),
        ]
        for name in (*GENERATED, *ONCE)
    ]  # fmt: skip
    header = [
        "space", *(SAID[metric] for metric in MADE), "Fréchet, reconstructed", "class right, reconstructed",
        "*paper: GenEval*",
    ]  # fmt: skip
    pictures = []
    for name in (PS_VAE, "rae", "rae-hd"):
        made = output / "generators" / f"{name}-0" / "samples.png"
        if made.exists():
            file = images / f"reproduction_made_{name}.png"
            file.write_bytes(made.read_bytes())
            pictures.append(f"{LABELS[name]}:\n\n![Generated pictures](images/{file.name})")
    sizes, steps = plan["sizes"], plan["generator_steps"]
    epochs = steps * plan["generator_batch"] / sizes["pictures"]
    size = next((stage["parameters_m"] for name, stage in found.items() if name.startswith("generator-")), None)
    return f"""
## Generation

One class-conditional `DeepFusionDiT` with the wide head in each space: {size} M parameters, {steps} steps of
{plan["generator_batch"]} latents ({epochs:.1f} epochs of {sizes["pictures"]} pictures), noise shifted in training by
√(channels / 16) and in sampling by 3, both as in the paper, {sizes["updates"]} updates, no guidance.
{sizes["samples"]} pictures are made each time; a random class is right with 0.1.

"Fréchet" and "turns" compare with the test pictures, "blurred" with half of the resolution, without texture. "decoded"
compares with the test pictures as the space itself reconstructs them, so that the decoder's own faults cancel.
"Reconstructed" are those reconstructions themselves, from the table above. The paper's GenEval asks whether a picture
holds what its text says, which texture hardly changes.

![Fréchet distance and class accuracy against steps](images/reproduction_generation.png)

{table(header, rows)}
{sampler_text(found, sizes)}
A column per class, the first seed, the last step.

{(chr(10) * 2).join(pictures)}
"""


def sampler_text(found: Results, sizes: dict[str, Any]) -> str:
    if "sampler" not in found:
        return ""
    shown = ", ".join(
        f"{LABELS[name]} {last_of(found.get(f'generator-{name}-0', {})).get('frechet', 0):.2f} → "
        f"{found['sampler'][name]['frechet']:.2f}"
        for name in LONGER
    )
    return f"\nWith the paper's {sizes['more_updates']} updates, Fréchet of the first seed: {shown}.\n"


def coarse_section(found: Results, plan: dict[str, Any]) -> str:
    if not any(f"coarse-{name}" in found for name in COARSE):
        return ""
    encoder = found.get("coarse-encoder", {})
    rows = [
        [
            LABELS[name], *cells(found.get(f"coarse-{name}", {}), "psnr", "ssim", "detail", "frechet", "probe"),
            *cells(last_of(found.get(f"coarse-generator-{name}", {})), *MADE),
            *of_paper(PS_VAE if name == COARSE_PS_VAE else name, "psnr"),
        ]
        for name in COARSE
    ]  # fmt: skip
    header = ["space", "PSNR", "SSIM", "detail", "Fréchet", "probe", *(f"generated: {SAID[x]}" for x in MADE)]
    return f"""
## Cells as large as the paper's

Added after the first seed's results, with its orderings written before it ran. Above, {plan["width"]} features of a
cell stand for 48 numbers of pixels, so that a frozen encoder loses little and RAE reconstructs well; in the paper 768
stand for 768. Here an encoder of patch 8 was trained in the same way (probe {number(encoder.get("probe"))}):
{plan["width"]} features for 192, and a PS-VAE of 24 channels, an eighth, the paper's share. The first seed.

{table([*header, "*paper: PSNR*"], rows)}
"""


def longer_section(found: Results, plan: dict[str, Any]) -> str:
    if f"longer-{PS_VAE}" not in found:
        return ""
    rows = []
    for name in LONGER:
        for steps, space, made in (
            (1, f"space-0-{name}", f"generator-{name}-0"),
            (plan["longer"], f"longer-{name}", f"longer-generator-{name}"),
        ):
            numbers = cells(found.get(space, {}), "psnr", "detail", "frechet", "probe")
            last = cells(last_of(found.get(made, {})), *MADE)
            rows.append([LABELS[name], str(steps * plan["space_steps"]), *numbers, *last])
    header = ["space", "steps", "PSNR", "detail", "Fréchet", "probe", *(f"generated: {SAID[x]}" for x in MADE)]
    return (
        "## Longer\n\nAdded after the first seed's results, as was the generator in the widest PS-VAE: does a longer "
        "training of the spaces change the order of RAE and PS-VAE? The first seed; the generators as above.\n\n"
        + table(header, rows)
    )


def reals_section(found: Results) -> str:
    ours = [over_seeds(found, "generator", name, "frechet") for name in CONVOLUTIONAL]
    if not all(ours):
        return ""
    rows = [
        [f"*the paper, FID, {name}*", f"{plain:.2f}", f"{reals:.2f}", f"{100 * (reals / plain - 1):+.0f} %"]
        for name, (plain, reals) in PAPER_REALS.items()
    ]
    plain, reals = map(fmean, ours)
    here = ["here, Fréchet", *(spread(numbers, 2) for numbers in ours), f"{100 * (reals / plain - 1):+.0f} %"]
    return (
        "## ReaLS\n\nThe generators of the table above in the plain latents and in ReaLS', beside the paper's:\n\n"
        + table(["", "plain", "ReaLS", "difference"], [here, *rows])
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
    among = [(ordering, pair) for ordering in SPACES for pair in pairs(found, ordering, ordering.metric)]
    rows = [
        [ordering.where + later(ordering), SAID[ordering.metric], f"{pair.names[0]} < {pair.names[1]}", str(pair)]
        for ordering, pair in among
    ]
    generated = [
        (ordering, same)
        for ordering in GENERATORS
        for same in zip(*(pairs(found, ordering, metric) for metric in MADE), strict=True)
    ]
    made = [
        [ordering.where + later(ordering), f"{same[0].names[0]} before {same[0].names[1]}", *map(str, same)]
        for ordering, same in generated
    ]
    counts = [counted(column) for column in zip(*(same for _, same in generated), strict=True)]
    return f"""
## Does each ordering appear?

Neighbours of each ordering, and the difference between them; a positive one is as in the paper. An order is "undecided"
where the mean is within two standard errors of 0; a single seed is given the spread of the spaces that have three. An
asterisk marks what was written after the first seed's results; the rest was written before any. Of the measures of
generators "turns", "blurred" and "decoded" came after the first seed too.

{table(["the paper", "measure", "order", "here"], [*rows, ["", "", "all", counted([pair for _, pair in among])]])}

Of generators the better one comes first:

{table(["the paper", "order", *(SAID[metric] for metric in MADE)], [*made, ["", "all", *counts]])}
"""


def counted(found: Iterable[Pair]) -> str:
    """How many of them have each verdict, the most frequent one first."""
    return ", ".join(f"{verdict}: {n}" for verdict, n in Counter(pair.verdict for pair in found).most_common())


def later(ordering: Any) -> str:
    return " \\*" if ordering.later else ""


def ablation_section(found: Results, plan: dict[str, Any]) -> str:
    if not any(name.startswith("ablation-") for name in found):
        return ""
    metrics, rows = ("psnr", "frechet", "probe", "feature_cosine", "noise"), []
    for group, phases in ABLATED.items():
        for name in (PS_VAE, *(name for name in phases if not name.endswith("-stage1"))):
            row = [group, "the default" if name == PS_VAE else name]
            row += cells(found.get(f"ablation-{name}", {}), *metrics)
            if group in ABLATED_GENERATORS:
                row += cells(last_of(found.get(f"ablation-generator-{name}", {})), *MADE)
            else:
                row += [""] * len(MADE)
            rows.append(row)
    spreads = [deviation(over_seeds(found, "space", PS_VAE, metric) or [0.0]) for metric in metrics]
    steps = plan["ablation_steps"]
    twice = ["", "twice the spread", *cells({m: 2 * x for m, x in zip(metrics, spreads, strict=True)}, *metrics)]
    header = ["question", "choice", "PSNR", "Fréchet", "probe", "cosine, rebuilt", "noise"]
    header += [f"generated: {SAID[x]}" for x in MADE]
    return (
        f"## What the paper leaves open\n\nPS-VAE of 16 channels, {steps} steps, {steps // 2} of them with pixels, "
        "the first seed; for two questions a generator too, with half its steps. So short a training tells what learns "
        "faster, and may not tell what ends better. The rule, from before the runs: a default changes where another "
        "choice is better by more than twice the spread over seeds in the table of spaces (the last row), and nothing "
        "else is worse by as much. The choice between samples of the posterior and its means is in the table of "
        "generation.\n\n" + table(header, [*rows, twice + [""] * len(MADE)])
    )


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
    axes[0].set(title="Fréchet distance", xlabel="training step")
    axes[1].set(title="class right", xlabel="training step")
    for axis in axes:
        axis.grid(alpha=0.2)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(file, dpi=120)
    plt.close(figure)
    return True


def save_pictures(images: Tensor, file: Path) -> None:
    """``N 3 H W`` in [-1, 1], ten to a row."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_image(images * 0.5 + 0.5, file, nrow=10, padding=1)
