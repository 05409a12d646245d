"""LDM's own layout (Rombach et al. 2022): VA-VAE, MAR, REPA-E, the original SD, SD3 and FLUX autoencoders.

The file says nothing but names and shapes, so the architecture is read off them; a ``ddconfig`` in a
``config.json`` beside it must agree. In the file of a whole generator the autoencoder stands under one of `ROOTS`,
and nothing else is read.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from psvae.errors import CheckpointError
from psvae.hub.formats import Format, Header, Rule
from psvae.hub.keymaps._conv import ATTENTION, as_conv, as_linear, coarsest, multipliers, statistics_rule

__all__ = ["LDM"]

Json = Mapping[str, Any]

# ours → theirs; the decoder's levels are counted from the other end
RENAMES = (
    (r"encoder\.levels\.(\d+)\.blocks\.", r"encoder.down.\1.block."),
    (r"encoder\.levels\.(\d+)\.attentions\.", r"encoder.down.\1.attn."),
    (r"encoder\.levels\.(\d+)\.downsample\.", r"encoder.down.\1.downsample."),
    (r"decoder\.levels\.(\d+)\.blocks\.", r"decoder.up.\1.block."),
    (r"decoder\.levels\.(\d+)\.attentions\.", r"decoder.up.\1.attn."),
    (r"decoder\.levels\.(\d+)\.upsample\.", r"decoder.up.\1.upsample."),
    (r"middle\.block1\.", "mid.block_1."),
    (r"middle\.block2\.", "mid.block_2."),
    (r"middle\.attention\.", "mid.attn_1."),
    (r"\.shortcut\.", ".nin_shortcut."),
)
FIRST = ("encoder.down.0.block.0.conv1.weight", "decoder.up.0.block.0.conv1.weight")  # by which files are known
ROOTS = ("", "first_stage_model.", "vae.")  # a file of its own; whole generators' files, by LDM's code and by others
TRAINING = ("loss.", "model_ema.", "foundation_model.", "linear_proj.")  # discriminators, VA-VAE's own loss


def _root(header: Header) -> str | None:
    """What stands before the autoencoder's names; None if there is no autoencoder."""
    return next((root for root in ROOTS if any(root + name in header for name in FIRST)), None)


def _recognise(config: Json | None, header: Header) -> bool:
    return _root(header) is not None


def _read_config(config: Json | None, header: Header) -> dict[str, Any]:
    root = _root(header) or ""
    header = {name.removeprefix(root): shape for name, shape in header.items() if name.startswith(root)}
    needed = ("encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.conv_out.weight")
    lost = [name for name in needed if len(header.get(name, ())) != 4]
    if lost:
        raise CheckpointError(f"an LDM checkpoint needs {lost[0]} to tell its architecture; it is missing or no kernel")
    encoder, decoder = _half(header, "encoder.down"), _half(header, "decoder.up")
    channels = header["decoder.conv_in.weight"][1]
    # a decoder has one block more per level than the encoder that its num_res_blocks counts
    decoder["num_res_blocks"] -= 1
    values = {
        "encoder": {
            **encoder,
            "latent_channels": channels,
            "in_channels": header["encoder.conv_in.weight"][1],
            "middle_attention": "encoder.mid.attn_1.q.weight" in header,
        },
        "decoder": {
            **decoder,
            "latent_channels": channels,
            "out_channels": header["decoder.conv_out.weight"][0],
            "middle_attention": "decoder.mid.attn_1.q.weight" in header,
        },
        "quant_conv": "quant_conv.weight" in header,
        "post_quant_conv": "post_quant_conv.weight" in header,
        "scaling_factor": 1.0,  # the file holds none: statistics, or the caller's own constant
    }
    _agree(config or {}, values)
    return values


def _half(header: Header, root: str) -> dict[str, Any]:
    """Widths, depth and attention of one half, fine to coarse."""
    widths, depths, attends = [], [], []
    while (shape := header.get(f"{root}.{len(widths)}.block.0.conv1.weight")) is not None:
        level = f"{root}.{len(widths)}"
        if len(shape) != 4:
            raise CheckpointError(f"{level}.block.0.conv1.weight is {shape}; wanted a kernel of four axes")
        widths.append(shape[0])
        depths.append(sum(f"{level}.block.{i}.conv1.weight" in header for i in range(64)))
        attends.append(f"{level}.attn.0.q.weight" in header)
    base, multiples = multipliers(widths, f"the widths of {root}")
    if len(set(depths)) > 1:
        raise CheckpointError(f"the levels of {root} have {depths} blocks; wanted the same number in each")
    return {
        "base_channels": base,
        "channel_multipliers": multiples,
        "num_res_blocks": depths[0],
        "attention_levels": coarsest(attends, root),
    }


def _agree(config: Json, values: Json) -> None:
    """The ``ddconfig`` that some projects keep beside the weights must say what the tensors say."""
    said = config.get("ddconfig", config)
    found = {
        "ch": values["encoder"]["base_channels"],
        "ch_mult": values["encoder"]["channel_multipliers"],
        "num_res_blocks": values["encoder"]["num_res_blocks"],
        "z_channels": values["encoder"]["latent_channels"],
        "in_channels": values["encoder"]["in_channels"],
        "out_ch": values["decoder"]["out_channels"],
        "double_z": True,
    }
    for name, value in found.items():
        if isinstance(said, Mapping) and name in said and said[name] != value:
            raise CheckpointError(
                f"config.json says {name} {said[name]!r}; the tensors say {value!r}: one of them is wrong"
            )


def _write_config(config: Json) -> dict[str, Any]:
    encoder, decoder = config["encoder"], config["decoder"]
    levels = len(encoder["channel_multipliers"])
    size = config["sample_size"]
    return {
        "embed_dim": encoder["latent_channels"],
        "ddconfig": {
            "double_z": True,
            "z_channels": encoder["latent_channels"],
            "resolution": size,
            "in_channels": encoder["in_channels"],
            "out_ch": decoder["out_channels"],
            "ch": encoder["base_channels"],
            "ch_mult": encoder["channel_multipliers"],
            "num_res_blocks": encoder["num_res_blocks"],
            "attn_resolutions": [size // 2**i for i in range(levels - encoder["attention_levels"], levels)],
            "dropout": 0.0,
        },
    }


def _rules(keys: Sequence[str], config: Json, header: Header) -> dict[str, Rule]:
    last, root = len(config["decoder"]["channel_multipliers"]) - 1, _root(header) or ""
    return {key: _rule(key, config, last, root) for key in keys}


def _rule(key: str, config: Json, last: int, root: str) -> Rule:
    if key.startswith("latent_spec."):
        return statistics_rule(key, config)
    theirs = re.sub(r"(?<=decoder\.levels\.)\d+", lambda found: str(last - int(found[0])), key)
    for ours, replacement in RENAMES:
        theirs = re.sub(ours, replacement, theirs)
    part = theirs.split(".")[-2]
    if re.search(r"\.attn(_1|\.\d+)\.", theirs) and part in ATTENTION:
        theirs = theirs.replace(".proj.", ".proj_out.")
        return Rule((root + theirs,), load=as_linear, save=as_conv)
    return Rule((root + theirs,))


def _ignored(config: Json, header: Header) -> tuple[str, ...]:
    """Of training; and, in the file of a whole generator, everything that is not the autoencoder's."""
    root = _root(header) or ""
    others = {re.match(r"[^.]*\.?", name)[0] for name in header if not name.startswith(root)}  # type: ignore[index]
    return (*(root + name for name in TRAINING), *sorted(part for part in others if not root.startswith(part)))


def _remark(header: Header) -> str:
    root = _root(header)
    inside = f", read from the names that begin with {root!r}" if root else ""
    return f"{inside}; it holds no scaling_factor: 1 unless one is passed"


LDM = Format(
    "LDM (VA-VAE, MAR, REPA-E, original SD and FLUX)",
    _recognise,
    _read_config,
    _rules,
    ignored=_ignored,
    write_config=_write_config,
    remark=_remark,
)
