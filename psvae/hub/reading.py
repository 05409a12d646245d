"""Find a checkpoint in a folder or on the Hub, and read it strictly."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from psvae.errors import CheckpointError

__all__ = ["CONFIG", "INDEX", "WEIGHTS", "Source", "read_config", "read_weights"]

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LISTED = 20


class Source:
    """Where a checkpoint's files come from: a local folder, or a Hub repository through its cache.

    Raises:
        CheckpointError: neither a folder nor something that can be a Hub id.
    """

    def __init__(self, repo_or_folder: str | os.PathLike[str], subfolder: str, **hub_options: Any) -> None:
        self.name, self.subfolder, self.hub_options = str(repo_or_folder), subfolder, hub_options
        self.folder = Path(repo_or_folder) if Path(repo_or_folder).exists() else None
        if self.folder is None and not _REPO_ID.fullmatch(self.name):
            raise CheckpointError(f"{self.name!r} is not a folder here, nor a Hub id of the form 'org/name'")
        if self.folder is not None and not self.folder.is_dir():
            raise CheckpointError(f"{self.name!r} is a file; wanted the folder that holds {CONFIG} and {WEIGHTS}")

    def __str__(self) -> str:
        return "/".join(part for part in (self.name, self.subfolder) if part)

    def find(self, filename: str) -> Path | None:
        """The local path of a file, fetched if need be; ``None`` if the source does not have it.

        Raises:
            CheckpointError: the repository or revision does not exist, or cannot be reached.
        """
        if self.folder is not None:
            path = self.folder / self.subfolder / filename
            return path if path.is_file() else None
        from huggingface_hub import errors, hf_hub_download

        where = f"revision {self.hub_options['revision'] or 'main'!r} of {self.name!r}"
        try:
            path = Path(hf_hub_download(self.name, filename, subfolder=self.subfolder or None, **self.hub_options))
        except errors.LocalEntryNotFoundError as error:
            if filename != CONFIG:
                return None  # absent from a cached snapshot whose config was found
            raise CheckpointError(
                f"{filename} of {where} is not in the local cache and the Hub cannot be reached: go online once, "
                "or pass a local folder"
            ) from error
        except errors.EntryNotFoundError:
            return None
        except errors.GatedRepoError as error:
            raise CheckpointError(
                f"{self.name!r} is gated: accept its terms on its page and run `hf auth login`"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise CheckpointError(f"there is no {where}; check the branch, tag or commit") from error
        except errors.RepositoryNotFoundError as error:
            raise CheckpointError(
                f"there is no folder {self.name!r} here and no repository of that name on the Hub, or it is private: "
                "check the name, or pass token=..."
            ) from error
        except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
            raise CheckpointError(f"{filename} of {where} could not be fetched: {error}") from error
        # the rest comes from the same commit, even if the branch moves meanwhile
        self.hub_options["revision"] = path.parents[len(Path(self.subfolder).parts)].name
        return path

    def listing(self) -> str:
        """What is there, for an error message."""
        if self.folder is None:
            return f"look at the files of {self.name!r}; without a connection only those in the local cache are seen"
        names = sorted(path.name for path in (self.folder / self.subfolder).glob("*"))
        return f"the folder holds {', '.join(names[:_LISTED]) or 'nothing'}"


def read_config(source: Source, class_name: str) -> dict[str, Any]:
    """The fields of ``config.json``, after checking that it is psvae's and of this class.

    Raises:
        CheckpointError: absent, not JSON, not psvae's, or of another class.
    """
    path = source.find(CONFIG)
    if path is None:
        raise CheckpointError(f"{source} has no {CONFIG}; {source.listing()}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); save or download it again") from error
    saved_class = values.pop("_class", None) if isinstance(values, dict) else None
    if saved_class is None:
        raise CheckpointError(f"{path} has no '_class': it was not written by psvae's save_pretrained")
    if saved_class != class_name:
        raise CheckpointError(
            f"{source} holds a {saved_class}; wanted a {class_name}: use {saved_class}.from_pretrained"
        )
    return values


def read_weights(
    source: Source,
    expected: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    allow_pickle: bool,
) -> dict[str, Tensor]:
    """All tensors of the checkpoint, after comparing every key and shape with ``expected``.

    Raises:
        CheckpointError: see `HubMixin.from_pretrained`.
    """
    files = _weight_files(source)
    if files:
        shapes = {key: (path, shape) for path in files for key, shape in _header(path).items()}
        _compare(source, {key: shape for key, (_, shape) in shapes.items()}, expected)
        tensors: dict[str, Tensor] = {}
        for path in files:
            with safe_open(path, framework="pt", device=str(device)) as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
    else:
        tensors = _read_pickle(source, allow_pickle)
        _compare(source, {key: tuple(tensor.shape) for key, tensor in tensors.items()}, expected)
    return {
        key: tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
        for key, tensor in tensors.items()
    }


def _weight_files(source: Source) -> list[Path]:
    """The safetensors file, or the shards that the index names; empty if there is neither."""
    path = source.find(WEIGHTS)
    if path is not None:
        return [path]
    index = source.find(INDEX)
    if index is None:
        return []
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        leaves = any(Path(name).name != name for name in names)  # TypeError if a name is no string
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not a shard index ({error!r}); save or download it again") from error
    if leaves:
        raise CheckpointError(f"{index} names files outside its folder: {names}; it is not to be trusted")
    shards = {name: source.find(name) for name in names}
    lost = [name for name, shard in shards.items() if shard is None]
    if lost:
        raise CheckpointError(f"{source} lacks shards that its index names: {', '.join(lost)}; {source.listing()}")
    return [shard for shard in shards.values() if shard is not None]


def _header(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file, without reading its tensors."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        raise CheckpointError(
            f"{path} ({size} bytes) is not a whole safetensors file ({error}); it is empty, truncated or of another "
            "format: download or save it again"
        ) from error


def _read_pickle(source: Source, allowed: bool) -> dict[str, Tensor]:
    candidates = [f"pytorch_model{ending}" for ending in PICKLES] + [f"model{ending}" for ending in PICKLES]
    path = next((found for found in map(source.find, candidates) if found), None)
    if path is None:
        raise CheckpointError(f"{source} has no {WEIGHTS} (nor {INDEX} with shards); {source.listing()}")
    if not allowed:
        raise CheckpointError(
            f"{path} is a pickle, which can run code when read; wanted {WEIGHTS}. If you trust its author, pass "
            "allow_pickle=True: it is then read with PyTorch's restricted unpickler"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError... by the fault
        raise CheckpointError(f"{path} could not be read with the restricted unpickler: {error}") from error
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    plain = isinstance(content, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
    if not plain:
        raise CheckpointError(f"{path} does not hold a plain state dict of tensors")
    return content


def _compare(source: Source, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, Tensor]) -> None:
    """One error that lists every difference."""
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    wrong = [
        f"{key} is {shape}, wanted {tuple(expected[key].shape)}"
        for key, shape in found.items()
        if key in expected and shape != tuple(expected[key].shape)
    ]
    faults = [
        f"{len(keys)} {kind}: {', '.join(keys[:_LISTED])}{' and more' if len(keys) > _LISTED else ''}"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
        if keys
    ]
    if faults:
        raise CheckpointError(
            f"the weights of {source} do not fit its configuration; nothing was loaded. " + "; ".join(faults)
        )
