"""PrefixCache: what the noisy latents attend to, computed once for all sampling steps.

Source latents and text see neither the noise nor σ, so their keys and values do not change from step to step.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from psvae.errors import DtypeError, ShapeError
from psvae.generators.config import DeepFusionDiTConfig
from psvae.generators.masks import check_mask
from psvae.nn.decoder import KeysValues

__all__ = ["PrefixCache"]


@dataclass(frozen=True, eq=False)
class PrefixCache:
    """Keys (rotated) and values of every layer; often called a KV cache, or past key values.

    Attributes:
        keys, values: ``L B kv P d``; P may be 0.
        key_mask: ``B P``, True where a key is real; None where all are.
        next_position: ``B``, the first rotary position after the prefix.
        source_images: how many are in it; of a joined batch, the most.
        has_text: whether text is in it.
    """

    keys: Float[Tensor, "L B kv P d"]
    values: Float[Tensor, "L B kv P d"]
    key_mask: Bool[Tensor, "B P"] | None
    next_position: Int[Tensor, " B"]
    source_images: int = 0
    has_text: bool = False

    @classmethod
    def empty(
        cls,
        config: DeepFusionDiTConfig,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """No source and no text: the unconditional branch."""
        shape = (config.num_layers, batch_size, config.num_key_value_heads, 0, config.attention_head_dim)
        nothing = torch.empty(shape, device=device, dtype=dtype)
        return cls(nothing, nothing, None, torch.zeros(batch_size, dtype=torch.long, device=device))

    @classmethod
    def from_hf(
        cls,
        past_key_values: Any,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        layer_map: Sequence[int] | None = None,
    ) -> Self:
        """Copy a transformers cache, which goes on growing when it is used: the copy does not.

        Args:
            past_key_values: what a language model returned, or a sequence of (keys, values) per layer.
            attention_mask: ``B P``, the tokenizer's; None where nothing is padded. Padding is set to zero.
            position_ids: ``B P``, what the language model was given, such as by ``generate`` for padding on the
                left; None where it counted 0, 1, 2, … from the first token, padding included.
            layer_map: for each layer of the generator, the language model's; None for one to one.

        Raises:
            DtypeError: no cache. ShapeError: layers of different geometry, empty, or truncated by a sliding window;
                a mask of another shape, with other numbers than 0 and 1, or with an item of padding alone.
        """
        layers = getattr(past_key_values, "layers", past_key_values)
        if not isinstance(layers, Sequence):
            raise DtypeError(
                f"the cache came as {type(past_key_values).__name__}; wanted one of transformers, such as "
                "llm(**tokens, use_cache=True).past_key_values"
            )
        order = range(len(layers)) if layer_map is None else layer_map
        if not layers or not all(0 <= index < len(layers) for index in order):
            raise ShapeError(f"the cache has {len(layers)} layers; wanted layers {list(order)}: see layer_map")
        pairs = [_keys_values(layers[index], index) for index in order]
        shapes = {tuple(x.shape) for pair in pairs for x in pair}
        if len(shapes) != 1:
            raise ShapeError(
                f"the cache's layers have keys and values of shapes {sorted(shapes)}; wanted one: a layer_map can pick "
                "layers of equal geometry"
            )
        (batch, _, length, _), device = shapes.pop(), pairs[0][0].device
        places = torch.arange(length, device=device)[None] if position_ids is None else position_ids.to(device)
        _check_shape("attention_mask", attention_mask, ((batch, length),))
        _check_shape("position_ids", places, ((batch, length), (1, length)))
        keys, values = (torch.stack(part) for part in zip(*pairs, strict=True))
        places = places.expand(batch, -1)
        mask = check_mask((batch, length), None if attention_mask is None else attention_mask.to(device), None)
        if mask is not None:
            places = places.masked_fill(~mask, -1)
            # padding may hold NaN, and 0 · NaN is NaN
            keys, values = (x.masked_fill(~mask[:, None, :, None], 0) for x in (keys, values))
        return cls(keys, values, mask, places.amax(dim=1) + 1, has_text=True)

    @classmethod
    def concat_batch(cls, parts: Sequence["PrefixCache"]) -> Self:
        """Join along the batch, as for the branches of guidance; shorter ones are padded and masked.

        Raises:
            ShapeError: no parts, or of different geometry.
        """
        if not parts:
            raise ShapeError("no prefixes came; wanted at least one")
        geometries = {(*part.keys.shape[:1], part.keys.shape[2], part.keys.shape[4]) for part in parts}
        if len(geometries) != 1:
            raise ShapeError(f"prefixes have (layers, key heads, width) {sorted(geometries)}; wanted equal ones")
        length = max(part.length for part in parts)
        dtypes = [part.keys.dtype for part in parts if part.length or not length]  # empty ones hold no numbers
        dtype = functools.reduce(torch.promote_types, dtypes)
        masked = any(part.key_mask is not None or part.length < length for part in parts)
        return cls(
            torch.cat([_pad(part.keys, length, dtype) for part in parts], dim=1),
            torch.cat([_pad(part.values, length, dtype) for part in parts], dim=1),
            torch.cat([F.pad(part.all_keys(), (0, length - part.length)) for part in parts]) if masked else None,
            torch.cat([part.next_position for part in parts]),
            max(part.source_images for part in parts),
            any(part.has_text for part in parts),
        )

    @property
    def batch_size(self) -> int:
        """B."""
        return self.keys.shape[1]

    @property
    def length(self) -> int:
        """P, padding included."""
        return self.keys.shape[3]

    def extend(
        self,
        keys_values: Sequence[KeysValues],
        visible: Bool[Tensor, "B N"] | None,
        next_position: Int[Tensor, " B"],
        kind: Literal["source", "text"],
    ) -> Self:
        """With one more segment behind.

        Args:
            keys_values: of the segment, layer by layer.
            visible: which of its keys are real; None for all.
            kind: a source image, or text.
        """
        keys, values = (torch.stack(part) for part in zip(*keys_values, strict=True))
        if visible is not None or self.key_mask is not None:
            own = torch.ones(keys.shape[1], keys.shape[3], dtype=torch.bool, device=keys.device)
            visible = torch.cat([self.all_keys(), own if visible is None else visible], dim=1)
        if self.length:
            keys = torch.cat([self.keys.to(keys.dtype), keys], dim=3)
            values = torch.cat([self.values.to(values.dtype), values], dim=3)
        return type(self)(
            keys, values, visible, next_position, self.source_images + (kind == "source"),
            self.has_text or kind == "text",
        )  # fmt: skip

    def all_keys(self) -> Bool[Tensor, "B P"]:
        """The mask, all True where there is none."""
        if self.key_mask is not None:
            return self.key_mask
        return torch.ones(self.batch_size, self.length, dtype=torch.bool, device=self.keys.device)

    def repeat_interleave(self, count: int) -> Self:
        """Each item ``count`` times in a row, for several images of one prompt."""
        return replace(
            self,
            keys=self.keys.repeat_interleave(count, dim=1),
            values=self.values.repeat_interleave(count, dim=1),
            key_mask=None if self.key_mask is None else self.key_mask.repeat_interleave(count, dim=0),
            next_position=self.next_position.repeat_interleave(count),
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """On another device, or keys and values in another dtype."""
        return replace(
            self,
            keys=self.keys.to(device=device, dtype=dtype),
            values=self.values.to(device=device, dtype=dtype),
            key_mask=None if self.key_mask is None else self.key_mask.to(device),
            next_position=self.next_position.to(device),
        )

    def detach(self) -> Self:
        """Without gradient."""
        return replace(self, keys=self.keys.detach(), values=self.values.detach())


def _check_shape(name: str, given: Tensor | None, wanted: tuple[tuple[int, int], ...]) -> None:
    if given is not None and tuple(given.shape) not in wanted:
        raise ShapeError(
            f"{name} has shape {tuple(given.shape)}; the cache holds {wanted[0]}: it is another prompt's, or leaves "
            "out tokens that were cached before"
        )


def _keys_values(layer: Any, index: int) -> tuple[Tensor, Tensor]:
    """Of one layer of a transformers cache, or of a pair."""
    keys, values = (layer.keys, layer.values) if hasattr(layer, "keys") else (layer[0], layer[1])
    if keys is None or keys.ndim != 4:
        raise ShapeError(
            f"layer {index} of the cache holds no keys (B, heads, P, d): run the language model on the prompt first; "
            "layers without attention can be left out by layer_map"
        )
    seen = int(layer.get_seq_length()) if hasattr(layer, "get_seq_length") else keys.shape[2]
    if seen > keys.shape[2]:
        raise ShapeError(
            f"layer {index} of the cache keeps {keys.shape[2]} of {seen} tokens, those in its sliding window; wanted "
            "all: give the language model past_key_values=DynamicCache()"
        )
    return keys[:, :, :seen], values[:, :, :seen]  # a static cache is longer than its content


def _pad(x: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    return F.pad(x.to(dtype), (0, 0, 0, length - x.shape[3]))
