"""One way to configure: a frozen dataclass per module, checked field by field, stored as JSON.

A subclass only lists its fields with types and defaults, and overrides `Config.validate` for ranges.
Types are enforced at construction; lists from JSON become tuples; unknown keys raise and name the
nearest valid one.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from psvae.errors import ConfigError

__all__ = ["Config", "one_of"]

LARGEST = 2**31 - 1  # of whole numbers: no size of a tensor is larger


@dataclass(frozen=True)
class Config:
    """Base of every configuration: JSON-able, immutable, strict.

    Raises:
        ConfigError: a field has the wrong type or is out of range.
    """

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            where = f"{type(self).__name__}.{field.name}"
            value = _coerce(getattr(self, field.name), hints[field.name], where)
            object.__setattr__(self, field.name, value)  # frozen: this is the only write
        self.validate()

    def validate(self) -> None:
        """Check ranges and combinations. Called after types are known to be right."""

    def require(self, condition: bool, field: str, wanted: str) -> None:
        """Raise `ConfigError` naming ``field``, its value and what was wanted, unless ``condition``."""
        if not condition:
            raise ConfigError(f"{type(self).__name__}.{field} is {getattr(self, field)!r}; wanted {wanted}")

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, checked like a new one."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict: nested configurations become dicts, tuples become lists."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from `to_dict`'s output or parsed JSON.

        Raises:
            ConfigError: a key is unknown; the message names the nearest valid one.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [key for key in values if key not in known]
        if unknown:
            near = difflib.get_close_matches(unknown[0], known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"valid fields: {', '.join(known)}"
            raise ConfigError(f"{cls.__name__} has no field {unknown[0]!r}; {hint}")
        return cls(**values)


def one_of(name: str, value: Any, options: Any) -> None:
    """Require a choice that a `Literal` lists, where it is an argument and no field.

    Raises:
        ConfigError: another value.
    """
    if value not in typing.get_args(options):
        raise ConfigError(f"{name} is {value!r}; wanted {' or '.join(map(repr, typing.get_args(options)))}")


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _likely_first(options: tuple[Any, ...], value: Any) -> list[Any]:
    """Of several configurations, first the one whose fields the keys of ``value`` fit best."""

    def strangers(option: Any) -> int:
        if not (isinstance(value, Mapping) and isinstance(option, type) and issubclass(option, Config)):
            return 0
        return len(set(value) - {field.name for field in dataclasses.fields(option)})

    return sorted(options, key=strangers)


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """``value`` as the annotation ``hint`` wants it, or a `ConfigError` that names the field ``where``."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        for option in _likely_first(options, value):
            try:
                return _coerce(value, option, where)
            except ConfigError as error:
                if isinstance(option, type) and issubclass(option, Config) and isinstance(value, Mapping):
                    raise error  # the fault lies inside the nested configuration: say which
    elif origin is Literal:
        if value in options:
            return value
    elif origin is tuple and isinstance(value, list | tuple):
        kinds = options[:1] * len(value) if options[-1] is Ellipsis else options
        if len(kinds) == len(value):
            return tuple(_coerce(v, k, f"{where}[{i}]") for i, (v, k) in enumerate(zip(value, kinds, strict=True)))
    elif origin is dict and isinstance(value, Mapping):
        return {str(key): tuple(item) if isinstance(item, list) else item for key, item in value.items()}
    elif isinstance(hint, type) and issubclass(hint, Config) and isinstance(value, Mapping):
        return hint.from_dict(value)
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    elif hint is int and isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST:
        return value
    elif isinstance(hint, type) and hint not in (int, float) and origin is None and isinstance(value, hint):
        return value
    wanted = getattr(hint, "__name__", str(hint)) if origin is None else str(hint).replace("typing.", "")
    if isinstance(value, float) and not math.isfinite(value):
        wanted = "a finite number"
    elif hint is int and isinstance(value, int) and not isinstance(value, bool):
        wanted = f"a whole number up to {LARGEST}"
    raise ConfigError(f"{where} is {value!r}; wanted {wanted}")
