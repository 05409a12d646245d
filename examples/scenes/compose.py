"""Scenes with their captions, each a pure function of a seed, and the combinations that training never sees."""

import random
import zlib
from collections import Counter
from collections.abc import Sequence
from itertools import combinations, product

from .language import RELATIONS, Prompt, Wanted
from .world import BACKGROUNDS, BOARD, CELL, COLOURS, SHAPES, SIZE, Background, Scene, Thing, reach

TASKS = ("single_object", "two_objects", "counting", "colour", "position", "colour_attribution")
Kind = tuple[str, str]  # (colour, shape)
KINDS: tuple[Kind, ...] = tuple(product(COLOURS, SHAPES))
# One colour per shape, so that each word is still learned from all the other combinations.
HELD_OUT: frozenset[Kind] = frozenset({
    ("red", "star"), ("blue", "triangle"), ("green", "circle"), ("yellow", "cross"), ("purple", "square"),
})  # fmt: skip
SEEN: tuple[Kind, ...] = tuple(kind for kind in KINDS if kind not in HELD_OUT)
SIZES = (22, 28)  # both stay inside a cell
MIX = {"single": 30, "two": 40, "counting": 20, "several": 10}  # of training scenes, in per cent
COLOURED, SETTING = 0.7, 0.6  # shares of training captions: that name colours; that name the background
# Things stand as the spots on a die, in the order in which the caption names them, on white if it names no background.
# So the words decide where each is, from pure noise on. With random places they do not, and once the noise has shown
# where, it has shown what as well: there was little left to learn from words.
NEAR, MIDDLE, FAR = BOARD[0], SIZE // 2, BOARD[-1]
SIDE_BY_SIDE, STACKED = ((NEAR, MIDDLE), (FAR, MIDDLE)), ((MIDDLE, NEAR), (MIDDLE, FAR))
SPOTS = {
    1: ((MIDDLE, MIDDLE),),
    2: SIDE_BY_SIDE,
    3: ((NEAR, NEAR), (FAR, NEAR), (MIDDLE, FAR)),
    4: ((NEAR, NEAR), (FAR, NEAR), (NEAR, FAR), (FAR, FAR)),
}
RELATED = {"left of": SIDE_BY_SIDE, "right of": SIDE_BY_SIDE[::-1], "above": STACKED, "below": STACKED[::-1]}


def _held_out_pair(first: Kind, second: Kind) -> bool:
    if first[0] == second[0] or first[1] == second[1]:
        return False
    # A checksum, not a random generator: the same one in eight on every machine and Python version.
    return zlib.crc32(" ".join(sorted(" ".join(kind) for kind in (first, second))).encode()) % 8 == 0


HELD_OUT_PAIRS: frozenset[frozenset[Kind]] = frozenset(
    frozenset(pair) for pair in combinations(SEEN, 2) if _held_out_pair(*pair)
)


def trainable(kinds: Sequence[Kind]) -> bool:
    """Whether training may see things of these kinds in one picture."""
    single = all(kind not in HELD_OUT for kind in kinds)
    return single and all(frozenset(pair) not in HELD_OUT_PAIRS for pair in combinations(kinds, 2))


def example(seed: int, task: str | None = None, held_out: bool = False) -> tuple[Scene, Prompt]:
    """A scene and what its caption says.

    Args:
        task: without one, a training example: one to four things, captions of every form. With one of `TASKS`, that
            task of GenEval: the prompt is what to evaluate, the scene shows one right answer to it.
        held_out: of a task, a combination that training never draws and never names. Colour and counting take a held
            out kind; position and colour attribution two kinds held out together; two objects a held out kind beside a
            shape of any colour; single object a held out kind before a named background.
    """
    rng = random.Random(f"example {task} {held_out} {seed}")
    if task is None:
        if held_out:
            raise ValueError("held_out=True needs a task: training examples hold no held out combination")
        return _training_example(rng)
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; the tasks are {', '.join(TASKS)}")
    return _task_example(rng, task, held_out)


def evaluation_prompts(task: str, count: int, held_out: bool = False, seed: int = 0) -> list[Prompt]:
    """``count`` prompts of one task; few texts exist for some tasks, so they may repeat."""
    return [example(seed * 1_000_003 + place, task, held_out)[1] for place in range(count)]


def _training_example(rng: random.Random) -> tuple[Scene, Prompt]:
    form = rng.choices(list(MIX), list(MIX.values()))[0]
    relation = rng.choice(RELATIONS) if form == "two" and rng.random() < 0.7 else None
    kinds: list[Kind] = []
    while not kinds or not trainable(kinds):
        if form == "single":
            kinds = [rng.choice(SEEN)]
        elif form == "two":
            kinds = rng.sample(SEEN, 2)
        elif form == "counting":
            kinds = _same_shape(rng, one_colour=rng.random() < 0.7)
        elif rng.random() < 0.5:
            kinds = rng.sample(SEEN, 3)
        else:
            kinds = [rng.choice(SEEN)] * rng.randint(2, 3) + [rng.choice(SEEN)]
    coloured = rng.random() < COLOURED and len(set(kinds)) <= 3  # four colours would be too many words
    groups = Counter((shape, colour if coloured else None) for colour, shape in kinds)
    if len(groups) < 2:
        relation = None  # two things that the words cannot tell apart
    named = sorted(kinds, key=lambda kind: list(groups).index((kind[1], kind[0] if coloured else None)))
    setting = rng.choice(list(BACKGROUNDS)) if rng.random() < SETTING else None
    wanted = tuple(Wanted(*kind, count) for kind, count in groups.items())
    return compose(rng, named, relation, setting), Prompt("caption", wanted, relation, setting)


def _same_shape(rng: random.Random, one_colour: bool) -> list[Kind]:
    shape, count = rng.choice(SHAPES), rng.randint(2, 4)
    colours = [colour for colour in COLOURS if (colour, shape) not in HELD_OUT]
    return [
        (colour, shape) for colour in (rng.choices(colours) * count if one_colour else rng.choices(colours, k=count))
    ]


def _task_example(rng: random.Random, task: str, held_out: bool) -> tuple[Scene, Prompt]:
    kinds = _task_kinds(rng, task, held_out)
    coloured = held_out or task in ("colour", "colour_attribution")
    relation = rng.choice(RELATIONS) if task == "position" else None
    setting = rng.choice(list(BACKGROUNDS)) if task == "single_object" and held_out else None
    wanted = [Wanted(shape, colour if coloured else None) for colour, shape in kinds]
    if task == "counting":
        wanted = [Wanted(wanted[0].shape, wanted[0].colour, len(kinds))]
    if task == "two_objects":
        wanted[1] = Wanted(wanted[1].shape)
    return compose(rng, kinds, relation, setting), Prompt(task, tuple(wanted), relation, setting)


def _task_kinds(rng: random.Random, task: str, held_out: bool) -> list[Kind]:
    """The kinds of a task's scene; in GenEval, two objects always differ in what they are."""
    first = rng.choice(sorted(HELD_OUT) if held_out else SEEN)
    if task in ("single_object", "colour"):
        return [first]
    if task == "counting":
        return [first] * rng.randint(2, 4)
    if task == "two_objects" and held_out:
        return [first, rng.choice([kind for kind in SEEN if kind[1] != first[1]])]
    if held_out:
        pair = sorted(rng.choice(_ORDERED_PAIRS))
        return rng.sample(pair, 2)
    while True:
        kinds = rng.sample(SEEN, 2)
        if trainable(kinds) and kinds[0][1] != kinds[1][1] and kinds[0][0] != kinds[1][0]:
            return kinds


_ORDERED_PAIRS = sorted(tuple(sorted(pair)) for pair in HELD_OUT_PAIRS)  # a set's order is not the same in every run


def compose(rng: random.Random, kinds: Sequence[Kind], relation: str | None, setting: str | None) -> Scene:
    """One to four things of these kinds, in the order of `SPOTS`; or two, the first in a relation to the second."""
    spots = SPOTS[len(kinds)] if relation is None else RELATED[relation]
    things = tuple(
        Thing(shape, colour, x, y, rng.choice(SIZES)) for (colour, shape), (x, y) in zip(kinds, spots, strict=True)
    )
    return Scene(things, background(rng, [setting or "white"]))


def scatter(rng: random.Random, kinds: Sequence[Kind], overlap: bool = False) -> Scene:
    """Things of these kinds on free cells of the board, in a random depth order.

    Args:
        overlap: leave the board, and let things of different colours cover a little of each other, so that depth
            order matters.
    """
    while True:
        things: list[Thing] = []
        for colour, shape in kinds:
            for _ in range(20):
                thing = place(rng, colour, shape, CELL // 4 if overlap else CELL)
                if all(fits(thing, other, overlap) for other in things):
                    things.append(thing)
                    break
            else:
                break  # no room is left: begin again
        if len(things) == len(kinds):
            break
    rng.shuffle(things)
    return Scene(tuple(things), background(rng))


def background(rng: random.Random, names: Sequence[str] = tuple(BACKGROUNDS)) -> Background:
    slope = (rng.uniform(-0.05, 0.05), rng.uniform(-0.05, 0.05))
    return Background(rng.choice(names), rng.uniform(-0.03, 0.03), slope)


def place(rng: random.Random, colour: str, shape: str, step: int = CELL) -> Thing:
    """A thing of any size on any cell; or with a smaller step, also between cells."""
    places = range(BOARD[0], BOARD[-1] + 1, step)
    return Thing(shape, colour, rng.choice(places), rng.choice(places), rng.choice(SIZES))


def fits(thing: Thing, other: Thing, overlap: bool = False) -> bool:
    """Whether two things are in cells of their own, or overlap a little where they may."""
    dx, dy = thing.x - other.x, thing.y - other.y
    if not overlap or thing.colour == other.colour:  # one colour over the same would be one blob
        return max(abs(dx), abs(dy)) >= CELL
    mine, others = reach(thing.shape, thing.size), reach(other.shape, other.size)
    return (dx**2 + dy**2) ** 0.5 - mine - others >= -0.35 * min(mine, others)


def holds(thing: Thing, relation: str, other: Thing) -> bool:
    """Whether a relation is plain: more along its axis than across."""
    dx, dy = thing.x - other.x, thing.y - other.y
    along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
    return along > abs(dy if relation in ("left of", "right of") else dx)
