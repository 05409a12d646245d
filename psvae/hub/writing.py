"""Write a checkpoint so that a crash, a kill or a full disk leaves the older one intact."""

import contextlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from psvae.errors import CheckpointError
from psvae.hub.cards import MARK
from psvae.hub.reading import INDEX, WEIGHTS
from psvae.hub.source import CONFIG

__all__ = ["WEIGHT_PATTERNS", "write_checkpoint", "write_file", "write_json", "write_text"]

WEIGHT_PATTERNS = [WEIGHTS, INDEX, "model-*-of-*.safetensors"]
_STAGING = ".saving"


def write_checkpoint(
    folder: Path,
    config: dict[str, Any],
    state: Mapping[str, Tensor],
    card: str,
    max_shard_size: str | int,
    stem: str = "model",
) -> None:
    """Write everything under ``folder/.saving``, flush it to the disk, then move it into place.

    Until the last move of the weights a reader sees the old checkpoint whole: a single file is replaced in
    one step, and new shards have new names until their index is replaced in one step.
    ``config.json`` follows: only over a checkpoint of another configuration is there an instant between the two.

    Args:
        stem: of the weights files' names: ``diffusion_pytorch_model`` for diffusers.

    Raises:
        CheckpointError: anything could not be written, or the weights are sharded (FSDP); the old checkpoint is as
            it was.
    """
    tensors = _plain(state)
    staging = folder / _STAGING
    try:
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file")
        shutil.rmtree(staging, ignore_errors=True)  # of a save that was killed
        staging.mkdir(parents=True)
        before = _weights_in(folder, stem)
        _stage_weights(staging, tensors, max_shard_size, before, stem)
        (staging / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        readme = folder / "README.md"
        if card and (not readme.exists() or MARK in readme.read_text(encoding="utf-8", errors="replace")):
            (staging / readme.name).write_text(card, encoding="utf-8")
        staged = sorted(staging.iterdir(), key=lambda path: (path.suffix != ".safetensors", path.name == CONFIG))
        for path in staged:
            _flush(path)
        for path in staged:
            os.replace(path, folder / path.name)
        _flush(folder)
        for name in before - {path.name for path in staged}:
            (folder / name).unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)  # before the free space is measured
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        free = shutil.disk_usage(next(p for p in (folder, *folder.absolute().parents) if p.exists())).free
        raise CheckpointError(
            f"could not save to {folder} ({error}); {size / 1e6:.1f} MB were to be written and {free / 1e6:.1f} MB are "
            "free there. What was saved before is untouched: make room or choose another folder"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_file(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write one safetensors file, and move it into place when it is whole and on the disk.

    Raises:
        CheckpointError: it could not be written, or the weights are sharded (FSDP); an older file is as it was.
    """
    tensors = _plain(state)
    _replace(path, lambda staged: _save(tensors, staged))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write one JSON file in the same way.

    Raises:
        CheckpointError: it could not be written; an older file is as it was.
    """
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write one text file in the same way.

    Raises:
        CheckpointError: it could not be written; an older file is as it was.
    """
    _replace(path, lambda staged: staged.write_text(text, encoding="utf-8"))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    staged = path.with_name(f"{path.name}{_STAGING}")
    try:
        write(staged)
        _flush(staged)
        os.replace(staged, path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"could not write {path} ({error}); what was there is untouched: make room or choose another place"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            staged.unlink()


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    sharded = [key for key, tensor in state.items() if hasattr(tensor, "full_tensor")]
    if sharded:
        raise CheckpointError(
            f"{sharded[0]} and {len(sharded) - 1} other tensors are sharded over processes; wanted whole ones: load "
            "the result of torch.distributed.checkpoint.state_dict.get_model_state_dict, with full_state_dict=True, "
            "into an unsharded module and save that"
        )
    return {key: tensor.detach().contiguous() for key, tensor in state.items()}


def _stage_weights(
    staging: Path, tensors: dict[str, Tensor], max_shard_size: str | int, before: set[str], stem: str
) -> None:
    plan = split_torch_state_dict_into_shards(
        tensors, filename_pattern=f"{stem}{{suffix}}.safetensors", max_shard_size=max_shard_size
    )
    names = {name: name for name in plan.filename_to_tensors}
    if plan.is_sharded and before & set(names):  # a name in use would be overwritten before the index is
        token = uuid.uuid4().hex[:8]
        names = {name: name.replace(f"{stem}-", f"{stem}-{token}-") for name in names}
    for name, keys in plan.filename_to_tensors.items():
        _save({key: tensors[key] for key in keys}, staging / names[name])
    if plan.is_sharded:
        weight_map = {key: names[name] for key, name in plan.tensor_to_filename.items()}
        index = {"metadata": plan.metadata, "weight_map": weight_map}
        (staging / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    path.touch()
    mode = path.stat().st_mode  # of any new file; safetensors 0.8 leaves one that its owner alone may read
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def _weights_in(folder: Path, stem: str) -> set[str]:
    """Names of the weight files that are there, also the shards of a save that was killed before its index."""
    ours = re.compile(rf"{stem}(-([0-9a-f]{{8}}-)?\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?")
    return {path.name for path in folder.iterdir() if ours.fullmatch(path.name)}


def _flush(path: Path) -> None:
    """fsync a file or folder, so that the moves never outrun the bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
