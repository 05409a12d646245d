"""What `DeepFusionDiT` refuses, and the words it does so with. Values are read in eager mode alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from psvae.errors import ConfigError, DtypeError, ShapeError
from psvae.flow.checks import column, one_batch
from psvae.generators.config import DeepFusionDiTConfig
from psvae.generators.prefix import PrefixCache
from psvae.shapes import check_dtype, check_map, readable

__all__ = [
    "check_batch", "check_condition", "check_given", "check_noisy", "check_prefix", "check_sources",
    "check_states", "check_text",
]  # fmt: skip


# Of one forward


def check_given(
    config: DeepFusionDiTConfig, given: Mapping[str, Any], condition: Tensor | None, return_layers: Sequence[int]
) -> list[str]:
    """Nothing that would be ignored, and layers that exist.

    Args:
        given: the prefix and what it would be encoded from, by name.

    Returns:
        The names of those that came.

    Raises:
        ConfigError: two that exclude each other; a block that is not there.
    """
    names = [name for name, value in given.items() if value is not None]
    if condition is not None and (names or return_layers):
        names += ["return_layers"] * bool(return_layers)
        raise ConfigError(
            f"condition came together with {', '.join(names)}; with a condition the head alone is run, and reads "
            "nothing else: leave one out"
        )
    if "prefix" in names and len(names) > 1:
        raise ConfigError(f"prefix came together with {', '.join(names[1:])}; pass one or the other")
    listed = isinstance(return_layers, Sequence) and all(isinstance(layer, int) for layer in return_layers)
    if not listed or not all(0 <= layer < config.num_layers for layer in return_layers):
        raise ConfigError(
            f"return_layers is {return_layers!r}; wanted a tuple of numbers from 0 to {config.num_layers - 1}"
        )
    return names


def check_noisy(config: DeepFusionDiTConfig, latents: Tensor, timestep: Tensor) -> None:
    """Noisy latents ``B Z h w`` and σ ``B``.

    Raises:
        ShapeError: wrong shape, σ outside [0, 1], NaN. DtypeError: no tensor, or integers.
    """
    _check_latents(config, latents, "latents")
    _check_finite(latents, "latents")
    column(timestep, latents, "timesteps")


def check_condition(config: DeepFusionDiTConfig, condition: Tensor, batch: int, tokens: int) -> None:
    """Of an earlier output for latents of this size."""
    wanted = (batch, tokens, config.hidden_size)
    if not isinstance(condition, Tensor):
        raise DtypeError(f"condition came as {type(condition).__name__}; wanted the tensor .condition of an output")
    if tuple(condition.shape) != wanted:
        raise ShapeError(
            f"condition has shape {tuple(condition.shape)}; wanted {wanted}: the .condition of an earlier output for "
            "latents of this shape"
        )


def check_states(states: Tensor, reader: nn.Module) -> None:
    """Hidden states of text, zero where it is padded, for the layer that reads them.

    Raises:
        DtypeError: it cannot. ShapeError: NaN or infinity.
    """
    check_dtype(states, reader, "the text's states")
    _check_finite(states, "the text's states", ", padding is told by attention_mask")


# Of the prefix


def check_prefix(config: DeepFusionDiTConfig, prefix: PrefixCache, batch_size: int | None = None) -> None:
    """A prefix of this geometry and batch.

    Raises:
        DtypeError: something else. ConfigError: of another geometry. ShapeError: of another batch size.
    """
    if not isinstance(prefix, PrefixCache):
        raise DtypeError(
            f"prefix came as {type(prefix).__name__}; wanted a PrefixCache: pass token ids as input_ids=, and a "
            "language model's cache as PrefixCache.from_hf(past_key_values, attention_mask)"
        )
    found = (prefix.keys.shape[0], prefix.keys.shape[2], prefix.keys.shape[4])
    wanted = (config.num_layers, config.num_key_value_heads, config.attention_head_dim)
    if found != wanted:
        raise ConfigError(
            f"the prefix has (layers, key heads, head width) {found}; wanted {wanted}: it was made by another model, "
            "encode it with this one; a language model's cache needs a generator of its geometry, or a layer_map"
        )
    if batch_size is not None:
        one_batch(prefix.batch_size, batch_size)


def check_sources(
    config: DeepFusionDiTConfig, source_latents: Tensor | None, prefix: PrefixCache | None, reader: nn.Module
) -> list[Tensor]:
    """``B Z h w`` or ``B S Z h w`` → S source images, each ``B Z h w``.

    Raises:
        ShapeError: too many with those in the prefix, or of wrong shape, or NaN. ConfigError: behind text.
        DtypeError: of a dtype that the layer ``reader`` cannot take.
    """
    if source_latents is None:
        return []
    several = isinstance(source_latents, Tensor) and source_latents.ndim == 5
    images = list(source_latents.unbind(1)) if several else [source_latents]
    before = 0 if prefix is None else prefix.source_images
    if not 1 <= len(images) <= config.max_source_images - before:
        chained = f" after {before} in the prefix" if before else ""
        raise ShapeError(
            f"{len(images)} source images came{chained}; wanted at most {config.max_source_images}, None for none: "
            "for more set DeepFusionDiTConfig.max_source_images, and train it so"
        )
    if prefix is not None and prefix.has_text and config.fusion != "prefix":
        raise ConfigError(
            f"source_latents came after a prefix with text; fusion={config.fusion!r} reads [source latents | text]: "
            "encode the source first, or both in one call"
        )
    for image in images:
        _check_latents(config, image, "source_latents")
        check_dtype(image, reader, "source_latents")
        _check_finite(image, "source_latents")
    return images


def check_text(config: DeepFusionDiTConfig, **kinds: Tensor | None) -> Tensor | None:
    """The one kind of text that came, of the kind that the fusion reads.

    Args:
        kinds: by the name of the input.

    Raises:
        ConfigError: several kinds, or one that is not read. DtypeError: of another dtype. ShapeError: of another
            shape, or ids outside the vocabulary.
    """
    given = {name: text for name, text in kinds.items() if text is not None}
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} came together; wanted one: they are two ways to say one thing")
    for name, text in given.items():
        if not isinstance(text, Tensor):
            raise DtypeError(
                f"{name} came as {type(text).__name__}; wanted a torch.Tensor: tokenizer(..., return_tensors='pt')"
            )
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
            _check_embedded(config, text, name)
        return text
    return None


def _check_ids(config: DeepFusionDiTConfig, ids: Tensor) -> None:
    if ids.dtype not in (torch.int64, torch.int32):
        raise DtypeError(f"input_ids have dtype {ids.dtype}; wanted torch.int64, as the tokenizer returns them")
    if ids.ndim != 2 or 0 in ids.shape:
        hint = "; add a batch axis with .unsqueeze(0)" if ids.ndim == 1 else ""
        raise ShapeError(f"input_ids have shape {tuple(ids.shape)}; wanted (B, T), a word at least{hint}")
    if not readable(ids):
        return
    low, high = torch.stack(ids.aminmax()).tolist()
    if low < 0 or high >= (config.vocab_size or 0):
        raise ShapeError(
            f"input_ids span {low} to {high}; wanted 0 to {(config.vocab_size or 0) - 1}: use the tokenizer of the "
            "language model that this one began as"
        )


def _check_embedded(config: DeepFusionDiTConfig, states: Tensor, name: str) -> None:
    width = config.hidden_size if name == "inputs_embeds" else config.text_hidden_size
    plain = name == "inputs_embeds" or (states.ndim == 3 and config.text_layers == 1)
    layers = () if plain else (config.text_layers,)
    fits = states.ndim == 3 + len(layers) and tuple(states.shape[: len(layers)]) == layers
    if not fits or states.shape[-1] != width or 0 in states.shape:
        wanted = ", ".join([*map(str, layers), "B", "T", str(width)])
        raise ShapeError(f"{name} have shape {tuple(states.shape)}; wanted ({wanted}), a word at least")
    if not states.is_floating_point():
        raise DtypeError(f"{name} have dtype {states.dtype}; wanted floating point: token ids are passed as input_ids=")


def check_batch(
    text: tuple[int, ...] | None,
    sources: Sequence[Tensor],
    prefix: PrefixCache | None,
    drop_text: Tensor | None,
    drop_source: Tensor | None,
) -> int:
    """The one batch size of all that a prefix is made of.

    Args:
        text: its shape, ``(B, T)``.
        drop_text, drop_source: which items go without, ``B``.

    Raises:
        ShapeError: unequal ones. DtypeError: drops that are not boolean. ConfigError: nothing came, or a drop of
            what did not come.
    """
    sizes = {} if text is None else {"text": text[0]}
    if sources:
        sizes["source_latents"] = len(sources[0])
    if prefix is not None:
        sizes["prefix"] = prefix.batch_size
    for name, of, drop in (("drop_text", "text", drop_text), ("drop_source", "source_latents", drop_source)):
        if drop is None:
            continue
        if of not in sizes:
            raise ConfigError(f"{name} came without {of}; there is nothing to go without: leave it out")
        if not isinstance(drop, Tensor) or drop.dtype != torch.bool:
            got = drop.dtype if isinstance(drop, Tensor) else type(drop).__name__
            raise DtypeError(f"{name} came as {got}; wanted a boolean tensor (B,), True where an item goes without")
        sizes[name] = drop.shape[0] if drop.ndim == 1 else -1
    if not sizes:
        raise ConfigError(
            "neither text nor source_latents came; wanted one of them: PrefixCache.empty(...) is no condition"
        )
    if len(set(sizes.values())) > 1:
        said = ", ".join(f"{name} {'of another rank' if size < 0 else size}" for name, size in sizes.items())
        raise ShapeError(f"the batches differ: {said}; wanted one size: each item has its own text and source")
    return next(iter(sizes.values()))


def _check_finite(x: Tensor, what: str, hint: str = "") -> None:
    if readable(x) and not x.isfinite().all():
        raise ShapeError(f"{what} hold NaN or infinity; wanted finite values: look at the step that made them{hint}")


def _check_latents(config: DeepFusionDiTConfig, latents: Tensor, what: str) -> None:
    """``B Z h w``, h and w multiples of the patch."""
    check_map(latents, config.in_channels, what)
    h, w = latents.shape[-2:]
    if h % config.patch_size or w % config.patch_size:
        p = config.patch_size
        near = " x ".join(str(max(p, round(side / p) * p)) for side in (h, w))
        raise ShapeError(f"{what} are {h} x {w}; wanted multiples of patch_size {p}, nearest {near}: crop or pad them")
