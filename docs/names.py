"""Sphinx: what psvae's docstrings and signatures write, as Sphinx understands it.

- `DiagonalGaussian` in a docstring of `psvae.losses`, or `psvae.latents.DiagonalGaussian` in a signature, is
  `psvae.DiagonalGaussian`: the one documented object that ends so.
- An entry under "Attributes:" may name several, "mean, std: ...", which napoleon takes for a name with its type.
"""

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.nodes import make_refnode


def resolve(app: Sphinx, env: Any, node: Any, contnode: nodes.Element) -> nodes.Element | None:
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    objects = env.domains.python_domain.objects
    last = target.removeprefix("psvae.").split(".")
    for length in range(len(last), 0, -1):
        ending = "." + ".".join(last[-length:])
        found = [name for name, entry in objects.items() if name.endswith(ending) and not entry.aliased]
        if len(found) == 1:
            entry = objects[found[0]]
            return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, contnode, found[0])
    return None


def list_attributes(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """ "Attributes:" becomes a list, before napoleon sees it."""
    inside = False
    for number, line in enumerate(lines):
        if line == "Attributes:":
            inside, lines[number] = True, ":Attributes:"
        elif inside and line and not line.startswith(" "):
            inside = False
        elif inside and (match := re.fullmatch(r" {4}(\w+(?:, \w+)*): (.*)", line)):
            names = ", ".join(f"``{part}``" for part in match[1].split(", "))
            lines[number] = f"    - {names}: {match[2]}"
        elif inside and line:
            lines[number] = f"      {line.lstrip()}"


def readable(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, result: str | None
) -> Any:
    """A dataclass field with a default_factory says "<factory>", which Sphinx cannot parse."""
    return (signature or "").replace("<factory>", "...") or None, result


def skip(app: Sphinx, what: str, name: str, obj: Any, skipped: bool, options: Any) -> bool | None:
    """Fields of a NamedTuple say "Alias for field number 0": the class's Attributes say what they are."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("missing-reference", resolve)
    app.connect("autodoc-process-docstring", list_attributes, priority=400)
    app.connect("autodoc-process-signature", readable)
    app.connect("autodoc-skip-member", skip)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
