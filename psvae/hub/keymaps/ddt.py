"""RAE's wide head (DiT-DH), inside its stage-2 checkpoint, and our `WideHead`.

Theirs is of patch 1; of a larger one, the kernel is that of their `PatchEmbed`, as in RAEv2.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from einops import rearrange
from torch import Tensor

from psvae.errors import CheckpointError
from psvae.hub.formats import Format, Header, Rule

__all__ = ["DDT_HEAD"]

Json = Mapping[str, Any]

TOP = {
    "condition": "s_projector",
    "embed": "x_embedder.proj",
    "norm": "final_layer.norm_final",
    "out": "final_layer.linear",
    "modulation": "final_layer.adaLN_modulation.1",
}
BLOCK = {
    "modulation": "adaLN_modulation.1",
    "norm1": "norm1",
    "qkv": "attn.qkv",
    "proj": "attn.proj",
    "norm2": "norm2",
    "mlp.gate_up": "mlp.w12",
    "mlp.down": "mlp.w3",
}
# the trunk of RAE's own generator, which ours replaces
TRUNK = ("pos_embed", "s_embedder.", "t_embedder.", "y_embedder.", "enc_feat_rope.", "dec_feat_rope.")


def _blocks(header: Header) -> int:
    return len({name.split(".")[1] for name in header if name.startswith("blocks.")})


def _check_heads(heads: int, header: Header) -> None:
    """How wide a head is: no weight's shape tells it, their table of rotary positions does, where it is there."""
    table, kernel = header.get("dec_feat_rope.freqs_cos"), header.get("x_embedder.proj.weight")
    if table and kernel and table[-1] * heads != kernel[0]:
        raise CheckpointError(
            f"head_num_heads is {heads}; wanted {kernel[0] // max(table[-1], 1)}, the file's table of rotary positions "
            f"has heads of {table[-1]} in a width of {kernel[0]}"
        )


def _rules(keys: Sequence[str], config: Json, header: Header) -> dict[str, Rule]:
    _check_heads(config["head_num_heads"], header)
    first = max(0, _blocks(header) - config["head_depth"])  # the head's blocks are the last ones
    return {key: _rule(key, first, config["head_num_heads"], config["patch_size"]) for key in keys}


def _rule(key: str, first: int, heads: int, patch: int) -> Rule:
    part, leaf = key.rsplit(".", 1)
    if part == "embed" and leaf == "weight":  # their convolution
        sides = {"p": patch, "q": patch}
        return Rule(
            (f"{TOP[part]}.{leaf}",),
            load=lambda x: rearrange(x, "w Z p q -> w (p q Z)", **sides),
            save=lambda names, x: {names[0]: rearrange(x, "w (p q Z) -> w Z p q", **sides)},
        )
    if part in TOP:
        return Rule((f"{TOP[part]}.{leaf}",))
    _, index, part = part.split(".", 2)
    name = f"blocks.{first + int(index)}.{BLOCK[part]}.{leaf}"
    if part != "qkv":
        return Rule((name,))
    return Rule((name,), load=lambda x: _pairs(x, heads, back=False), save=lambda n, x: {n[0]: _pairs(x, heads, True)})


def _pairs(qkv: Tensor, heads: int, back: bool) -> Tensor:
    """Rotary pairs of q and k: neighbours in their files, the two halves of a head here."""
    q, k, v = rearrange(qkv, "(three heads d) ... -> three heads d ...", three=3, heads=heads)
    theirs, ours = "heads (half two) ... -> heads (two half) ...", "heads (two half) ... -> heads (half two) ..."
    q, k = (rearrange(x, ours if back else theirs, two=2) for x in (q, k))
    return rearrange([q, k, v], "three heads d ... -> (three heads d) ...")


def _ignored(config: Json, header: Header) -> tuple[str, ...]:
    trunk = _blocks(header) - config["head_depth"]
    return (*TRUNK, *(f"blocks.{index}." for index in range(trunk)))


def _read_config(config: Json | None, header: Header) -> dict[str, Any]:
    raise CheckpointError("RAE's generator is not read whole; DeepFusionDiT.load_rae_head takes its head")


DDT_HEAD = Format(
    "RAE's DDT head", lambda config, header: "s_projector.weight" in header, _read_config, _rules, _ignored
)
