"""The words: what a prompt asks for, how it reads, and a tokenizer that splits at spaces."""

import difflib
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from .world import BACKGROUNDS, COLOURS, SHAPES

PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}
NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATIONS = ("left of", "right of", "above", "below")
SIDES = ("left", "right", "top", "bottom")
PAD = 0
WORDS = (
    "<pad>", "a", "the", "and", "of", "on", "to", "with", "background",
    "left", "right", "above", "below", "top", "bottom",
    "make", "replace", "add", "remove", "move", "change",
    *NUMBERS.values(), *COLOURS, *BACKGROUNDS, *SHAPES, *PLURALS.values(),
)  # fmt: skip
LENGTH, EDIT_LENGTH = 15, 9  # words of the longest caption and the longest instruction
_IDS = {word: place for place, word in enumerate(WORDS)}


@dataclass(frozen=True)
class Wanted:
    """So many shapes of one kind; no colour means any."""

    shape: str
    colour: str | None = None
    count: int = 1

    @property
    def text(self) -> str:
        words = [NUMBERS.get(self.count, "a"), self.colour, self.shape if self.count == 1 else PLURALS[self.shape]]
        return " ".join(word for word in words if word)


@dataclass(frozen=True)
class Prompt:
    """What a caption says, as data that a picture can be checked against.

    ``relation`` is between the first wanted thing and the second.
    """

    task: str
    wanted: tuple[Wanted, ...]
    relation: str | None = None
    background: str | None = None

    @property
    def text(self) -> str:
        said = (f" {self.relation} " if self.relation else " and ").join(wanted.text for wanted in self.wanted)
        return f"{said} on a {self.background} background" if self.background else said


def encode(text: str, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """Token ids and which of them are real, both ``length``; padded on the right."""
    ids = []
    for word in text.split():
        if word not in _IDS:
            near = difflib.get_close_matches(word, WORDS, n=1)
            raise ValueError(f"{word!r} is not in the vocabulary" + (f"; did you mean {near[0]!r}?" if near else ""))
        ids.append(_IDS[word])
    if len(ids) > length:
        raise ValueError(f"{text!r} is {len(ids)} words, more than length={length}")
    tokens = torch.full((length,), PAD)
    tokens[: len(ids)] = torch.tensor(ids)
    return tokens, torch.arange(length) < len(ids)


def encode_many(texts: list[str], length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """Ids and mask, both ``B length``."""
    ids, mask = zip(*(encode(text, length) for text in texts), strict=True)
    return torch.stack(ids), torch.stack(mask)


def decode(ids: Tensor) -> str:
    """The text of ``length`` token ids."""
    return " ".join(WORDS[place] for place in ids.tolist() if place != PAD)


def save_tokenizer(folder: Path) -> None:
    """As transformers reads it, so that generate.py and edit.py take prompts; an unknown word raises there too."""
    words = Tokenizer(models.WordLevel(_IDS))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token=WORDS[PAD]).save_pretrained(folder)
