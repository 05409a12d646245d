"""Latents to look at, of any VAEs of this library side by side in one picture.

    python examples/visualise_latents.py --data /data/imagenet/val --vae outputs/reals --vae stabilityai/sd-vae-ft-mse

One column per VAE: the pictures, their latents' first three principal components as colours, how similar each cell is
to one chosen cell (`--patch`), t-SNE of the pictures' latents coloured by class, and the histogram of each channel.
Latents are taken as a generator sees them. For maps, similarity and t-SNE each channel is brought to mean 0 and
variance 1 over the pictures, so that VAEs of other scales compare.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib
import torch
import tyro
from cache_latents import Images, ImageSource
from data import spread
from pictures import principal_colours
from sampling import load_measured_vae, plain_errors, scale_latents, vae_folder
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import make_grid
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

LEAST = 4  # pictures: t-SNE of fewer says nothing
COMPONENTS = 50  # to which t-SNE's input is brought by PCA, as its authors do
BINS = 80


@dataclass(frozen=True)
class Options:
    """Draw the latents of one or more VAEs."""

    data: str
    """A folder with one subfolder per class, or a Hugging Face dataset (id, or folder of parquet files)."""
    vae: Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
    """Folder or Hub id of a PSVAE or PixelVAE, or a ReaLS folder; once for each column."""
    split: str | None = None
    """Split of a Hugging Face dataset; without it, `data` is a folder of images."""
    image_column: str = "image"
    label_column: str | None = "label"
    size: int = 256
    """Images are resized on their short side and centre-cropped to this."""
    count: int = 500
    """Pictures, spread evenly over the data: all of them in t-SNE and histograms."""
    shown: int = 4
    """Of them, spread evenly too, as maps."""
    patch: str | None = None
    """Row,column of the cell that others are compared with, on the first VAE's grid; None is the middle. Other VAEs'
    cell at that place of the picture."""
    pooled: bool = False
    """t-SNE of the mean over cells; else of all cells."""
    perplexity: float = 30.0
    """Of t-SNE; less where there are few pictures."""
    batch_size: int = 16
    allow_pickle: bool = False
    """Of VAEs' files."""
    seed: int = 0
    output: Path = Path("outputs/latents.png")


def main(options: Options) -> None:
    check(options)
    images, labels, classes = read(options)
    chosen = spread(len(images), options.shown)
    columns = [latents_of(name, images, options) for name in options.vae]
    point = place_of(options.patch, tuple(columns[0].shape[-2:]))
    figure, axes = plt.subplots(
        5, len(columns), figsize=(4.8 * len(columns), 18), squeeze=False, layout="constrained",
        height_ratios=(1, 1, 1, 1.3, 0.8),
    )  # fmt: skip
    for name, latents, line in zip(options.vae, columns, axes.T, strict=True):
        draw_column(name, latents, images[chosen], chosen, point, line)
        draw_classes(embed(even(latents), options), labels, classes, line[3])
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output, dpi=100)
    plt.close(figure)
    print(f"{len(images)} pictures, {len(columns)} VAE{'s' * (len(columns) != 1)}: {options.output}")


def check(options: Options) -> None:
    if not options.vae:
        raise SystemExit("no VAE came; wanted --vae, once for each column")
    for name, least in (("count", LEAST), ("shown", 1), ("batch_size", 1), ("size", 1), ("perplexity", 1)):
        if getattr(options, name) < least:
            raise SystemExit(f"--{name.replace('_', '-')} is {getattr(options, name)}; wanted at least {least}")


def read(options: Options) -> tuple[Tensor, list[int], dict[int, str]]:
    """(images ``B 3 H W`` in [-1, 1], their classes by number, the classes' names)."""
    same = ("data", "split", "image_column", "label_column", "size")
    data = Images(ImageSource(**{name: getattr(options, name) for name in same}))
    found = [data[place] for place in spread(len(data), options.count)]
    for _, fault, _ in found:
        if isinstance(fault, str):
            print(f"{fault}; left out")
    found = [item for item in found if isinstance(item[1], Tensor)]
    if len(found) < LEAST:
        raise SystemExit(f"{options.data} gave {len(found)} pictures; wanted at least {LEAST}")
    folders = zip(data.names, data.labels, strict=True) if data.table is None else ()
    names = {label: name.partition("/")[0] for name, label in folders if "/" in name}
    labels = [label for _, _, label in found]
    if len(set(labels)) == 1:
        print(f"all pictures from {options.data} are of one class, so t-SNE shows none; wanted a subfolder for each")
    return torch.stack([image for _, image, _ in found]), labels, names


@torch.no_grad()
def latents_of(name: str, images: Tensor, options: Options) -> Tensor:
    """The posteriors' means ``B Z h w`` as a generator sees them, on the CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = []
    vae = load_measured_vae(vae_folder(name), None, device, options.allow_pickle, required=False)
    for part in tqdm(images.split(options.batch_size), name):
        with plain_errors():
            latents = vae.encode(part.to(device)).latent_dist.mode()
            parts.append(scale_latents(vae, latents).float().cpu())
    return torch.cat(parts)


def even(latents: Tensor) -> Tensor:
    """Each channel of mean 0 and variance 1."""
    mean = latents.mean(dim=(0, 2, 3), keepdim=True)
    return (latents - mean) / latents.std(dim=(0, 2, 3), keepdim=True).clamp(min=1e-6)


def place_of(patch: str | None, grid: tuple[int, int]) -> tuple[float, float]:
    """The middle of the cell as shares of height and width, so that it means the same on every grid."""
    if patch is None:
        cell = [side // 2 for side in grid]
    else:
        try:
            cell = [int(number) for number in patch.split(",")]
        except ValueError:
            cell = []
        if len(cell) != 2 or not all(0 <= number < side for number, side in zip(cell, grid, strict=True)):
            raise SystemExit(
                f"--patch is {patch!r}; wanted row,column, from 0,0 to {grid[0] - 1},{grid[1] - 1}: the first VAE's "
                "latents of this size have so many cells"
            )
    return (cell[0] + 0.5) / grid[0], (cell[1] + 0.5) / grid[1]


def similarity(latents: Tensor, point: tuple[float, float]) -> Tensor:
    """Cosine of every cell with the cell at that place of its own picture: ``B Z h w`` → ``B h w``."""
    row, column = (int(share * side) for share, side in zip(point, latents.shape[-2:], strict=True))
    return F.cosine_similarity(latents, latents[:, :, row : row + 1, column : column + 1], dim=1)


def embed(latents: Tensor, options: Options) -> Tensor:
    """t-SNE, ``B 2``."""
    rows = (latents.mean(dim=(2, 3)) if options.pooled else latents.flatten(1)).numpy()
    if min(rows.shape) > COMPONENTS:
        rows = PCA(COMPONENTS, random_state=options.seed).fit_transform(rows)
    perplexity = min(options.perplexity, (len(rows) - 1) / 3)
    return torch.from_numpy(TSNE(perplexity=perplexity, random_state=options.seed).fit_transform(rows))


# Drawing


def draw_column(
    name: str, latents: Tensor, images: Tensor, chosen: list[int], point: tuple[float, float], axes: list[Axes]
) -> None:
    """All but t-SNE: pictures with the chosen place, principal components, similarity, histograms."""
    size, flat = images.shape[-2:], even(latents)[chosen]
    maps = similarity(flat, point)
    titles = (
        f"{name[-40:]}\n{latents.shape[1]} channels, {latents.shape[2]} x {latents.shape[3]} cells",
        "first three principal components",
        f"cosine with the marked cell: {maps.min():.2f} to 1",
    )
    strips = (images * 0.5 + 0.5, principal_colours(flat), coloured(maps))
    for axis, title, strip in zip(axes, titles, strips, strict=False):
        strip = strip if strip.shape[-2:] == size else F.interpolate(strip, size, mode="nearest")
        axis.imshow(make_grid(strip.clamp(0, 1), nrow=2, padding=0).movedim(0, -1).numpy())
        for number in range(len(images)):
            row, column = number // 2 + point[0], number % 2 + point[1]
            axis.plot(column * size[1], row * size[0], "+", color="white", markeredgecolor="red", markersize=8)
        axis.set_title(title, fontsize=10)
        axis.axis("off")
    histograms(latents, axes[4])


def coloured(maps: Tensor) -> Tensor:
    """``B h w`` in [-1, 1] → ``B 3 h w``."""
    colours = matplotlib.colormaps["viridis"](maps.clamp(-1, 1).numpy() * 0.5 + 0.5)
    return torch.from_numpy(colours[..., :3]).float().movedim(-1, 1)


def histograms(latents: Tensor, axis: Axes) -> None:
    """A line for each channel, over the range that holds all but a thousandth of the values."""
    values = latents.movedim(1, 0).flatten(1)
    limit = float(values.abs().flatten()[:: max(1, values.numel() // 100_000)].quantile(0.999)) or 1.0
    middles = (torch.arange(BINS) + 0.5) / BINS * 2 * limit - limit
    for channel in values:
        counts = torch.histc(channel, BINS, -limit, limit)
        density = counts / len(channel) * BINS / (2 * limit)
        axis.plot(middles.numpy(), density.numpy(), linewidth=0.8, alpha=0.7)
    axis.set_title(f"density of each channel; std of all {latents.std():.3g}", fontsize=10)
    axis.grid(alpha=0.2)


def draw_classes(points: Tensor, labels: list[int], classes: dict[int, str], axis: Axes) -> None:
    numbers = torch.tensor(labels)
    for place, label in enumerate(sorted(set(labels))):
        mine = points[numbers == label].numpy()
        axis.scatter(
            *mine.T, s=10, color=f"C{place % 10}", marker="os^"[place // 10 % 3], label=classes.get(label, label)
        )
    if 1 < len(set(labels)) <= 10:
        axis.legend(fontsize=7, markerscale=1.2)
    axis.set_title("t-SNE of the pictures' latents, by class", fontsize=10)
    axis.set(xticks=[], yticks=[])


if __name__ == "__main__":
    main(tyro.cli(Options))
