"""timm's own folders: ``config.json`` with ``architecture``, weights in the names that our encoder has too."""

from collections.abc import Mapping, Sequence
from typing import Any

from psvae.errors import CheckpointError
from psvae.hub.formats import Format, Header, Rule
from psvae.hub.keymaps._vit import IMAGENET, cut_blocks, patch_size, side, stride_for

__all__ = ["TIMM"]

Json = Mapping[str, Any]

PATCH = "patch_embed.proj.weight"
HEADS = ("head.", "head_dist.", "attn_pool.", "fc_norm.", "norm.")  # pooling, classes, a final norm that is replaced
NOT_OURS = ("num_classes", "global_pool", "fc_norm", "dynamic_img_size")  # of the head, or set by the encoder itself


def _recognise(config: Json | None, header: Header) -> bool:
    return config is not None and isinstance(config.get("architecture"), str) and "model_type" not in config


def _read_config(config: Json | None, header: Header) -> dict[str, Any]:
    config = config or {}
    given = config.get("model_args") or {}
    published = config.get("pretrained_cfg", config)
    if not isinstance(given, Mapping) or not isinstance(published, Mapping):
        raise CheckpointError("config.json has a 'model_args' or 'pretrained_cfg' that is no dictionary")
    model_args = {key: value for key, value in given.items() if key not in NOT_OURS}
    depth = model_args.get("depth", 1)
    if not isinstance(depth, int) or not 0 < depth <= len(header):
        raise CheckpointError(f"config.json has a depth of {depth!r}; the weights have {len(header)} tensors in all")
    patch = patch_size(header, PATCH)
    table = header.get("pos_embed", ())
    if "img_size" not in model_args and len(table) == 3:  # the architecture's default may be of another size
        registers = header.get("reg_token", (1, 0, 0))
        grid = side(table[1], (0, 1, registers[1] + 1) if len(registers) == 3 else (0, 1))
        if grid is not None:
            model_args["img_size"] = patch * grid
    return {
        "name": config["architecture"],
        "model_args": model_args,
        "stride": stride_for(patch),
        "mean": published.get("mean", IMAGENET["mean"]),
        "std": published.get("std", IMAGENET["std"]),
    }


def _rules(keys: Sequence[str], config: Json, header: Header) -> dict[str, Rule]:
    return {key: Rule((key.removeprefix("vit."),)) for key in keys}


def _ignored(config: Json, header: Header) -> tuple[str, ...]:
    blocks = {name.split(".")[1] for name in header if name.startswith("blocks.")}
    return HEADS + cut_blocks(config, len(blocks), "blocks.")


def _write_config(config: Json) -> dict[str, Any]:
    model_args = config["model_args"]
    published = {
        "tag": "psvae",
        "input_size": [3, model_args["img_size"], model_args["img_size"]]
        if "img_size" in model_args
        else [3, 224, 224],
        "fixed_input_size": "img_size" in model_args,
        "interpolation": config["resize_mode"],
        "crop_pct": 1.0,
        "mean": config["mean"],
        "std": config["std"],
        "num_classes": 0,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    return {
        "architecture": config["name"],
        "num_classes": 0,
        "model_args": model_args,
        "pretrained_cfg": published,
    }


TIMM = Format("timm", _recognise, _read_config, _rules, ignored=_ignored, write_config=_write_config)
