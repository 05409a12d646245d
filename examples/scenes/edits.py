"""Edits: a scene, an instruction, the scene that follows it, and the pixels that may change."""

import random
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from .compose import HELD_OUT, KINDS, SEEN, background, fits, holds, place, scatter, trainable
from .language import RELATIONS, SIDES
from .world import BACKGROUNDS, BOARD, COLOURS, SIZE, Scene, coverages

EDITS = ("recolour", "replace", "add", "remove", "move", "background")
MARGIN = 2  # pixels around what changes that may change too: an autoencoder blurs
_KEEPING = ("remove", "move", "background")  # edits that make no new combination


@dataclass(frozen=True)
class Edit:
    """A triple (source, instruction, target) and which things it is about.

    Attributes:
        subject: place in ``source.things`` of the thing that is changed, removed or moved.
        result: place in ``target.things`` of what comes of it, or of the added thing.
        anchor: of an addition, place in ``source.things`` of the thing that ``relation`` names.
        side: of a move, one of `SIDES`.
    """

    kind: str
    instruction: str
    source: Scene
    target: Scene
    subject: int | None = None
    result: int | None = None
    relation: str | None = None
    anchor: int | None = None
    side: str | None = None


def edit_example(seed: int, kind: str | None = None, held_out: bool = False) -> Edit:
    """One edit, a pure function of its arguments.

    Args:
        kind: one of `EDITS`, or any of them.
        held_out: with a combination that training never sees: in what a recolouring, replacement or addition makes,
            in the source of the others. Without it, source and target are both of the kind that training may see.
    """
    rng = random.Random(f"edit {kind} {held_out} {seed}")
    kind = kind or rng.choice(EDITS)
    if kind not in EDITS:
        raise ValueError(f"unknown edit {kind!r}; the edits are {', '.join(EDITS)}")
    while True:
        edit = _MAKERS[kind](rng, _source(rng, kind, held_out))
        if edit is None:
            continue  # no room for it in this source
        before, after = (trainable([thing.kind for thing in scene.things]) for scene in (edit.source, edit.target))
        if not held_out:
            fitting = before and after
        elif kind in _KEEPING:
            fitting = not before
        else:
            fitting = before and not after
        if fitting:
            return edit


def region(edit: Edit) -> Tensor:
    """``64 64``, bool: where the picture may change. Outside it, source and target are equal."""
    if edit.kind == "background":
        things = coverages(edit.source).max(axis=0) == 1
        return torch.from_numpy(~ndimage.binary_erosion(things, iterations=MARGIN))
    changed = np.zeros((SIZE, SIZE), bool)
    for scene, number in ((edit.source, edit.subject), (edit.target, edit.result)):
        if number is not None:
            changed |= coverages(scene)[number] > 0
    return torch.from_numpy(ndimage.binary_dilation(changed, iterations=MARGIN))


def _source(rng: random.Random, kind: str, held_out: bool) -> Scene:
    kinds = rng.sample(SEEN, rng.randint(1, 3))
    if held_out and kind in _KEEPING:
        kinds[0] = rng.choice(sorted(HELD_OUT))
    return scatter(rng, kinds)


def _subject(rng: random.Random, scene: Scene) -> int:
    """A thing to change; the held out one where there is one."""
    special = [number for number, thing in enumerate(scene.things) if thing.kind in HELD_OUT]
    return special[0] if special else rng.randrange(len(scene.things))


def _name(rng: random.Random, scene: Scene, number: int) -> str:
    """How an instruction speaks of a thing; now and then by its shape alone, where that is enough."""
    thing = scene.things[number]
    alone = sum(other.shape == thing.shape for other in scene.things) == 1
    return f"the {thing.shape}" if alone and rng.random() < 0.25 else f"the {thing.colour} {thing.shape}"


def _change(scene: Scene, number: int, **changes: object) -> Scene | None:
    """The scene with one thing changed, if that one still fits."""
    thing = replace(scene.things[number], **changes)
    others = scene.things[:number] + scene.things[number + 1 :]
    if not all(fits(thing, other) for other in others):
        return None
    return replace(scene, things=(*scene.things[:number], thing, *scene.things[number + 1 :]))


def _recolour(rng: random.Random, source: Scene) -> Edit | None:
    number = _subject(rng, source)
    colour = rng.choice([colour for colour in COLOURS if colour != source.things[number].colour])
    target = _change(source, number, colour=colour)
    said = f"make {_name(rng, source, number)} {colour}"
    return target and Edit("recolour", said, source, target, number, number)


def _replace(rng: random.Random, source: Scene) -> Edit | None:
    number = _subject(rng, source)
    thing = source.things[number]
    colour, shape = rng.choice([kind for kind in KINDS if kind[1] != thing.shape])
    target = _change(source, number, colour=colour, shape=shape)
    said = f"replace {_name(rng, source, number)} with a {colour} {shape}"
    return target and Edit("replace", said, source, target, number, number)


def _add(rng: random.Random, source: Scene) -> Edit | None:
    there = [thing.kind for thing in source.things]
    colour, shape = rng.choice([kind for kind in KINDS if kind not in there])
    thing = place(rng, colour, shape)
    if not all(fits(thing, other) for other in source.things):
        return None
    target, said = replace(source, things=(*source.things, thing)), f"add a {colour} {shape}"
    anchor = rng.randrange(len(there))
    relations = [relation for relation in RELATIONS if holds(thing, relation, source.things[anchor])]
    if not relations or rng.random() < 0.5:
        return Edit("add", said, source, target, result=len(there))
    said = f"{said} {relations[0]} {_name(rng, source, anchor)}"
    return Edit("add", said, source, target, result=len(there), relation=relations[0], anchor=anchor)


def _remove(rng: random.Random, source: Scene) -> Edit:
    number = _subject(rng, source)
    target = replace(source, things=source.things[:number] + source.things[number + 1 :])
    return Edit("remove", f"remove {_name(rng, source, number)}", source, target, number)


def _move(rng: random.Random, source: Scene) -> Edit | None:
    """Straight to one side of the picture, as far as it goes: one right answer."""
    number, side = _subject(rng, source), rng.choice(SIDES)
    thing = source.things[number]
    axis, goal = "x" if side in ("left", "right") else "y", BOARD[0] if side in ("left", "top") else BOARD[-1]
    target = _change(source, number, **{axis: goal}) if goal != getattr(thing, axis) else None
    said = f"move {_name(rng, source, number)} to the {side}"
    return target and Edit("move", said, source, target, number, number, side=side)


def _background(rng: random.Random, source: Scene) -> Edit:
    after = background(rng, [name for name in BACKGROUNDS if name != source.background.name])
    return Edit("background", f"change the background to {after.name}", source, replace(source, background=after))


_MAKERS = dict(zip(EDITS, (_recolour, _replace, _add, _remove, _move, _background), strict=True))
