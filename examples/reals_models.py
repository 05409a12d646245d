"""What a ReaLS training is made of: the VAE, the teacher that it is aligned with, the network that aligns them."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from sampling import plain_errors

from psvae import AlignmentNet, AlignmentNetConfig, PixelVAE, PixelVAEConfig, SemanticEncoder


def build_vae(name: str | None, model: Path | None, allow_pickle: bool = False) -> PixelVAE:
    """Of a folder, file or Hub id; without a name random weights of a JSON file of PixelVAEConfig, or of SD's. Nothing
    but mean_std.json is to be applied to its latents."""
    unscaled: dict[str, Any] = {"scaling_factor": 1.0, "shift_factor": None, "latents_mean": None, "latents_std": None}
    if name is not None:
        return PixelVAE.from_pretrained(name, allow_pickle=allow_pickle, **unscaled)
    config = PixelVAEConfig() if model is None else PixelVAEConfig.from_dict(json.loads(model.read_text("utf-8")))
    return PixelVAE(config.replace(**unscaled))


def build_teacher(name: str, vae: PixelVAE, size: int, merge: int, *, pre_norm_cls: bool = False) -> SemanticEncoder:
    """Frozen, seeing one patch for each latent cell or each 2 x 2 of them.

    Args:
        name: a timm name, or a folder of timm or transformers, whose final norm it keeps; or a folder of psvae, with
            the final norm that its config.json says.
        size: of the images, in pixels.
        merge: latent cells per teacher token on each axis.
        pre_norm_cls: its CLS token before the final norm is aligned with.

    Raises:
        SystemExit: no such grid fits the images, there is no such folder, or it has no CLS token where one is to be
            aligned with.
    """
    stride = vae.latent_spec.stride * merge
    if size % stride:
        raise SystemExit(
            f"images of {size} px give {size / stride:g} teacher tokens on a side; wanted a --data.size that is a "
            f"multiple of the VAE's stride {vae.latent_spec.stride} times --merge {merge}"
        )
    refuse_absent(name)
    config = config_of(name)
    if config is None:
        teacher = SemanticEncoder.from_timm(name, stride=stride, final_norm="affine")
    elif "_class" in config:
        teacher = SemanticEncoder.from_pretrained(name, stride=stride)
    else:
        teacher = SemanticEncoder.from_pretrained(name, stride=stride, final_norm="affine")
    if pre_norm_cls and teacher.vit.cls_token is None:
        raise SystemExit(
            f"the teacher {name} has no CLS token, and --teacher-features pre_norm aligns pooled latents with one: "
            "pass --losses.cls 0, or --teacher-features normed, which takes the mean of its patch tokens"
        )
    return teacher.eval().requires_grad_(False)


def refuse_absent(teacher: str) -> None:
    """Before timm looks for a folder among its models, none of which has a slash in its name.

    Raises:
        SystemExit: it is a path at which no folder is.
    """
    if len(Path(teacher).parts) > 1 and not Path(teacher).is_dir():
        raise SystemExit(
            f"there is no folder {teacher} for a teacher; wanted a folder of psvae, timm or transformers, or a timm "
            "name"
        )


def config_of(teacher: str) -> dict[str, Any] | None:
    """What a folder's config.json says; None of a timm name.

    Raises:
        SystemExit: the folder has none that can be read.
    """
    file = Path(teacher) / "config.json"
    if not file.parent.is_dir():
        return None
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        said = f"the teacher's folder {teacher} has no config.json that can be read ({error})"
        raise SystemExit(f"{said}; wanted a folder of psvae, timm or transformers, or a timm name") from error


def width_of(teacher: str) -> int:
    """D, without downloading anything."""
    refuse_absent(teacher)
    with plain_errors():
        if config_of(teacher) is not None:
            return SemanticEncoder.from_pretrained(teacher).feature_dim
        with torch.device("meta"):
            return SemanticEncoder.from_timm(teacher, pretrained=False).feature_dim


def build_alignment(
    vae: PixelVAE,
    teacher: SemanticEncoder,
    layers: int,
    hidden: int,
    activation: Literal["silu", "gelu"],
    merge: Literal[1, 2],
    pooling: Literal["mean", "max"],
) -> AlignmentNet:
    """As wide as the teacher, for the latents of the VAE."""
    channels, stride = vae.config.latent_channels, vae.latent_spec.stride
    return AlignmentNet(
        AlignmentNetConfig(channels, teacher.feature_dim, layers, hidden, activation, merge, pooling, stride)
    )
