"""What `DeepFusionDiT` refuses, and the words it does so with."""

import difflib
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from psvae.errors import ConfigError, DtypeError, ShapeError
from psvae.generators.config import DeepFusionDiTConfig
from psvae.generators.prefix import PrefixCache
from psvae.shapes import check_map

__all__ = [
    "PREFIX_INPUTS", "check_batch", "check_condition", "check_names", "check_noisy", "check_prefix", "check_sources",
    "check_text",
]  # fmt: skip

# of `DeepFusionDiT.encode_prefix`, as `forward` takes them
PREFIX_INPUTS = (
    "input_ids", "attention_mask", "inputs_embeds", "encoder_hidden_states", "source_latents", "drop_text",
    "drop_source",
)  # fmt: skip


def check_noisy(config: DeepFusionDiTConfig, latents: Tensor, timestep: Tensor) -> None:
    """Noisy latents ``B Z h w`` and σ ``B``. Values are read in eager mode alone.

    Raises:
        ShapeError: wrong shape, σ outside [0, 1], NaN. DtypeError: no tensor, or integers.
    """
    check_latents(config, latents, "latents")
    wanted = f"wanted σ in [0, 1], floating point, shape ({len(latents)},): torch.full(({len(latents)},), sigma)"
    if not isinstance(timestep, Tensor):
        raise DtypeError(f"timestep came as {type(timestep).__name__} {timestep!r:.40}; {wanted}")
    if not timestep.is_floating_point():
        raise DtypeError(f"timestep has dtype {timestep.dtype}; {wanted}; a timestep of 0 to 1000 is divided by 1000")
    if tuple(timestep.shape) != (len(latents),):
        raise ShapeError(f"timestep has shape {tuple(timestep.shape)}; {wanted}")
    if not _readable(latents):
        return
    low, high, sigma_low, sigma_high = torch.stack([*latents.detach().aminmax(), *timestep.aminmax()]).tolist()
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ShapeError("latents hold NaN or infinity; wanted finite values: look at the step that made them")
    if not (sigma_low >= 0 and sigma_high <= 1):
        scaled = sigma_low >= 0 and sigma_high <= 1000
        hint = "this looks like a timestep of 0 to 1000, divide it by 1000" if scaled else "see psvae.flow"
        raise ShapeError(f"timestep spans [{sigma_low:.4g}, {sigma_high:.4g}]; wanted σ in [0, 1], 1 for noise: {hint}")


def check_latents(config: DeepFusionDiTConfig, latents: Tensor, what: str) -> None:
    """``B Z h w``, h and w multiples of the patch."""
    check_map(latents, config.in_channels, what)
    h, w = latents.shape[-2:]
    if h % config.patch_size or w % config.patch_size:
        p = config.patch_size
        near = " x ".join(str(max(p, round(side / p) * p)) for side in (h, w))
        raise ShapeError(f"{what} are {h} x {w}; wanted multiples of patch_size {p}, nearest {near}: crop or pad them")


def check_sources(config: DeepFusionDiTConfig, source_latents: Tensor | None) -> list[Tensor]:
    """``B Z h w`` or ``B S Z h w`` → S source images, each ``B Z h w``."""
    if source_latents is None:
        return []
    several = isinstance(source_latents, Tensor) and source_latents.ndim == 5
    images = list(source_latents.unbind(1)) if several else [source_latents]
    if not 1 <= len(images) <= config.max_source_images:
        raise ShapeError(
            f"{len(images)} source images came; wanted at most {config.max_source_images}, None for none: "
            "for more set DeepFusionDiTConfig.max_source_images, and train it so"
        )
    for image in images:
        check_latents(config, image, "source_latents")
        if _readable(image) and not image.isfinite().all():
            raise ShapeError(
                "source_latents hold NaN or infinity; wanted finite values: look at the step that made them"
            )
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
    for name, tensor in (*given.items(), ("attention_mask", attention_mask)):
        if tensor is not None and not isinstance(tensor, Tensor):
            raise DtypeError(
                f"{name} came as {type(tensor).__name__}; wanted a torch.Tensor: tokenizer(..., return_tensors='pt')"
            )
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} came together; wanted one: they are two ways to say one thing")
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
        plain = name == "inputs_embeds" or (text.ndim == 3 and config.text_layers == 1)
        layers = () if plain else (config.text_layers,)
        if text.shape[-1] != width or text.ndim != 3 + len(layers) or tuple(text.shape[: len(layers)]) != layers:
            wanted = ", ".join([*map(str, layers), "B", "T", str(width)])
            raise ShapeError(f"{name} have shape {tuple(text.shape)}; wanted ({wanted})")
    shape = tuple(text.shape) if name == "input_ids" else tuple(text.shape[-3:-1])
    if attention_mask is None:
        return None
    if tuple(attention_mask.shape) != shape:
        raise ShapeError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; wanted {shape}, as the text: 1 for words, 0 for "
            "padding, as the tokenizer returns it"
        )
    visible = attention_mask.bool()
    if not _readable(visible):
        return visible
    if not visible.any(dim=1).all():
        raise ShapeError(
            "attention_mask leaves an item with padding alone; wanted a word in each: an item without text is said by "
            "drop_text=, a batch without text by PrefixCache.empty(...)"
        )
    if attention_mask.is_floating_point() and attention_mask.min() < 0:
        raise ShapeError("attention_mask holds negative numbers, to be added; wanted 1 for words, 0 for padding")
    return None if visible.all() else visible


def _check_ids(config: DeepFusionDiTConfig, ids: Tensor) -> None:
    if ids.ndim != 2 or ids.is_floating_point() or 0 in ids.shape:
        raise DtypeError(f"input_ids have shape {tuple(ids.shape)}, {ids.dtype}; wanted whole numbers, (B, T), T ≥ 1")
    if not _readable(ids):
        return
    low, high = torch.stack(ids.aminmax()).tolist()
    if low < 0 or high >= (config.vocab_size or 0):
        raise ShapeError(
            f"input_ids span {low} to {high}; wanted 0 to {(config.vocab_size or 0) - 1}: use the tokenizer of the "
            "language model that this one began as"
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
            f"the prefix has (layers, key heads, head width) {found}; wanted {wanted}: it was made by another model, "
            "encode it with this one"
        )
    if prefix.batch_size != batch_size:
        raise ShapeError(
            f"the prefix is for a batch of {prefix.batch_size}; wanted {batch_size}, as the latents: "
            "prefix.repeat_interleave(n) serves n images of each prompt"
        )


def check_batch(sizes: dict[str, int], **drops: Tensor | None) -> None:
    """One batch size for all that a prefix is made of.

    Args:
        sizes: by the name of the input. drops: which items go without, ``B``.

    Raises:
        ShapeError: unequal ones. DtypeError: drops that are not boolean.
    """
    for name, drop in drops.items():
        if drop is None:
            continue
        if not isinstance(drop, Tensor) or drop.dtype != torch.bool:
            got = drop.dtype if isinstance(drop, Tensor) else type(drop).__name__
            raise DtypeError(f"{name} came as {got}; wanted a boolean tensor (B,), True where an item goes without")
        sizes = {**sizes, name: drop.shape[0] if drop.ndim == 1 else -1}
    if len(set(sizes.values())) > 1:
        said = ", ".join(f"{name} {'of another rank' if size < 0 else size}" for name, size in sizes.items())
        raise ShapeError(f"the batches differ: {said}; wanted one size: each item has its own text and source")


def check_condition(config: DeepFusionDiTConfig, condition: Tensor, batch: int, tokens: int) -> None:
    """Of an earlier output for latents of this size."""
    wanted = (batch, tokens, config.hidden_size)
    if tuple(condition.shape) != wanted:
        raise ShapeError(
            f"condition has shape {tuple(condition.shape)}; wanted {wanted}: the .condition of an earlier output for "
            "latents of this shape"
        )


def check_names(config: DeepFusionDiTConfig, given: Iterable[str], return_layers: tuple[int, ...]) -> None:
    """Keywords and layers that exist.

    Raises:
        ConfigError: a misspelt keyword, named with the nearest valid one; a block that is not there.
    """
    for name in given:
        if name not in PREFIX_INPUTS:
            near = difflib.get_close_matches(name, PREFIX_INPUTS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"wanted one of {', '.join(PREFIX_INPUTS)}"
            raise ConfigError(f"DeepFusionDiT has no input {name!r}; {hint}")
    if not all(0 <= layer < config.num_layers for layer in return_layers):
        raise ConfigError(f"return_layers is {return_layers}; wanted numbers from 0 to {config.num_layers - 1}")


def _readable(x: Tensor) -> bool:
    """Whether the values may be looked at: not while compiling, capturing a CUDA graph, or on the meta device."""
    if torch.compiler.is_compiling() or x.device.type == "meta":
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())
