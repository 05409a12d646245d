"""What `DeepFusionDiT` refuses, and the words it does so with."""

import math

import torch
from torch import Tensor

from psvae.errors import ConfigError, DtypeError, ShapeError
from psvae.generators.config import DeepFusionDiTConfig
from psvae.generators.prefix import PrefixCache
from psvae.shapes import check_map

__all__ = ["check_noisy", "check_prefix", "check_sources", "check_text"]


def check_noisy(config: DeepFusionDiTConfig, latents: Tensor, timestep: Tensor) -> None:
    """Noisy latents ``B Z h w`` and σ ``B``. Values are read in eager mode alone.

    Raises:
        ShapeError: wrong shape, σ outside [0, 1], NaN. DtypeError: integers.
    """
    check_latents(config, latents, "latents")
    batch = len(latents)
    if not isinstance(timestep, Tensor) or not timestep.is_floating_point() or tuple(timestep.shape) != (batch,):
        got = f"shape {tuple(timestep.shape)}, {timestep.dtype}" if isinstance(timestep, Tensor) else repr(timestep)
        raise ShapeError(
            f"timestep came as {got}; wanted σ in floating point, shape ({batch},): torch.full((B,), sigma)"
        )
    if not _readable(latents):
        return
    low, high, sigma_low, sigma_high = torch.stack([*latents.detach().aminmax(), *timestep.aminmax()]).tolist()
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ShapeError("latents hold NaN or infinity: look at the step that made them")
    if not (sigma_low >= 0 and sigma_high <= 1):
        scaled = sigma_low >= 0 and sigma_high <= 1000
        hint = "this looks like a timestep of 0 to 1000, divide it by 1000" if scaled else "see psvae.flow"
        raise ShapeError(f"timestep spans [{sigma_low:.4g}, {sigma_high:.4g}]; wanted σ in [0, 1], 1 for noise: {hint}")


def check_latents(config: DeepFusionDiTConfig, latents: Tensor, what: str) -> None:
    """``B Z h w``, h and w multiples of the patch."""
    check_map(latents, config.in_channels, what)
    h, w = latents.shape[-2:]
    if h % config.patch_size or w % config.patch_size:
        raise ShapeError(f"{what} are {h} x {w}; wanted multiples of patch_size {config.patch_size}")


def check_sources(config: DeepFusionDiTConfig, source_latents: Tensor | None) -> list[Tensor]:
    """``B Z h w`` or ``B S Z h w`` → S source images, each ``B Z h w``."""
    if source_latents is None:
        return []
    images = [source_latents] if source_latents.ndim != 5 else list(source_latents.unbind(1))
    if len(images) > config.max_source_images:
        raise ShapeError(
            f"{len(images)} source images came; this model is configured for {config.max_source_images}: "
            "set DeepFusionDiTConfig.max_source_images, and train it so"
        )
    for image in images:
        check_latents(config, image, "source_latents")
        if _readable(image) and not image.isfinite().all():
            raise ShapeError("source_latents hold NaN or infinity: look at the step that made them")
    return images


def check_text(
    config: DeepFusionDiTConfig,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    encoder_hidden_states: Tensor | None,
    attention_mask: Tensor | None,
) -> Tensor | None:
    """At most one kind of text, of the kind that the fusion reads → its visible tokens ``B T``, None for all."""
    kinds = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "encoder_hidden_states": encoder_hidden_states}
    given = {name: text for name, text in kinds.items() if text is not None}
    if not given:
        return None
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} came together; they are two ways to say one thing, pass one")
    name, text = next(iter(given.items()))
    reads = ["encoder_hidden_states"] if config.text_hidden_size else []
    if config.fusion != "prefix":
        reads = ["inputs_embeds"] if config.vocab_size is None else ["input_ids", "inputs_embeds"]
    if name not in reads:
        raise ConfigError(
            f"{name} came; fusion={config.fusion!r} with vocab_size={config.vocab_size} and text_hidden_size="
            f"{config.text_hidden_size} reads {' or '.join(reads) or 'a PrefixCache.from_hf alone'}"
        )
    if name == "input_ids":
        _check_ids(config, text)
    else:
        width = config.hidden_size if name == "inputs_embeds" else config.text_hidden_size
        layers = () if text.ndim == 3 and config.text_layers == 1 else (config.text_layers,)
        if text.shape[-1] != width or text.ndim != 3 + len(layers) or tuple(text.shape[: len(layers)]) != layers:
            wanted = ", ".join([*map(str, layers), "B", "T", str(width)])
            raise ShapeError(f"{name} have shape {tuple(text.shape)}; wanted ({wanted})")
    shape = tuple(text.shape) if name == "input_ids" else tuple(text.shape[-3:-1])
    if attention_mask is None:
        return None
    if tuple(attention_mask.shape) != shape:
        raise ShapeError(f"attention_mask has shape {tuple(attention_mask.shape)}; the text is {shape}")
    visible = attention_mask.bool()
    if not _readable(visible):
        return visible
    if not visible.any(dim=1).all():
        raise ShapeError(
            "attention_mask leaves an item with padding alone; an item without text is said by drop_text=, "
            "a batch without text by PrefixCache.empty(...)"
        )
    return None if visible.all() else visible


def _check_ids(config: DeepFusionDiTConfig, ids: Tensor) -> None:
    if ids.ndim != 2 or ids.is_floating_point() or 0 in ids.shape:
        raise DtypeError(f"input_ids have shape {tuple(ids.shape)}, {ids.dtype}; wanted whole numbers, (B, T), T ≥ 1")
    if not _readable(ids):
        return
    low, high = torch.stack(ids.aminmax()).tolist()
    if low < 0 or high >= (config.vocab_size or 0):
        raise ShapeError(
            f"input_ids span {low} to {high}; wanted 0 to {(config.vocab_size or 0) - 1}: another tokenizer's?"
        )


def check_prefix(config: DeepFusionDiTConfig, prefix: PrefixCache, batch_size: int) -> None:
    """A prefix of this geometry and batch.

    Raises:
        ConfigError: of another geometry. ShapeError: of another batch size.
    """
    found = (prefix.keys.shape[0], prefix.keys.shape[2], prefix.keys.shape[4])
    wanted = (config.num_layers, config.num_key_value_heads, config.attention_head_dim)
    if found != wanted:
        raise ConfigError(
            f"the prefix has (layers, key heads, head width) {found}; this model has {wanted}: it was made by another "
            "model, encode it with this one"
        )
    if prefix.batch_size != batch_size:
        raise ShapeError(
            f"the prefix is for a batch of {prefix.batch_size}; here it is {batch_size}: "
            "prefix.repeat_interleave(n) serves n images of each prompt"
        )


def _readable(x: Tensor) -> bool:
    """Whether the values may be looked at: not while compiling, capturing a CUDA graph, or on the meta device."""
    if torch.compiler.is_compiling() or x.device.type == "meta":
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())
