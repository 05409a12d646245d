"""Decoder-only language models of transformers (Qwen2, Qwen2.5, Qwen3, Llama) and our trunk's blocks."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from psvae.errors import CheckpointError
from psvae.hub.formats import Format, Header, Rule

__all__ = ["LANGUAGE_MODEL", "block_rule"]

Json = Mapping[str, Any]

KINDS = ("qwen2", "qwen3", "llama")
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
PARTS = {
    "norm1": ("input_layernorm",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "q_norm": ("self_attn.q_norm",),
    "k_norm": ("self_attn.k_norm",),
    "proj": ("self_attn.o_proj",),
    "norm2": ("post_attention_layernorm",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}


def block_rule(part: str, theirs: tuple[str, ...], config: Json) -> Rule:
    """The rule of one tensor of a `DecoderBlock`, ``part`` being its name without the leaf."""
    if part != "qkv":
        return Rule(theirs)  # gate and up are equal halves
    d = config["attention_head_dim"]
    sizes = [d * config["num_attention_heads"]] + [d * config["num_key_value_heads"]] * 2

    def save(names: tuple[str, ...], tensor: Tensor) -> dict[str, Tensor]:
        return dict(zip(names, tensor.split(sizes), strict=True))

    return Rule(theirs, save=save)


def _recognise(config: Json | None, header: Header) -> bool:
    return config is not None and config.get("model_type") in KINDS and any("self_attn.q_proj" in n for n in header)


def _root(header: Header) -> str:
    """``model.`` where the file is of a model with a language head."""
    return "model." if any(name.startswith("model.") for name in header) else ""


def _read_config(config: Json | None, header: Header) -> dict[str, Any]:
    config = config or {}
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    built = {
        "hidden_act": (config.get("hidden_act", "silu"), ("silu",)),
        "use_sliding_window": (config.get("use_sliding_window"), (False, None)),
        "mlp_bias": (config.get("mlp_bias"), (False, None)),
        "attention_bias": (config["model_type"] != "qwen2" and config.get("attention_bias"), (False, None)),  # o_proj's
        "rope_type": (kind, ("default", "llama3")),
    }
    for name, (value, wanted) in built.items():
        if value not in wanted:
            raise CheckpointError(
                f"config.json of a {config['model_type']} has {name} {value!r}; wanted "
                f"{' or '.join(repr(x) for x in wanted if x is not None)}, no other block is built here: such a model "
                "conditions a generator of fusion='prefix', through PrefixCache.from_hf"
            )
    try:
        heads, width = config["num_attention_heads"], config["hidden_size"]
        return {
            "hidden_size": width,
            "num_layers": config["num_hidden_layers"],
            "num_attention_heads": heads,
            "num_key_value_heads": config.get("num_key_value_heads") or heads,
            "attention_head_dim": config.get("head_dim") or width // heads,
            "intermediate_size": config["intermediate_size"],
            "rms_norm_eps": config["rms_norm_eps"],
            "rope_theta": config.get("rope_theta") or rope.get("rope_theta", 10000.0),
            "rope_scaling": {name: rope[name] for name in LLAMA3} if kind == "llama3" else None,
            "attention_bias": config["model_type"] == "qwen2",
            "qk_norm": config["model_type"] == "qwen3",
            "vocab_size": config["vocab_size"],
        }
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"config.json of a {config.get('model_type')} lacks {error}") from error


def _rules(keys: Sequence[str], config: Json, header: Header) -> dict[str, Rule]:
    root, has = _root(header), any(".q_norm." in name for name in header)
    if config["qk_norm"] != has:
        raise CheckpointError(
            f"qk_norm is {config['qk_norm']}; wanted {has}: the language model has {'' if has else 'no '}norms of "
            "queries and keys, and its text would be another"
        )
    return {key: _rule(key, root, config) for key in keys}


def _rule(key: str, root: str, config: Json) -> Rule:
    if not key.startswith("layers."):
        return Rule((f"{root}{key}",))  # embed_tokens, norm
    _, index, rest = key.split(".", 2)
    part, leaf = rest.rsplit(".", 1)
    theirs = tuple(f"{root}layers.{index}.{name}.{leaf}" for name in PARTS[part])
    return block_rule(part, theirs, config)


def _ignored(config: Json, header: Header) -> tuple[str, ...]:
    """The head, and the embedding too where words come embedded."""
    return ("lm_head.",) if config["vocab_size"] else ("lm_head.", f"{_root(header)}embed_tokens.")


LANGUAGE_MODEL = Format("a transformers language model", _recognise, _read_config, _rules, _ignored)
