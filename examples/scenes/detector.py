"""Finds the shapes in a picture of a scene, by their known colours and outlines; nothing is learned.

A pixel at the edge of a red shape on white looks pink. So a pixel is not given to the nearest colour, but to the
colour whose mixture with the background explains it best; how much of it is in that mixture is the pixel's coverage,
and survives blur. Connected coverage is then compared with every shape in every size at every place nearby. What other
things cover is left out of the comparison, so a shape that is partly hidden is still itself.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from .world import BACKGROUNDS, COLOURS, SHAPES, SIZE, silhouette

LEAST_AREA = 60  # pixels; a cross of size 22 has 270
STRANGE = 0.25  # RGB distance from every mixture, from which on a pixel is no colour of ours
TEMPLATE_SIZES = range(18, 32, 2)
BLURS = (0.0, 1.0, 1.8, 2.6)  # a decoder's picture is never quite sharp
TAIL = 6  # pixels around a blob that still belong to it, where nothing else is nearer
SHIFT, WINDOW = 3, 43  # pixels searched around the middle of what is seen; side of the compared window
CONFIDENT = 0.75


@dataclass(frozen=True)
class Found:
    """A detected shape; ``confidence`` is its overlap with the drawn shape, 1 if they are equal."""

    shape: str
    colour: str
    x: int
    y: int
    size: int
    confidence: float

    @property
    def kind(self) -> tuple[str, str]:
        """(colour, shape)."""
        return self.colour, self.shape


@dataclass(frozen=True)
class Detection:
    """Everything found in one picture, most confident first."""

    things: tuple[Found, ...]
    background: str


def detect(images: Tensor, confident: float = CONFIDENT) -> list[Detection]:
    """What is in each picture.

    Args:
        images: ``B 3 64 64`` in [-1, 1].
        confident: leave out what looks less than this like any of the shapes.
    """
    if images.ndim != 4 or images.shape[1:] != (3, SIZE, SIZE):
        raise ValueError(f"images are {tuple(images.shape)}, wanted B 3 {SIZE} {SIZE}")
    found: list[Detection] = []
    for part in images.detach().float().cpu().split(128):
        pixels = ((part.clamp(-1, 1) + 1) / 2).nan_to_num(0.5)
        names, base = _backgrounds(pixels)
        colour, coverage = _coverage(pixels, base)
        found += [
            Detection(things, name) for things, name in zip(_things(colour, coverage, confident), names, strict=True)
        ]
    return found


def _backgrounds(pixels: Tensor) -> tuple[list[str], Tensor]:
    """The background's name, and its mean colour ``B 3``, in each picture."""
    palette = torch.tensor([*BACKGROUNDS.values(), *COLOURS.values()])
    flat = pixels.flatten(2).transpose(1, 2)
    nearest = torch.cdist(flat, palette).argmin(dim=2)
    counts = F.one_hot(nearest, len(palette))[..., : len(BACKGROUNDS)].sum(dim=1)
    best = counts.argmax(dim=1)
    mine = (nearest == best[:, None]).float()
    mean = (flat * mine[..., None]).sum(dim=1) / mine.sum(dim=1, keepdim=True).clamp(min=1)
    base = torch.where(mine.sum(dim=1, keepdim=True) > 0, mean, palette[best])
    return [list(BACKGROUNDS)[number] for number in best.tolist()], base


def _coverage(pixels: Tensor, base: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The best colour of each pixel, -1 for background, and the coverage by each colour: ``B H W``, ``B K H W``."""
    offsets = torch.tensor(list(COLOURS.values())) - base[:, None]  # B K 3
    above = pixels - base[:, :, None, None]
    squared = offsets.square().sum(dim=2)[:, :, None, None]
    coverage = (torch.einsum("bchw,bkc->bkhw", above, offsets) / squared).clamp(0, 1)
    # |above − coverage·offset|², opened up so that no B K 3 H W is needed
    cross = torch.einsum("bchw,bkc->bkhw", above, offsets)
    rest = above.square().sum(dim=1, keepdim=True) - 2 * coverage * cross + coverage.square() * squared
    rest = F.avg_pool2d(rest, 3, stride=1, padding=1, count_include_pad=False)  # neighbours vote against noise
    least, colour = rest.min(dim=1)
    covered = coverage.gather(1, colour[:, None])[:, 0]
    colour[(covered <= 0.5) | (least > STRANGE**2)] = -1
    return colour.numpy(), coverage.numpy()


@cache
def _templates() -> tuple[list[tuple[str, int, int, int]], Tensor, Tensor]:
    """Every (shape, size, dx, dy), sharp and blurred; its window and squared window, both ``WINDOW² templates``."""
    names, windows = [], []
    shifts = range(-SHIFT, SHIFT + 1)
    for shape in SHAPES:
        for size in TEMPLATE_SIZES:
            coverage = np.pad(silhouette(shape, size), WINDOW // 2)
            for blur in BLURS:
                wide = ndimage.gaussian_filter(coverage, blur) if blur else coverage
                for dy in shifts:
                    for dx in shifts:
                        top, left = ((len(wide) - WINDOW) // 2 - shift for shift in (dy, dx))
                        names.append((shape, size, dx, dy))
                        windows.append(wide[top : top + WINDOW, left : left + WINDOW].ravel())
    stacked = torch.from_numpy(np.stack(windows, axis=1))
    return names, stacked, stacked.square()


def _things(colour: np.ndarray, coverage: np.ndarray, confident: float) -> list[tuple[Found, ...]]:
    """The shapes in each picture of ``colour`` (B H W) and ``coverage`` (B K H W)."""
    flat = np.zeros((3, 3, 3), bool)
    flat[1] = ndimage.generate_binary_structure(2, 1)  # neighbours lie in the same picture
    blobs = np.zeros(colour.shape, np.int32)
    places: list[tuple[int, int, tuple[slice, ...]]] = []
    for number in range(len(COLOURS)):
        labels, count = ndimage.label(colour == number, flat)
        areas = np.bincount(labels.ravel(), minlength=count + 1)
        for blob, where in enumerate(ndimage.find_objects(labels), start=1):
            if areas[blob] >= LEAST_AREA:
                places.append((len(places) + 1, number, where))
                blobs[where][labels[where] == blob] = len(places)
    found: list[list[Found]] = [[] for _ in colour]
    if not places:
        return [() for _ in found]
    border = (WINDOW // 2, WINDOW // 2)
    padded = np.pad(blobs, ((0, 0), border, border), constant_values=-1)  # outside the picture anything may be
    nearest = np.pad(_cells(blobs), ((0, 0), border, border), constant_values=-1)
    covers = np.pad(coverage, ((0, 0), (0, 0), border, border))
    seen, known, middles = [], [], []
    for blob, number, (image, rows, columns) in places:
        y, x = (rows.start + rows.stop - 1) // 2, (columns.start + columns.stop - 1) // 2
        cut = (slice(y, y + WINDOW), slice(x, x + WINDOW))  # padded by half a window, so (y, x) is in its middle
        around, cells = padded[image.start][cut], nearest[image.start][cut]
        mine = around == blob
        other = ndimage.binary_dilation((around != 0) & ~mine)
        seen.append(covers[image.start, number][cut] * (cells == blob))
        known.append(mine | ((cells == blob) | (cells == 0)) & ~other)
        middles.append((image.start, number, x, y))
    for (image, number, x, y), (shape, size, dx, dy), overlap in _match(np.stack(seen), np.stack(known), middles):
        if overlap >= confident:
            found[image].append(Found(shape, list(COLOURS)[number], x + dx, y + dy, size, round(overlap, 3)))
    return [tuple(sorted(things, key=lambda thing: -thing.confidence)) for things in found]


def _cells(blobs: np.ndarray) -> np.ndarray:
    """The blob nearest to each pixel, 0 where none is within `TAIL`: ``B H W``."""
    cells = np.zeros_like(blobs)
    for cell, blob in zip(cells, blobs, strict=True):
        if blob.any():
            distance, (rows, columns) = ndimage.distance_transform_edt(blob == 0, return_indices=True)
            cell[:] = np.where(distance <= TAIL, blob[rows, columns], 0)
    return cells


def _match(seen: np.ndarray, known: np.ndarray, middles: list) -> list[tuple]:
    """The best template for each window: 2·seen·template / (seen² + template²), over the known pixels."""
    names, plain, squared = _templates()
    mask = torch.from_numpy(known).flatten(1).float()
    windows = torch.from_numpy(seen).flatten(1) * mask
    visible = mask @ squared
    overlap = 2 * (windows @ plain) / (windows.square().sum(dim=1, keepdim=True) + visible)
    # A template may not hide behind other things; of two that fit, the one that shows more is right.
    hidden = 1 - visible / squared.sum(dim=0)
    place = (overlap - 0.05 * hidden - (hidden > 0.5).float()).argmax(dim=1)
    overlap = overlap.gather(1, place[:, None])[:, 0]
    return list(zip(middles, (names[number] for number in place.tolist()), overlap.tolist(), strict=True))
