"""The documentation site: what it must hold, and (slow) that it builds without a warning and its links lead somewhere.

`make docs` also runs the notebook; here it is left unrun.
"""

import json
import os
import posixpath
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

import psvae
from psvae import adapt, flow, losses
from psvae.integrations import comfyui

ROOT = Path(__file__).parents[1]
API = "\n".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs" / "api").glob("*.rst")))
NOTEBOOK = json.loads((ROOT / "docs" / "tour.ipynb").read_text(encoding="utf-8"))
MODULES = {"psvae.flow": flow, "psvae.losses": losses, "psvae.adapt": adapt, "psvae.integrations.comfyui": comfyui}


def test_every_public_name_is_on_a_page():
    documented = set(re.findall(r"^\.\. auto\w+:: (\S+)", API, re.MULTILINE))
    wanted = {f"psvae.{name}" for name in psvae.__all__ if name != "__version__"}
    wanted |= {"psvae.AutoencoderPSVAE", "psvae.AutoencoderPixelVAE", *MODULES}
    assert wanted - documented == set()


def test_the_notebook_is_kept_without_outputs():
    cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 5
    assert [cell["outputs"] for cell in cells] == [[]] * len(cells)
    assert {cell["execution_count"] for cell in cells} == {None}
    assert {"kernelspec", "language_info"} >= NOTEBOOK["metadata"].keys()


def test_the_notebook_is_python():
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            compile("".join(cell["source"]), cell["id"], "exec")


def test_the_notebook_links_to_files():
    text = "".join(line for cell in NOTEBOOK["cells"] if cell["cell_type"] == "markdown" for line in cell["source"])
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    assert targets
    assert [target for target in targets if not (ROOT / "docs" / target).exists()] == []


class Links(HTMLParser):
    """What a page links to, and the anchors that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: set[str] = set()
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors |= {found[key] or "" for key in ("id", "name") if key in found}
        self.targets |= {found[key] or "" for key in ("href", "src") if key in found}


@pytest.fixture(scope="module")
def site(request, tmp_path_factory):
    """The built site."""
    if built := request.config.getoption("--site"):
        return Path(built)
    output = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-E", "-n", "-W", "--keep-going", "-q", "-D", "nb_execution_mode=off"]
    command += ["-d", str(output / ".doctrees"), "-c", str(ROOT / "docs"), str(ROOT), str(output)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return output


@pytest.mark.slow
def test_links_of_the_site_lead_somewhere(site):
    pages = {}
    for file in site.glob("**/*.html"):
        page = Links()
        page.feed(file.read_text(encoding="utf-8"))
        pages[file.relative_to(site).as_posix()] = page
    assert {"index.html", "README.html", "docs/index.html", "docs/tour.html", "examples/README.html"} <= pages.keys()
    assert "source/psvae/latents.py.html" in pages
    lost = []
    for name, page in pages.items():
        for target in page.targets:
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            place = posixpath.normpath(posixpath.join(posixpath.dirname(name), unquote(path.partition("?")[0])))
            place = place if path else name
            if not (site / place).is_file() or (anchor and unquote(anchor) not in pages[place].anchors):
                lost.append(f"{name}: {target}")
    assert lost == []


@pytest.mark.slow
def test_every_public_name_is_documented_there(site):
    anchors = set()
    for file in (site / "docs" / "api").glob("*.html"):
        anchors |= set(re.findall(r'id="([\w.-]+)"', file.read_text(encoding="utf-8")))
    wanted = {f"psvae.{name}" for name in psvae.__all__ if name not in ("__version__", "flow", "losses")}
    for place, module in MODULES.items():
        wanted |= {f"{place}.{name}" for name in module.__all__ if name != "Velocity"}  # a type, said in its module
    wanted |= {"psvae.PSVAE.encode", "psvae.hub.mixin.HubMixin.from_pretrained"}
    assert wanted - anchors == set()
    text = (site / "docs" / "api" / "autoencoders.html").read_text(encoding="utf-8")
    plain = re.sub(r"<[^>]+>", "", text)
    assert "Float[Tensor, &#39;B C H W&#39;]" in plain.replace("'", "&#39;")
    assert "object at 0x" not in plain
