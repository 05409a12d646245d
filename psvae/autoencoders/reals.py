"""ReaLS on the disk: a VAE that diffusers opens, the alignment network beside it, the statistics of its latents.

- ``vae/``: ``config.json``, ``diffusion_pytorch_model.safetensors``, ``mean_std.json``, as in the authors' folder
- ``alignment/``: ``config.json``, ``model.safetensors``

One mean and one std are all that is applied to these latents: scaling is 1 and shift 0, whatever the VAE came with.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from psvae.alignment import AlignmentNet
from psvae.autoencoders.pixel_vae import PixelVAE
from psvae.errors import CheckpointError, ConfigError
from psvae.hub.exporting import export
from psvae.hub.keymaps.autoencoder_kl import AUTOENCODER_KL
from psvae.hub.source import CONFIG, Source
from psvae.hub.statistics import MEAN_STD, load_latent_statistics, write_mean_std

__all__ = ["ReaLS", "load_reals", "save_reals"]

_UNSCALED = {"scaling_factor": 1.0, "shift_factor": None}


class ReaLS(NamedTuple):
    """A VAE, and what reads features from its latents.

    Attributes:
        vae: image ↔ latent. Its ``latent_spec`` holds the statistics, for the caller to apply.
        alignment: latent → features. Its ``latent_spec`` holds the same.
    """

    vae: PixelVAE
    alignment: AlignmentNet


def save_reals(folder: str | os.PathLike[str], vae: PixelVAE, alignment: AlignmentNet | None) -> None:
    """Write both, and ``mean_std.json`` from ``vae.latent_spec``; ``alignment.latent_spec`` is given the same numbers.

    Args:
        alignment: None for a plain VAE: ``vae/`` alone is written.

    Raises:
        ConfigError: the two have another latent, or the statistics were not measured. CheckpointError: the folder
            cannot be written.
    """
    if alignment is not None:
        _same_latent(vae, alignment)
    root = Path(folder)
    (root / "vae").mkdir(parents=True, exist_ok=True)
    mean, std = write_mean_std(vae.latent_spec, root / "vae" / MEAN_STD)
    each = {"latents_mean": (mean,) * vae.latent_spec.channels, "latents_std": (std,) * vae.latent_spec.channels}
    config = vae.config.replace(**_UNSCALED, **each)
    export(vae, AUTOENCODER_KL, root / "vae", config=config, stem="diffusion_pytorch_model", max_shard_size="10GB")
    if alignment is not None:
        load_latent_statistics(alignment.latent_spec, root / "vae" / MEAN_STD)
        alignment.save_pretrained(root / "alignment")


def load_reals(
    repo_or_folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **hub_options: Any,
) -> ReaLS:
    """Load what `save_reals` wrote, from a folder or the Hub.

    The authors' own release has no alignment network: ``PixelVAE.from_pretrained(folder, scaling_factor=1.0)`` reads
    it, and ``load_latent_statistics(vae.latent_spec, folder / "mean_std.json")`` its statistics.

    Args:
        **hub_options: ``local_files_only``, ``token`` and ``cache_dir``, as of `HubMixin.from_pretrained`.

    Raises:
        CheckpointError: a part is missing or is not what it should be. ConfigError: the two have another latent.
    """
    where = {"local_files_only": False, "token": None, "cache_dir": None, **hub_options}
    parts = {name: Source(repo_or_folder, name, revision=revision, **where) for name in ("vae", "alignment")}
    for part in parts.values():
        if part.find(CONFIG) is None:
            raise CheckpointError(
                f"{part} has no {CONFIG}; wanted vae/ and alignment/, as save_reals writes them. A VAE alone is read "
                "by PixelVAE.from_pretrained"
            )
    statistics = parts["vae"].find(MEAN_STD)
    if statistics is None:
        raise CheckpointError(
            f"{parts['vae']} has no {MEAN_STD}, without which a generator's latents cannot be read; measure it with "
            "psvae.fit_latent_statistics(vae, batches) and save both again with save_reals"
        )
    load = {"revision": revision, "dtype": dtype, "device": device, **where}
    vae = PixelVAE.from_pretrained(repo_or_folder, subfolder="vae", **load, **_UNSCALED)
    alignment = AlignmentNet.from_pretrained(repo_or_folder, subfolder="alignment", **load)
    _same_latent(vae, alignment)
    for module in (vae, alignment):
        load_latent_statistics(module.latent_spec, statistics)
    return ReaLS(vae, alignment)


def _same_latent(vae: PixelVAE, alignment: AlignmentNet) -> None:
    ours = (alignment.config.latent_channels, alignment.config.stride)
    theirs = (vae.latent_spec.channels, vae.latent_spec.stride)
    if ours != theirs:
        raise ConfigError(
            f"the alignment network reads latents of (channels, stride) {ours} and the VAE makes {theirs}; wanted the "
            "same: they belong to two models"
        )
