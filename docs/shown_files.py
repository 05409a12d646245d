"""Sphinx: a link to a file or folder of the repository that is no page leads to a page that shows it.

On a code host the same link opens the file. Python, configuration and other text is highlighted; a folder is listed.
"[source]" in the API leads to such pages too.
"""

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx import addnodes
from sphinx.application import Sphinx

PLACE = "source"  # of the pages
ROOT = Path(__file__).parents[1]


def relink(app: Sphinx, doctree: nodes.document) -> None:
    """MyST takes such links for downloads (files) or does not know them (folders)."""
    docname = app.env.docname
    shown = app.env.psvae_shown.setdefault(docname, set())  # type: ignore[attr-defined]
    links = [*doctree.findall(addnodes.download_reference), *doctree.findall(addnodes.pending_xref)]
    for link in links:
        if link.get("reftype") != "myst" or link.get("refdomain") is not None:
            continue
        path = Path(app.env.relfn2path(link["reftarget"], docname)[1])
        if not path.exists() or not path.is_relative_to(app.srcdir):
            continue  # MyST will complain
        name = path.relative_to(app.srcdir).as_posix()
        shown.add(name)
        uri = app.builder.get_relative_uri(docname, f"{PLACE}/{name}")
        link.replace_self(nodes.reference("", "", *link.children, refuri=uri, internal=True))


def pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    linked = set().union(*app.env.psvae_shown.values())  # type: ignore[attr-defined]
    package = {path.relative_to(app.srcdir).as_posix() for path in Path(app.srcdir, "psvae").glob("**/*.py")}
    for name in sorted(linked | package):
        path = Path(app.srcdir) / name
        if path.is_dir():
            inside = sorted(child.name + "/" * child.is_dir() for child in path.iterdir() if child.name[:2] != "__")
            text, lexer = "\n".join(inside), TextLexer()
        else:
            text = path.read_text(encoding="utf-8")
            try:
                lexer = get_lexer_for_filename(name)
            except ClassNotFound:
                lexer = TextLexer()
        body = f"<h1>{name}</h1>{highlight(text, lexer, HtmlFormatter(lineanchors='line'))}"
        yield f"{PLACE}/{name}", {"title": name, "body": body}, "page.html"


def linkcode_resolve(domain: str, info: dict[str, str]) -> str | None:
    """Sphinx's linkcode: where "[source]" leads, from a page in docs/api/."""
    found: Any = importlib.import_module(info["module"])
    for name in info["fullname"].split("."):
        found = getattr(found, name, None)
    found = inspect.unwrap(found.fget if isinstance(found, property) else found)
    try:
        path, line = Path(inspect.getfile(found)), inspect.getsourcelines(found)[1]
    except (TypeError, OSError):  # a constant, or what dataclass made
        return None
    return f"../../{PLACE}/{path.relative_to(ROOT).as_posix()}.html#line-{line}" if path.is_relative_to(ROOT) else None


def prepare(app: Sphinx) -> None:
    if not hasattr(app.env, "psvae_shown"):
        app.env.psvae_shown = {}  # type: ignore[attr-defined]


def forget(app: Sphinx, env: Any, docname: str) -> None:
    env.psvae_shown.pop(docname, None)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", prepare)
    app.connect("env-purge-doc", forget)
    app.connect("doctree-read", relink, priority=100)  # before Sphinx copies downloads
    app.connect("html-collect-pages", pages)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
