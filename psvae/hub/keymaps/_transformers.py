"""Where transformers' Vision Transformers keep their tensors.

The library renamed its layers between 4.57 and 5.18; a table lists every name that a part has had. What is
written is the first of them: the names of the published files, which 4.57 and 5.23 both read without a warning.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from psvae.errors import ConfigError
from psvae.hub.formats import Header, Rule
from psvae.hub.keymaps._vit import cut_blocks, folded_class_token, patch_positions, patch_rule, qkv

__all__ = ["DINOV2", "DINOV2_GIANT", "DINOV3", "SIGLIP", "SIGLIP2", "VIT_MAE", "Layout"]

Json = Mapping[str, Any]
Names = tuple[str, ...]  # several make one of ours, on top of each other


@dataclass(frozen=True)
class Layout:
    """Where one family keeps what.

    Attributes:
        marker: a name that every file has; what stands before it there is a prefix of the encoder's names.
        roots: what stands before a block's number, over the versions.
        top: our names outside the blocks → theirs.
        blocks: our parts of a block → theirs, over the versions.
        spare: known and not needed, after the prefix.
        outside: known and not needed, with no prefix: heads, text models, decoders.
        rules: of the names that no table can say.
        written: the prefix that is written.
    """

    marker: str
    roots: tuple[str, ...]
    top: Mapping[str, str]
    blocks: Mapping[str, tuple[Names, ...]]
    spare: tuple[str, ...]
    outside: tuple[str, ...]
    rules: Callable[[str, str, Json], Rule | None] = lambda key, prefix, config: None
    written: str = ""

    def prefix(self, header: Header) -> str:
        """What stands before the encoder's own names in this file."""
        found = [name.removesuffix(self.marker) for name in header if name.endswith(self.marker)]
        return min((p for p in found if not p or p.endswith(".")), key=len, default=self.written)

    def root(self, header: Header) -> str:
        """What stands before a block's number in this file, with the prefix."""
        prefix = self.prefix(header)
        used = (prefix + root for root in self.roots if any(name.startswith(prefix + root) for name in header))
        return next(used, prefix + self.roots[0])

    def key_map(self, keys: Sequence[str], config: Json, header: Header) -> dict[str, Rule]:
        """Our keys → rules, by the names that this file uses."""
        prefix, root = self.prefix(header), self.root(header)
        parts = {re.sub(r"\.(weight|bias)$", "", name.removeprefix(root).partition(".")[2]) for name in header}
        names = {part: next((a for a in known if a[0] in parts), known[0]) for part, known in self.blocks.items()}
        return {key: self._rule(key.removeprefix("vit."), prefix, root, names, config) for key in keys}

    def _rule(self, key: str, prefix: str, root: str, names: Mapping[str, Names], config: Json) -> Rule:
        special = self.rules(key, prefix, config)
        if special is not None:
            return special
        part, leaf = re.fullmatch(r"(.+?)(\.weight|\.bias|)", key).groups()  # type: ignore[union-attr]
        if part in self.top:
            return Rule((prefix + self.top[part] + leaf,))
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", part)
        if block is None or block[2] not in names:
            raise ConfigError(f"transformers' layout has no place for {key!r}; it is of another family")
        theirs = tuple(f"{root}{block[1]}.{name}{leaf}" for name in names[block[2]])
        return qkv(*theirs) if len(theirs) > 1 else Rule(theirs)

    def ignored(self, config: Json, header: Header) -> tuple[str, ...]:
        """Beginnings of names that are known and not needed."""
        prefix, root = self.prefix(header), self.root(header)
        blocks = {name.removeprefix(root).partition(".")[0] for name in header if name.startswith(root)}
        registers = prefix + REGISTERS
        none = (registers,) if 0 in header.get(registers, ()) else ()  # DINOv3's, where it has none
        spare = (*(prefix + name for name in self.spare), *none)
        return (*spare, *self.outside, *cut_blocks(config, len(blocks), root))


def _masked(token: str, mask: str, axes: int) -> Rule:
    """A class token; written, a mask token comes with it, which only training reads."""

    def save(names: Names, value: Tensor) -> dict[str, Tensor]:
        return {names[0]: value, mask: torch.zeros_like(value if axes == 3 else value[0])}

    return Rule((token,), save=save)


def _dinov2_rules(key: str, prefix: str, config: Json) -> Rule | None:
    token, table = f"{prefix}embeddings.cls_token", f"{prefix}embeddings.position_embeddings"
    if key == "cls_token":
        plain = _masked(token, f"{prefix}embeddings.mask_token", axes=2)
        if "_reg4_" not in config["name"]:
            return plain
        return dataclasses.replace(folded_class_token(token, table), save=plain.save)
    if key == "pos_embed" and "_reg4_" in config["name"]:
        return patch_positions(table)
    return None


def _dinov3_rules(key: str, prefix: str, config: Json) -> Rule | None:
    if key != "cls_token":
        return None
    rule = _masked(f"{prefix}embeddings.cls_token", f"{prefix}embeddings.mask_token", axes=3)
    if config["model_args"].get("num_reg_tokens") != 0:
        return rule

    def save(names: Names, value: Tensor) -> dict[str, Tensor]:  # the library has a tensor for registers even so
        return rule.save(names, value) | {prefix + REGISTERS: value[:, :0]}

    return dataclasses.replace(rule, save=save)


def _siglip_rules(key: str, prefix: str, config: Json) -> Rule | None:
    if key == "pos_embed":
        name = f"{prefix}embeddings.position_embedding.weight"
        return Rule((name,), load=lambda rows: rows[None], save=lambda names, rows: {names[0]: rows[0]})
    return None


def _siglip2_rules(key: str, prefix: str, config: Json) -> Rule | None:
    if key == "patch_embed.proj.weight":
        return patch_rule(f"{prefix}embeddings.patch_embedding.weight", config["model_args"]["patch_size"])
    return _siglip_rules(key, prefix, config)


QKV: tuple[Names, ...] = (
    ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
)
REGISTERS = "embeddings.register_tokens"
_EMBEDDINGS = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
DINOV2 = Layout(
    marker="embeddings.cls_token",
    roots=("encoder.layer.", "layers."),
    top=_EMBEDDINGS | {"reg_token": REGISTERS},
    blocks={
        "norm1": (("norm1",),),
        "attn.qkv": QKV,
        "attn.proj": (("attention.output.dense",), ("attention.o_proj",)),
        "ls1.gamma": (("layer_scale1.lambda1",),),
        "norm2": (("norm2",),),
        "mlp.fc1": (("mlp.fc1",),),
        "mlp.fc2": (("mlp.fc2",),),
        "ls2.gamma": (("layer_scale2.lambda1",),),
    },
    spare=("embeddings.mask_token", "layernorm."),
    outside=("classifier.",),
    rules=_dinov2_rules,
)
DINOV2_GIANT = dataclasses.replace(
    DINOV2,
    blocks=dict(DINOV2.blocks)
    | {
        "mlp.fc1": (("mlp.weights_in",), ("mlp.gate_proj", "mlp.up_proj")),
        "mlp.fc2": (("mlp.weights_out",), ("mlp.down_proj",)),
    },
)
DINOV3 = Layout(
    marker="embeddings.cls_token",
    roots=("layer.", "model.layer."),
    top={
        "cls_token": "embeddings.cls_token",
        "reg_token": REGISTERS,
        "patch_embed.proj": "embeddings.patch_embeddings",
        "norm": "norm",
    },
    blocks={
        "norm1": (("norm1",),),
        "attn.qkv": (QKV[1],),
        "attn.q_bias": (("attention.q_proj.bias",),),
        "attn.v_bias": (("attention.v_proj.bias",),),
        "attn.proj": (("attention.o_proj",),),
        "gamma_1": (("layer_scale1.lambda1",),),
        "norm2": (("norm2",),),
        "mlp.fc1": (("mlp.up_proj",),),
        "mlp.fc1_g": (("mlp.gate_proj",),),
        "mlp.fc1_x": (("mlp.up_proj",),),
        "mlp.fc2": (("mlp.down_proj",),),
        "gamma_2": (("layer_scale2.lambda1",),),
    },
    spare=("embeddings.mask_token", "norm."),
    outside=("classifier.",),
    rules=_dinov3_rules,
)
SIGLIP = Layout(
    marker="embeddings.patch_embedding.weight",
    roots=("encoder.layers.",),
    top={"patch_embed.proj": "embeddings.patch_embedding", "norm": "post_layernorm"},
    blocks={
        "norm1": (("layer_norm1",),),
        "attn.qkv": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),),
        "attn.proj": (("self_attn.out_proj",),),
        "norm2": (("layer_norm2",),),
        "mlp.fc1": (("mlp.fc1",),),
        "mlp.fc2": (("mlp.fc2",),),
    },
    spare=("post_layernorm.", "head.", "embeddings.position_ids"),
    outside=("text_model.", "logit_scale", "logit_bias", "classifier."),
    rules=_siglip_rules,
    written="vision_model.",  # 4.57 reads no other, and 5.23 takes it off
)
SIGLIP2 = dataclasses.replace(SIGLIP, rules=_siglip2_rules)
VIT_MAE = Layout(
    marker="embeddings.cls_token",
    roots=("encoder.layer.", "layers."),
    top=_EMBEDDINGS,
    blocks={
        "norm1": (("layernorm_before",),),
        "attn.qkv": QKV,
        "attn.proj": (("attention.output.dense",), ("attention.o_proj",)),
        "norm2": (("layernorm_after",),),
        "mlp.fc1": (("intermediate.dense",), ("mlp.fc1",)),
        "mlp.fc2": (("output.dense",), ("mlp.fc2",)),
    },
    spare=("layernorm.",),
    outside=("decoder.",),
)
