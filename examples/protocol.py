"""Numbers of evaluate.py with what they are beside them: which pictures, how they were cut, what measured them."""

import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from cache_latents import some
from frechet import frechet_distance, too_few
from measures import active_share
from probes import Probe, probed
from reconstruction import MeasuredPictures, Pass, Rows
from torch import Tensor

from psvae import PSVAE, PixelVAE

COMMON = ("pictures", "resize", "crop", "latent", "reconstruction", "precision", "left_out")


@dataclass(frozen=True)
class Setting:
    """What all codecs are measured on and with, as it was asked for.

    Attributes:
        features, frozen: names of encoders; None where there is none.
        sample: latents are drawn, with ``seed``.
    """

    pictures: MeasuredPictures
    features: str | None
    frozen: str | None
    precision: str
    sample: bool
    seed: int


def numbers_of(
    vae: PSVAE | PixelVAE, found: Pass, reference: Rows, learned: Rows, probe: Probe | None, setting: Setting
) -> dict[str, dict[str, Any]]:
    """By name: value, what it is, and what else belongs to its protocol."""
    rows, metrics = found.rows, f"torchmetrics {version('torchmetrics')}"
    numbers: dict[str, dict[str, Any]] = {}
    exact = rows["psnr"].isinf()
    numbers["psnr"] = {
        "value": float(rows["psnr"][~exact].mean()) if not exact.all() else None,
        "measure": f"PSNR in dB of each picture, 8-bit pixels with data range 255, mean over pictures ({metrics})",
        "rebuilt_exactly": f"{int(exact.sum())} pictures, whose PSNR is infinite and not in the mean",
    }
    numbers["ssim"] = {
        "value": float(rows["ssim"].mean()),
        "measure": "SSIM of each channel, pixels in [0, 1] with data range 1, K 0.01 and 0.03, Gaussian window of "
        f"11 x 11 pixels and σ 1.5, borders mirrored, mean over pictures ({metrics})",
    }
    if "lpips" in rows:
        numbers["lpips"] = {
            "value": float(rows["lpips"].mean()),
            "measure": f"LPIPS, version 0.1 on VGG-16, mean over pictures (lpips {version('lpips')})",
        }
    extractors = {
        "rfid": f"Inception v3 of FID's TensorFlow weights, 2048 pooled features (torch-fidelity "
        f"{version('torch-fidelity')})",
        "frechet_distance": f"{setting.features}, mean over its grid",
    }
    for name, extractor in extractors.items():
        if f"{name} features" not in rows:
            continue
        real, made = reference[f"{name} features"], rows[f"{name} features"]
        said = too_few(len(made), made.shape[1])
        numbers[name] = {
            "value": frechet_distance(real, made),
            "measure": "Fréchet distance of the Gaussians of features" + (", no FID" if name != "rfid" else ""),
            "extractor": f"{extractor}, {made.shape[1]} features",
            "reference": f"the same {len(real)} pictures, cut and in 8 bits as the codec got them",
        } | ({"warning": said} if said else {})
    if "feature_cosine" in rows:
        whose = setting.frozen or "the codec's own encoder"
        numbers["feature_cosine"] = {
            "value": float(rows["feature_cosine"].mean()),
            "measure": "cosine of features rebuilt from the latent, token by token, mean over tokens and pictures",
            "reference": f"features of {whose} from the same pictures",
        }
    if "moments" in rows:
        side = setting.pictures.source.size // vae.config.spatial_compression_ratio
        numbers["active_channels"] = {
            "value": active_of(rows["moments"], side**2),
            "measure": "share of latent channels that carry more than 0.01 nat per cell, ½ log(1 + variance of the "
            "posterior's mean / mean of its variance)",
            "latent": "the posterior's mean and variance",
        }
    return numbers | (probed(rows, learned, probe, mean_of(vae)) if probe is not None else {})


def active_of(moments: Tensor, cells: int) -> float:
    """Of means over cells of the posterior's mean, of its square and of the variance, ``N 3 Z``."""
    mean, square, noise = moments.mean(dim=0)
    count = len(moments) * cells
    return active_share((square - mean.square()) * count / max(1, count - 1), noise)


def has_posterior(vae: PSVAE | PixelVAE) -> bool:
    return not isinstance(vae, PSVAE) or vae.vae is not None


def mean_of(vae: PSVAE | PixelVAE) -> str:
    """What the latent is where none is drawn, in words."""
    return "the posterior's mean" if has_posterior(vae) else "the encoder's features, no posterior"


def protocol_of(vae: PSVAE | PixelVAE, found: Pass, setting: Setting) -> dict[str, str]:
    """What all numbers of a codec have in common."""
    device, pictures, source = vae.device, setting.pictures, setting.pictures.source
    precision = {"no": "float32", "bf16": "bfloat16 autocast", "fp16": "float16 autocast"}[setting.precision]
    if device.type == "cuda" and setting.precision == "no" and torch.backends.cudnn.allow_tf32:
        precision += ", convolutions in TF32"
    draws = setting.sample and has_posterior(vae)
    enlarged, split = int(found.rows["enlarged"].sum()), f", split {source.split}" if source.split else ""
    said = {
        "pictures": f"{len(found.rows['place'])} of the {len(pictures)} of {source.data}{split}"
        + (", spread evenly over them" if len(pictures.places) < len(pictures) else ""),
        "resize": f"short side to {source.size} pixels, bilinear with antialiasing (Pillow)"
        + (f"; {enlarged} were smaller and are enlarged" if enlarged else ""),
        "crop": f"centre, {source.size} x {source.size}",
        "latent": f"a draw of the posterior, seed {setting.seed}" if draws else mean_of(vae),
        "reconstruction": "clamped to [-1, 1] and rounded to 8 bits",
        "precision": f"{precision}, on {device.type}",
    }
    if found.left_out:
        said["left_out"] = f"{len(found.left_out)} that cannot be read: {', '.join(found.left_out)}"
    return said


def result_of(
    name: str, vae: PSVAE | PixelVAE, weights: str, numbers: dict[str, dict[str, Any]], common: dict[str, str]
) -> dict[str, Any]:
    """Of one codec, as it is written."""
    written = {}
    for measure, number in numbers.items():
        own = {key: value for key, value in number.items() if key != "value"}
        written[measure] = {"value": number["value"], "protocol": common | own}
    kind = {"vae": name, "class": type(vae).__name__, "weights": weights}
    return kind | {
        "latent": {"channels": vae.config.latent_channels, "stride": vae.config.spatial_compression_ratio},
        "numbers": written,
    }


def about_cosine(results: list[dict[str, Any]], frozen: str | None) -> list[str]:
    """What --frozen would do for the PSVAEs of the table, a line each."""
    has = {result["vae"]: "feature_cosine" in result["numbers"] for result in results if result["class"] == "PSVAE"}
    lines = []
    if any(has.values()) and frozen is None:
        lines.append(
            "feature_cosine is with the codec's own encoder, which stage 2 tunes; --frozen compares with another, such "
            "as the one before it"
        )
    if lacking := [name for name, there in has.items() if not there]:
        lines.append(f"no feature_cosine of {some(lacking)}: no SemanticVAE rebuilds features for --frozen to compare")
    return lines


def show(results: list[dict[str, Any]], frozen: str | None, file: Path) -> None:
    """One row for each number, one column for each codec; below, the protocols."""
    names = list(dict.fromkeys(name for result in results for name in result["numbers"]))
    heads = [f"{result['vae'][-24:]}" for result in results]
    print("\n" + " " * 20 + "".join(f"{head:>26s}" for head in heads))
    for name in names:
        cells = []
        for result in results:
            number = result["numbers"].get(name)
            cells.append("" if number is None else "infinite" if number["value"] is None else f"{number['value']:.4f}")
        print(f"{name:20s}" + "".join(f"{cell:>26s}" for cell in cells))
    for line in about_cosine(results, frozen):
        print(line)
    said: dict[str, None] = {}
    for result in results:
        for name, number in result["numbers"].items():
            if "warning" in number["protocol"]:
                print(f"warning, {name} of {result['vae']}: {number['protocol']['warning']}", file=sys.stderr)
        first = next(iter(result["numbers"].values()))["protocol"]
        said["; ".join(first[key] for key in COMMON if key in first)] = None
    print("\n" + "\n".join(said) + f"\nthe protocol of each number: {file}")
