"""`HubMixin`: ``from_pretrained``, ``save_pretrained`` and ``push_to_hub`` for every module.

A folder holds ``config.json``, ``model.safetensors`` (or shards with an index) and ``README.md``.
"""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch

from psvae.config import Config
from psvae.hub.cards import model_card
from psvae.hub.reading import Source, read_config, read_weights
from psvae.hub.writing import WEIGHT_PATTERNS, write_checkpoint

__all__ = ["HubMixin"]


class HubMixin:
    """Weights in and out, for an ``nn.Module`` built from one `Config`."""

    config_class: ClassVar[type[Config]]
    config: Any  # the subclass's own Config

    @classmethod
    def from_pretrained(
        cls,
        repo_or_folder: str | os.PathLike[str],
        *,
        revision: str | None = None,
        subfolder: str = "",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        local_files_only: bool = False,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        allow_pickle: bool = False,
    ) -> Self:
        """Load a saved module, strictly: every key and shape must match. Returned in eval mode.

        Args:
            repo_or_folder: a folder on disk, or a Hub id such as ``"org/name"``.
            revision: branch, tag or commit of the Hub repository; only a full commit hash is immutable.
            subfolder: of the folder or repository.
            dtype: of the floating-point weights, whatever the file holds.
            local_files_only: use the Hub's cache alone; ``HF_HUB_OFFLINE=1`` does the same.
            token, cache_dir: as in huggingface_hub.
            allow_pickle: where there is no safetensors file, read a ``.bin``, ``.pt``, ``.pth`` or ``.ckpt``
                with PyTorch's restricted unpickler. Off by default: pickles can run code.

        Raises:
            CheckpointError: not found, unreadable, of another class, or with missing, unexpected or
                mis-shaped keys, all listed.
            ConfigError: ``config.json`` has an unknown or invalid field.
        """
        source = Source(
            repo_or_folder, subfolder, revision=revision, local_files_only=local_files_only, token=token,
            cache_dir=cache_dir,
        )  # fmt: skip
        config = cls.config_class.from_dict(read_config(source, cls.__name__))
        with torch.device("meta"):
            model = cast(Any, cls)(config)
        weights = read_weights(source, model.state_dict(), dtype=dtype, device=device, allow_pickle=allow_pickle)
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
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Write config, weights and model card. A crash half-way leaves an older checkpoint there, of the
        same configuration, intact.

        Other files in the folder stay. A ``README.md`` that psvae did not write is kept. With several
        processes, call it on one.

        Args:
            max_shard_size: weights above it are split, such as ``"5GB"``.
            training_command: written into the card.
            metrics: measured numbers by name, written into the card.

        Raises:
            CheckpointError: the disk is full or the folder cannot be written.
        """
        module: Any = self
        card = model_card(module, training_command=training_command, metrics=metrics)
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
