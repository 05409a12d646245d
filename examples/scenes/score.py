"""Scores as GenEval gives them: is what the prompt names in the picture; was the edit done, and nothing else."""

import math

from torch import Tensor

from .detector import Detection, Found, detect
from .edits import MARGIN, Edit, region
from .language import Prompt, Wanted
from .world import SIZE, Thing

NEAR = 8  # pixels between a thing and where it should be
PLAIN = 6  # pixels between two centres that make a relation true
HIGHEST_PSNR = 99.0  # of pictures that are equal


def score_prompt(image: Tensor, prompt: Prompt, exact: bool = False) -> bool:
    """Whether a picture, ``3 64 64`` in [-1, 1], shows what the prompt says; see `score_prompts`."""
    return score_prompts(image[None], [prompt], exact)[0]


def score_prompts(images: Tensor, prompts: list[Prompt], exact: bool = False) -> list[bool]:
    """Whether each of the pictures, ``B 3 64 64`` in [-1, 1], shows what its prompt says.

    As in GenEval, more things than were asked for do no harm, except where the prompt counts.

    Args:
        exact: nothing but what the prompt names may be there.
    """
    return [_shows(found, prompt, exact) for found, prompt in zip(detect(images), prompts, strict=True)]


def _shows(found: Detection, prompt: Prompt, exact: bool) -> bool:
    groups = [[thing for thing in found.things if _is(thing, wanted)] for wanted in prompt.wanted]
    for group, wanted in zip(groups, prompt.wanted, strict=True):
        if len(group) < wanted.count or (len(group) > wanted.count and (exact or wanted.count > 1)):
            return False
    if exact and len(found.things) != sum(wanted.count for wanted in prompt.wanted):
        return False
    if prompt.background and found.background != prompt.background:
        return False
    return prompt.relation is None or any(
        related(first, prompt.relation, second) for first in groups[0] for second in groups[1]
    )


def _is(thing: Found, wanted: Wanted) -> bool:
    return thing.shape == wanted.shape and wanted.colour in (None, thing.colour)


def related(thing: Found | Thing, relation: str, other: Found | Thing) -> bool:
    """Whether a relation is true of two centres."""
    dx, dy = thing.x - other.x, thing.y - other.y
    return {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation] >= PLAIN


def score_edit(source: Tensor, edited: Tensor, edit: Edit) -> tuple[bool, float]:
    """Whether the instruction was followed, and the PSNR (dB) of the rest against the source; see `score_edits`."""
    return score_edits(source[None], edited[None], [edit])[0]


def score_edits(sources: Tensor, edited: Tensor, edits: list[Edit]) -> list[tuple[bool, float]]:
    """(followed, PSNR of what should stay) of each edit; pictures are ``B 3 64 64`` in [-1, 1].

    Followed: what the instruction asks for is there, what it takes away is not, and every other thing still is. The
    PSNR is against the given source, over the pixels outside `region`; where the instruction leaves the place open
    (an addition), the place that was chosen counts.
    """
    scores = []
    for source, image, edit, found in zip(sources, edited, edits, detect(edited), strict=True):
        keep = ~region(edit)
        if edit.kind in ("add", "move") and edit.result is not None:
            for thing in found.things:
                if thing.kind == edit.target.things[edit.result].kind:
                    half = thing.size // 2 + 1 + MARGIN
                    keep[_around(thing.y, half), _around(thing.x, half)] = False
        error = (image.clamp(-1, 1).nan_to_num(1) - source)[:, keep].square().mean().item()
        psnr = min(10 * math.log10(4 / error), HIGHEST_PSNR) if error > 0 else HIGHEST_PSNR
        scores.append((_followed(found, edit), psnr))
    return scores


def _around(centre: int, half: int) -> slice:
    return slice(max(centre - half, 0), min(centre + half + 1, SIZE))


def _followed(found: Detection, edit: Edit) -> bool:
    if found.background != edit.target.background.name:
        return False
    others = [thing for number, thing in enumerate(edit.target.things) if number != edit.result]
    if not all(_near(found, thing) for thing in others):
        return False
    if edit.kind == "background":
        return True
    old = edit.source.things[edit.subject] if edit.subject is not None else None
    new = edit.target.things[edit.result] if edit.result is not None else None
    # How many of a kind there should be; "a red circle" may stand for several, and one of them is changed.
    for kind in {thing.kind for thing in (old, new) if thing}:
        if sum(thing.kind == kind for thing in found.things) != sum(thing.kind == kind for thing in edit.target.things):
            return False
    if new is None:
        return True
    if edit.kind == "add":
        places = [thing for thing in found.things if thing.kind == new.kind]
        if edit.relation is None:
            return bool(places)
        return any(related(thing, edit.relation, edit.source.things[edit.anchor]) for thing in places)
    return _near(found, new) is not None


def _near(found: Detection, thing: Thing) -> Found | None:
    """A detection of this kind, about where the thing is."""
    close = (f for f in found.things if f.kind == thing.kind and math.hypot(f.x - thing.x, f.y - thing.y) <= NEAR)
    return next(close, None)
