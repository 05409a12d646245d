"""Scenes with their captions, each a pure function of a seed, and the combinations that training never sees."""

import random
import zlib
from collections import Counter
from collections.abc import Sequence
from itertools import combinations, product

from .language import RELATIONS, Prompt, Wanted
from .world import BACKGROUNDS, BOARD, CELL, COLOURS, SHAPES, Background, Scene, Thing, cell_name, reach

TASKS = ("single_object", "two_objects", "counting", "colour", "position", "colour_attribution")
Kind = tuple[str, str]  # (colour, shape)
KINDS: tuple[Kind, ...] = tuple(product(COLOURS, SHAPES))
# One colour per shape, so that each word is still learned from all the other combinations.
HELD_OUT: frozenset[Kind] = frozenset({
    ("red", "star"), ("blue", "triangle"), ("green", "circle"), ("yellow", "cross"), ("purple", "square"),
})  # fmt: skip
SEEN: tuple[Kind, ...] = tuple(kind for kind in KINDS if kind not in HELD_OUT)
SIZES = (22, 28)  # both stay inside a cell
APART = 14  # pixels between centres, along its axis, that make a relation plain
DENSE, COLOURED = 0.6, 0.7  # shares of training captions: that say where each thing is; that name colours
MIX = {"single": 35, "two": 35, "counting": 20, "several": 10}  # of training scenes, in per cent


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
    relation = rng.choice(RELATIONS) if form == "two" and rng.random() < 0.5 else None
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
    scene = arrange(rng, kinds, relation)
    if rng.random() < DENSE and len(kinds) < 4:
        return scene, _dense_caption(rng, scene)
    return scene, _caption(rng, kinds, relation, scene.background.name)


def _dense_caption(rng: random.Random, scene: Scene) -> Prompt:
    """Every thing with its cell. Without such captions, words are learned late: where a thing is, they do not say,
    and once the noise shows where, it shows what as well."""
    coloured = rng.random() < COLOURED
    wanted = [
        Wanted(thing.shape, thing.colour if coloured else None, cell=cell_name(thing.x, thing.y))
        for thing in scene.things
    ]
    rng.shuffle(wanted)
    return Prompt("caption", tuple(wanted), None, scene.background.name if rng.random() < 0.35 else None)


def _caption(rng: random.Random, kinds: list[Kind], relation: str | None, background: str) -> Prompt:
    """Everything that is in the scene; its colours, its relation and its background not always."""
    coloured = rng.random() < COLOURED and len(set(kinds)) <= 3  # four colours would be too many words
    groups = Counter((shape, colour if coloured else None) for colour, shape in kinds)
    wanted = [Wanted(*kind, count) for kind, count in groups.items()]
    if len(wanted) < 2:
        relation = None  # two things that the words cannot tell apart
    if relation is None:
        rng.shuffle(wanted)
    return Prompt("caption", tuple(wanted), relation, background if rng.random() < 0.35 else None)


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
    scene = arrange(rng, kinds, relation)
    wanted = [Wanted(shape, colour if coloured else None) for colour, shape in kinds]
    if task == "counting":
        wanted = [Wanted(wanted[0].shape, wanted[0].colour, len(kinds))]
    if task == "two_objects":
        wanted[1] = Wanted(wanted[1].shape)
    background = scene.background.name if task == "single_object" and held_out else None
    return scene, Prompt(task, tuple(wanted), relation, background)


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


def arrange(rng: random.Random, kinds: Sequence[Kind], relation: str | None = None, overlap: bool = False) -> Scene:
    """Things of these kinds at free places, in a random depth order.

    Args:
        relation: the first thing is there with respect to the second.
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
        if len(things) == len(kinds) and (relation is None or holds(things[0], relation, things[1])):
            break
    rng.shuffle(things)
    return Scene(tuple(things), background(rng))


def background(rng: random.Random, but: str | None = None) -> Background:
    """Any background, its name another than ``but``."""
    name = rng.choice([name for name in BACKGROUNDS if name != but])
    slope = (rng.uniform(-0.05, 0.05), rng.uniform(-0.05, 0.05))
    return Background(name, rng.uniform(-0.03, 0.03), slope)


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
    """Whether a relation is plain: far enough along its axis, and more along it than across."""
    dx, dy = thing.x - other.x, thing.y - other.y
    along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
    across = abs(dy if relation in ("left of", "right of") else dx)
    return along >= APART and along >= 1.2 * across
