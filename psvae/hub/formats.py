"""What a foreign checkpoint layout is: how to recognise it, its configuration, and its key map.

A key map is written once, from our keys to theirs; the other direction is read off the same rules.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from psvae.errors import CheckpointError

__all__ = ["Format", "Header", "Rule", "same"]

Json = Mapping[str, Any]
Header = Mapping[str, tuple[int, ...]]


def _stack(*parts: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _split(names: tuple[str, ...], tensor: Tensor) -> dict[str, Tensor]:
    return dict(zip(names, tensor.chunk(len(names)), strict=True)) if names else {}


@dataclass(frozen=True)
class Rule:
    """How one tensor of ours is made of theirs, and theirs of it.

    Attributes:
        theirs: names in the file. Several are stacked on the first axis, as q, k, v are to qkv. None at all:
            ``load`` makes the tensor.
        load: their tensors → ours. It also runs on meta tensors: that is how shapes are checked before reading.
        save: (names, our tensor) → their tensors by name.
    """

    theirs: tuple[str, ...]
    load: Callable[..., Tensor] = _stack
    save: Callable[[tuple[str, ...], Tensor], dict[str, Tensor]] = _split


def same(keys: Sequence[str]) -> dict[str, Rule]:
    """The key map of our own format."""
    return {key: Rule((key,)) for key in keys}


@dataclass(frozen=True)
class Format:
    """One foreign layout, as pure functions of its ``config.json`` (or None) and its header (names and shapes).

    Attributes:
        name: as said to people, such as ``"diffusers AutoencoderKL"``.
        recognise: is it this layout?
        read_config: the fields of our configuration.
        rules: (our keys, our configuration as a dict, their header) → a `Rule` for each key.
        ignored: beginnings of their names that are known and not needed: losses, heads. A function of our
            configuration and their header where the configuration decides: blocks after the last one kept.
        write_config: our configuration as a dict → theirs; None where nothing writes this layout.
        remark: what people should know of the file with these names, beside the layout's name.
    """

    name: str
    recognise: Callable[[Json | None, Header], bool]
    read_config: Callable[[Json | None, Header], dict[str, Any]]
    rules: Callable[[Sequence[str], Json, Header], dict[str, Rule]]
    ignored: tuple[str, ...] | Callable[[Json, Header], tuple[str, ...]] = ()
    write_config: Callable[[Json], dict[str, Any]] | None = None
    remark: Callable[[Header], str] = lambda header: ""

    def holds(self, config: Json) -> bool:
        """Can this layout say our configuration?"""
        if self.write_config is None:
            return False
        try:
            self.write_config(config)
        except CheckpointError:
            return False
        return True

    def save(self, state: Mapping[str, Tensor], config: Json, header: Header) -> dict[str, Tensor]:
        """Our tensors → theirs, both by name."""
        theirs: dict[str, Tensor] = {}
        for key, rule in self.rules(list(state), config, header).items():
            theirs |= rule.save(rule.theirs, state[key])
        return theirs

    def needed(self, rules: Mapping[str, Rule]) -> list[str]:
        """Their names that the rules read, once each."""
        return list(dict.fromkeys(name for rule in rules.values() for name in rule.theirs))

    def unneeded(self, config: Json, header: Header) -> tuple[str, ...]:
        """Beginnings of their names that our configuration does not need."""
        return self.ignored if isinstance(self.ignored, tuple) else self.ignored(config, header)

    def left_out(self, header: Header, rules: Mapping[str, Rule], config: Json | None = None) -> list[str]:
        """Their names that are known and not needed."""
        needed, ignored = set(self.needed(rules)), self.unneeded(config or {}, header)
        return [name for name in header if name not in needed and name.startswith(ignored or ("\0",))]
