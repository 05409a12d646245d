"""What is measured of each space, on the test pictures."""

from collections.abc import Callable
from typing import Any

import torch
from frechet import frechet_distance
from measures import active_channels, eight_bits, picture_measures
from probes import accuracies
from torch import Tensor, nn

from psvae import PSVAE, PixelVAE, SemanticEncoder
from psvae.losses import cosine_similarity_map
from reproduction.cifar import Split, to_images
from reproduction.classifiers import Judges, accuracy
from reproduction.training import Machine, batched

BATCH = 250
SLOW = 5.5  # cycles per picture: what is slower, the detail leaves out


def rounded(numbers: dict[str, Any]) -> dict[str, float]:
    return {name: round(float(value), 4) for name, value in numbers.items()}


def reconstruction(
    paint: Callable[[Tensor], Tensor], test: Split, judges: Judges, machine: Machine
) -> dict[str, float]:
    """psnr, ssim, and lpips where its weights are on this machine, each a mean over pictures of 8 bits; how much of the
    detail is left; the Fréchet distance of each judge's features from the originals', and how often the class is named.

    Args:
        paint: images → their reconstructions, ``B 3 H W`` both.
    """
    images = to_images(test.pictures)
    made = as_saved(batched(paint, images, machine, BATCH))
    rows = [
        {name: float(value) * len(part) for name, value in picture_measures(part, original).items()}
        for part, original in zip(made.split(BATCH), images.split(BATCH), strict=True)
    ]
    numbers = {name: sum(row[name] for row in rows) / len(images) for name in rows[0]}
    numbers["detail"] = detail(made) / detail(images)
    for name, judge in zip(("frechet", "frechet_turns"), judges, strict=True):
        numbers[name] = frechet_distance(*(batched(judge.features, pictures, machine) for pictures in (images, made)))
    return rounded(numbers | {"class_accuracy": accuracy(judges.classes, made, test.labels, machine)})


def detail(images: Tensor) -> float:
    """The energy of all but the slowest waves, of images ``N 3 H W``."""
    rows, columns = (torch.fft.fftfreq(size) * size for size in images.shape[2:])
    fine = rows[:, None].hypot(columns) > SLOW
    return sum(float(torch.fft.fft2(part).abs().square()[..., fine].sum()) for part in images.split(BATCH))


def as_saved(images: Tensor) -> Tensor:
    """With 8 bits, and read again."""
    return to_images(eight_bits(images))


def semantics(
    vae: PSVAE | PixelVAE, frozen: SemanticEncoder, train: Split, test: Split, fitted: int, machine: Machine
) -> dict[str, float]:
    """Linear probe and nearest neighbours on the latents; cosines with the frozen features; channels in use, noise.

    Args:
        fitted: training pictures that the probes see.
    """
    known, unknown = (latents_of(vae, split.pictures, machine) for split in (Split(*(x[:fitted] for x in train)), test))
    numbers = probe(known, train.labels[:fitted], unknown, test.labels)
    if isinstance(vae, PSVAE):
        numbers |= cosines(vae, frozen, to_images(test.pictures[:2000]), machine)
    return rounded(numbers)


def latents_of(vae: PSVAE | PixelVAE, pictures: Tensor, machine: Machine) -> Tensor:
    """The posterior's means, normalised, ``N Z h w``."""

    return batched(lambda part: normalised(vae, to_images(part)), pictures, machine, BATCH)


def normalised(vae: PSVAE | PixelVAE, images: Tensor) -> Tensor:
    """The posterior's mean as a generator sees it, ``B Z h w``."""
    mean = vae.encode(images).latent_dist.mode()
    return mean if isinstance(vae, PSVAE) else vae.latent_spec.normalize(mean)


def probe(known: Tensor, classes: Tensor, unknown: Tensor, truth: Tensor) -> dict[str, float]:
    """Linear probe and nearest neighbours of evaluate.py, on the mean over the grid, and on all cells (``_cells``)."""
    labels, answers = classes.numpy(), truth.numpy()
    means = accuracies(known.mean(dim=(2, 3)).numpy(), labels, unknown.mean(dim=(2, 3)).numpy(), answers)
    cells = accuracies(known.flatten(1).numpy(), labels, unknown.flatten(1).numpy(), answers)
    return {
        "probe": means["linear_probe"], "knn": means["knn"],
        "probe_cells": cells["linear_probe"], "knn_cells": cells["knn"],
    }  # fmt: skip


def cosines(vae: PSVAE, frozen: SemanticEncoder, images: Tensor, machine: Machine) -> dict[str, float]:
    """Of the tuned features, and of the rebuilt ones, with the frozen encoder's; the share of channels in use, and the
    std of the posterior's noise as a share of the latent's own, a mean over channels."""
    rows: list[dict[str, float]] = []
    moments: list[tuple[Tensor, Tensor]] = []
    with torch.inference_mode(), machine.autocast():
        for part in images.split(BATCH):
            part = part.to(machine.device)
            output, target = vae(part), frozen(part)
            row = {"encoder_cosine": float(cosine_similarity_map(output.features, target).mean())}
            if output.rebuilt_features is not None:
                row["feature_cosine"] = float(cosine_similarity_map(output.rebuilt_features, target).mean())
                moments.append((output.posterior.mean.float().cpu(), output.posterior.var.float().cpu()))
            rows.append(row)
    numbers = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    if moments:
        means, variances = (torch.cat(parts) for parts in zip(*moments, strict=True))
        numbers["active_channels"] = active_channels(means, variances)
        noise = variances.mean(dim=(0, 2, 3)) / means.var(dim=(0, 2, 3))
        numbers["noise"] = float(noise.sqrt().mean())
    return numbers


def painter(vae: PSVAE | PixelVAE) -> Callable[[Tensor], Tensor]:
    """Through the public encode and decode, from the posterior's mean."""

    def paint(images: Tensor) -> Tensor:
        return vae.decode(vae.encode(images).latent_dist.mode()).sample

    return paint


def parameters(model: nn.Module) -> float:
    """In millions."""
    return round(sum(p.numel() for p in model.parameters()) / 1e6, 2)
