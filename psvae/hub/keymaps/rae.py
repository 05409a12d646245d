"""RAE's decoder (arXiv 2510.11690): ViT-MAE's decoder as its repository and as diffusers' AutoencoderRAE name it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from psvae.errors import CheckpointError
from psvae.hub.formats import Format, Header, Rule
from psvae.hub.keymaps._transformers import DINOV2, SIGLIP, VIT_MAE, Layout
from psvae.hub.keymaps._vit import IMAGENET, mlp_ratio, number, table_side
from psvae.nn.positions import sincos_positions

__all__ = ["AUTOENCODER_RAE", "RAE_DECODER"]

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
# encoder_type → (where the tensors are, what transformers' encoder of that type is to us)
ENCODERS: dict[str, tuple[Layout, dict[str, Any], dict[str, Any]]] = {
    "dinov2": (DINOV2, {"reg_tokens": 4}, {"name": "vit_base_patch14_reg4_dinov2", "norm_eps": 1e-6}),
    "siglip2": (
        SIGLIP,
        {"act_layer": "gelu_tanh"},
        {"name": "vit_base_patch16_siglip_224", "position_antialias": False, "norm_eps": 1e-6},
    ),
    "mae": (VIT_MAE, {}, {"name": "vit_base_patch16_224", "position_antialias": False, "norm_eps": 1e-12}),
}
LARGEST_SIDE = 512  # of a grid, in tokens; RAE's largest is 32
DIFFUSERS_EPS = 1e-5  # diffusers: (z − mean) / (std + ε)
DIFFUSERS_SPAN = 16.0  # diffusers makes the decoder's table anew, its coordinates rescaled to those of 16 tokens
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


def decoder_rules(
    keys: Sequence[str], config: Json, header: Header, prefix: str = "", span: float | None = None
) -> dict[str, Rule]:
    """`ViTPixelDecoder`'s keys → rules. Where the file has no position table, one is made: RAE's own, or over ``span``
    as `sincos_positions` says.
    """
    attention = DIFFUSERS if f"{prefix}decoder_layers.0.attention.to_q.weight" in header else ORIGINAL
    positions = Rule((f"{prefix}decoder_pos_embed",))
    if header and positions.theirs[0] not in header:  # no header: the file is to be written
        positions = Rule((), load=lambda: sincos_positions(config["width"], tuple(config["grid"]), span))
    return {key: positions if key == "positions" else _rule(key, BLOCK | attention, prefix) for key in keys}


def _rule(key: str, names: Mapping[str, tuple[str, ...]], prefix: str) -> Rule:
    if key in TOP:
        return Rule((prefix + TOP[key],))
    _, index, part = key.split(".", 2)
    part, leaf = part.rsplit(".", 1)
    return Rule(tuple(f"{prefix}decoder_layers.{index}.{name}.{leaf}" for name in names[part]))


def _read_decoder(config: Json | None, header: Header) -> dict[str, Any]:
    """Scale-RAE keeps ViT-MAE's configuration beside the decoder, which tells what the tensors do not."""
    fields, said = decoder_fields(header), config or {}
    names = {"decoder_num_attention_heads": "num_heads", "layer_norm_eps": "norm_eps"}
    return fields | {
        ours: said[theirs] for theirs, ours in names.items() if "decoder_num_attention_heads" in said and theirs in said
    }


RAE_DECODER = Format(
    "RAE's decoder",
    lambda config, header: "decoder_embed.weight" in header and "decoder_pred.weight" in header,
    _read_decoder,
    lambda keys, config, header: decoder_rules(keys, config, header),
)


def _is_rae(config: Json | None, header: Header) -> bool:
    return config is not None and config.get("_class_name") == "AutoencoderRAE"


def _read_rae(config: Json | None, header: Header) -> dict[str, Any]:
    values: dict[str, Any] = {
        "encoder_type": "dinov2", "encoder_patch_size": 14, "patch_size": 16, "encoder_input_size": 224,
        "decoder_num_attention_heads": 16, "noise_tau": 0.0, "scaling_factor": 1.0, "encoder_norm_mean": None,
        "encoder_norm_std": None, **(config or {}),
    }  # fmt: skip
    if values["scaling_factor"] != 1.0:
        raise CheckpointError(
            f"config.json has scaling_factor {values['scaling_factor']!r}; wanted 1: no other is built"
        )
    kind = values["encoder_type"]
    if not isinstance(kind, str) or kind not in ENCODERS:
        raise CheckpointError(f"config.json has encoder_type {kind!r}; wanted {', '.join(ENCODERS)}")
    layout, args, fields = ENCODERS[kind]
    patch, size, stride = (number(values, name) for name in ("encoder_patch_size", "encoder_input_size", "patch_size"))
    side = size // patch
    if size % patch or side > LARGEST_SIDE:  # nothing in the file bounds the grid: its table is made anew
        raise CheckpointError(
            f"config.json has encoder_input_size {size} and encoder_patch_size {patch}; wanted a multiple of the "
            f"patch, up to {LARGEST_SIDE} patches"
        )
    prefix = layout.prefix(header)
    width = _encoder_width(header, prefix)
    depth = len(
        {n.removeprefix(layout.root(header)).partition(".")[0] for n in header if n.startswith(layout.root(header))}
    )
    hidden = next((s[0] for n, s in header.items() if n.startswith(layout.root(header)) and _first_mlp(n)), 4 * width)
    args = args | {"img_size": _table_side(header, prefix, kind) * patch, "mlp_ratio": mlp_ratio(hidden, width)}
    args |= {"embed_dim": width, "depth": depth, "num_heads": max(1, width // 64), "patch_size": patch}
    mean = values["encoder_norm_mean"] or IMAGENET["mean"]  # diffusers' default, whichever the encoder
    std = values["encoder_norm_std"] or IMAGENET["std"]
    colours = {"mean": mean, "std": std}
    spec = header.get("_latents_std", (1,))
    decoder = decoder_fields(header, "decoder.") | {"grid": (side, side), "output_mean": mean, "output_std": std}
    return {
        "encoder": fields | colours | {"model_args": args, "stride": stride},
        "vae": None,
        "decoder": decoder | {"num_heads": values["decoder_num_attention_heads"]},
        "latent_noise": values["noise_tau"],
        "statistics_grid": tuple(spec[-2:]) if len(spec) >= 3 and tuple(spec[-2:]) != (1, 1) else None,
        "sample_size": side * stride,
    }


def _encoder_width(header: Header, prefix: str) -> int:
    kernels = (s for n, s in header.items() if n.startswith(prefix) and "patch_embedding" in n and len(s) == 4)
    shape = next(kernels, (0,))
    if 0 in shape:
        raise CheckpointError("the file has no patch embedding under 'encoder.'; wanted an AutoencoderRAE's encoder")
    return shape[0]


def _first_mlp(name: str) -> bool:
    return name.endswith(("mlp.fc1.weight", "intermediate.dense.weight"))


def _table_side(header: Header, prefix: str, kind: str) -> int:
    """Of the encoder's own position table."""
    if kind == "siglip2":
        name = f"{prefix}embeddings.position_embedding.weight"
        return table_side({name: (1, *header.get(name, ()))}, name, prefix=0)
    return table_side(header, f"{prefix}embeddings.position_embeddings", prefix=1)


def _rae_rules(keys: Sequence[str], config: Json, header: Header) -> dict[str, Rule]:
    kind = next(k for k, (_, _, fields) in ENCODERS.items() if fields["name"] == config["encoder"]["name"])
    inside = {n: s for n, s in header.items() if n.startswith("encoder.")}
    parts = {root: [k.removeprefix(root) for k in keys if k.startswith(root)] for root in ("encoder.", "decoder.")}
    encoder = ENCODERS[kind][0].key_map(parts["encoder."], config["encoder"], inside)
    decoder = decoder_rules(parts["decoder."], config["decoder"], header, "decoder.", DIFFUSERS_SPAN)
    grid = tuple(config["statistics_grid"] or (1, 1))
    channels = config["decoder"]["latent_channels"]

    def shaped(values: Tensor) -> Tensor:
        return values.reshape(-1, *values.shape[-2:]) if values.ndim >= 3 else values.reshape(-1, 1, 1)

    def mean(values: Tensor) -> Tensor:
        return shaped(values).expand(channels, *grid).clone()

    def std(values: Tensor) -> Tensor:
        # without statistics diffusers divides by 1 + ε too: one meaning, whatever the buffer holds
        return (shaped(values).float() + DIFFUSERS_EPS).expand(channels, *grid).clone()

    return {
        **{f"encoder.{key}": rule for key, rule in encoder.items()},
        **{f"decoder.{key}": rule for key, rule in decoder.items()},
        "latent_spec.mean": Rule(("_latents_mean",), load=mean),
        "latent_spec.std": Rule(("_latents_std",), load=std),
    }


def _rae_ignored(config: Json, header: Header) -> tuple[str, ...]:
    kind = next(k for k, (_, _, fields) in ENCODERS.items() if fields["name"] == config["encoder"]["name"])
    return (*ENCODERS[kind][0].ignored(config["encoder"], header), "encoder_mean", "encoder_std")


AUTOENCODER_RAE = Format("diffusers AutoencoderRAE", _is_rae, _read_rae, _rae_rules, ignored=_rae_ignored)
