"""Images with their classes, or their cached latents: for train_sit.py, which reads either the same way.

Which image comes when, and whether it is mirrored, is a function of the seed and the position in the stream alone.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from cache_latents import (
    MANIFEST,
    NAMES,
    CachedLatents,
    Images,
    ImageSource,
    beside_classes,
    digest_of,
    shard_places,
    some,
)
from checkpoints import changed
from safetensors import safe_open
from sampling import generator_of, plain_errors
from sit import check_classes
from torch import Tensor
from torch.utils.data import Dataset

from psvae import PSVAE, PixelVAE
from psvae.adapt import latent_shape


@dataclass(frozen=True)
class LabelledOptions:
    """Where classes and images come from. SiT: ImageNet at 256 px, centre-cropped, half of it mirrored."""

    path: str
    """A folder of cache_latents.py, or of images with one subfolder per class, or a Hugging Face dataset."""
    split: str | None = None
    """Split of a Hugging Face dataset; without it `path` is a folder."""
    image_column: str = "image"
    label_column: str | None = "label"
    size: int = 256
    """Images are resized on their short side and centre-cropped to this. Not for cached latents."""
    classes: int | None = None
    """How many; None counts those of the data. 1 trains without classes, whatever the labels."""
    flip: bool = True
    """Mirror half of the images. A cache has one draw of each mirrored image, and with --moments a new one of each
    other at every step."""
    workers: int = 4
    """Loader processes on each training process."""


class Batch(NamedTuple):
    """Images ``B 3 H W`` in [-1, 1], or mean and log-variance ``B 2Z h w`` of cached latents."""

    content: Tensor
    labels: Tensor
    unreadable: list[str]


class Cached(Dataset):
    """(moments 2Z h w, label, []) of a folder of cache_latents.py, by (position in the stream, place)."""

    def __init__(self, options: LabelledOptions, seed: int) -> None:
        try:
            self.latents = CachedLatents(options.path)
        except FileNotFoundError as error:
            raise SystemExit(str(error)) from error
        self.options, self.seed = options, seed
        self.shape = tuple(self.latents[0][0].shape)

    def labels(self) -> list[int]:
        found: list[int] = []
        for file in sorted(Path(self.options.path).glob("latents_*.safetensors")):
            with safe_open(file, framework="pt") as shard:
                found += shard.get_tensor("labels").tolist()
        return found

    def without_class(self) -> list[str]:
        """Images that got class 0 because they lay beside the subfolders of all others."""
        file = self.latents.folder / NAMES
        names = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        kept = [place for places in shard_places(self.latents.manifest) for place in places if place < len(names)]
        return beside_classes([names[place] for place in kept])

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, list[str]]:
        position, place = key
        mirrored = mirrors(self.options, self.seed, position)
        if mirrored or not self.latents.manifest["moments"]:
            drawn = self.latents.stored(place, mirrored)
            moments = [drawn, torch.full_like(drawn, -30.0)]  # a posterior that gives itself
        else:
            moments = list(self.latents.moments(place))
        return torch.cat(moments).float(), class_of(self.latents.label(place), self.options), []


class LabelledPictures(Dataset):
    """(image 3 H W, label, what could not be read) by (position in the stream, place)."""

    def __init__(self, options: LabelledOptions, seed: int, vae: PSVAE | PixelVAE) -> None:
        self.options, self.seed = options, seed
        source = ImageSource(options.path, options.split, options.image_column, options.label_column, size=options.size)
        self.images = Images(source, "for a Hugging Face dataset name its --data.split")
        with plain_errors():
            self.shape = latent_shape(vae, options.size)
        found = (self.images[place][1] for place in range(len(self.images)))  # read up to the first that can be
        if not any(isinstance(image, Tensor) for image in found):
            raise SystemExit(
                f"none of the {len(self.images)} images of {options.path} can be read: {self.images[0][1]}; wanted one "
                "or more that can"
            )

    def labels(self) -> list[int]:
        if self.images.table is None:
            return self.images.labels
        return self.images.table["label"] if self.options.label_column else [0] * len(self.images)

    def without_class(self) -> list[str]:
        return self.images.without_class()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, list[str]]:
        position, start = key
        unreadable: list[str] = []
        for offset in range(len(self.images)):
            _, image, label = self.images[(start + offset) % len(self.images)]
            if isinstance(image, Tensor):
                image = image.flip(-1) if mirrors(self.options, self.seed, position) else image
                return image, class_of(label, self.options), unreadable
            unreadable.append(image)
        raise RuntimeError(f"none of the {len(self.images)} images can be read: {unreadable[0]}")


def mirrors(options: LabelledOptions, seed: int, position: int) -> bool:
    return options.flip and bool(torch.rand((), generator=generator_of(seed, position, "flip")) < 0.5)


def class_of(label: int, options: LabelledOptions) -> int:
    return 0 if options.classes == 1 else label


def open_data(options: LabelledOptions, seed: int, vae: PSVAE | PixelVAE) -> Cached | LabelledPictures:
    """Cached latents or pictures.

    Raises:
        SystemExit: there is no data, its latents are not this VAE's, or some have no class.
    """
    cached = (Path(options.path) / MANIFEST).exists()
    data = Cached(options, seed) if cached else LabelledPictures(options, seed, vae)
    channels, height, width = data.shape
    if channels != vae.config.latent_channels:
        raise SystemExit(
            f"{options.path} holds latents of {channels} channels, and the VAE makes {vae.config.latent_channels}: "
            "pass the --vae that they were cached with"
        )
    said = changed({"vae": data.latents.manifest["vae"]}, {"vae": digest_of(vae)}) if isinstance(data, Cached) else ""
    if said:
        raise SystemExit(f"{options.path} holds latents of another VAE ({said}): pass the --vae that cached them")
    lacking = [] if options.classes == 1 else data.without_class()
    if lacking:
        raise SystemExit(
            f"{options.path} has {len(lacking)} images without a class beside others that have one: {some(lacking)}. "
            f"Wanted each in a subfolder, or a label in each row{', and then a new cache' * cached}; --data.classes 1 "
            "trains without classes"
        )
    if height != width:
        raise SystemExit(f"{options.path} holds latents of {height} x {width}; diffusers' DiT takes squares")
    return data


def count_classes(labels: Iterable[int], options: LabelledOptions) -> int:
    """As asked for, or of the data.

    Raises:
        SystemExit: a label is out of range, or there is but one class and one was not asked for.
    """
    if options.classes == 1:
        return 1
    found = set(labels)
    if len(found) == 1:
        raise SystemExit(
            f"{options.path} has no labels, or one class alone: wanted one subfolder per class, or a Hugging Face "
            "dataset and its --data.label-column. --data.classes 1 trains without classes"
        )
    classes = max(found) + 1 if options.classes is None else options.classes
    check_classes(found, classes, "--data.classes")
    return classes


def collate(items: list[tuple[Tensor, int, list[str]]]) -> Batch:
    contents, labels, unreadable = zip(*items, strict=True)
    return Batch(torch.stack(contents), torch.tensor(labels), [name for names in unreadable for name in names])
