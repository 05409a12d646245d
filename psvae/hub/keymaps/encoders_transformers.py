"""transformers' folders: DINOv2 with and without registers, DINOv3, SigLIP, SigLIP 2 and ViT-MAE."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from psvae.errors import CheckpointError, ConfigError
from psvae.hub.formats import Format, Header
from psvae.hub.keymaps._transformers import DINOV2, DINOV2_GIANT, DINOV3, SIGLIP, SIGLIP2, VIT_MAE, Layout
from psvae.hub.keymaps._vit import HALF, IMAGENET, choice, mlp_ratio, number, stride_for
from psvae.hub.reading import PROCESSOR

__all__ = ["TRANSFORMERS"]

Json = Mapping[str, Any]

ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "quick_gelu": "quick_gelu"}
# what each library's configuration holds where a file does not say it
SHARED = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": "gelu"}
SHARED |= {"num_channels": 3, "image_size": 224}
DINOV2_DEFAULTS = SHARED | {
    "patch_size": 14, "mlp_ratio": 4, "layer_norm_eps": 1e-6, "qkv_bias": True, "use_swiglu_ffn": False,
    "num_register_tokens": 4,
}  # fmt: skip
DINOV3_DEFAULTS = SHARED | {
    "hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6, "patch_size": 16, "layer_norm_eps": 1e-5,
    "rope_theta": 100.0, "query_bias": True, "key_bias": False, "value_bias": True, "use_gated_mlp": False,
    "num_register_tokens": 0,
}  # fmt: skip
SIGLIP_DEFAULTS = SHARED | {
    "intermediate_size": 3072, "patch_size": 16, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh",
    "num_patches": 256,
}  # fmt: skip
MAE_DEFAULTS = SHARED | {"intermediate_size": 3072, "patch_size": 16, "layer_norm_eps": 1e-12, "qkv_bias": True}


def _shared(values: Json, header: Header, width: int | None = None) -> dict[str, Any]:
    """The fields that all families read in one way."""
    choice(values, "num_channels", {3: 3})
    dim, depth, patch = (number(values, name) for name in ("hidden_size", "num_hidden_layers", "patch_size"))
    if depth > len(header):
        raise CheckpointError(
            f"config.json has num_hidden_layers {depth}; the weights have {len(header)} tensors in all"
        )
    wide: int = number(values, "intermediate_size") if width is None else width
    return {
        "model_args": {
            "embed_dim": dim,
            "depth": depth,
            "num_heads": number(values, "num_attention_heads"),
            "mlp_ratio": mlp_ratio(wide, dim),
            "patch_size": patch,
        },
        "stride": stride_for(patch),
        "norm_eps": number(values, "layer_norm_eps", float),
    }


def _colours(values: Json, default: Json) -> dict[str, Any]:
    """Mean and std of the image processor beside the model; where there is none, the family's own."""
    said = values.get(PROCESSOR) or {}
    if not isinstance(said, Mapping):
        raise CheckpointError(f"config.json has {PROCESSOR} {said!r}; wanted it in a file of its own")
    return {name: said.get(f"image_{name}") or default[name] for name in ("mean", "std")}


def _image_size(values: Json) -> int:
    size = values["image_size"]
    if isinstance(size, list | tuple) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    return number({"image_size": size}, "image_size")


def _read_dinov2(values: Json, header: Header) -> dict[str, Any]:
    colours = _colours(values, IMAGENET)
    values = DINOV2_DEFAULTS | dict(values)
    registers = values["model_type"] == "dinov2_with_registers"
    gated = choice(values, "use_swiglu_ffn", {True: True, False: False})
    width = int(number(values, "hidden_size") * number(values, "mlp_ratio", float))
    fields = _shared(values, header, 2 * _gated_width(width) if gated else width)
    args = fields["model_args"] | {"img_size": _image_size(values)}
    args["qkv_bias"] = choice(values, "qkv_bias", {True: True, False: False})
    if not gated:
        args["act_layer"] = choice(values, "hidden_act", ACTIVATIONS)
    if registers:
        args["reg_tokens"] = number(values, "num_register_tokens")
    name = f"vit_{'giant' if gated else 'base'}_patch14_{'reg4_' if registers else ''}dinov2"
    return fields | {"name": name, "model_args": args, "position_antialias": registers, **colours}


def _gated_width(width: int) -> int:
    """Of one half of DINOv2's SwiGLU, where a plain MLP would have ``width``."""
    return (int(width * 2 / 3) + 7) // 8 * 8


def _read_dinov3(values: Json, header: Header) -> dict[str, Any]:
    colours = _colours(values, IMAGENET)
    values = DINOV3_DEFAULTS | dict(values)
    choice(values, "key_bias", {False: False})
    bias = choice(values, "query_bias", {True: True, False: False})
    choice(values, "value_bias", {bias: bias})
    gated = choice(values, "use_gated_mlp", {True: True, False: False})
    choice(values, "hidden_act", {"silu": "silu"} if gated else {"gelu": "gelu"})  # the ones that timm's class has
    fields = _shared(values, header)
    args = fields["model_args"] | {"qkv_bias": bias, "rope_temperature": number(values, "rope_theta", float)}
    args["num_reg_tokens"] = number(values, "num_register_tokens", least=0)
    if gated:
        args |= {"swiglu_mlp": True, "swiglu_align_to": 1}
    return fields | {"name": "vit_base_patch16_dinov3", "model_args": args, **colours}


def _read_siglip(values: Json, header: Header) -> dict[str, Any]:
    colours = _colours(values, HALF)
    vision = values.get("vision_config", values)
    if not isinstance(vision, Mapping):
        raise CheckpointError(f"config.json has vision_config {vision!r}; wanted a dictionary")
    flexible = values["model_type"].startswith("siglip2")
    values = SIGLIP_DEFAULTS | dict(vision)
    fields = _shared(values, header)
    args = fields["model_args"] | {"act_layer": choice(values, "hidden_act", ACTIVATIONS)}
    if flexible:
        args["img_size"] = args["patch_size"] * math.isqrt(number(values, "num_patches"))
        positions = {"position_mode": "bilinear", "position_antialias": True}
    else:
        args["img_size"] = _image_size(values)
        positions = {"position_antialias": False}
    return fields | {"name": "vit_base_patch16_siglip_224", "model_args": args, **positions, **colours}


def _read_mae(values: Json, header: Header) -> dict[str, Any]:
    colours = _colours(values, IMAGENET)
    values = MAE_DEFAULTS | dict(values)
    fields = _shared(values, header)
    args = fields["model_args"] | {"img_size": _image_size(values)}
    args["qkv_bias"] = choice(values, "qkv_bias", {True: True, False: False})
    args["act_layer"] = choice(values, "hidden_act", ACTIVATIONS)
    return fields | {"name": "vit_base_patch16_224", "model_args": args, "position_antialias": False, **colours}


def _write(config: Json, model_type: str, model_class: str) -> dict[str, Any]:
    args = config["model_args"]
    return {
        "model_type": model_type,
        "architectures": [model_class],
        "hidden_size": args["embed_dim"],
        "num_hidden_layers": args["depth"],
        "num_attention_heads": args["num_heads"],
        "patch_size": args["patch_size"],
        "num_channels": 3,
        "layer_norm_eps": config["norm_eps"],
    }


def _intermediate(args: Json) -> int:
    return int(args["embed_dim"] * args["mlp_ratio"])


def _activation(args: Json) -> str:
    name = next((theirs for theirs, ours in ACTIVATIONS.items() if ours == args["act_layer"]), None)
    if name is None:
        raise ConfigError(f"the encoder's activation is {args['act_layer']!r}; transformers' layout is for a GELU")
    return name


def _write_dinov2(config: Json) -> dict[str, Any]:
    args = config["model_args"]
    gated, registers = "_giant_" in config["name"], "_reg4_" in config["name"]
    dim, width = args["embed_dim"], _intermediate(args)
    fits = (r for r in range(1, 17) if (2 * _gated_width(dim * r) if gated else dim * r) == width)
    ratio = next(fits, None)
    if ratio is None:
        raise ConfigError(f"the encoder's MLP is {width} wide; transformers' DINOv2 takes whole multiples of {dim}")
    kind = ("dinov2_with_registers", "Dinov2WithRegistersModel") if registers else ("dinov2", "Dinov2Model")
    return _write(config, *kind) | {
        "mlp_ratio": ratio,
        "image_size": args["img_size"],
        "qkv_bias": args["qkv_bias"],
        "use_swiglu_ffn": gated,
        "hidden_act": "gelu" if gated else _activation(args),
        **({"num_register_tokens": args["reg_tokens"]} if registers else {}),
    }


def _write_dinov3(config: Json) -> dict[str, Any]:
    args = config["model_args"]
    gated = bool(args.get("swiglu_mlp"))
    return _write(config, "dinov3_vit", "DINOv3ViTModel") | {
        "intermediate_size": _intermediate(args),
        "num_register_tokens": args["num_reg_tokens"],
        "rope_theta": args["rope_temperature"],
        "query_bias": args["qkv_bias"],
        "key_bias": False,
        "value_bias": args["qkv_bias"],
        "use_gated_mlp": gated,
        "hidden_act": "silu" if gated else "gelu",
    }


def _write_siglip(config: Json) -> dict[str, Any]:
    args = config["model_args"]
    return _write(config, "siglip_vision_model", "SiglipVisionModel") | {
        "intermediate_size": _intermediate(args),
        "image_size": args["img_size"],
        "hidden_act": _activation(args),
        "vision_use_head": False,
    }


def _write_siglip2(config: Json) -> dict[str, Any]:
    values = _write_siglip(config) | {"model_type": "siglip2_vision_model", "architectures": ["Siglip2VisionModel"]}
    side = values.pop("image_size") // values["patch_size"]
    return values | {"num_patches": side * side}


def _write_mae(config: Json) -> dict[str, Any]:
    args = config["model_args"]
    return _write(config, "vit_mae", "ViTMAEModel") | {
        "intermediate_size": _intermediate(args),
        "image_size": args["img_size"],
        "qkv_bias": args["qkv_bias"],
        "hidden_act": _activation(args),
        "mask_ratio": 0.0,  # an encoder of whole images
    }


def _format(
    name: str,
    types: tuple[str, ...],
    read: Callable[[Json, Header], dict[str, Any]],
    write: Callable[[Json], dict[str, Any]],
    layout: Callable[[Json], Layout],
) -> Format:
    return Format(
        f"transformers' {name}",
        lambda config, header: config is not None and config.get("model_type") in types,
        lambda config, header: read(config or {}, header),
        lambda keys, config, header: layout(config).key_map(keys, config, header),
        ignored=lambda config, header: layout(config).ignored(config, header),
        write_config=write,
    )


def _dinov2_layout(config: Json) -> Layout:
    return DINOV2_GIANT if "_giant_" in config.get("name", "") else DINOV2


# By the model_type that is written. Only the norms' epsilon, the activation and the widths are in these files;
# how each family resizes its position table is fixed in transformers' code, and set by its reader above.
TRANSFORMERS = {
    "dinov2": _format("DINOv2", ("dinov2",), _read_dinov2, _write_dinov2, _dinov2_layout),
    "dinov2_with_registers": _format(
        "DINOv2 with registers", ("dinov2_with_registers",), _read_dinov2, _write_dinov2, _dinov2_layout
    ),
    "dinov3_vit": _format("DINOv3", ("dinov3_vit",), _read_dinov3, _write_dinov3, lambda config: DINOV3),
    "siglip_vision_model": _format(
        "SigLIP", ("siglip", "siglip_vision_model"), _read_siglip, _write_siglip, lambda config: SIGLIP
    ),
    "siglip2_vision_model": _format(
        "SigLIP 2 NaFlex", ("siglip2", "siglip2_vision_model"), _read_siglip, _write_siglip2, lambda config: SIGLIP2
    ),
    "vit_mae": _format("ViT-MAE", ("vit_mae",), _read_mae, _write_mae, lambda config: VIT_MAE),
}
