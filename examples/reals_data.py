"""The pictures of compare_reals.py: drawn scenes, or a labelled data set's, as folders of classes."""

import random
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import scenes
import torch
from data import center_transform, open_table, read_image
from PIL import Image
from scenes.compose import SHAPES, background, place
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

SIDE, GRID = 32, 8  # of pictures, in pixels, and of latents and features alike, in cells
HELD_OUT = 8  # one in so many combinations of what a scene shows is never trained on

Picture = tuple[Image.Image, str, Image.Image | None]  # picture, class, mask


def drawn(seed: int) -> Callable[[str], Iterator[Picture]]:
    """One thing of any colour, on one of nine places, before any background; its class is its shape.

    A combination of shape, colour, place and background belongs to one split, so that no held-out scene, of either
    size, has a twin among the training scenes.
    """

    def of_split(split: str) -> Iterator[Picture]:
        rng = random.Random(f"reals {split} {seed}")
        while True:
            thing = place(rng, rng.choice(list(scenes.COLOURS)), rng.choice(SHAPES), step=16)
            behind = background(rng)
            shown = f"{thing.colour} {thing.shape} at {thing.x} {thing.y} on {behind.name}"
            # a checksum, not a random generator: the same on every machine, and for every seed
            if (zlib.crc32(shown.encode()) % HELD_OUT == 0) != (split == "test"):
                continue
            scene = scenes.Scene((thing,), behind)
            picture = to_pil_image(scenes.draw(scene) * 0.5 + 0.5).resize((SIDE, SIDE), Image.Resampling.BOX)
            mask = Image.fromarray(scenes.class_map(scene).numpy().astype(np.uint8))
            yield picture, thing.shape, mask.resize((SIDE, SIDE), Image.Resampling.NEAREST)

    return of_split


def stored(data: Path, test_pictures: int, seed: int) -> Callable[[str], Iterator[Picture]]:
    """A data set's pictures, shuffled; of a single file, some are held out.

    Raises:
        SystemExit: it has no columns image and label.
    """
    import datasets

    tables: Any
    if data.is_file():
        table = datasets.Dataset.from_parquet(str(data))
        check_columns(data, table)
        tables = table.train_test_split(min(len(table) // 6, test_pictures), seed=seed)
    else:
        tables = {split: open_table(str(data), split).shuffle(seed=seed) for split in ("train", "test")}
        check_columns(data, tables["train"])
    transform = center_transform(SIDE)

    def of_split(split: str) -> Iterator[Picture]:
        for row in tables[split].cast_column("image", datasets.Image(decode=False)):
            yield to_pil_image(transform(read_image(row["image"])) * 0.5 + 0.5), str(row["label"]).zfill(3), None

    return of_split


def check_columns(data: Path, table: Any) -> None:
    if not {"image", "label"} <= set(table.column_names):
        raise SystemExit(f"{data} has the columns {', '.join(table.column_names)}; wanted image and label")


def prepare(root: Path, source: Callable[[str], Iterator[Picture]], counts: dict[str, int]) -> None:
    """``train`` and ``test`` with one folder per class; of scenes also ``images`` and ``masks``, those of test, and
    ``cells``: a class for each cell of the training pictures' grid, N 8 8, 0 for background."""
    if (root / "whole").exists():
        return
    for split, number in counts.items():
        cells: dict[str, np.ndarray] = {}
        pictures = zip(range(number), source(split), strict=False)
        for place_of, (picture, label, mask) in tqdm(pictures, f"{split} pictures", total=number):
            name = f"{place_of:05d}"
            save(picture, root / split / label / f"{name}.png")
            if mask is not None and split == "train":
                cells[f"{label}/{name}"] = np.asarray(mask.resize((GRID, GRID), Image.Resampling.NEAREST))
            elif mask is not None:
                save(picture, root / "images" / f"{name}.png")
                save(mask, root / "masks" / f"{name}.png")
        if cells:  # in the order of `labelled`
            np.save(root / "cells.npy", np.stack([cells[name] for name in sorted(cells)]))
    (root / "whole").touch()


def save(picture: Image.Image, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(file)


def classes_of(root: Path) -> list[str]:
    """Those of the training pictures, in order."""
    return sorted(folder.name for folder in (root / "train").iterdir())


def labelled(root: Path, split: str) -> tuple[Tensor, Tensor]:
    """All pictures ``N 3 H W`` in [-1, 1] and their classes ``N``."""
    files, classes = sorted((root / split).rglob("*.png")), classes_of(root)
    labels = torch.tensor([classes.index(file.parent.name) for file in files])
    return torch.stack([center_transform(SIDE)(read_image(file)) for file in files]), labels
