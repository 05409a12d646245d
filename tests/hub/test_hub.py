"""Loading by Hub id: through huggingface_hub's cache, and over HTTP from a small Hub on this machine."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch

from psvae import PixelDecoder, PixelDecoderConfig, PixelVAE, PixelVAEConfig
from psvae.encoders import PixelEncoderConfig
from psvae.errors import CheckpointError
from psvae.hub.source import Source
from tests.base import assert_same_state
from tests.hub.checkpoints import assert_same, fill, weight_files
from tests.hub.server import Hub, Repository, commit_of, serve
from tests.tiny import tiny_decoder

ONE, TWO = commit_of(0x1111), commit_of(0x2222)
SHARD = "20KB"


def fill_cache(cache: Path, repo_id: str, commit: str, folder: Path, *, ref: str | None = "main") -> None:
    """Lay a folder out as huggingface_hub's cache: blobs by hash, a snapshot of links, a ref."""
    repository = cache / f"models--{repo_id.replace('/', '--')}"
    for file in (path for path in folder.rglob("*") if path.is_file()):
        blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        link = repository / "snapshots" / commit / file.relative_to(folder)
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(file.read_bytes())
        link.symlink_to(os.path.relpath(blob, link.parent))
    if ref is not None:
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / ref).write_text(commit)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache with ``org/one`` (main: 1.0, v2: 2.0, by shards) and ``org/parts`` with a subfolder."""
    fill(tiny_decoder(), 1.0).save_pretrained(tmp_path / "a")
    fill(tiny_decoder(), 2.0).save_pretrained(tmp_path / "b", max_shard_size=SHARD)
    tiny_decoder().save_pretrained(tmp_path / "c" / "decoder")
    fill_cache(tmp_path / "cache", "org/one", ONE, tmp_path / "a")
    fill_cache(tmp_path / "cache", "org/one", TWO, tmp_path / "b", ref="v2")
    fill_cache(tmp_path / "cache", "org/parts", ONE, tmp_path / "c")
    return tmp_path / "cache"


@pytest.mark.parametrize(("revision", "value"), [(None, 1.0), ("main", 1.0), (ONE, 1.0), ("v2", 2.0), (TWO, 2.0)])
def test_the_cache_alone_is_enough(cache: Path, revision: str | None, value: float) -> None:
    loaded = PixelDecoder.from_pretrained("org/one", revision=revision, cache_dir=cache, local_files_only=True)
    assert_same(loaded, fill(tiny_decoder(), value))


def test_a_subfolder_of_a_repository(cache: Path) -> None:
    loaded = PixelDecoder.from_pretrained("org/parts", subfolder="decoder", cache_dir=cache, local_files_only=True)
    assert_same(loaded, tiny_decoder())


def test_the_offline_variable_is_honoured(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # what HF_HUB_OFFLINE=1 sets
    assert_same(PixelDecoder.from_pretrained("org/one", cache_dir=cache), fill(tiny_decoder(), 1.0))
    with pytest.raises(CheckpointError, match="'org/none' is not in the local cache and the Hub cannot be reached"):
        PixelDecoder.from_pretrained("org/none", cache_dir=cache)


@pytest.mark.parametrize(("name", "revision"), [("org/none", None), ("org/one", "v3"), ("org/one", commit_of(0x3333))])
def test_offline_with_nothing_in_the_cache(cache: Path, name: str, revision: str | None) -> None:
    message = f"config.json of revision '{revision or 'main'}' of '{name}' is not in the local cache and the Hub "
    with pytest.raises(CheckpointError, match=f"{message}cannot be reached: go online once, or pass a local folder"):
        PixelDecoder.from_pretrained(name, revision=revision, cache_dir=cache, local_files_only=True)


@pytest.mark.parametrize("lost", ["model.safetensors", "shard"])
def test_offline_with_half_of_it_in_the_cache(cache: Path, lost: str) -> None:
    snapshot = cache / "models--org--one" / "snapshots" / (TWO if lost == "shard" else ONE)
    name = weight_files(snapshot)[0]
    (snapshot / name).unlink()
    with pytest.raises(CheckpointError, match="without a connection only those in the local cache are seen") as caught:
        PixelDecoder.from_pretrained("org/one", revision=snapshot.name, cache_dir=cache, local_files_only=True)
    assert name in str(caught.value)


@pytest.mark.parametrize("name", ["org/a--b", "org/a..b"])
def test_a_name_that_no_repository_can_have(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=f"config.json of revision 'main' of '{name}' could not be fetched: Cannot have"
    ):
        PixelDecoder.from_pretrained(name, cache_dir=tmp_path)


def test_files_in_folders_of_one_repository_come_from_one_commit(cache: Path) -> None:
    """RAE's repository keeps its decoder and its statistics in folders of their own."""
    source = Source("org/parts", "", revision=None, cache_dir=cache, local_files_only=True)
    for name in ("decoder/config.json", "decoder/model.safetensors"):
        path = source.find(name)
        assert path is not None
        assert path.name == name.rpartition("/")[2]
        assert source.hub_options["revision"] == ONE


def test_a_cached_repository_without_a_config(tmp_path: Path) -> None:
    """LDM's repositories have weights alone; huggingface_hub remembers what it did not find."""
    tiny = {"base_channels": 32, "channel_multipliers": (1, 2), "num_res_blocks": 1, "attention_levels": 0}
    vae = PixelVAE(
        PixelVAEConfig(PixelEncoderConfig(4, **tiny), PixelDecoderConfig(4, **tiny), scaling_factor=1.0)
    ).eval()
    vae.export_ldm(tmp_path / "ldm")
    (tmp_path / "ldm" / "config.json").unlink()
    cache = tmp_path / "cache"
    fill_cache(cache, "org/ldm", ONE, tmp_path / "ldm")
    absent = cache / "models--org--ldm" / ".no_exist" / ONE / "config.json"
    absent.parent.mkdir(parents=True)
    absent.touch()
    loaded = PixelVAE.from_pretrained("org/ldm", cache_dir=cache, local_files_only=True)
    assert_same_state(loaded, vae)
    absent.unlink()
    with pytest.raises(CheckpointError, match=r"config\.json .* is not in the local cache and the Hub cannot"):
        PixelVAE.from_pretrained("org/ldm", cache_dir=cache, local_files_only=True)


def test_what_cannot_be_ruled_out_is_named(cache: Path) -> None:
    """Absent from the cache is not absent, unless huggingface_hub remembers that it is."""

    def unseen(name: str | Path) -> set[str]:
        source = Source(name, "", revision=None, cache_dir=cache, local_files_only=True)
        assert source.find("model.safetensors") is not None
        assert source.find("mean_std.json") is None
        return source.unseen

    repository = cache / "models--org--one"
    assert unseen("org/one") == {"mean_std.json"}
    assert unseen(repository / "snapshots" / ONE) == set()
    absent = repository / ".no_exist" / ONE / "mean_std.json"
    absent.parent.mkdir(parents=True)
    absent.touch()
    assert unseen("org/one") == set()


# Over HTTP. huggingface_hub reads its environment at import, so one other process makes all the calls.

CALLS: dict[str, dict[str, Any]] = {
    "main": {"name": "org/one"},
    "again": {"name": "org/one"},
    "tag": {"name": "org/one", "revision": "v2"},
    "branch with a slash": {"name": "org/one", "revision": "feature/x"},
    "commit": {"name": "org/one", "revision": TWO},
    "subfolder": {"name": "org/parts", "subfolder": "decoder"},
    "moving": {"name": "org/moving"},
    "no token": {"name": "org/private"},
    "wrong token": {"name": "org/private", "token": "hf_wrong"},
    "with token": {"name": "org/private", "token": "hf_right"},
    "gated": {"name": "org/gated"},
    "no repository": {"name": "org/none"},
    "no revision": {"name": "org/one", "revision": "v9"},
    "no config": {"name": "org/empty"},
    "no weights": {"name": "org/half"},
    "pickle": {"name": "org/pickle"},
    "pickle allowed": {"name": "org/pickle", "allow_pickle": True},
}

CLIENT = """
import json, sys
from psvae import PixelDecoder
results = {}
for label, options in json.load(sys.stdin).items():
    try:
        state = PixelDecoder.from_pretrained(options.pop("name"), **options).state_dict()
        results[label] = sorted({number for tensor in state.values() for number in tensor.unique().tolist()})
    except Exception as error:
        results[label] = f"{type(error).__name__}: {error}"
print(json.dumps(results))
"""


def run_client(hub: Hub, home: Path, calls: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Each call's distinct weights, or its error."""
    # no proxy variable may come between: the Hub is on this machine
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", CLIENT],
        input=json.dumps(calls),
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def over_http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Any], Hub]]:
    """The results of `CALLS`, and the Hub that they were made to."""
    root = tmp_path_factory.mktemp("hub")
    fill(tiny_decoder(), 1.0).save_pretrained(root / "a")
    fill(tiny_decoder(), 2.0).save_pretrained(root / "b", max_shard_size=SHARD)
    fill(tiny_decoder(), 3.0).save_pretrained(root / "c", max_shard_size=SHARD)
    fill(tiny_decoder(), 4.0).save_pretrained(root / "parts" / "decoder")
    (root / "empty").mkdir()
    for name in ("half", "pickle"):
        tiny_decoder().save_pretrained(root / name)
        (root / name / "model.safetensors").unlink()
    torch.save(fill(tiny_decoder(), 5.0).state_dict(), root / "pickle" / "pytorch_model.bin")

    def repository(name: str, **options: Any) -> Repository:
        return Repository({ONE: root / name}, {"main": ONE}, **options)

    repositories = {
        "org/one": Repository({ONE: root / "a", TWO: root / "b"}, {"main": ONE, "v2": TWO, "feature/x": TWO}),
        "org/moving": Repository({ONE: root / "b", TWO: root / "c"}, {"main": [ONE, TWO]}),
        "org/parts": repository("parts"),
        "org/private": repository("a", token="hf_right"),
        "org/gated": repository("a", gated=True),
        "org/empty": repository("empty"),
        "org/half": repository("half"),
        "org/pickle": repository("pickle"),
    }
    with serve(repositories) as hub:
        yield run_client(hub, root / "home", CALLS), hub


@pytest.mark.parametrize(
    ("label", "value"),
    [("main", 1.0), ("again", 1.0), ("tag", 2.0), ("branch with a slash", 2.0), ("commit", 2.0), ("subfolder", 4.0),
     ("with token", 1.0), ("pickle allowed", 5.0)],
)  # fmt: skip
def test_loading_over_http(over_http: tuple[dict[str, Any], Hub], label: str, value: float) -> None:
    assert over_http[0][label] == [value]


def test_weights_are_downloaded_once(over_http: tuple[dict[str, Any], Hub]) -> None:
    fetched = [request for request in over_http[1].requests if request.startswith("GET /org/one/resolve")]
    assert len(fetched) == len(set(fetched))


def test_a_branch_that_moves_while_it_is_read(over_http: tuple[dict[str, Any], Hub]) -> None:
    """The configuration came from one commit: so must every shard, though each save has the same file names."""
    assert over_http[0]["moving"] == [2.0]


@pytest.mark.parametrize(
    ("label", "wanted"),
    [
        (
            "no repository",
            "no folder 'org/none' here and no repository of that name on the Hub, or it is private: check",
        ),
        ("no token", "no repository of that name on the Hub, or it is private: check the name, or pass token=..."),
        ("wrong token", "no repository of that name on the Hub, or it is private: check the name, or pass token=..."),
        ("gated", "'org/gated' is gated: accept its terms on its page and run `hf auth login`"),
        ("no revision", "there is no revision 'v9' of 'org/one'; check the branch, tag or commit"),
        ("no config", "org/empty has no config.json; look at the files of 'org/empty'"),
        (
            "no weights",
            "org/half has no model.safetensors (nor model.safetensors.index.json with shards); files such as model.fp",
        ),
        ("pickle", "pytorch_model.bin is a pickle, which can run code when read; wanted safetensors."),
    ],
)
def test_refusals_over_http(over_http: tuple[dict[str, Any], Hub], label: str, wanted: str) -> None:
    message = over_http[0][label]
    assert message.startswith("CheckpointError: ")
    assert wanted in message


@pytest.mark.slow
def test_a_hub_that_does_not_answer(tmp_path: Path) -> None:
    """huggingface_hub tries for half a minute; then what was downloaded before loads, and what was not says so."""
    fill(tiny_decoder(), 1.0).save_pretrained(tmp_path / "old")
    fill_cache(tmp_path / "home" / "hub", "org/old", ONE, tmp_path / "old")
    with serve({}) as gone:
        pass
    results = run_client(gone, tmp_path / "home", {"old": {"name": "org/old"}, "new": {"name": "org/new"}})
    assert results["old"] == [1.0]
    assert "config.json of revision 'main' of 'org/new' is not in the local cache and the Hub cannot" in results["new"]
