"""BAGEL (ByteDance-Seed/Bagel): two sets of blocks, the images' under the suffix ``_moe_gen``.

Its weights begin a generator; they do not make one generate as BAGEL does, which puts a start and an end token inside
each image's segment, and shows a source to a vision encoder too.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from psvae.errors import CheckpointError
from psvae.hub.formats import Format, Header, Rule
from psvae.hub.keymaps.llm import PARTS, block_rule

__all__ = ["BAGEL"]

Json = Mapping[str, Any]

MODEL = "language_model.model."
GEN = "_moe_gen"
TOP = {
    "embed_latents": "vae2llm",
    "head.out": "llm2vae",
    "embed_time.fc1": "time_embedder.mlp.0",
    "embed_time.fc2": "time_embedder.mlp.2",
    "embed_tokens": f"{MODEL}embed_tokens",
    "norm": f"{MODEL}norm",
    "image_norm": f"{MODEL}norm{GEN}",
}
# its understanding tower, the language head, and the position table, which is computed here
IGNORED = ("language_model.lm_head.", "vit_model.", "connector.", "vit_pos_embed.", "latent_pos_embed.")


def _recognise(config: Json | None, header: Header) -> bool:
    return f"{MODEL}layers.0.self_attn.q_proj{GEN}.weight" in header


def _read_config(config: Json | None, header: Header) -> dict[str, Any]:
    def shape(name: str, rank: int) -> tuple[int, ...]:
        found = header.get(name, ())
        if len(found) != rank or 0 in found:
            raise CheckpointError(f"{name} is {found or 'missing'}; wanted {rank} axes, to tell BAGEL's geometry")
        return found

    layer = f"{MODEL}layers.0."
    d = shape(f"{layer}self_attn.q_norm{GEN}.weight", 1)[0]
    vocab, width = shape(f"{MODEL}embed_tokens.weight", 2)
    found, patch = shape("vae2llm.weight", 2), 2  # BAGEL's latent_patch_size; override if it is another
    if found[1] % patch**2:
        raise CheckpointError(
            f"vae2llm.weight is {found}; wanted (D, {patch**2} Z), BAGEL's patch is {patch} x {patch}"
        )
    return {
        "in_channels": found[1] // patch**2,
        "patch_size": patch,
        "fusion": "mot",
        "hidden_size": width,
        "num_layers": len({n.split(".")[3] for n in header if n.startswith(f"{MODEL}layers.")}),
        "num_attention_heads": shape(f"{layer}self_attn.q_proj.weight", 2)[0] // d,
        "num_key_value_heads": shape(f"{layer}self_attn.k_proj.weight", 2)[0] // d,
        "attention_head_dim": d,
        "intermediate_size": shape(f"{layer}mlp.gate_proj.weight", 2)[0],
        "attention_bias": f"{layer}self_attn.q_proj.bias" in header,
        "vocab_size": vocab,
        "qk_norm": True,
        "head": "linear",
    }


def _rules(keys: Sequence[str], config: Json, header: Header) -> dict[str, Rule]:
    return {key: _rule(key, config) for key in keys}


def _rule(key: str, config: Json) -> Rule:
    part, leaf = key.rsplit(".", 1)
    if part in TOP:
        return Rule((f"{TOP[part]}.{leaf}",))
    kind, index, part = part.split(".", 2)
    names = (_gen(name) if kind == "image_layers" else name for name in PARTS[part])
    return block_rule(part, tuple(f"{MODEL}layers.{index}.{name}.{leaf}" for name in names), config)


def _gen(name: str) -> str:
    """``self_attn.q_proj`` → ``self_attn.q_proj_moe_gen``, but ``mlp.up_proj`` → ``mlp_moe_gen.up_proj``."""
    return name.replace("mlp.", f"mlp{GEN}.") if name.startswith("mlp.") else name + GEN


BAGEL = Format("BAGEL", _recognise, _read_config, _rules, ignored=IGNORED)
