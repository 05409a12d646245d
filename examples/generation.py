"""How well a generator learns a VAE's latents: a small SiT trained in them for a while, and its pictures.

For compare_reals.py and the KL sweep of train_reals.py: the same recipe for every VAE, so that the spaces are compared
and nothing else. What is finished below `output` is not made again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cache_latents
import numpy as np
import sample_sit
import torch
import train_sit
from accelerate import Accelerator, PartialState
from cache_latents import CachedLatents, Images, ImageSource
from checkpoints import accelerator_for
from frechet import warned_distance
from labelled import LabelledOptions
from sit import STATISTICS
from torch import Tensor

BATCH = 128


@dataclass(frozen=True, kw_only=True)
class Options:
    """A tiny SiT (4 blocks of width 192), without guidance."""

    vae: Path
    """Folder of the VAE, with its mean_std.json."""
    data: Path
    """Pictures to learn, one subfolder per class."""
    output: Path
    """latents/, sit/ and samples.npz are written below it."""
    size: int
    """Side of the pictures, in pixels."""
    steps: int
    """Of training."""
    count: int
    """Pictures to make, of all classes in turn."""
    flip: bool = False
    """Learn mirrored pictures too."""
    workers: int = 0
    """Loader processes on each process; 0 reads in the program itself."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "bf16"
    seed: int = 0


def generate(options: Options) -> Tensor:
    """Pictures ``N 3 H W`` in [-1, 1] of a SiT trained in the VAE's latents; ``n`` is of class n modulo their number.

    All processes call it and share the work.
    """
    processes = Accelerator(mixed_precision=options.mixed_precision).num_processes  # a program's first decides for all
    vae, latents = str(options.vae), options.output / "latents"
    model, made = options.output / "sit", options.output / "samples"
    if not (model / "model" / STATISTICS).exists():  # which is written last
        cache_latents.main(
            cache_latents.Options(
                str(options.data), size=options.size, vae=vae, output=latents, moments=True, workers=options.workers
            )
        )
        side = CachedLatents(latents)[0][0].shape[-1]
        asked = train_sit.Options(
            data=LabelledOptions(str(latents), flip=options.flip, workers=options.workers), vae=vae, output=model,
            model="tiny/2", patch_size=2 if side % 2 == 0 else 1, steps=options.steps,
            batch_size=-(-BATCH // processes) * processes, lr=1e-3, warmup=min(100, options.steps), final_lr=0.02,
            clip=1.0, ema=0.99, mixed_precision=options.mixed_precision, seed=options.seed, resume=True,
            sample_every=10**9, checkpoint_every=max(1, options.steps // 3), tracker="none",
        )  # fmt: skip
        # not train_sit.main, which ends the group of processes
        train_sit.Training(asked, accelerator_for(asked, asked.mixed_precision)).run()
    sample_sit.main(
        sample_sit.Options(
            model=str(model / "model"), vae=vae, output=made, count=options.count, balanced=True, solver="heun",
            steps=12, batch_size=128, seed=options.seed,
        )
    )  # fmt: skip
    PartialState().wait_for_everyone()
    with np.load(made.with_suffix(".npz")) as content:
        return torch.from_numpy(content["arr_0"]).permute(0, 3, 1, 2) / 127.5 - 1


@torch.no_grad()
def distance(real: Tensor, made: Tensor, read: Callable[[Tensor], Tensor]) -> float:
    """The Fréchet distance of features of pictures ``N 3 H W`` in [-1, 1].

    Args:
        read: a batch of them → features ``B D``.
    """
    return warned_distance(
        *(torch.cat([read(part).double().cpu() for part in pictures.split(128)]) for pictures in (real, made))
    )


def check_labelled(folder: Path, size: int) -> None:
    """Before anything is trained.

    Raises:
        SystemExit: its pictures do not lie in one subfolder per class.
    """
    otherwise = "a SiT learns classes, from one subfolder each"
    names = Images(ImageSource(str(folder), size=size), otherwise).names
    classes, beside = {name.partition("/")[0] for name in names if "/" in name}, sum("/" not in name for name in names)
    if len(classes) < 2 or beside:
        raise SystemExit(
            f"{folder} has {len(classes)} subfolders with pictures and {beside} pictures beside them; a SiT learns "
            "classes: wanted one subfolder per class, two or more, and nothing beside them"
        )
