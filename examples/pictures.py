"""Pictures a person can look at: sample grids while training, and the report of a finished run."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import save_image

from psvae.losses import cosine_similarity_map


def save_grid(pictures: np.ndarray, path: Path, columns: int = 8) -> None:
    """``N H W 3``, uint8, in rows of so many, as a PNG whatever the path's ending."""
    save_image(torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255, path, nrow=columns, format="PNG")


@torch.no_grad()
def save_samples(model: Any, images: Tensor, path: Path) -> None:
    """Three rows: images, their reconstructions, the first three principal components of their latents."""
    path.parent.mkdir(parents=True, exist_ok=True)
    latents = model.encode(images).latent_dist.mode()
    painted = model.decode(latents).sample.float().clamp(-1, 1)
    colours = F.interpolate(principal_colours(latents) * 2 - 1, images.shape[-2:], mode="nearest")
    grid = torch.cat([images.float(), painted, colours]) * 0.5 + 0.5
    save_image(grid.cpu(), path, nrow=len(images))


def principal_colours(maps: Tensor) -> Tensor:
    """``B D h w`` → ``B 3 h w`` in [0, 1]: each cell's first three principal components as a colour."""
    batch, _, height, width = maps.shape
    cells = maps.float().permute(0, 2, 3, 1).flatten(0, 2)
    cells = cells - cells.mean(dim=0)
    _, _, directions = torch.linalg.svd(cells, full_matrices=False)
    scores = cells @ directions[:3].T
    scores = scores * scores.sum(dim=0).sign().where(scores.sum(dim=0) != 0, torch.ones(3, device=scores.device))
    low, high = scores.quantile(0.01, dim=0), scores.quantile(0.99, dim=0)
    colours = ((scores - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    return colours.unflatten(0, (batch, height, width)).permute(0, 3, 1, 2)


@torch.no_grad()
def save_report(image: Tensor, stage1: Any, stage2: Any, frozen: Any, path: Path) -> None:
    """Input, reconstruction after each stage, PCA of the latent, cosine between rebuilt and original features.

    Args:
        image: ``1 3 H W`` in [-1, 1], not trained on.
        stage1, stage2: PSVAEs after each stage.
        frozen: the encoder before training.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    outputs = [model(image) for model in (stage1, stage2)]
    cosine = cosine_similarity_map(outputs[1].rebuilt_features, frozen(image))[0]
    figure, axes = plt.subplots(1, 5, figsize=(17, 4), layout="constrained")
    axes[0].imshow(_shown(image))
    axes[0].set_title("input, not trained on")
    for axis, output, name in zip(axes[1:3], outputs, ("stage 1, S-VAE", "stage 2, PS-VAE"), strict=True):
        reconstruction = output.sample.clamp(-1, 1)
        axis.imshow(_shown(reconstruction))
        axis.set_title(f"{name}: {_psnr(reconstruction, image):.1f} dB")
    axes[3].imshow(_rows(principal_colours(stage2.encode(image).latent_dist.mode())[0]))
    axes[3].set_title("latent, first 3 principal components")
    shown = axes[4].imshow(cosine.numpy(), vmin=min(0.5, float(cosine.min())), vmax=1.0, cmap="viridis")
    axes[4].set_title(f"rebuilt vs original features:\ncosine {cosine.mean():.3f}")
    figure.colorbar(shown, ax=axes[4], shrink=0.8)
    for axis in axes:
        axis.axis("off")
    figure.savefig(path, dpi=110)
    plt.close(figure)


@torch.no_grad()
def save_look(images: dict[str, Tensor], model: Any, path: Path) -> dict[str, float]:
    """A row for each image: it, its reconstruction, PCA of its latent, of its features, of its rebuilt features.

    Args:
        images: ``1 3 H W`` each, in [-1, 1], by name.
        model: a PSVAE with a semantic VAE.

    Returns:
        The PSNR in dB of each.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(images), 5, figsize=(14, 3 * len(images)), squeeze=False, layout="constrained")
    found = {}
    for row, (name, image) in zip(axes, images.items(), strict=True):
        posterior = model.encode(image).latent_dist
        painted, features = model.decode(posterior.mode()).sample.clamp(-1, 1), model.features(image)
        rebuilt = model.decode_features(posterior.mode())
        found[name] = _psnr(painted, image)
        colours = principal_colours(torch.cat([features, rebuilt]))  # one set of components for both
        maps = (principal_colours(posterior.mode())[0], *colours)
        titles = (
            "input", f"reconstruction: {found[name]:.1f} dB", f"latent, {posterior.mean.shape[1]} channels",
            f"features, {features.shape[1]} channels",
            f"features rebuilt from the latent:\ncosine {cosine_similarity_map(rebuilt, features).mean():.3f}",
        )  # fmt: skip
        shown = (_shown(image), _shown(painted), *map(_rows, maps))
        for axis, picture, title in zip(row, shown, titles, strict=True):
            axis.imshow(picture)
            axis.set_title(title, fontsize=10)
            axis.axis("off")
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return found


def _psnr(painted: Tensor, image: Tensor) -> float:
    return -10 * float(torch.log10(((painted - image) / 2).square().mean()))


def _shown(image: Tensor) -> np.ndarray:
    return _rows(image[0] * 0.5 + 0.5)


def _rows(colours: Tensor) -> np.ndarray:
    """``3 H W`` in [0, 1] → ``H W 3``, as matplotlib has it."""
    return colours.clamp(0, 1).permute(1, 2, 0).numpy()
