"""A small world of coloured shapes: scenes, captions, edits, and a detector that scores pictures of them."""

from .compose import HELD_OUT, HELD_OUT_PAIRS, TASKS, evaluation_prompts, example, scatter
from .detector import Detection, Found, detect
from .edits import EDITS, Edit, edit_example, region
from .language import EDIT_LENGTH, LENGTH, WORDS, Prompt, Wanted, decode, encode, encode_many, save_tokenizer
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
    "BACKGROUNDS", "COLOURS", "EDITS", "EDIT_LENGTH", "HELD_OUT", "HELD_OUT_PAIRS", "LENGTH", "SHAPES", "SIZE", "TASKS",
    "WORDS", "Background", "Detection", "Edit", "Found", "Prompt", "Scene", "Thing", "Wanted", "class_map", "decode",
    "depth_map", "detect", "draw", "draw_many", "edit_example", "encode", "encode_many", "evaluation_prompts",
    "example", "masks", "region", "save_tokenizer", "scatter", "score_edit", "score_edits", "score_prompt",
    "score_prompts",
]  # fmt: skip
