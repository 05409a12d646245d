"""A segmentation head fitted on a teacher's features of labelled pictures, and measured on latents' (mean IoU).

downstream.py's `--fit-head` does it.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import UNREADABLE, center_transform, image_files, read_image
from heads import SegmentationHead, fit_segmentation_head
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchmetrics.classification import MulticlassJaccardIndex
from torchvision.transforms import InterpolationMode, v2

from psvae import SemanticEncoder

INDEX_MODES = {"1", "L", "P", "I", "I;16"}  # of PIL: one number per pixel


class Labelled(Dataset):
    """(image ``3 H W`` in [-1, 1], mask ``H W`` of class numbers) by place.

    Args:
        folder: holds images/ and masks/ of the same names.
        classes: numbers in the masks are below it; None counts them.
    """

    def __init__(self, folder: Path, size: int, classes: int | None = None, ignore: int = 255) -> None:
        self.folder = folder
        images, masks = (by_name(folder / part) for part in ("images", "masks"))
        if odd := sorted(set(images) ^ set(masks)):
            raise SystemExit(
                f"{folder} has {len(images)} pictures in images/ and {len(masks)} in masks/; without a partner: "
                f"{', '.join(odd[:5])}{' and more' * (len(odd) > 5)}; wanted both, of the same names"
            )
        self.pairs, self.ignore = [(images[name], masks[name]) for name in images], ignore
        largest = [self._largest(*pair, classes) for pair in self.pairs]  # all, before a run that one would stop
        self.classes = classes or 1 + max(largest)
        self.transform = center_transform(size)
        cut = {"interpolation": InterpolationMode.NEAREST}
        self.cut = v2.Compose([v2.Resize(size, **cut), v2.CenterCrop(size)])

    def _largest(self, image: Path, mask: Path, classes: int | None) -> int:
        numbers = np.asarray(read_mask(mask))
        try:
            with Image.open(image) as picture:
                wanted = read_image(picture).size[::-1]
        except UNREADABLE as error:
            raise SystemExit(f"{image} cannot be read: {error}") from error
        if numbers.shape != wanted:
            raise SystemExit(f"{mask} has {numbers.shape} pixels (rows, columns); wanted its picture's, {wanted}")
        labels = [int(label) for label in np.unique(numbers) if label != self.ignore]
        wrong = [label for label in labels if label < 0 or (classes is not None and label >= classes)]
        if wrong:
            numbered = "0 or more" if classes is None else f"0 to {classes - 1}"
            raise SystemExit(
                f"{mask} has the label {wrong[0]}; wanted {numbered}, or {self.ignore} for no class: see --classes and "
                "--ignore"
            )
        return max(labels, default=0)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        image, mask = self.pairs[place]
        return self.transform(read_image(image)), torch.from_numpy(
            np.asarray(self.cut(read_mask(mask))).astype(np.int64)
        )


def by_name(folder: Path) -> dict[str, Path]:
    """The pictures below a folder, by their relative paths without the ending, in order.

    Raises:
        SystemExit: there is no such folder, or nothing in it.
    """
    folder = folder.absolute()
    files = sorted(image_files(folder, "labelled pictures are a folder of images/ and masks/ of the same names"))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}


def read_mask(file: Path) -> Image.Image:
    """One number per pixel."""
    try:
        with Image.open(file) as opened:
            mask = opened.copy()
    except UNREADABLE as error:
        raise SystemExit(f"{file} cannot be read: {error}") from error
    if mask.mode not in INDEX_MODES:
        raise SystemExit(f"{file} has colours (mode {mask.mode}); wanted an index PNG, one class number per pixel")
    return mask


def features_of(encode: Callable[[Tensor], Tensor], batches: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """(features, masks) of (images, masks)."""
    for images, masks in batches:
        with torch.no_grad():
            features = encode(images)
        yield features, masks


def split(count: int, one_in: int, seed: int) -> tuple[list[int], list[int]]:
    """Places to fit to and places to hold out; the same for the same number of pictures and seed."""
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = count // one_in
    return sorted(drawn[held_out:]), sorted(drawn[:held_out])


def fit(
    labelled: Labelled,
    teacher: SemanticEncoder,
    latent_features: Callable[[Tensor], Tensor],
    *,
    one_in: int,
    steps: int,
    lr: float,
    batch_size: int,
    workers: int,
    seed: int,
) -> tuple[SegmentationHead, list[Path], dict[str, float]]:
    """A head of the teacher's features; the held-out pictures, and how well it does there on either's features.

    Args:
        latent_features: images ``B 3 H W`` → the features that are read from their latents.
        one_in: one picture in so many is held out.
        workers: loader processes.
        seed: of the split, the head's first weights and the order.

    Raises:
        SystemExit: there are too few pictures to hold one out.
    """
    fitted, held_out = split(len(labelled), one_in, seed)
    if not held_out:
        raise SystemExit(
            f"{labelled.folder} has {len(labelled)} labelled pictures, too few to hold out one in {one_in}"
        )
    loading = {"batch_size": batch_size, "num_workers": workers}
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    shuffled = DataLoader(Subset(labelled, fitted), shuffle=True, generator=order, **loading)
    head = fit_segmentation_head(
        features_of(on(teacher), chain.from_iterable(repeat(shuffled))), teacher.feature_dim, labelled.classes,
        steps, lr, labelled.ignore, teacher.mean.device,
    )  # fmt: skip
    rest = DataLoader(Subset(labelled, held_out), **loading)
    scores = {
        "miou_teacher": mean_iou(head, features_of(on(teacher), rest), labelled),
        "miou_latents": mean_iou(head, features_of(latent_features, rest), labelled),
    }
    scores |= {"classes": labelled.classes, "fitted": len(fitted), "held_out": len(held_out)}
    return head, [labelled.pairs[place][0] for place in held_out], scores


def on(teacher: SemanticEncoder) -> Callable[[Tensor], Tensor]:
    return lambda images: teacher(images.to(teacher.mean.device))


@torch.no_grad()
def mean_iou(head: SegmentationHead, batches: Iterable[tuple[Tensor, Tensor]], labelled: Labelled) -> float:
    """Over the classes that are in the masks or in what is said of them."""
    metric = MulticlassJaccardIndex(labelled.classes, ignore_index=labelled.ignore)
    for features, masks in batches:
        metric.update(head(features, tuple(masks.shape[-2:])).argmax(dim=1).cpu(), masks)
    return float(metric.compute())
