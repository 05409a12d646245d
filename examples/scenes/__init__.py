"""A small world of coloured shapes: scenes, captions, edits, and a detector that scores pictures of them."""

from .compose import CELL, HELD_OUT, HELD_OUT_PAIRS, TASKS, evaluation_prompts, example, trainable
from .detector import Detection, Found, detect
from .edits import EDITS, Edit, edit_example, region
from .language import EDIT_LENGTH, LENGTH, PAD, START, WORDS, Prompt, Wanted, decode, encode, encode_many
from .score import score_edit, score_edits, score_prompt, score_prompts
from .world import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZE,
    Background,
    Scene,
    Thing,
    class_map,
    depth_map,
    draw,
    draw_many,
    masks,
)

__all__ = [
    "BACKGROUNDS", "CELL", "COLOURS", "EDITS", "EDIT_LENGTH", "HELD_OUT", "HELD_OUT_PAIRS", "LENGTH", "PAD", "SHAPES",
    "SIZE", "START", "TASKS", "WORDS", "Background", "Detection", "Edit", "Found", "Prompt", "Scene", "Thing",
    "Wanted", "class_map", "decode", "depth_map", "detect", "draw", "draw_many", "edit_example", "encode",
    "encode_many", "evaluation_prompts", "example", "masks", "region", "score_edit", "score_edits", "score_prompt",
    "score_prompts", "trainable",
]  # fmt: skip
