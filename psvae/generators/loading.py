"""Weights of other projects for a part of `DeepFusionDiT`."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from psvae.errors import CheckpointError, ConfigError
from psvae.generators.config import DeepFusionDiTConfig
from psvae.hub.formats import Format
from psvae.hub.keymaps.llm import LANGUAGE_MODEL
from psvae.hub.reading import Checkpoint

__all__ = ["language_model_config", "read_part"]

GEOMETRY = (
    "hidden_size", "num_layers", "num_attention_heads", "num_key_value_heads", "attention_head_dim",
    "intermediate_size", "vocab_size",
)  # fmt: skip


def language_model_config(checkpoint: Checkpoint, fields: Mapping[str, Any]) -> DeepFusionDiTConfig:
    """That of a generator around a language model's folder.

    Args:
        fields: over those that the folder tells.

    Raises:
        CheckpointError: not a Qwen2, Qwen2.5, Qwen3 or Llama of transformers, or not of the fields' geometry.
        ConfigError: ``fusion="prefix"``.
    """
    if fields.get("fusion") == "prefix":
        raise ConfigError("fusion='prefix' has no text blocks; run the language model and use PrefixCache.from_hf")
    if not LANGUAGE_MODEL.recognise(checkpoint.config, checkpoint.header):
        kind = None if checkpoint.config is None else checkpoint.config.get("model_type")
        raise CheckpointError(
            f"{checkpoint.source} holds a model of type {kind!r} with weights named like "
            f"{', '.join(list(checkpoint.header)[:2])}; wanted a qwen2, qwen3 or llama folder of transformers"
        )
    told = LANGUAGE_MODEL.read_config(checkpoint.config, checkpoint.header)
    for name in GEOMETRY:
        if fields.get(name) not in (None, told[name]):
            raise CheckpointError(
                f"{name}={fields[name]!r} came and the model in {checkpoint.source} has {told[name]!r}; wanted the "
                "same: leave it out"
            )
    return DeepFusionDiTConfig.from_dict({**told, **fields})


def read_part(
    expected: Mapping[str, Tensor], checkpoint: Checkpoint, layout: Format, config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Some of a model's tensors, read strictly: all that are expected, and nothing of the file left over.

    Args:
        expected: as they will be, by name; they may be on the meta device.

    Raises:
        CheckpointError: missing, unexpected or mis-shaped tensors, all listed, before any is read.
    """
    rules, ignored = layout.rules(list(expected), config, checkpoint.header), layout.unneeded(config, checkpoint.header)
    dtype = next(iter(expected.values())).dtype
    return checkpoint.read(expected, rules, ignored=ignored, dtype=dtype, device="cpu")
