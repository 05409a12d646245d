"""diffusers' AutoencoderKL: SD 1 and 2, SDXL, SD3, FLUX.1, ReaLS."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from psvae.errors import CheckpointError
from psvae.hub.formats import Format, Header, Rule
from psvae.hub.keymaps._conv import as_linear, coarsest, multipliers, statistics_rule

__all__ = ["AUTOENCODER_KL"]

Json = Mapping[str, Any]

# ours → theirs
RENAMES = (
    (r"encoder\.levels\.(\d+)\.blocks\.", r"encoder.down_blocks.\1.resnets."),
    (r"encoder\.levels\.(\d+)\.attentions\.", r"encoder.down_blocks.\1.attentions."),
    (r"encoder\.levels\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"decoder\.levels\.(\d+)\.blocks\.", r"decoder.up_blocks.\1.resnets."),
    (r"decoder\.levels\.(\d+)\.attentions\.", r"decoder.up_blocks.\1.attentions."),
    (r"decoder\.levels\.(\d+)\.upsample\.", r"decoder.up_blocks.\1.upsamplers.0."),
    (r"middle\.block1\.", "mid_block.resnets.0."),
    (r"middle\.block2\.", "mid_block.resnets.1."),
    (r"middle\.attention\.", "mid_block.attentions.0."),
    (r"\.shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
)
NOW = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj": "to_out.0"}
LEGACY = {"norm": "group_norm", "q": "query", "k": "key", "v": "value", "proj": "proj_attn"}  # files of 2022
DEFAULTS: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"], "block_out_channels": [64], "layers_per_block": 1, "act_fn": "silu",
    "latent_channels": 4, "norm_num_groups": 32, "sample_size": 32, "scaling_factor": 0.18215, "shift_factor": None,
    "latents_mean": None, "latents_std": None, "force_upcast": True, "use_quant_conv": True,
    "use_post_quant_conv": True, "mid_block_add_attention": True,
}  # fmt: skip


def _recognise(config: Json | None, header: Header) -> bool:
    return config is not None and config.get("_class_name") == "AutoencoderKL"


def _read_config(config: Json | None, header: Header) -> dict[str, Any]:
    given = {key: value for key, value in (config or {}).items() if not key.startswith("_")}
    unknown = sorted(set(given) - set(DEFAULTS))
    if unknown:
        raise CheckpointError(
            f"config.json of an AutoencoderKL has the unknown field {unknown[0]!r}; known: {', '.join(DEFAULTS)}"
        )
    values = {**DEFAULTS, **given}
    if values["act_fn"] not in ("silu", "swish"):
        raise CheckpointError(f"config.json has act_fn {values['act_fn']!r}; wanted 'silu': no other is built")
    widths = _numbers(values, "block_out_channels")
    base, multiples = multipliers(widths, "block_out_channels")
    down = _attending(values, "down_block_types", "DownEncoderBlock2D", len(widths))
    up = _attending(values, "up_block_types", "UpDecoderBlock2D", len(widths))
    shared = {
        "latent_channels": values["latent_channels"],
        "base_channels": base,
        "channel_multipliers": multiples,
        "num_res_blocks": values["layers_per_block"],
        "norm_groups": values["norm_num_groups"],
        "middle_attention": values["mid_block_add_attention"],
    }
    encoder = {"in_channels": values["in_channels"], "attention_levels": coarsest(down, "down_block_types")}
    decoder = {"out_channels": values["out_channels"], "attention_levels": coarsest(up[::-1], "up_block_types")}
    same_names = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast", "sample_size")
    return {
        "encoder": shared | encoder,
        "decoder": shared | decoder,
        "quant_conv": values["use_quant_conv"],
        "post_quant_conv": values["use_post_quant_conv"],
        **{name: values[name] for name in same_names},
    }


def _numbers(values: Json, name: str) -> list[int]:
    found = values[name]
    if not isinstance(found, list | tuple) or not all(type(item) is int for item in found):
        raise CheckpointError(f"config.json has {name} {found!r}; wanted a list of whole numbers")
    return list(found)


def _attending(values: Json, name: str, plain: str, levels: int) -> list[bool]:
    kinds = values[name]
    attending = "Attn" + plain
    if not isinstance(kinds, list | tuple) or len(kinds) != levels or any(k not in (plain, attending) for k in kinds):
        raise CheckpointError(f"config.json has {name} {kinds!r}; wanted {levels} of {plain!r} or {attending!r}")
    return [kind == attending for kind in kinds]


def _write_config(config: Json) -> dict[str, Any]:
    encoder, decoder = config["encoder"], config["decoder"]
    shared = ("base_channels", "channel_multipliers", "num_res_blocks", "norm_groups", "middle_attention")
    differing = [name for name in shared if encoder[name] != decoder[name]]
    if differing or encoder["norm_eps"] != 1e-6 or decoder["norm_eps"] != 1e-6:
        raise CheckpointError(
            f"AutoencoderKL has one {differing[0] if differing else 'norm_eps, 1e-6,'} for encoder and decoder; this "
            "model has another: keep it in psvae's own layout, with save_pretrained"
        )
    levels = len(encoder["channel_multipliers"])
    down = [_kind("DownEncoderBlock2D", index >= levels - encoder["attention_levels"]) for index in range(levels)]
    up = [_kind("UpDecoderBlock2D", index < decoder["attention_levels"]) for index in range(levels)]
    same_names = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast", "sample_size")
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": encoder["in_channels"],
        "out_channels": decoder["out_channels"],
        "down_block_types": down,
        "up_block_types": up,
        "block_out_channels": [encoder["base_channels"] * m for m in encoder["channel_multipliers"]],
        "layers_per_block": encoder["num_res_blocks"],
        "act_fn": "silu",
        "latent_channels": encoder["latent_channels"],
        "norm_num_groups": encoder["norm_groups"],
        "mid_block_add_attention": encoder["middle_attention"],
        "use_quant_conv": config["quant_conv"],
        "use_post_quant_conv": config["post_quant_conv"],
        **{name: config[name] for name in same_names},
    }


def _kind(plain: str, attends: bool) -> str:
    return "Attn" + plain if attends else plain


def _rules(keys: Sequence[str], config: Json, header: Header) -> dict[str, Rule]:
    legacy = any(name.endswith(".proj_attn.weight") for name in header)
    return {key: _rule(key, config, LEGACY if legacy else NOW) for key in keys}


def _rule(key: str, config: Json, attention: Mapping[str, str]) -> Rule:
    if key.startswith("latent_spec."):
        return statistics_rule(key, config)
    theirs = key
    for ours, replacement in RENAMES:
        theirs = re.sub(ours, replacement, theirs)
    head, part, leaf = theirs.rsplit(".", 2) if theirs.count(".") >= 2 else ("", "", "")
    if ".attentions." in theirs and part in attention:
        return Rule((f"{head}.{attention[part]}.{leaf}",), load=as_linear)
    return Rule((theirs,))


AUTOENCODER_KL = Format("diffusers AutoencoderKL", _recognise, _read_config, _rules, write_config=_write_config)
