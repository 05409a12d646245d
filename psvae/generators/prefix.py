"""PrefixCache: what the noisy latents attend to, computed once for all sampling steps.

Source latents and text see neither the noise nor σ, so their keys and values do not change from step to step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from psvae.errors import ShapeError
from psvae.nn.decoder import KeysValues

__all__ = ["PrefixCache"]


@dataclass(frozen=True, eq=False)
class PrefixCache:
    """Keys (rotated) and values of every layer; often called a KV cache, or past key values.

    Attributes:
        keys, values: ``L B kv P d``; P may be 0.
        key_mask: ``B P``, True where a key is real; None where all are.
        next_position: ``B``, the first rotary position after the prefix.
    """

    keys: Float[Tensor, "L B kv P d"]
    values: Float[Tensor, "L B kv P d"]
    key_mask: Bool[Tensor, "B P"] | None
    next_position: Int[Tensor, " B"]

    @classmethod
    def empty(
        cls,
        config: Any,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """No source and no text: the unconditional branch.

        Args:
            config: a `DeepFusionDiTConfig`.
        """
        shape = (config.num_layers, batch_size, config.num_key_value_heads, 0, config.attention_head_dim)
        nothing = torch.empty(shape, device=device, dtype=dtype)
        return cls(nothing, nothing, None, torch.zeros(batch_size, dtype=torch.long, device=device))

    @classmethod
    def from_hf(
        cls,
        past_key_values: Any,
        attention_mask: Tensor | None = None,
        *,
        layer_map: Sequence[int] | None = None,
    ) -> Self:
        """Copy a transformers cache, which goes on growing when it is used: the copy does not.

        Args:
            past_key_values: what a language model returned, or a sequence of (keys, values) per layer.
            attention_mask: ``B P``, the tokenizer's; None where nothing is padded.
            layer_map: for each layer of the generator, the language model's; None for one to one.

        Raises:
            ShapeError: layers of different geometry, or truncated by a sliding window.
        """
        layers = getattr(past_key_values, "layers", past_key_values)
        pairs = [(x.keys, x.values) if hasattr(x, "keys") else (x[0], x[1]) for x in layers]
        if layer_map is not None:
            pairs = [pairs[index] for index in layer_map]
        shapes = {tuple(keys.shape) for keys, _ in pairs}
        if len(shapes) != 1:
            raise ShapeError(
                f"the cache's layers have keys of shapes {sorted(shapes)}; wanted one: layers with a sliding window "
                "drop tokens unless the language model is given past_key_values=DynamicCache(), and layers of "
                "different geometry need a layer_map that picks equal ones"
            )
        (batch, _, length, _), device = shapes.pop(), pairs[0][0].device
        mask = None if attention_mask is None else attention_mask.bool().to(device)
        if mask is not None and tuple(mask.shape) != (batch, length):
            raise ShapeError(
                f"attention_mask has shape {tuple(mask.shape)}; the cache holds ({batch}, {length}): a sliding "
                "window dropped tokens, or the mask is another prompt's"
            )
        count = torch.full((batch,), length, device=device) if mask is None else mask.sum(dim=1)
        keys, values = (torch.stack(part) for part in zip(*pairs, strict=True))
        return cls(keys, values, mask, count)

    @classmethod
    def concat_batch(cls, parts: Sequence["PrefixCache"]) -> Self:
        """Join along the batch, as for the branches of guidance; shorter ones are padded and masked.

        Raises:
            ShapeError: of different geometry.
        """
        geometries = {(*part.keys.shape[:1], part.keys.shape[2], part.keys.shape[4]) for part in parts}
        if len(geometries) != 1:
            raise ShapeError(f"prefixes have (layers, key heads, width) {sorted(geometries)}; wanted equal ones")
        length = max(part.length for part in parts)
        masked = any(part.key_mask is not None or part.length < length for part in parts)
        return cls(
            torch.cat([_pad(part.keys, length) for part in parts], dim=1),
            torch.cat([_pad(part.values, length) for part in parts], dim=1),
            torch.cat([F.pad(part.all_keys(), (0, length - part.length)) for part in parts]) if masked else None,
            torch.cat([part.next_position for part in parts]),
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
    ) -> Self:
        """With one more segment behind.

        Args:
            keys_values: of the segment, layer by layer.
            visible: which of its keys are real; None for all.
        """
        keys, values = (torch.stack(part) for part in zip(*keys_values, strict=True))
        if visible is not None or self.key_mask is not None:
            own = torch.ones(keys.shape[1], keys.shape[3], dtype=torch.bool, device=keys.device)
            visible = torch.cat([self.all_keys(), own if visible is None else visible], dim=1)
        if self.length:
            keys = torch.cat([self.keys.to(keys.dtype), keys], dim=3)
            values = torch.cat([self.values.to(values.dtype), values], dim=3)
        return replace(self, keys=keys, values=values, key_mask=visible, next_position=next_position)

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


def _pad(x: Tensor, length: int) -> Tensor:
    return F.pad(x, (0, 0, 0, length - x.shape[3]))
