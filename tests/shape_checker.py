"""What ``pytest --shapes`` puts around every function of psvae."""

from collections.abc import Callable
from typing import Any, Self

from beartype import beartype


def check(function: Callable[..., Any]) -> Any:
    """beartype, with two exceptions.

    A `Config` takes what JSON holds, lists for tuples, and checks its own fields. ``Self`` is understood by
    beartype on whole classes only.
    """
    if function.__qualname__.endswith("Config.__init__"):
        return function
    hints = function.__annotations__
    function.__annotations__ = {name: Any if hint is Self else hint for name, hint in hints.items()}
    return beartype(function)
