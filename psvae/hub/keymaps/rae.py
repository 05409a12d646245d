"""RAE's decoder (arXiv 2510.11690): ViT-MAE's decoder as its repository and as diffusers' AutoencoderRAE name it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from psvae.errors import CheckpointError
from psvae.hub.formats import Format, Header, Rule
from psvae.nn.positions import sincos_positions

__all__ = ["RAE_DECODER", "decoder_fields", "decoder_rules"]

Json = Mapping[str, Any]

TOP = {
    "token": "trainable_cls_token",
    "embed.weight": "decoder_embed.weight",
    "embed.bias": "decoder_embed.bias",
    "norm.weight": "decoder_norm.weight",
    "norm.bias": "decoder_norm.bias",
    "predict.weight": "decoder_pred.weight",
    "predict.bias": "decoder_pred.bias",
}
BLOCK = {
    "norm1": ("layernorm_before",),
    "norm2": ("layernorm_after",),
    "mlp.fc1": ("intermediate.dense",),
    "mlp.fc2": ("output.dense",),
}
ORIGINAL = {
    "attn.qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "attn.proj": ("attention.output.dense",),
}
DIFFUSERS = {
    "attn.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "attn.proj": ("attention.to_out.0",),
}
HEADS = {768: 12, 1024: 16, 1152: 16}  # of RAE's ViT-B, L and XL; the tensors do not say


def decoder_fields(header: Header, prefix: str = "") -> dict[str, Any]:
    """The fields of `ViTPixelDecoderConfig` that names and shapes tell.

    Raises:
        CheckpointError: a tensor that tells one of them is missing or of another rank.
    """

    def shape(name: str, rank: int) -> tuple[int, ...]:
        found = header.get(prefix + name, ())
        if len(found) != rank or 0 in found:
            raise CheckpointError(f"{prefix}{name} is {found or 'missing'}; wanted {rank} axes, to tell RAE's decoder")
        return found

    width, channels = shape("decoder_embed.weight", 2)
    patch = math.isqrt(shape("decoder_pred.weight", 2)[0] // 3)
    layers = f"{prefix}decoder_layers."
    depth = len({name.removeprefix(layers).partition(".")[0] for name in header if name.startswith(layers)})
    fields = {
        "latent_channels": channels,
        "width": width,
        "depth": depth,
        "num_heads": HEADS.get(width),
        "mlp_dim": shape("decoder_layers.0.intermediate.dense.weight", 2)[0],
        "patch_size": patch,
    }
    if f"{prefix}decoder_pos_embed" in header:
        tokens = shape("decoder_pos_embed", 3)[1] - 1
        fields["grid"] = (math.isqrt(tokens), math.isqrt(tokens))
    return fields


def decoder_rules(keys: Sequence[str], config: Json, header: Header, prefix: str = "") -> dict[str, Rule]:
    """`ViTPixelDecoder`'s keys → rules. Where the file has no position table, RAE's own is made."""
    attention = DIFFUSERS if f"{prefix}decoder_layers.0.attention.to_q.weight" in header else ORIGINAL
    return {key: _rule(key, config, header, BLOCK | attention, prefix) for key in keys}


def _rule(key: str, config: Json, header: Header, names: Mapping[str, tuple[str, ...]], prefix: str) -> Rule:
    if key == "positions":
        table = f"{prefix}decoder_pos_embed"
        if table in header or not header:  # no header: the file is to be written
            return Rule((table,))
        return Rule((), load=lambda: sincos_positions(config["width"], tuple(config["grid"])))
    if key in TOP:
        return Rule((prefix + TOP[key],))
    _, index, part = key.split(".", 2)
    part, leaf = part.rsplit(".", 1)
    return Rule(tuple(f"{prefix}decoder_layers.{index}.{name}.{leaf}" for name in names[part]))


RAE_DECODER = Format(
    "RAE's decoder",
    lambda config, header: "decoder_embed.weight" in header and "decoder_pred.weight" in header,
    lambda config, header: decoder_fields(header),
    lambda keys, config, header: decoder_rules(keys, config, header),
)
