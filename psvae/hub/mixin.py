"""`HubMixin`: ``from_pretrained``, ``save_pretrained`` and ``push_to_hub`` for every module.

A folder holds ``config.json``, ``model.safetensors`` (or shards with an index) and ``README.md``.
"""

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch

from psvae.config import Config
from psvae.errors import CheckpointError, ConfigError, PSVAEError
from psvae.hub.cards import model_card
from psvae.hub.formats import Format, same
from psvae.hub.reading import Checkpoint
from psvae.hub.source import CONFIG, LISTED, Source
from psvae.hub.writing import WEIGHT_PATTERNS, write_checkpoint

__all__ = ["HubMixin", "build_empty", "recognise"]

_log = logging.getLogger("psvae")

LAYER_COUNTS = ("depth", "num_res_blocks", "num_layers", "head_depth")  # fields, of ours and in timm's arguments


class HubMixin:
    """Weights in and out, for an ``nn.Module`` built from one `Config`."""

    config_class: ClassVar[type[Config]]
    foreign_formats: ClassVar[tuple[Format, ...]] = ()  # layouts of other projects that `from_pretrained` reads
    pipeline_tag: ClassVar[str | None] = None  # the Hub's name for the task, in the model card
    card_tags: ClassVar[tuple[str, ...]] = ()
    config: Any  # the subclass's own Config

    @classmethod
    def from_pretrained(
        cls,
        repo_or_folder: str | os.PathLike[str],
        *,
        revision: str | None = None,
        subfolder: str = "",
        file: str | None = None,
        variant: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        local_files_only: bool = False,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        allow_pickle: bool = False,
        **fields: Any,
    ) -> Self:
        """Load a saved module, strictly: every key and shape must match. Returned in eval mode.

        Layouts of other projects that the class knows (docs/checkpoints.md) are recognised from ``config.json``
        and the names in the weights; which one it was is logged under ``psvae``.

        Args:
            repo_or_folder: a folder on disk, a weights file, a model of the package (``"psvae-tiny"``), or a Hub id
                such as ``"org/name"``.
            revision: branch, tag or commit of the Hub repository; only a full commit hash is immutable.
            subfolder: of the folder or repository.
            file: name of the weights file, where it is not a standard one.
            variant: such as ``"fp16"``, where the weights file's name carries one.
            dtype: of the floating-point weights, whatever the file holds.
            local_files_only: use the Hub's cache alone; ``HF_HUB_OFFLINE=1`` does the same.
            token, cache_dir: as in huggingface_hub.
            allow_pickle: where there is no safetensors file, read a ``.bin``, ``.pt``, ``.pth`` or ``.ckpt``
                with PyTorch's restricted unpickler. Off by default: pickles can run code.
            **fields: fields of the configuration to set over those of the file.

        Raises:
            CheckpointError: not found, unreadable, of another class, or with missing, unexpected or
                mis-shaped keys, all listed.
            ConfigError: ``config.json`` has an unknown or invalid field.
        """
        if "torch_dtype" in fields:
            raise ConfigError(
                "torch_dtype came; the argument is called dtype here, as in transformers since 4.56: use dtype="
            )
        source = Source(
            repo_or_folder, subfolder, revision=revision, local_files_only=local_files_only, token=token,
            cache_dir=cache_dir,
        )  # fmt: skip
        checkpoint = Checkpoint(source, file=file, variant=variant, allow_pickle=allow_pickle)
        layout = recognise(cls, checkpoint)
        values = checkpoint.own_config() if layout is None else layout.read_config(checkpoint.config, checkpoint.header)
        config = cls.config_class.from_dict({**values, **fields})
        model = build_empty(cls, config, checkpoint)
        expected = model.state_dict()
        if layout is None:
            rules, ignored = same(list(expected)), ()
        else:
            ours, header = config.to_dict(), checkpoint.header
            rules, ignored = layout.rules(list(expected), ours, header), layout.unneeded(ours, header)
            left_out = layout.left_out(header, rules, ours)
            more = f" and {len(left_out) - LISTED} more" if len(left_out) > LISTED else ""
            _log.info(
                "%s is a checkpoint of %s%s; not needed: %s%s",
                source, layout.name, layout.remark(header), left_out[:LISTED] or "nothing", more,
            )  # fmt: skip
        weights = checkpoint.read(expected, rules, ignored=ignored, dtype=dtype, device=device)
        model.load_state_dict(weights, strict=True, assign=True)
        for module in model.modules():
            if hasattr(module, "_fill_constant_buffers"):
                module._fill_constant_buffers(device)
        return model.to(device=device, dtype=dtype).eval()

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        max_shard_size: str | int = "5GB",
        training_command: str | None = None,
        training_data: str | None = None,
        metrics: Mapping[str, float] | None = None,
        license: str | None = None,
    ) -> None:
        """Write config, weights and model card. A crash half-way leaves an older checkpoint there, of the
        same configuration, intact.

        Other files in the folder stay. A ``README.md`` that psvae did not write is kept. With several
        processes, call it on one.

        Args:
            max_shard_size: weights above it are split, such as ``"5GB"``.
            training_command, training_data: written into the card: how the weights were made, and from what.
            metrics: measured numbers by name, written into the card.
            license: of the weights, as the Hub names it, such as ``"apache-2.0"``.

        Raises:
            CheckpointError: the disk is full or the folder cannot be written.
        """
        module: Any = self
        card = model_card(
            module, training_command=training_command, training_data=training_data, metrics=metrics, license=license
        )
        config = {"_class": type(self).__name__, **self.config.to_dict()}
        write_checkpoint(Path(folder), config, module.state_dict(), card, max_shard_size)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload with psvae",
        **save_options: Any,
    ) -> str:
        """Create the repository if needed and upload what `save_pretrained` writes, in place of older weights.

        A ``README.md`` there that psvae did not write is kept.

        Args:
            **save_options: arguments of `save_pretrained`.

        Returns:
            The address of the commit.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            if api.file_exists(repo_id, "README.md", revision=revision):  # kept by `save_pretrained` if not ours
                api.hf_hub_download(repo_id, "README.md", revision=revision, local_dir=folder)
            self.save_pretrained(folder, **save_options)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message,
                delete_patterns=WEIGHT_PATTERNS,  # an older single file would be read before new shards
            )
        return str(commit)


def build_empty(cls: type[HubMixin], config: Config, checkpoint: Checkpoint) -> Any:
    """The module without weights, on the meta device, if the checkpoint can hold as many layers.

    Raises:
        ConfigError: a module of more layers than there are tensors, or of tensors that no memory can hold.
    """
    for name, value in _layer_counts(config.to_dict()):
        if not isinstance(value, int) or value > len(checkpoint.header):  # building them would take for ever
            raise ConfigError(
                f"the configuration of {checkpoint.source} has {name} {value!r}; wanted a number of layers, and the "
                f"weights have {len(checkpoint.header)} tensors in all"
            )
    try:
        with torch.device("meta"):
            return cast(Any, cls)(config)
    except PSVAEError:
        raise
    except RuntimeError as error:  # even a tensor without memory has a largest size
        raise ConfigError(f"the configuration of {checkpoint.source} cannot be built: {error}") from error


def _layer_counts(values: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    """What a configuration says of how many layers are built, at any depth of nesting."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _layer_counts(value, f"{where}{name}.")
        elif name in LAYER_COUNTS:
            yield where + name, value


def recognise(cls: type[HubMixin], checkpoint: Checkpoint) -> Format | None:
    """The foreign layout of a checkpoint, or None if psvae wrote it for this class. Reads no tensors.

    Raises:
        CheckpointError: of another class, or of no layout that the class reads.
    """
    name, source, config = cls.__name__, checkpoint.source, checkpoint.config
    saved = None if config is None else config.get("_class")
    if saved == name:
        return None
    if saved is not None:
        raise CheckpointError(f"{source} holds a {saved}; wanted a {name}: use {saved}.from_pretrained")
    if not cls.foreign_formats:
        if config is None:
            raise CheckpointError(f"{source} has no {CONFIG}; {source.listing()}")
        raise CheckpointError(f"{source}/{CONFIG} has no '_class': it was not written by psvae's save_pretrained")
    for layout in cls.foreign_formats:
        if layout.recognise(config, checkpoint.header):
            return layout
    what = "no config.json" if config is None else f"a config.json of {_kind_of(config)}"
    known = ", ".join(layout.name for layout in cls.foreign_formats)
    raise CheckpointError(
        f"{source} has {what} and weights named like {', '.join(list(checkpoint.header)[:3]) or 'nothing'}; "
        f"{name} reads psvae's own folders and those of {known}"
    )


def _kind_of(config: Mapping[str, Any]) -> str:
    kinds = (config.get(key) for key in ("_class_name", "model_type", "architecture"))
    return next((repr(kind) for kind in kinds if isinstance(kind, str)), "an unknown kind")
