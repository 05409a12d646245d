"""Fit a generator to another latent: its shape, and new first and last layers for a DiT.

The rest of the weights stay, and the model has to be trained again: a latent is not a drop-in.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from psvae.errors import ConfigError, DtypeError, ShapeError

__all__ = ["latent_shape", "resize_latent_io"]

PACKED_BY_FLUX = 2  # latent cells per token and axis in FluxPipeline, whatever the transformer's own patch_size says

M = TypeVar("M", bound=nn.Module)


def latent_shape(vae: Any, image_size: int | Sequence[int]) -> tuple[int, int, int]:
    """(Z, h, w) of the latent of an image: what stands for ``4, size // 8, size // 8`` in code written for SD.

    Args:
        vae: `PSVAE`, `PixelVAE`, or any diffusers VAE with ``config.latent_channels``.
        image_size: pixels, one side of a square or (height, width), such as ``images.shape[-2:]``.

    Raises:
        ShapeError: not one or two numbers, or not a multiple of the stride.
        DtypeError: not whole numbers.
        ConfigError: the configuration does not tell channels and stride.
    """
    config = getattr(vae, "config", None)
    channels = getattr(config, "latent_channels", None)
    stride = getattr(config, "spatial_compression_ratio", None)
    levels = getattr(config, "block_out_channels", None) or getattr(config, "encoder_block_out_channels", None)
    if stride is None and levels:
        stride = 2 ** (len(levels) - 1)  # what diffusers' pipelines compute
    if channels is None or stride is None:
        raise ConfigError(
            f"the configuration of {type(vae).__name__} has no latent_channels, or neither spatial_compression_ratio "
            "nor block_out_channels; wanted a VAE that names them"
        )
    height, width = _sides(image_size)
    for side in (height, width):
        if side < stride or side % stride:
            near = max(stride, round(side / stride) * stride)
            raise ShapeError(f"an image side is {side}; wanted a multiple of the stride {stride}, nearest {near}")
    return channels, height // stride, width // stride


def _sides(image_size: Any) -> tuple[int, int]:
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    if not isinstance(sides, Sequence) or not all(isinstance(side, int) for side in sides):
        kind = "a tensor" if isinstance(image_size, torch.Tensor) else repr(image_size)
        raise DtypeError(
            f"image_size came as {kind}; wanted pixels as one int or (height, width), as images.shape[-2:]"
        )
    if len(sides) != 2:
        raise ShapeError(
            f"image_size came as {tuple(sides)}; wanted one side or (height, width): of a batch B C H W pass "
            "images.shape[-2:]"
        )
    return sides[0], sides[1]


@torch.no_grad()
def resize_latent_io(model: M, channels: int, patch_size: int | None = None) -> M:
    """Give a DiT-like model a new patch embedding and output layer for latents of ``channels``, in place.

    Works on diffusers' DiT, PixArt, SD3 and Flux transformers and on any DiT with the names ``x_embedder`` and
    ``final_layer`` (DiT, SiT, REPA, LightningDiT). The grid of tokens stays, so position tables do too: with
    ``patch_size=1`` a model of 32×32 latents in patches of 2 becomes one of 16×16 latents in patches of 1, which is the
    same image where the stride went from 8 to 16.

    The new embedding is Xavier-uniform and the new output layer zero, as in DiT (Peebles and Xie 2023); every other
    weight stays. A learned variance stays learned: the output has as many times ``channels`` as it had.

    Args:
        model: changed in place, and returned.
        channels: Z.
        patch_size: latent cells per token, on each axis. None keeps the model's own; for Flux, whose pipeline packs the
            latents, that is the pipeline's 2.

    Raises:
        ConfigError: the model has other layers, reads more than the latent (inpainting and control models), or a
            number is no int or below 1.
    """
    _check_count("channels", channels, "such as vae.config.latent_channels")
    if patch_size is not None:
        _check_count("patch_size", patch_size, "or None to keep the model's own")
    parts: Any = model
    embedder = getattr(parts, "x_embedder", getattr(parts, "pos_embed", None))
    if isinstance(embedder, nn.Linear) and isinstance(getattr(parts, "proj_out", None), nn.Linear):
        _resize_packed(parts, channels, patch_size)
    elif isinstance(getattr(embedder, "proj", None), nn.Conv2d) and _output_layer(parts) is not None:
        _resize_patches(parts, embedder, channels, patch_size)
    else:
        raise ConfigError(
            f"{type(model).__name__} has no layers that psvae knows; wanted an x_embedder or pos_embed with a "
            "convolution 'proj' and final_layer.linear, proj_out or proj_out_2 (DiT, PixArt, SD3, SiT, LightningDiT), "
            "or a linear x_embedder and proj_out (Flux)"
        )
    return model


def _check_count(name: str, value: Any, remedy: str) -> None:
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} came as {value!r}; wanted an int of at least 1, {remedy}")


def _resize_patches(model: Any, embedder: Any, channels: int, patch_size: int | None) -> None:
    old = embedder.proj
    old_channels, old_patch = old.in_channels, old.kernel_size[0]
    patch: int = patch_size or old_patch
    owner, name = _output_layer(model)  # type: ignore[misc]  (checked by the caller)
    linear = getattr(owner, name)
    times, rest = divmod(linear.out_features, old_patch**2 * old_channels)  # 2 where the variance is learned
    if rest or not times:
        raise _reads_more(model, old_channels, linear.out_features / old_patch**2)
    embedder.proj = nn.Conv2d(channels, old.out_channels, patch, patch, bias=old.bias is not None).to(old.weight)
    _initialise(embedder.proj)
    setattr(owner, name, _zero_linear(linear, patch**2 * times * channels))
    is_pair = isinstance(embedder.patch_size, tuple)  # timm's embedding keeps pairs, and the size that it checks
    embedder.patch_size = (patch, patch) if is_pair else patch
    if getattr(embedder, "img_size", None) is not None:
        embedder.img_size = tuple(side * patch for side in embedder.grid_size)
    sizes: dict[str, Any] = {"in_channels": channels, "out_channels": times * channels, "patch_size": patch}
    if hasattr(embedder, "height"):  # diffusers
        sizes["sample_size"] = embedder.height * patch
        if "interpolation_scale" in model.config:  # PixArt draws two more from sample_size, where they are None
            drawn = {"interpolation_scale": max(model.config.sample_size // 64, 1)}
            drawn["use_additional_conditions"] = getattr(model, "use_additional_conditions", None)
            sizes |= {name: value for name, value in drawn.items() if model.config.get(name, 0) is None}
    _tell(model, sizes)


def _resize_packed(model: Any, channels: int, patch: int | None) -> None:
    old, width = model.x_embedder, channels * (patch or PACKED_BY_FLUX) ** 2
    if old.in_features != model.proj_out.out_features:
        raise _reads_more(model, old.in_features, model.proj_out.out_features)
    model.x_embedder = nn.Linear(width, old.out_features, bias=old.bias is not None).to(old.weight)
    _initialise(model.x_embedder)
    model.proj_out = _zero_linear(model.proj_out, width)
    _tell(model, {"in_channels": width, "out_channels": width})


def _reads_more(model: Any, takes: int | float, gives: int | float) -> ConfigError:
    return ConfigError(
        f"{type(model).__name__} takes {takes:g} channels and gives {gives:g}: it reads more than the latent (a mask, "
        "an image); wanted a model that gives as many channels as it takes, or a multiple"
    )


def _output_layer(model: Any) -> tuple[Any, str] | None:
    """(owner, attribute) of the last linear layer."""
    places = ((getattr(model, "final_layer", None), "linear"), (model, "proj_out_2"), (model, "proj_out"))
    return next((place for place in places if isinstance(getattr(*place, None), nn.Linear)), None)


def _initialise(layer: nn.Conv2d | nn.Linear) -> None:
    nn.init.xavier_uniform_(layer.weight.view(layer.weight.shape[0], -1))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _zero_linear(old: nn.Linear, out_features: int) -> nn.Linear:
    new = nn.Linear(old.in_features, out_features, bias=old.bias is not None).to(old.weight)
    for parameter in new.parameters():
        nn.init.zeros_(parameter)
    return new


def _tell(model: Any, sizes: dict[str, Any]) -> None:
    """Attributes and configuration that repeat the sizes."""
    for name, size in sizes.items():
        if isinstance(model.__dict__.get(name), int):
            setattr(model, name, size)
    if hasattr(model, "register_to_config"):
        model.register_to_config(**{name: size for name, size in sizes.items() if name in model.config})
