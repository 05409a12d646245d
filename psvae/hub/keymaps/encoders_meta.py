"""Meta's own DINOv2 files: names and shapes alone, so the architecture is read off them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from psvae.errors import CheckpointError
from psvae.hub.formats import Format, Header, Rule
from psvae.hub.keymaps._vit import (
    IMAGENET,
    cut_blocks,
    folded_class_token,
    mlp_ratio,
    patch_positions,
    patch_size,
    stride_for,
    table_side,
)

__all__ = ["META_DINOV2"]

Json = Mapping[str, Any]

HEAD_WIDTH = 64  # of every attention head that Meta trained
RENAMES = ((r"^reg_token$", "register_tokens"), (r"\.mlp\.fc1\.", ".mlp.w12."), (r"\.mlp\.fc2\.", ".mlp.w3."))


def _recognise(config: Json | None, header: Header) -> bool:
    names = ("pos_embed", "patch_embed.proj.weight", "blocks.0.ls1.gamma")
    return config is None and all(name in header for name in names) and ("mask_token" in header or _registers(header))


def _registers(header: Header) -> bool:
    return "register_tokens" in header


def _read_config(config: Json | None, header: Header) -> dict[str, Any]:
    patch = patch_size(header, "patch_embed.proj.weight")
    dim = header["patch_embed.proj.weight"][0]
    if dim < 1 or dim % HEAD_WIDTH:
        raise CheckpointError(f"patch_embed.proj.weight makes {dim} channels; wanted heads of {HEAD_WIDTH}, as Meta's")
    gated = "blocks.0.mlp.w12.weight" in header  # the giant's SwiGLU
    first = header.get("blocks.0.mlp.w12.weight" if gated else "blocks.0.mlp.fc1.weight", ())
    if len(first) != 2 or first[0] < 1:
        raise CheckpointError(f"the first layer of blocks.0.mlp is {first or 'missing'}; wanted (width, {dim})")
    model_args = {
        "embed_dim": dim,
        "depth": _depth(header),
        "num_heads": dim // HEAD_WIDTH,
        "mlp_ratio": mlp_ratio(first[0], dim),
        "img_size": patch * table_side(header, "pos_embed", prefix=1),
        "patch_size": patch,
    }
    registers = header.get("register_tokens", ())
    if registers:
        model_args["reg_tokens"] = registers[1] if len(registers) == 3 else 0
    # Meta's hub builds the models with registers with other options of the resize than those without
    return {
        "name": f"vit_{'giant' if gated else 'base'}_patch14_{'reg4_' if registers else ''}dinov2",
        "model_args": model_args,
        "stride": stride_for(patch),
        "position_antialias": bool(registers),
        "position_offset": 0.0 if registers else 0.1,
        **IMAGENET,
    }


def _depth(header: Header) -> int:
    return len({match[1] for name in header if (match := re.match(r"blocks\.(\d+)\.", name))})


def _rules(keys: Sequence[str], config: Json, header: Header) -> dict[str, Rule]:
    return {key: _rule(key.removeprefix("vit."), header) for key in keys}


def _rule(key: str, header: Header) -> Rule:
    if _registers(header) and key == "cls_token":
        return folded_class_token("cls_token", "pos_embed")
    if _registers(header) and key == "pos_embed":
        return patch_positions("pos_embed")
    gated = "blocks.0.mlp.w12.weight" in header
    for ours, theirs in RENAMES if gated else RENAMES[:1]:
        key = re.sub(ours, theirs, key)
    return Rule((key,))


def _ignored(config: Json, header: Header) -> tuple[str, ...]:
    return ("mask_token", "norm.", "head.", *cut_blocks(config, _depth(header), "blocks."))


META_DINOV2 = Format("Meta's DINOv2", _recognise, _read_config, _rules, ignored=_ignored)
