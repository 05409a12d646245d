"""The figures of docs/reproduction.md."""

from pathlib import Path

import matplotlib
from torch import Tensor
from torchvision.utils import save_image

from reproduction.orderings import Results
from reproduction.plan import GENERATED, LABELS, SEEDS, SWEEP

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = plt.get_cmap("tab10").colors


def draw_sweep(found: Results, file: Path) -> None:
    """PSNR and probe against channels, where two widths have been trained."""
    points = [(z, found[f"space-0-ps-vae-{z}"]) for z in SWEEP if f"space-0-ps-vae-{z}" in found]
    if len(points) < 2:
        return
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


def draw_curves(found: Results, file: Path) -> None:
    """Fréchet distance and class accuracy against steps, where a generator has been trained."""
    if not any(stage.startswith("generator-") for stage in found):
        return
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for colour, name in zip(COLOURS, GENERATED, strict=False):  # ten for seven
        curves = [found[stage]["curve"] for seed in SEEDS if (stage := f"generator-{name}-{seed}") in found]
        if not curves:
            continue
        steps = sorted(map(int, curves[0]))
        for axis, metric in zip(axes, ("frechet", "class_accuracy"), strict=True):
            values = [[curve[str(step)][metric] for curve in curves] for step in steps]
            axis.fill_between(steps, [min(v) for v in values], [max(v) for v in values], alpha=0.15, linewidth=0,
                              color=colour)  # fmt: skip
            axis.plot(steps, [sum(v) / len(v) for v in values], color=colour, label=LABELS[name])
    axes[0].set(title="Fréchet distance", xlabel="training step")
    axes[1].set(title="class right", xlabel="training step")
    for axis in axes:
        axis.grid(alpha=0.2)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def save_pictures(images: Tensor, file: Path) -> None:
    """``N 3 H W`` in [-1, 1], ten to a row."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_image(images * 0.5 + 0.5, file, nrow=10, padding=1)
