"""Open a checkpoint, compare every name and shape before reading, and read it strictly."""

import contextlib
import functools
import json
import logging
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint

from psvae.errors import CheckpointError
from psvae.hub.formats import Header, Rule
from psvae.hub.source import CONFIG, LISTED, Source

__all__ = ["INDEX", "PROCESSOR", "WEIGHTS", "Checkpoint", "read_pickle"]

_log = logging.getLogger("psvae")

PROCESSOR = "preprocessor_config"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
STEMS = ("model", "diffusion_pytorch_model")  # psvae, timm and transformers; diffusers
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
VARIANT = re.compile(
    rf"(?:pytorch_model|{'|'.join(STEMS)})(?:-\d+-of-\d+)?\.([\w-]+?)(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
)
OTHER_KINDS = {  # endings of what lies beside weights
    **dict.fromkeys((".json", ".yaml", ".yml", ".toml"), "a configuration"),
    **dict.fromkeys((".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"), "a picture"),
    **dict.fromkeys((".csv", ".log", ".md", ".py", ".txt"), "text"),
    **dict.fromkeys((".gz", ".tar", ".tgz", ".zip"), "an archive, to be unpacked first"),
    **dict.fromkeys((".h5", ".msgpack", ".npy", ".npz", ".onnx", ".gguf"), "in another framework's format"),
}
# Under which training scripts put the weights, the moving average first: it is what they sample with.
WRAPPERS = ("ema", "model_ema", "ema_state_dict", "state_dict", "model", "module")
PREFIXES = ("module.", "first_stage_model.", "vae.", "decoder.")  # of DDP, LDM, a pipeline's file, RAE


class Checkpoint:
    """One checkpoint, opened: its configuration and the names and shapes in its weights; tensors are read later.

    Args:
        file: the weights file, where it has no standard name.
        variant: such as ``"fp16"`` in ``diffusion_pytorch_model.fp16.safetensors``.

    Attributes:
        config: the content of ``config.json``, or None where there is none. transformers' also has that of
            ``preprocessor_config.json``, or None, as `PROCESSOR`.
        files: where the tensors are, once `header` is read.

    Raises:
        CheckpointError: absent, unreadable, or a pickle without permission.
    """

    def __init__(self, source: Source, *, file: str | None, variant: str | None, allow_pickle: bool) -> None:
        self.source, self.file, self.variant, self.allow_pickle = source, file or source.file, variant, allow_pickle
        if self.file is not None:
            _refuse_other_kinds(PurePath(self.file), source)
        self.config = _read_json(source, CONFIG)
        if self.config is not None and "model_type" in self.config:  # transformers': the colours are in another file
            self.config[PROCESSOR] = _read_json(source, f"{PROCESSOR}.json")
        self.files: list[Path] = []
        self._names: dict[str, tuple[Path, str]] = {}  # cleaned name → (file, name in it)
        self._pickled: dict[str, Tensor] | None = None

    def own_config(self) -> dict[str, Any]:
        """The fields of psvae's own ``config.json``."""
        return {key: value for key, value in (self.config or {}).items() if key != "_class"}

    @functools.cached_property
    def header(self) -> Header:
        """Name → shape, of every tensor, without the prefixes that DDP and ``torch.compile`` leave."""
        self.files = self._find()
        if self.files and self.files[0].suffix == ".safetensors":
            shapes = {(path, key): shape for path in self.files for key, shape in _header(path).items()}
        else:
            path = self.files[0] if self.files else _find_pickle(self.source, self.variant)
            self.files = [path]
            self._pickled = _read_state_dict(path, self.allow_pickle)
            shapes = {(path, key): tuple(tensor.shape) for key, tensor in self._pickled.items()}
        clean = _clean_names([key for _, key in shapes])
        for path, key in shapes:
            name = clean[key]
            if name in self._names:
                raise CheckpointError(f"{self.source} holds {name!r} twice: {self._names[name][1]!r} and {key!r}")
            self._names[name] = (path, key)
        return {clean[key]: shape for (_, key), shape in shapes.items()}

    def read(
        self,
        expected: Mapping[str, Tensor],
        rules: Mapping[str, Rule],
        *,
        ignored: Sequence[str],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> dict[str, Tensor]:
        """All of our tensors, after comparing every name and shape with ``expected`` (on the meta device).

        Raises:
            CheckpointError: names are missing, unexpected or of another shape, in the file's own words.
        """
        self.compare(expected, rules, tuple(ignored))
        place = "cpu" if torch.device(device).type == "cpu" else str(device)  # safetensors knows no "cpu:0"
        with contextlib.ExitStack() as stack:
            handles: dict[Path, Any] = {}
            if self._pickled is None:
                for path in self.files:
                    handles[path] = stack.enter_context(safe_open(path, framework="pt", device=place))

            def fetch(name: str) -> Tensor:
                path, key = self._names[name]
                return handles[path].get_tensor(key) if self._pickled is None else self._pickled[key]

            weights, storages = {}, set()
            for key, rule in rules.items():
                tensor = rule.load(*map(fetch, rule.theirs))
                if expected[key].is_floating_point() and not tensor.is_floating_point():
                    raise CheckpointError(
                        f"{' + '.join(rule.theirs)} of {self.source} holds {tensor.dtype}; wanted floating point: "
                        "quantised weights are not read"
                    )
                tensor = tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
                storage = tensor.untyped_storage().data_ptr()
                weights[key] = tensor.clone() if storage in storages else tensor  # tied in a pickle, not in the model
                storages.add(storage)
        return weights

    def _find(self) -> list[Path]:
        """The safetensors file, or the shards that its index names, or the file that was asked for."""
        if self.file is not None:
            path = self.source.find(self.file)
            if path is None:
                raise CheckpointError(f"{self.source} has no file {self.file!r}; {self.source.listing()}")
            return [path]
        middle = f".{self.variant}" if self.variant else ""
        for stem in STEMS:
            path = self.source.find(f"{stem}{middle}.safetensors")
            if path is not None:
                return [path]
            names = [f"{stem}{middle}.safetensors.index.json", f"{stem}.safetensors.index{middle}.json"]
            index = next((found for found in map(self.source.find, dict.fromkeys(names)) if found), None)
            if index is not None:
                return self._shards(index)
        return []

    def _shards(self, index: Path) -> list[Path]:
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            leaves = any(Path(name).name != name for name in names)  # TypeError if a name is no string
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is not a shard index ({error!r}); save or download it again") from error
        if leaves:
            raise CheckpointError(f"{index} names files outside its folder: {names}; it is not to be trusted")
        shards = {name: self.source.find(name) for name in names}
        lost = [name for name, shard in shards.items() if shard is None]
        if lost:
            raise CheckpointError(
                f"{self.source} lacks shards that its index names: {', '.join(lost)}; {self.source.listing()}"
            )
        return [shard for shard in shards.values() if shard is not None]

    def compare(self, expected: Mapping[str, Tensor], rules: Mapping[str, Rule], ignored: tuple[str, ...]) -> None:
        """One error that lists every difference."""
        needed = dict.fromkeys(name for rule in rules.values() for name in rule.theirs)
        missing = [name for name in needed if name not in self.header]
        unexpected = [name for name in self.header if name not in needed and not name.startswith(ignored or ("\0",))]
        wrong = []
        for key, rule in rules.items():
            if any(name not in self.header for name in rule.theirs):
                continue
            found, wanted = [self.header[name] for name in rule.theirs], tuple(expected[key].shape)
            try:
                with torch.device("meta"):  # also where the rule makes the tensor of nothing
                    got = tuple(rule.load(*(torch.empty(shape) for shape in found)).shape)
            except (RuntimeError, IndexError, ValueError):
                got = None
            if got != wanted:
                name, shape = (key, "unusable") if not found else (" + ".join(rule.theirs), found[0])
                wrong.append(f"{name} is {shape if len(found) < 2 else found}, wanted {wanted}")
        faults = [
            f"{len(keys)} {kind}: {', '.join(keys[:LISTED])}{' and more' if len(keys) > LISTED else ''}"
            for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
            if keys
        ]
        if faults:
            raise CheckpointError(
                f"the weights of {self.source} do not fit its configuration; nothing was loaded. " + "; ".join(faults)
            )


def _read_json(source: Source, name: str) -> dict[str, Any] | None:
    path = source.find(name)
    if path is None:
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); save or download it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{path} holds no dictionary and has no '_class': it was not written by psvae's save_pretrained"
        )
    return values


def _header(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file, without reading its tensors."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        raise CheckpointError(
            f"{path} ({size} bytes) is not a whole safetensors file ({error}); it is empty, truncated or of another "
            "format: download or save it again"
        ) from error


def _clean_names(names: Sequence[str]) -> dict[str, str]:
    """Without ``_orig_mod.`` anywhere, and without a prefix that every name has."""
    clean = {name: name.replace("_orig_mod.", "") for name in names}
    for prefix in PREFIXES:
        if clean and all(name.startswith(prefix) for name in clean.values()):
            clean = {key: name.removeprefix(prefix) for key, name in clean.items()}
    return clean


def _find_pickle(source: Source, variant: str | None) -> Path:
    middle = f".{variant}" if variant else ""
    candidates = [f"{stem}{middle}{ending}" for stem in ("pytorch_model", *STEMS) for ending in PICKLES]
    path = next((found for found in map(source.find, candidates) if found), None)
    if path is None and source.find("model_index.json") is not None:
        raise CheckpointError(
            f"{source} holds a pipeline, which is many models; pass subfolder='vae' or another of them"
        )
    if path is None:
        if not source.subfolder and source.find(f"vae/{CONFIG}") is not None:
            path = f", or its path {source.folder / 'vae'}" if source.folder is not None else ""
            raise CheckpointError(
                f"{source} holds no weights itself, and a VAE in vae/, as of save_reals; pass subfolder='vae'{path}"
            )
        what = f"weights of variant {variant!r}" if variant else f"{WEIGHTS} (nor {INDEX} with shards)"
        raise CheckpointError(f"{source} has no {what}; {_other_variants(source)}{source.listing()}")
    return path


def _other_variants(source: Source) -> str:
    """How to ask for the weights that are there under another name, if any."""
    if source.folder is None:
        return "files such as model.fp16.safetensors are read with variant='fp16'; "
    names = [path.name for path in (source.folder / source.subfolder).glob("*")]
    found = sorted({match[1] for match in map(VARIANT.fullmatch, names) if match})
    return f"pass {' or '.join(f'variant={name!r}' for name in found)}: " if found else ""


def _refuse_other_kinds(path: PurePath, shown: Any) -> None:
    kind = OTHER_KINDS.get(path.suffix.lower())
    if kind is not None:
        hint = ": pass its folder" if path.suffix == ".json" else ""
        raise CheckpointError(
            f"{shown} is {kind}, no weights{hint}; wanted a folder, a .safetensors file, or a {', '.join(PICKLES)}"
        )


def _read_state_dict(path: Path, allowed: bool) -> dict[str, Tensor]:
    content = read_pickle(path, allowed)
    while isinstance(content, dict) and (found := [name for name in WRAPPERS if isinstance(content.get(name), dict)]):
        if len(found) > 1:
            _log.warning("%s holds %s: %r is read", path, " and ".join(map(repr, found)), found[0])
        content = content[found[0]]
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} does not hold a plain state dict of tensors: it is a {type(content).__name__}; wanted a dict"
        )
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            what = f"a tensor of {value.layout}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise CheckpointError(
                f"{path} does not hold a plain state dict of tensors: {name!r} is {what}; wanted tensors alone, or "
                f"a dict of them under {' or '.join(map(repr, WRAPPERS))}"
            )
    return content


def read_pickle(path: Path, allowed: bool) -> Any:
    """What a pickle holds, by PyTorch's restricted unpickler.

    Raises:
        CheckpointError: not allowed, damaged, or holding code.
    """
    _refuse_other_kinds(path, path)
    if path.suffix.lower() not in PICKLES:
        with path.open("rb") as file:
            start = file.read(2)
        if start[:1] != b"\x80" and start != b"PK":  # a pickle's own mark, or a zip's, in which torch puts it
            raise CheckpointError(f"{path} is no weights file; wanted a .safetensors file, or a {', '.join(PICKLES)}")
    if not allowed:
        raise CheckpointError(
            f"{path} is a pickle, which can run code when read; wanted safetensors. If you trust its author, pass "
            "allow_pickle=True: it is then read with PyTorch's restricted unpickler"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError... by the fault
        raise CheckpointError(
            f"{path} could not be read with the restricted unpickler{_wishes(path, error)}: {error}"
        ) from error


def _wishes(path: Path, error: Exception) -> str:
    """What a refused pickle wanted to import."""
    if not isinstance(error, pickle.UnpicklingError):
        return ""
    try:
        wanted = get_unsafe_globals_in_checkpoint(path)
    except Exception:  # the file is not even a torch archive
        return ""
    return f" (it asks for {', '.join(wanted)}, which is code)" if wanted else ""
