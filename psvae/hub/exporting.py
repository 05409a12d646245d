"""Write a module in another project's layout, by the key map that reads it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from psvae.config import Config
from psvae.errors import CheckpointError
from psvae.hub.formats import Format
from psvae.hub.writing import write_checkpoint

__all__ = ["export"]


def export(
    module: Any,
    layout: Format,
    folder: str | os.PathLike[str],
    *,
    config: Config | None = None,
    state: Mapping[str, Tensor] | None = None,
    stem: str = "model",
    max_shard_size: str | int = "5GB",
) -> None:
    """Write ``config.json`` and weights as ``layout`` has them, atomically.

    Args:
        module: a psvae module whose class reads ``layout``.
        config: written instead of the module's own, where the layout keeps more in it than ours does.
        state: written instead of the module's own tensors, where the layout has some that ours does without.
        stem: of the weights files' names.

    Raises:
        CheckpointError: the layout cannot hold this module, or the folder cannot be written.
    """
    if layout.write_config is None:
        raise CheckpointError(f"psvae reads {layout.name} and does not write it")
    fields = (module.config if config is None else config).to_dict()
    theirs = layout.save(module.state_dict() if state is None else state, fields, {})
    write_checkpoint(Path(folder), layout.write_config(fields), theirs, "", max_shard_size, stem)
