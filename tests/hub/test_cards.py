"""The model card, and what ``push_to_hub`` sends. HfApi's network calls are recorded, not made."""

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import CommitInfo, HfApi, ModelCard, RepoUrl
from huggingface_hub.utils import filter_repo_objects

from psvae import PSVAE, PixelDecoder
from psvae.hub.cards import MARK
from tests.hub.checkpoints import BUILDERS, assert_same, weight_files
from tests.tiny import tiny_decoder, tiny_pixel_vae, tiny_psvae

COMMAND = "python examples/train_tokenizer.py --stage both --data photos"
METRICS = {"psnr": 28.7351, "lpips": 0.0857}


@pytest.mark.parametrize("name", BUILDERS)
def test_the_card_holds_config_command_and_metrics(tmp_path: Path, name: str) -> None:
    module = BUILDERS[name]()
    module.save_pretrained(tmp_path, training_command=COMMAND, metrics=METRICS)
    text = (tmp_path / "README.md").read_text()
    assert f"model = {name}.from_pretrained(" in text
    assert f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.2f} M parameters" in text
    assert f"```shell\n{COMMAND}\n```" in text
    assert "| psnr | 28.74 |" in text
    assert "| lpips | 0.0857 |" in text
    config = text.split("```json\n")[1].split("\n```")[0]
    assert json.loads(config) == module.config.to_dict()
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved == {"_class": name, **module.config.to_dict()}


FEATURES = "image-feature-extraction"
HEADERS = {  # pipeline_tag, tags besides psvae
    "SemanticEncoder": (FEATURES, []),
    "SemanticVAE": (None, ["autoencoder"]),
    "PixelDecoder": (None, []),
    "ViTPixelDecoder": (None, []),
    "PSVAE": (FEATURES, ["autoencoder"]),
    "PixelVAE": (None, ["autoencoder"]),
    "AlignmentNet": ("feature-extraction", []),
    "DeepFusionDiT": ("text-to-image", []),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_the_header_is_what_the_hub_reads(tmp_path: Path, name: str) -> None:
    BUILDERS[name]().save_pretrained(tmp_path)
    data = ModelCard.load(tmp_path / "README.md").data
    pipeline, tags = HEADERS[name]
    assert data.library_name == "psvae"
    assert data.pipeline_tag == pipeline
    assert data.tags == ["psvae", *tags]


def test_a_card_without_command_or_metrics_says_so(tmp_path: Path) -> None:
    tiny_decoder().save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "No command was recorded." in text
    assert "Nothing was recorded." in text


def test_the_card_tells_data_and_latent(tmp_path: Path) -> None:
    vae = tiny_psvae()
    vae.latent_spec.std.copy_(torch.linspace(1, 2.5, vae.latent_spec.channels)[:, None, None])
    vae.save_pretrained(tmp_path, training_data="Three pictures of a cat.")
    text = (tmp_path / "README.md").read_text()
    assert "## Training\n\nThree pictures of a cat.\n\nNo command" in text
    stride = vae.latent_spec.stride
    assert f"{vae.latent_spec.channels} channels, one cell for {stride} x {stride} pixels" in text
    assert "`encode` normalises" in text
    assert "standard deviations 1 to 2.5" in text
    tiny_pixel_vae().save_pretrained(tmp_path / "pixel")
    assert "the caller's to apply" in (tmp_path / "pixel" / "README.md").read_text()
    tiny_decoder().save_pretrained(tmp_path / "decoder")
    assert "## Latent" not in (tmp_path / "decoder" / "README.md").read_text()


def test_a_card_of_psvae_is_brought_up_to_date(tmp_path: Path) -> None:
    tiny_decoder().save_pretrained(tmp_path, metrics={"psnr": 20.0})
    tiny_decoder().save_pretrained(tmp_path, metrics={"psnr": 25.0})
    text = (tmp_path / "README.md").read_text()
    assert "| psnr | 25 |" in text
    assert "| psnr | 20 |" not in text


@pytest.mark.parametrize("text", [b"# My model\n", b"caf\xe9, not UTF-8\n", b""])
def test_a_card_that_the_user_wrote_is_kept(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "README.md").write_bytes(text)
    tiny_decoder().save_pretrained(tmp_path, metrics=METRICS)
    assert (tmp_path / "README.md").read_bytes() == text


def test_a_card_without_the_mark_is_the_users(tmp_path: Path) -> None:
    tiny_decoder().save_pretrained(tmp_path)
    edited = (tmp_path / "README.md").read_text().replace(MARK, "") + "Trained on my photographs.\n"
    (tmp_path / "README.md").write_text(edited)
    tiny_decoder().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == edited


class Remote:
    """A Hub repository as a folder: HfApi's network calls are answered from it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.created, self.uploaded = folder, {}, {}
        folder.mkdir()
        remote = self

        def create_repo(api: HfApi, repo_id: str, **options: Any) -> RepoUrl:
            remote.created = {"repo_id": repo_id, "api_token": api.token, **options}
            return RepoUrl(f"https://huggingface.co/org/{repo_id.split('/')[-1]}")

        def file_exists(_: HfApi, repo_id: str, filename: str, **options: Any) -> bool:
            return (remote.folder / filename).exists()

        def hf_hub_download(_: HfApi, repo_id: str, filename: str, *, local_dir: str, **options: Any) -> str:
            return shutil.copy(remote.folder / filename, local_dir)

        def upload_folder(
            _: HfApi, *, repo_id: str, folder_path: str, delete_patterns: list[str], **options: Any
        ) -> CommitInfo:
            remote.uploaded = {
                "repo_id": repo_id,
                **options,
                "files": sorted(p.name for p in Path(folder_path).iterdir()),
            }
            for name in filter_repo_objects([path.name for path in folder.iterdir()], allow_patterns=delete_patterns):
                (folder / name).unlink()
            shutil.copytree(folder_path, folder, dirs_exist_ok=True)
            url = f"https://huggingface.co/{repo_id}/commit/abc"
            return CommitInfo(commit_url=url, commit_message="", commit_description="", oid="abc")

        for stand_in in (create_repo, file_exists, hf_hub_download, upload_folder):
            monkeypatch.setattr(HfApi, stand_in.__name__, like(getattr(HfApi, stand_in.__name__), stand_in))


def like(original: Callable[..., Any], stand_in: Callable[..., Any]) -> Callable[..., Any]:
    """``stand_in``, called only with arguments that ``original`` takes too."""

    def call(*args: Any, **options: Any) -> Any:
        inspect.signature(original).bind(*args, **options)
        return stand_in(*args, **options)

    return call


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Remote:
    return Remote(tmp_path / "remote", monkeypatch)


def test_push_uploads_config_weights_and_card(remote: Remote) -> None:
    model = tiny_psvae()
    url = model.push_to_hub(
        "mine",
        private=True,
        revision="v2",
        token="hf_x",
        commit_message="First",
        training_command=COMMAND,
        metrics=METRICS,
    )
    assert url == "https://huggingface.co/org/mine/commit/abc"
    assert remote.created == {"repo_id": "mine", "api_token": "hf_x", "private": True, "exist_ok": True}
    files = ["README.md", "config.json", "model.safetensors"]
    assert remote.uploaded == {"repo_id": "org/mine", "revision": "v2", "commit_message": "First", "files": files}
    assert_same(PSVAE.from_pretrained(remote.folder), model)
    assert COMMAND in (remote.folder / "README.md").read_text()


@pytest.mark.parametrize("before", ["5GB", "20KB"])
@pytest.mark.parametrize("after", ["5GB", "20KB"])
def test_push_replaces_older_weights(remote: Remote, before: str, after: str) -> None:
    """A single file that stayed beside new shards would be the one that is read."""
    (remote.folder / "optimizer.safetensors").write_text("not weights of the model")
    tiny_decoder(latent_channels=4).push_to_hub("org/mine", max_shard_size=before)
    model = tiny_decoder()
    model.push_to_hub("org/mine", max_shard_size=after)
    assert_same(PixelDecoder.from_pretrained(remote.folder), model)
    kept = sorted({*remote.uploaded["files"], "optimizer.safetensors"})
    assert weight_files(remote.folder) == [name for name in kept if "safetensors" in name]


def test_push_keeps_a_card_that_the_user_wrote(remote: Remote) -> None:
    (remote.folder / "README.md").write_text("# My model\n")
    tiny_decoder().push_to_hub("org/mine", metrics=METRICS)
    assert (remote.folder / "README.md").read_text() == "# My model\n"


def test_push_updates_a_card_of_psvae(remote: Remote) -> None:
    tiny_decoder().push_to_hub("org/mine", metrics={"psnr": 20.0})
    tiny_decoder().push_to_hub("org/mine", metrics={"psnr": 25.0})
    assert "| psnr | 25 |" in (remote.folder / "README.md").read_text()
