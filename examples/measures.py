"""Validation measures and the choice of precision, for the examples."""

import time
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
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
    lpips = _local_lpips()
    rows: list[dict[str, float]] = []
    device = next(iter(model.state_dict().values())).device
    means: list[Tensor] = []
    variances: list[Tensor] = []
    for part in images.split(batch_size):
        part = part.to(device)
        with accelerator.autocast() if accelerator is not None else nullcontext():
            output = model(part)
            target = frozen(part)
        shown = output.sample.float().clamp(-1, 1)
        row = {
            "psnr": peak_signal_noise_ratio(shown, part, data_range=2.0, dim=(1, 2, 3), reduction="elementwise_mean"),
            "ssim": structural_similarity_index_measure(shown, part, data_range=2.0),
        }
        if output.rebuilt_features is not None:
            row["feature_cosine"] = cosine_similarity_map(output.rebuilt_features, target).mean()
        row["encoder_cosine"] = cosine_similarity_map(output.features, target).mean()
        if lpips is not None:
            row["lpips"] = lpips.to(device)(shown, part).mean()
        rows.append({name: float(value) * len(part) for name, value in row.items()})
        means.append(output.posterior.mean.float())
        variances.append(output.posterior.var.float())
    numbers = {name: sum(row[name] for row in rows) / len(images) for name in rows[0]}
    if output.parameters is not None:
        signal = torch.cat(means).var(dim=(0, 2, 3)) / torch.cat(variances).mean(dim=(0, 2, 3))
        numbers["active_channels"] = float((0.5 * signal.log1p() > 0.01).float().mean())
    return numbers


def _local_lpips() -> Any:
    """LPIPS, if torchvision has its VGG weights on this machine already."""
    from pathlib import Path

    if not list(Path(torch.hub.get_dir(), "checkpoints").glob("vgg16-*.pth")):
        return None
    import lpips

    return lpips.LPIPS(net="vgg", verbose=False).eval().requires_grad_(False)


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
