"""CIFAR-10 as tensors: from a folder in the Hugging Face parquet layout, or downloaded."""

import io
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from checkpoints import write_whole
from PIL import Image
from torch import Tensor

SIDE, CLASSES = 32, 10
DATASET = "uoft-cs/cifar10"
COLUMNS = (("image", "img"), ("label", "labels"))  # accepted names of each


class Split(NamedTuple):
    """Pictures ``N 3 32 32``, uint8, and their classes ``N``."""

    pictures: Tensor
    labels: Tensor

    def images(self, places: Tensor | slice) -> Tensor:
        """``B 3 32 32`` in [-1, 1]."""
        return to_images(self.pictures[places])


def to_images(pictures: Tensor) -> Tensor:
    return pictures.float() / 127.5 - 1


def load(data: Path | None, cache: Path) -> tuple[Split, Split]:
    """Train and test; decoded once, then read from ``cache``.

    Args:
        data: folder with train.parquet and test.parquet, or with ``train-*`` and ``test-*`` below it; None downloads.

    Raises:
        SystemExit: a split or a column is missing, pictures are of another size, or the cache is of other data.
    """
    train, test = (read(data, split, cache / f"{split}.npz") for split in ("train", "test"))
    return train, test


def source(data: Path | None, split: str) -> dict[str, int] | str:
    """Files of the split, by size in bytes; or the data set of the Hub."""
    if data is None:
        return DATASET
    found = {str(file.relative_to(data)): file.stat().st_size for file in files_of(data, split)}
    if not found:
        raise SystemExit(f"{data} has no {split}*.parquet; wanted CIFAR-10 in the Hugging Face layout, or --download")
    return found


def files_of(data: Path, split: str) -> list[Path]:
    return sorted(path for path in data.rglob("*.parquet") if path.name.startswith(split))


def read(data: Path | None, split: str, file: Path) -> Split:
    asked = json.dumps(source(data, split))
    if not file.exists():
        pictures, labels = decode(data, split)

        def save(partial: Path) -> None:
            with partial.open("wb") as opened:  # by name, numpy would add an ending
                np.savez(opened, pictures=pictures, labels=labels, source=asked)

        write_whole(file, save)
    with np.load(file) as content:
        before = str(content["source"]) if "source" in content else "other data"
        if before != asked:
            raise SystemExit(f"{file} was read from {before}, and {data or DATASET} is {asked}; take another --output")
        return Split(torch.from_numpy(content["pictures"]), torch.from_numpy(content["labels"]))


def decode(data: Path | None, split: str) -> tuple[np.ndarray, np.ndarray]:
    """uint8 ``N 3 32 32`` and int64 ``N``."""
    import datasets

    if data is None:
        table = datasets.load_dataset(DATASET, split=split)
    else:
        table = datasets.Dataset.from_parquet([str(file) for file in files_of(data, split)])
    names = [next((name for name in known if name in table.column_names), None) for known in COLUMNS]
    if None in names:
        wanted = " and ".join(" or ".join(known) for known in COLUMNS)
        raise SystemExit(f"the {split} split has columns {', '.join(table.column_names)}; wanted {wanted}")
    image, label = names
    encoded = table.select_columns([image, label]).cast_column(image, datasets.Image(decode=False))
    pictures = np.empty((len(encoded), 3, SIDE, SIDE), np.uint8)
    for place, row in enumerate(encoded):
        picture = Image.open(io.BytesIO(row[image]["bytes"])).convert("RGB")
        if picture.size != (SIDE, SIDE):
            raise SystemExit(f"picture {place} of {split} is {picture.size[0]} x {picture.size[1]}; wanted 32 x 32")
        pictures[place] = np.asarray(picture).transpose(2, 0, 1)
    return pictures, np.asarray(encoded[label], np.int64)
