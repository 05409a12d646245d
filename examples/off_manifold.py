"""The paper's toy (PS-VAE section 3.2, Figure 3): a flow in a space wider than its data strays further from them.

    python examples/off_manifold.py

The data are points of the letters "PS": in the plane, z, and as x = Qz in eight dimensions, Q an isometry, so that
nothing but empty directions is added. Two MLPs of one size learn one flow each, from the same points, the same σ and
the same noise (the plane's is Qᵀ of the other). Samples of both are compared in the plane: how far from the letters
is the worst twentieth of them? The shape, the dimensions, the width 256 and this measure are the paper's; the
constants below are ours, for it gives no more. So is the residual ‖(I − QQᵀ)x‖, the distance from the plane, which the
projection hides.
"""

import itertools
import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import matplotlib
import torch
import tyro
from matplotlib.font_manager import FontProperties
from matplotlib.path import Path as Outline
from matplotlib.textpath import TextPath
from torch import Tensor, nn
from tqdm import tqdm

from psvae import flow

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PLANE, SPACE = "2-D", "8-D"
DIMENSIONS = {PLANE: 2, SPACE: 8}
WIDTH, HIDDEN_LAYERS = 256, 4
POINTS, BATCH, LEARNING_RATE = 10_000, 256, 1e-3
UPDATES = 50  # of Euler
WORST = 0.05
P_VALUE = "p, one-sided, by flipping signs"
COLOURS = {PLANE: "#1f6fb4", SPACE: "#d1482f"}


@dataclass(frozen=True)
class Options:
    """Train both flows under several seeds, and compare them."""

    seeds: int = 5
    steps: int = 3000
    every: int = 300
    """Steps between two measurements."""
    samples: int = 2000
    """Drawn at each of them."""
    output: Path = Path("outputs/off_manifold")


class Velocity(nn.Module):
    """(x, σ) → v."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        widths = [dimension + 1, *[WIDTH] * HIDDEN_LAYERS]
        layers = [layer for sizes in itertools.pairwise(widths) for layer in (nn.Linear(*sizes), nn.SiLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(WIDTH, dimension))

    def forward(self, x: Tensor, sigmas: Tensor) -> Tensor:
        return self.layers(torch.cat([x, sigmas[:, None]], dim=1))


def letters(count: int, generator: torch.Generator) -> Tensor:
    """Points ``count 2`` spread evenly over a bold "PS", of mean 0 and variance 1."""
    path = TextPath((0, 0), "PS", size=1, prop=FontProperties(family="DejaVu Sans", weight="bold"))
    outlines = [Outline(polygon) for polygon in path.to_polygons()]
    corners = torch.from_numpy(path.get_extents().get_points())
    drawn = corners[0] + torch.rand(4 * count, 2, generator=generator) * (corners[1] - corners[0])
    crossed = sum(torch.from_numpy(outline.contains_points(drawn.numpy())).int() for outline in outlines)
    inside = drawn[crossed % 2 == 1][:count]  # the hole of the P is inside two outlines
    inside = inside - inside.mean(0)
    return (inside / inside.square().mean().sqrt()).float()


def nearest(points: Tensor, truth: Tensor) -> Tensor:
    """Distance of each point to the nearest of the truth."""
    return torch.cdist(points, truth).min(dim=1).values


def farthest(distances: Tensor) -> Tensor:
    """Which are the largest twentieth."""
    return distances.topk(max(1, round(WORST * len(distances)))).indices


def worst(distances: Tensor) -> float:
    """Their mean."""
    return distances[farthest(distances)].mean().item()


def train(seed: int, options: Options) -> dict:
    """Both flows under one seed: their curves, and the last samples, in the plane."""
    generator = torch.Generator().manual_seed(seed)
    truth = letters(POINTS, generator)
    isometry = {PLANE: torch.eye(2), SPACE: torch.linalg.qr(torch.randn(8, 2, generator=generator)).Q}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        models = {name: Velocity(dimension) for name, dimension in DIMENSIONS.items()}
    optimizers = {name: torch.optim.Adam(model.parameters(), lr=LEARNING_RATE) for name, model in models.items()}

    def in_both(noise: Tensor) -> dict[str, Tensor]:
        return {PLANE: noise @ isometry[SPACE], SPACE: noise}

    start = in_both(torch.randn(options.samples, 8, generator=generator))
    curves = {"tail": {PLANE: [], SPACE: []}, "residual": [], "worst residual": []}
    for step in tqdm(range(1, options.steps + 1), f"seed {seed}", position=seed):
        points = truth[torch.randint(POINTS, (BATCH,), generator=generator)]
        noise = in_both(torch.randn(BATCH, 8, generator=generator))
        sigmas = flow.sample_sigmas(BATCH, generator=generator)
        for name, model in models.items():
            x = points @ isometry[name].T
            loss = flow.flow_loss(model(flow.add_noise(x, noise[name], sigmas), sigmas), x, noise[name])
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()
        if step % options.every == 0:
            samples = {name: flow.sample(models[name], start[name], flow.sigma_schedule(UPDATES)) for name in models}
            flat = {name: x @ isometry[name] for name, x in samples.items()}
            residual = (samples[SPACE] - flat[SPACE] @ isometry[SPACE].T).norm(dim=1)
            for name, x in flat.items():
                curves["tail"][name].append(worst(nearest(x, truth)))
            curves["residual"].append(residual.mean().item())
            curves["worst residual"].append(worst(residual))
    floor = worst(nearest(letters(options.samples, generator), truth))
    return {"curves": curves, "floor": floor, "truth": truth, "flat": flat}


def compare(runs: list[dict]) -> dict:
    """The paired test on the last tails: one difference per seed."""
    last = {name: torch.tensor([run["curves"]["tail"][name][-1] for run in runs]) for name in DIMENSIONS}
    differences = last[SPACE] - last[PLANE]
    flips = torch.tensor(list(itertools.product((1.0, -1.0), repeat=len(runs))))
    as_large = (flips @ differences / len(runs)) >= differences.mean() - 1e-9  # exact, and assumes no distribution
    return {
        "tail": {name: values.mean().item() for name, values in last.items()},
        "floor": sum(run["floor"] for run in runs) / len(runs),
        "residual": sum(run["curves"]["residual"][-1] for run in runs) / len(runs),
        "worst residual": sum(run["curves"]["worst residual"][-1] for run in runs) / len(runs),
        "differences": differences.tolist(),
        "mean difference": differences.mean().item(),
        "standard error": (differences.std() / len(runs) ** 0.5).item(),
        P_VALUE: as_large.float().mean().item(),
    }


def picture(runs: list[dict], result: dict, steps: list[int], path: Path) -> None:
    """Samples of the first seed with their worst twentieth in colour, and the curves of all seeds."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4), width_ratios=(1.2, 1.2, 1), layout="constrained")
    first = runs[0]
    for axis, (name, x) in zip(axes, first["flat"].items(), strict=False):
        distances = nearest(x, first["truth"])
        axis.scatter(*first["truth"].T, s=3, color="#e4e4e4", linewidths=0)
        axis.scatter(*x.T, s=3, color="#555555", linewidths=0)
        axis.scatter(*x[farthest(distances)].T, s=12, color=COLOURS[name], linewidths=0)
        axis.set_title(f"flow in {name}: worst 5 % at {worst(distances):.3f}", color=COLOURS[name])
        axis.set(aspect="equal", xlim=(-2.6, 2.6), ylim=(-1.8, 1.8))
        axis.axis("off")
    axis = axes[2]
    for name, colour in COLOURS.items():
        curves = torch.tensor([run["curves"]["tail"][name] for run in runs])
        axis.fill_between(steps, curves.amin(0), curves.amax(0), color=colour, alpha=0.15, linewidth=0)
        axis.plot(steps, curves.mean(0), color=colour, linewidth=2.4, label=f"{name}, in the plane")
    residual = torch.tensor([run["curves"]["worst residual"] for run in runs]).mean(0)
    axis.plot(steps, residual, color=COLOURS[SPACE], linestyle=":", linewidth=1.8, label=f"{SPACE}, off the plane")
    axis.axhline(result["floor"], color="#888888", linestyle="--", linewidth=1.2, label="fresh points of the letters")
    axis.set(
        xlim=(0, None), ylim=(0, None), xlabel="training step", title=f"distance of the worst 5 %, {len(runs)} seeds"
    )
    axis.grid(alpha=0.2)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def print_result(result: dict, steps: int) -> None:
    tail, differences = result["tail"], result["differences"]
    signs = "".join("+" if difference > 0 else "-" for difference in differences)
    print(f"mean distance from the letters of the worst 5 %, {steps} steps, {len(differences)} seeds:")
    print(f"  {PLANE} {tail[PLANE]:.4f}, {SPACE} {tail[SPACE]:.4f}; fresh points of the letters {result['floor']:.4f}")
    print(f"  {SPACE} off the plane: {result['worst residual']:.4f}; all samples {result['residual']:.4f}")
    print(f"  difference {result['mean difference']:.4f} ± {result['standard error']:.4f} (standard error)")
    print(f"  signs {signs}; {P_VALUE}: {result[P_VALUE]:.3f}")


def main(options: Options) -> None:
    if options.seeds < 2 or not 1 <= options.every <= options.steps:
        raise SystemExit("wanted at least two seeds, and at least one measurement within the steps")
    with ProcessPoolExecutor(
        min(options.seeds, os.cpu_count() or 1),
        mp_context=get_context("spawn"),
        initializer=torch.set_num_threads,  # so small a network gains nothing from more
        initargs=(1,),
    ) as pool:
        runs = list(pool.map(train, range(options.seeds), [options] * options.seeds))
    steps = list(range(options.every, options.steps + 1, options.every))
    result = compare(runs)
    options.output.mkdir(parents=True, exist_ok=True)
    record = {"steps": steps, **result, "curves": [run["curves"] for run in runs]}
    (options.output / "off_manifold.json").write_text(json.dumps(record, indent=2) + "\n")
    picture(runs, result, steps, options.output / "off_manifold.png")
    print_result(result, steps[-1])
    print(f"picture and numbers: {options.output}")


if __name__ == "__main__":
    main(tyro.cli(Options))
