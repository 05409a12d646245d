"""Validation measures and the choice of precision, for the examples."""

import time
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from reals_losses import seen_by, targets_of
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from psvae.losses import cosine_similarity_map


@torch.no_grad()
def measure(
    model: Any, frozen: nn.Module, images: Tensor, batch_size: int, accelerator: Any = None
) -> dict[str, float]:
    """Means over ``images`` (``B 3 H W`` in [-1, 1]), through the public encode and decode.

    psnr, ssim: of the reconstruction, pixels in [0, 1]. feature_cosine: of rebuilt against frozen features,
    per token. active_channels: a probe for posterior collapse, the share of latent channels that carry more than
    0.01 nat per cell, as ½ log(1 + variance of the mean / mean of the variance). lpips: where its weights are on
    this machine.
    """
    rows: list[dict[str, float]] = []
    device = next(iter(model.state_dict().values())).device
    means: list[Tensor] = []
    variances: list[Tensor] = []
    for part in images.split(batch_size):
        part = part.to(device)
        with accelerator.autocast() if accelerator is not None else nullcontext():
            output = model(part)
            target = frozen(part)
        row = picture_measures(output.sample, part)
        if output.rebuilt_features is not None:
            row["feature_cosine"] = cosine_similarity_map(output.rebuilt_features, target).mean()
        row["encoder_cosine"] = cosine_similarity_map(output.features, target).mean()
        rows.append({name: float(value) * len(part) for name, value in row.items()})
        means.append(output.posterior.mean.float())
        variances.append(output.posterior.var.float())
    numbers = {name: sum(row[name] for row in rows) / len(images) for name in rows[0]}
    if output.parameters is not None:
        numbers["active_channels"] = active_channels(torch.cat(means), torch.cat(variances))
    return numbers


@torch.no_grad()
def measure_aligned(
    model: Any, teacher: nn.Module | None, images: Tensor, options: Any, accelerator: Any
) -> dict[str, float]:
    """Of what train_reals.py trains, by its options.

    psnr, ssim, lpips: of the reconstruction from the posterior's mean. patch_cosine, cls_cosine: of the features read
    from it, with the teacher's. latent_std, active_channels: of the latents.
    """
    rows: list[dict[str, float]] = []
    moments: list[tuple[Tensor, Tensor]] = []
    for part in images.split(options.batch_size):
        part = part.to(accelerator.device)
        with accelerator.autocast():
            output = model.vae(part)
            aligned = None if model.alignment is None else model.alignment(output.latents)
        row = picture_measures(output.sample, part)
        if aligned is not None and teacher is not None:
            patches, pooled = targets_of(options.teacher_features, seen_by(teacher, part))
            of_patches = cosine_similarity_map(aligned.patch_features, patches)
            of_cls = F.cosine_similarity(aligned.global_feature.float(), pooled.float())
            row |= {"patch_cosine": of_patches.mean(), "cls_cosine": of_cls.mean()}
        rows.append({name: float(value) * len(part) for name, value in row.items()})
        moments.append((output.posterior.mean.float(), output.posterior.var.float()))
    means, variances = (torch.cat(parts) for parts in zip(*moments, strict=True))
    numbers = {name: sum(row[name] for row in rows) / len(images) for name in rows[0]}
    spread = (means.var() + variances.mean()).sqrt()
    return numbers | {"latent_std": float(spread), "active_channels": active_channels(means, variances)}


def eight_bits(images: Tensor) -> Tensor:
    """uint8, of images in [-1, 1]; what lies beyond is clamped."""
    return (images.float().clamp(-1, 1) * 127.5 + 127.5).round().byte()


def picture_measures(sample: Tensor, images: Tensor) -> dict[str, Tensor]:
    """psnr, ssim, and lpips where its weights are on this machine, of reconstructions ``B 3 H W``."""
    shown, lpips = sample.float().clamp(-1, 1), local_lpips()
    pair = (shown * 0.5 + 0.5, images * 0.5 + 0.5)  # SSIM depends on where black is
    row = {
        "psnr": peak_signal_noise_ratio(*pair, data_range=1.0, dim=(1, 2, 3), reduction="elementwise_mean"),
        "ssim": structural_similarity_index_measure(*pair, data_range=1.0),
    }
    return row if lpips is None else row | {"lpips": lpips.to(images.device)(shown, images).mean()}


@torch.no_grad()
def each_picture(made: Tensor, real: Tensor, lpips: nn.Module | None) -> dict[str, Tensor]:
    """psnr, ssim, and lpips where it came, ``B`` each, of 8-bit pictures ``B 3 H W``."""
    shown, images = made.float() / 255, real.float() / 255
    row = {
        "psnr": peak_signal_noise_ratio(made.float(), real.float(), data_range=255.0, dim=(1, 2, 3), reduction="none"),
        "ssim": structural_similarity_index_measure(shown, images, data_range=1.0, reduction="none"),
    }
    return row if lpips is None else row | {"lpips": lpips(shown * 2 - 1, images * 2 - 1).flatten()}


def active_channels(means: Tensor, variances: Tensor) -> float:
    """The share of latent channels, ``B Z h w`` both, that carry more than 0.01 nat per cell."""
    return active_share(means.var(dim=(0, 2, 3)), variances.mean(dim=(0, 2, 3)))


def active_share(signal: Tensor, noise: Tensor) -> float:
    """Of channels, by the variance of the posterior's mean and the mean of its variance, ``Z`` both."""
    return float((0.5 * (signal / noise).log1p() > 0.01).float().mean())


def load_lpips(without: str = "--losses.perceptual 0 trains without") -> nn.Module:
    """LPIPS on VGG-16 with frozen parameters.

    Args:
        without: the remedy where its weights cannot be fetched.
    """
    import lpips

    try:
        return lpips.LPIPS(net="vgg", verbose=False).eval().requires_grad_(False)
    except OSError as error:
        raise SystemExit(f"the VGG weights of LPIPS could not be fetched ({error}); {without}") from error


@cache
def local_lpips() -> nn.Module | None:
    """LPIPS, if torchvision has its VGG weights on this machine already."""
    return load_lpips() if list(Path(torch.hub.get_dir(), "checkpoints").glob("vgg16-*.pth")) else None


def step_seconds(model: Any, batch_size: int, size: int) -> dict[str, float]:
    """Seconds of a forward and backward on this machine's CPU, in fp32 ("no") and under bf16 autocast ("bf16")."""
    images = torch.zeros(batch_size, 3, size, size)
    seconds: dict[str, list[float]] = {"no": [], "bf16": []}
    for precision in ("no", "bf16") * 3:  # in turn, so that a busy moment hits both
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            output = model(images)
        output.sample.float().square().mean().backward()
        model.zero_grad()
        seconds[precision].append(time.perf_counter() - start)
    return {precision: min(runs) for precision, runs in seconds.items()}


def fast_precision(model: Any, batch_size: int, size: int) -> str:
    """ "bf16" if a step of ``model`` is faster in it than in fp32 on this machine, else "no"."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    seconds = step_seconds(model, batch_size, size)
    return min(seconds, key=lambda precision: seconds[precision])
