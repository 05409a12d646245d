"""What a scene is, and how it is drawn: coloured shapes on a soft background, 64 by 64 pixels.

Everything is whole pixels: ``x`` to the right, ``y`` down, both of the centre. So one silhouette per shape and size
is drawn finely, once, and a scene is a few blends: thousands of scenes per second.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

SIZE = 64
# Things fill cells of this size: coarse on purpose, so that a small model learns them in minutes.
CELL = 32
BOARD = range(CELL // 2, SIZE, CELL)  # of centres, on both axes
SHAPES = ("circle", "square", "triangle", "star", "cross")
# Any two colours of the eleven, shapes' and backgrounds', are at least 0.4 apart in RGB, so that a blurred or noisy
# picture still says which one it is.
COLOURS = {
    "red": (0.88, 0.12, 0.12),
    "green": (0.13, 0.60, 0.22),
    "blue": (0.13, 0.28, 0.88),
    "yellow": (0.99, 0.86, 0.10),
    "purple": (0.50, 0.10, 0.70),
    "cyan": (0.20, 0.80, 0.90),
    "pink": (0.99, 0.40, 0.70),
}
BACKGROUNDS = {
    "white": (0.94, 0.94, 0.94),
    "grey": (0.50, 0.50, 0.50),
    "black": (0.09, 0.09, 0.09),
    "beige": (0.86, 0.76, 0.60),
}
# Distance from the centre to the farthest point, in units of the size.
REACH = {"circle": 0.50, "square": 0.63, "triangle": 0.66, "star": 0.55, "cross": 0.53}
FINE = 8  # sub-pixels per pixel and axis


@dataclass(frozen=True)
class Thing:
    """One coloured shape. ``size`` is about its height."""

    shape: str
    colour: str
    x: int
    y: int
    size: int

    @property
    def kind(self) -> tuple[str, str]:
        """(colour, shape): what a caption can say of it."""
        return self.colour, self.shape

    @property
    def label(self) -> int:
        """Its class among the 35 kinds: shape major, colour minor."""
        return SHAPES.index(self.shape) * len(COLOURS) + list(COLOURS).index(self.colour)


@dataclass(frozen=True)
class Background:
    """A named colour, a little lighter or darker, changing a little from side to side."""

    name: str
    shade: float = 0.0
    slope: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Scene:
    """Things from back to front, before a background."""

    things: tuple[Thing, ...]
    background: Background

    @property
    def labels(self) -> tuple[int, ...]:
        """One class per thing, back to front."""
        return tuple(thing.label for thing in self.things)


def reach(shape: str, size: float) -> float:
    """Radius of the circle around the centre that holds the shape."""
    return REACH[shape] * size


@cache
def silhouette(shape: str, size: int) -> np.ndarray:
    """Coverage of each pixel in [0, 1], float32, odd and square, the centre in its middle pixel."""
    half = int(np.ceil(reach(shape, size)))
    fine = (np.arange((2 * half + 1) * FINE) + 0.5) / FINE - half - 0.5
    x, y = np.meshgrid(fine / size, fine / size)
    if shape == "circle":
        inside = x**2 + y**2 <= 0.25
    elif shape == "square":
        inside = np.maximum(abs(x), abs(y)) <= 0.44
    elif shape == "triangle":
        inside = (y <= 0.42) & (abs(x) <= 0.5 * (y + 0.52) / 0.94)
    elif shape == "star":
        inside = _star(x, y, outer=0.55, inner=0.25)
    elif shape == "cross":
        inside = (np.minimum(abs(x), abs(y)) <= 0.17) & (np.maximum(abs(x), abs(y)) <= 0.5)
    else:
        raise ValueError(f"unknown shape {shape!r}; the shapes are {', '.join(SHAPES)}")
    side = 2 * half + 1
    coverage = inside.reshape(side, FINE, side, FINE).mean(axis=(1, 3)).astype(np.float32)
    coverage.flags.writeable = False  # shared by every caller
    return coverage


def _star(x: np.ndarray, y: np.ndarray, outer: float, inner: float) -> np.ndarray:
    """Five points, one up. Folded into one tenth of the turn, its edge is one straight line."""
    angle = np.arctan2(x, -y) % (2 * np.pi / 5)
    angle = np.minimum(angle, 2 * np.pi / 5 - angle)
    radius = np.hypot(x, y)
    along, across = radius * np.cos(angle), radius * np.sin(angle)
    tip, notch = np.array([outer, 0.0]), inner * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
    edge = notch - tip
    return edge[0] * (across - tip[1]) - edge[1] * (along - tip[0]) >= 0


def _window(thing: Thing) -> tuple[slice, slice, np.ndarray]:
    """Rows, columns and coverage of a thing, cut at the picture's edge."""
    coverage = silhouette(thing.shape, thing.size)
    half = coverage.shape[0] // 2
    top, left = thing.y - half, thing.x - half
    rows = slice(max(top, 0), min(top + len(coverage), SIZE))
    columns = slice(max(left, 0), min(left + len(coverage), SIZE))
    return rows, columns, coverage[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]


_RAMP = np.linspace(-0.5, 0.5, SIZE, dtype=np.float32)


def draw(scene: Scene) -> Tensor:
    """The picture, ``3 64 64`` in [-1, 1]."""
    back = scene.background
    light = back.shade + back.slope[0] * _RAMP[None, :] + back.slope[1] * _RAMP[:, None]
    image = np.clip(np.asarray(BACKGROUNDS[back.name], np.float32)[:, None, None] + light, 0.0, 1.0)
    for thing in scene.things:
        rows, columns, coverage = _window(thing)
        colour = np.asarray(COLOURS[thing.colour], np.float32)[:, None, None]
        # In this form, a pixel that is covered wholly keeps no trace of what is below.
        image[:, rows, columns] = image[:, rows, columns] * (1 - coverage) + colour * coverage
    return torch.from_numpy(image * 2.0 - 1.0)


def draw_many(scenes: list[Scene]) -> Tensor:
    """The pictures, ``B 3 64 64`` in [-1, 1]."""
    return torch.stack([draw(scene) for scene in scenes])


def coverages(scene: Scene) -> np.ndarray:
    """How much of each pixel each thing covers, hidden or not: ``things 64 64`` in [0, 1]."""
    full = np.zeros((len(scene.things), SIZE, SIZE), np.float32)
    for plane, thing in zip(full, scene.things, strict=True):
        rows, columns, coverage = _window(thing)
        plane[rows, columns] = coverage
    return full


def depth_map(scene: Scene) -> Tensor:
    """``64 64``: 0 on the background, then 1, 2, ... from the rearmost thing to the foremost."""
    depth = np.zeros((SIZE, SIZE), np.int64)
    for place, plane in enumerate(coverages(scene), start=1):
        depth[plane > 0.5] = place
    return torch.from_numpy(depth)


def masks(scene: Scene) -> Tensor:
    """The visible pixels of each thing, ``things 64 64``, bool; no pixel belongs to two."""
    return depth_map(scene) == torch.arange(1, len(scene.things) + 1)[:, None, None]


def class_map(scene: Scene) -> Tensor:
    """``64 64``: 0 on the background, 1 + the place in `SHAPES` on a shape; the target of a segmentation head."""
    table = torch.tensor([0, *(1 + SHAPES.index(thing.shape) for thing in scene.things)])
    return table[depth_map(scene)]
