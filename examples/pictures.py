"""Pictures a person can look at: sample grids while training, and the report of a finished run."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import save_image


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
