"""ReaLS on the disk: a VAE that diffusers opens, the alignment network beside it, the statistics of its latents.

- ``vae/``: ``config.json``, ``diffusion_pytorch_model.safetensors``, ``mean_std.json``, as in the authors' folder; in
  psvae's own layout where AutoencoderKL cannot be that VAE, such as one with a larger decoder than encoder
- ``alignment/``: ``config.json``, ``model.safetensors``

One mean and one std are all that is applied to these latents: scaling is 1 and shift 0, whatever the VAE came with.
``mean_std.json`` is what counts. Both parts hold the two numbers as well, which tells parts of two saves.
"""

import copy
import os
from pathlib import Path
from typing import NamedTuple

import torch

from psvae.alignment import AlignmentNet
from psvae.autoencoders.pixel_vae import PixelVAE
from psvae.errors import CheckpointError, ConfigError
from psvae.hub.exporting import export
from psvae.hub.keymaps.autoencoder_kl import AUTOENCODER_KL
from psvae.hub.source import CONFIG, Source
from psvae.hub.statistics import MEAN_STD, load_latent_statistics, pooled_statistics, write_mean_std

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
    """Write both with one mean and one std, those of ``vae.latent_spec`` over all channels and cells.

    Both modules are left as they are: ``vae.latent_spec`` keeps its numbers per channel, ``alignment.latent_spec``
    whatever it has. `load_reals` gives the pair with the two numbers that were written. Each part is replaced as a
    whole; after a crash between the two, `load_reals` refuses the folder.

    Args:
        alignment: None for a plain VAE: ``vae/`` alone is written.

    Raises:
        ConfigError: ``vae`` is no PixelVAE, the two have another latent, or the statistics were not measured.
        CheckpointError: the folder cannot be written, or there is an older ``alignment/`` that a plain VAE would be
            paired with.
    """
    root = Path(folder)
    if not isinstance(vae, PixelVAE):
        raise ConfigError(
            f"vae came as {type(vae).__name__}; wanted a PixelVAE: open the folder of a diffusers VAE with "
            "PixelVAE.from_pretrained(folder), then measure it with fit_latent_statistics"
        )
    if alignment is not None:
        _same_latent(vae, alignment)
    elif (root / "alignment" / CONFIG).exists():
        raise CheckpointError(
            f"{root} holds alignment/, of another VAE, and none came to replace it; wanted a folder without one: "
            "choose another, or delete alignment/ if it is no longer needed"
        )
    mean, std = pooled_statistics(vae.latent_spec)
    each = {"latents_mean": (mean,) * vae.latent_spec.channels, "latents_std": (std,) * vae.latent_spec.channels}
    config = vae.config.replace(**_UNSCALED, **each)
    if AUTOENCODER_KL.holds(config.to_dict()):
        export(vae, AUTOENCODER_KL, root / "vae", config=config, stem="diffusion_pytorch_model", max_shard_size="10GB")
    else:
        own = copy.deepcopy(vae)
        own.config = config
        own.latent_spec.float().mean.fill_(mean)
        own.latent_spec.std.fill_(std)
        own.save_pretrained(root / "vae")
    write_mean_std(vae.latent_spec, root / "vae" / MEAN_STD)
    if alignment is not None:
        written = copy.deepcopy(alignment)
        written.latent_spec.float()  # bf16 would round the two numbers, and the parts would no longer agree
        load_latent_statistics(written.latent_spec, root / "vae" / MEAN_STD)
        written.save_pretrained(root / "alignment")


def load_reals(
    repo_or_folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str = "",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    local_files_only: bool = False,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> ReaLS:
    """Load what `save_reals` wrote, from a folder or the Hub, both parts from one commit.

    The authors' own release has no alignment network: ``PixelVAE.from_pretrained(folder, scaling_factor=1.0)`` reads
    it, and ``load_latent_statistics(vae.latent_spec, folder / "mean_std.json")`` its statistics.

    Args:
        subfolder: of the folder or repository, in which vae/ and alignment/ are.
        revision, dtype, device, local_files_only, token, cache_dir: as in `HubMixin.from_pretrained`.

    Raises:
        CheckpointError: a part is missing, is not what it should be, or is of another save.
        ConfigError: the two have another latent.
    """
    where = {"local_files_only": local_files_only, "token": token, "cache_dir": cache_dir}
    places = [f"{subfolder}/{name}".lstrip("/") for name in ("vae", "alignment")]
    for place in places:
        source = Source(repo_or_folder, place, revision=revision, **where)
        if source.find(CONFIG) is None:
            raise CheckpointError(
                f"{source} has no {CONFIG}; wanted vae/ and alignment/, as save_reals writes them. A VAE alone is read "
                "by PixelVAE.from_pretrained"
            )
        revision = source.hub_options["revision"]  # the commit, even if the branch moves meanwhile
    source = Source(repo_or_folder, places[0], revision=revision, **where)
    statistics = source.find(MEAN_STD)
    if statistics is None and source.unseen:
        raise CheckpointError(
            f"{MEAN_STD} of {source} is not in the local cache and the Hub cannot be reached: go online once, or pass "
            "a local folder"
        )
    if statistics is None:
        raise CheckpointError(
            f"{source} has no {MEAN_STD}, without which a generator's latents cannot be read; measure it with "
            "psvae.fit_latent_statistics(vae, batches) and save both again with save_reals"
        )
    load = {"revision": revision, "dtype": dtype, "device": device, **where}
    vae = PixelVAE.from_pretrained(repo_or_folder, subfolder=places[0], **load, **_UNSCALED)
    alignment = AlignmentNet.from_pretrained(repo_or_folder, subfolder=places[1], **load)
    _same_latent(vae, alignment)
    if not all(a.equal(b) for a, b in zip(vae.latent_spec.buffers(), alignment.latent_spec.buffers(), strict=True)):
        raise CheckpointError(
            f"vae/ and alignment/ of {str(Path(repo_or_folder, subfolder))!r} have different statistics; wanted the "
            "same: they were not saved together, so they may be of two models. Save both again with save_reals"
        )
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
