"""The how-to pages and the questions: their Python runs as printed, top to bottom, and so do psvae's commands; those of
the examples are parsed."""

import importlib
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from PIL import Image
from safetensors.torch import load_file, save_file

from psvae.cli import main
from tests.tiny import images, tiny_pixel_vae, tiny_pixel_vae_config, tiny_psvae

ROOT = Path(__file__).parents[1]
HOWTO = ROOT / "docs" / "howto"
SCRIPTS = {"quickstart": "Quickstart", "train_tokenizer": "Options"}  # and the class of its options


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def run(page: Path, names: dict) -> dict:
    """The page's Python in one scope, and then its psvae commands."""
    found = blocks(page, "python")
    assert found
    for number, block in enumerate(found):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)
    for words in commands(page):
        if words[0] == "psvae":
            assert main([str(Path(word).expanduser()) if word[0] == "~" else word for word in words[1:]]) == 0, words
    return names


def commands(page: Path) -> list[list[str]]:
    lines = "".join(blocks(page, "shell")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in, at home."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_every_page_is_run():
    assert {page.stem for page in HOWTO.glob("*")} == {
        "add_an_encoder", "load_a_foreign_checkpoint", "replace_an_sd_vae", "train_on_my_images",
    }  # fmt: skip


def test_an_encoder_is_added(here):
    names = run(HOWTO / "add_an_encoder.md", {})
    assert names["features"].shape == (1, 384, 6, 4)
    assert names["latents"].shape == (1, 64, 6, 4)
    assert (here / "my-encoder" / "model.safetensors").exists()


def test_a_foreign_checkpoint_is_loaded(here):
    tiny_pixel_vae().export_diffusers("vae")
    config = tiny_pixel_vae_config()
    halves = {name: getattr(config, name).replace(base_channels=32, norm_groups=32) for name in ("encoder", "decoder")}
    ldm = tiny_pixel_vae(**halves, scaling_factor=1.0)
    ldm.export_ldm("ldm")
    torch.save({"state_dict": load_file("ldm/model.safetensors")}, "vae.ckpt")
    save_file({f"tokenizer.{key}": value for key, value in ldm.state_dict().items()}, "theirs.safetensors")
    torch.save({"mean": torch.ones(1, 8, 1, 1), "std": torch.full((1, 8, 1, 1), 2.0)}, "latents_stats.pt")
    names = run(HOWTO / "load_a_foreign_checkpoint.md", {})
    assert names["layout"] == "LightningDiT"
    assert names["vae"].latent_spec.mean.eq(1).all()
    for folder in ("converted", "renamed"):
        assert names["PixelVAE"].from_pretrained(folder).decoder.conv_out.weight.equal(ldm.decoder.conv_out.weight)


def test_training_on_my_images(here):
    tiny_psvae().save_pretrained("outputs/mine/stage2")
    (here / "Pictures").mkdir()
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(here / "Pictures" / "cat.jpg")
    names = run(HOWTO / "train_on_my_images.md", {})
    assert names["painted"].shape == (1, 3, 64, 64)
    assert names["loss"].isfinite()
    assert (here / "outputs/mine/measured/model.safetensors").exists()
    assert len(list((here / "out").iterdir())) == 2


def test_an_sd_vae_is_replaced(here):
    names = run(HOWTO / "replace_an_sd_vae.md", {})
    assert names["painted"].shape == (2, 3, 64, 64)
    assert names["model"].config.in_channels == 64
    assert round(names["shift"], 3) == 2.449


def test_questions_are_answered_in_code(capsys):
    names = run(ROOT / "docs" / "faq.md", {"vae": tiny_psvae(), "pixel": tiny_pixel_vae(), "images": images(2, 64, 64)})
    assert names["painted"].shape == (2, 3, 64, 64)
    assert "wanted multiples of the stride" in capsys.readouterr().out


def test_commands_of_the_examples_are_understood(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    found = [words for page in HOWTO.glob("*.md") for words in commands(page) if words[0] != "psvae"]
    assert found
    for words in found:
        script = next(word for word in words if word.startswith("examples/"))
        module = importlib.import_module(Path(script).stem)
        tyro.cli(getattr(module, SCRIPTS[module.__name__]), args=words[words.index(script) + 1 :])
