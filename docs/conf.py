"""The documentation site, built by `make docs` from the repository's own Markdown.

The source folder is the repository: README.md, examples/ and docs/ link to one another as they lie, so the same links
work on a code host and here. Links to files that are no pages lead to a page that shows the file (shown_files.py).
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))  # of the notebook

from shown_files import linkcode_resolve as linkcode_resolve  # noqa: E402

import psvae  # noqa: E402

project = "psvae"
author = "The psvae authors"
version = release = psvae.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.linkcode", "shown_files", "names"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**", "examples/**.md", "reproduction/README.md"]
exclude_patterns = [".*", "**/.*", "benchmarks", "docs/_build", "outputs", "psvae", "tests"]

html_theme = "furo"
html_title = f"psvae {release}"
html_copy_source = False
html_additional_pages = {"index": "to_index.html"}  # the pages keep the repository's folders: the first is docs/index
templates_path = ["_templates"]

myst_heading_anchors = 4  # those that code hosts give to headings
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 900  # of a cell, in seconds; on an idle core the whole takes less than 60

autodoc_default_options = {"exclude-members": "config_class"}
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # what torch says of `forward` says nothing here
default_role = "py:obj"  # docstrings name things of psvae in single backticks
napoleon_numpy_docstring = False
napoleon_use_rtype = False
maximum_signature_line_length = 100

nitpicky = True
nitpick_ignore_regex = [
    # other projects and the standard library: their inventories would need the network
    ("py:.*", r"(collections\.abc|diffusers|huggingface_hub|jaxtyping|os|timm|torch|transformers)\..*"),
    ("py:class", "Tensor"),  # inside jaxtyping's brackets
    ("py:obj", "FlowMatchEulerDiscreteScheduler|grid_positions"),
    # names that a reader need not look up: type variables, protocols, parts of a configuration
    ("py:class", r"psvae\.(adapt\.M|flow\.guidance\.(P|Prefix|Output)|latents\._Codec|nn\.rope\.RopeScaling)"),
]
