"""Weights of other projects into a part of `DeepFusionDiT`."""

import os
from collections.abc import Callable, Mapping
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from psvae.errors import CheckpointError, ConfigError
from psvae.generators.config import DeepFusionDiTConfig
from psvae.hub.formats import Format, Rule
from psvae.hub.keymaps.llm import LANGUAGE_MODEL
from psvae.hub.reading import Checkpoint

__all__ = ["compare_part", "copy_part", "is_text", "language_model_config", "save_part"]


def language_model_config(checkpoint: Checkpoint, fields: Mapping[str, Any]) -> DeepFusionDiTConfig:
    """That of a generator around a language model's folder.

    Args:
        fields: over those that the folder tells.

    Raises:
        CheckpointError: not a Qwen2, Qwen2.5, Qwen3 or Llama of transformers. ConfigError: ``fusion="prefix"``.
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
    return DeepFusionDiTConfig.from_dict({**told, **fields})


def is_text(key: str) -> bool:
    """Whether a language model brings this tensor."""
    return key.startswith(("embed_tokens.", "layers.", "norm."))


def compare_part(
    module: nn.Module, checkpoint: Checkpoint, layout: Format, config: Mapping[str, Any], wanted: Callable[[str], bool]
) -> None:
    """Compare some of a module's tensors, which may be on the meta device, with a file's names and shapes.

    Raises:
        CheckpointError: missing, unexpected or mis-shaped tensors, all listed.
    """
    ours, rules = _part(module, checkpoint, layout, config, wanted)
    checkpoint.compare(ours, rules, layout.unneeded(config, checkpoint.header))


def copy_part(
    module: nn.Module, checkpoint: Checkpoint, layout: Format, config: Mapping[str, Any], wanted: Callable[[str], bool]
) -> None:
    """Overwrite some of a module's tensors with a file's, strictly: all that are wanted, and nothing left over.

    Raises:
        CheckpointError: missing, unexpected or mis-shaped tensors, all listed; nothing is overwritten then.
    """
    ours, rules = _part(module, checkpoint, layout, config, wanted)
    first = next(iter(ours.values()))
    ignored = layout.unneeded(config, checkpoint.header)
    theirs = checkpoint.read(ours, rules, ignored=ignored, dtype=first.dtype, device=first.device)
    for key, value in theirs.items():
        ours[key].copy_(value)  # state_dict's tensors are detached views of the parameters


def save_part(module: nn.Module, file: str | os.PathLike[str], layout: Format, config: Mapping[str, Any]) -> None:
    """Write a module's tensors under the names of another project, as safetensors."""
    state, theirs = module.state_dict(), dict[str, Tensor]()
    for key, rule in layout.rules(list(state), config, {}).items():
        theirs |= rule.save(rule.theirs, state[key])
    save_file({name: tensor.detach().contiguous() for name, tensor in theirs.items()}, file)


def _part(
    module: nn.Module, checkpoint: Checkpoint, layout: Format, config: Mapping[str, Any], wanted: Callable[[str], bool]
) -> tuple[dict[str, Tensor], dict[str, Rule]]:
    ours: dict[str, Tensor] = {key: value for key, value in module.state_dict().items() if wanted(key)}
    return ours, layout.rules(list(ours), config, checkpoint.header)
