"""The README's Python runs as printed, top to bottom, beside the folder that `make quickstart ARGS=--train` leaves."""

import re
from pathlib import Path

import torch
import transformers

from psvae import AlignmentNet, AlignmentNetConfig, fit_latent_statistics, save_reals
from tests.generators.foreign import language_model
from tests.tiny import tiny_pixel_vae, tiny_psvae

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_psvae().save_pretrained("outputs/quickstart/stage2")
    tiny_pixel_vae().export_diffusers("stabilityai/sd-vae-ft-mse")  # a folder of that name comes before the Hub
    language_model(transformers.Qwen2Config).save_pretrained("Qwen/Qwen2.5-0.5B")
    pixel = tiny_pixel_vae().eval()
    channels, stride = pixel.latent_spec.channels, pixel.latent_spec.stride
    fit_latent_statistics(pixel, [torch.rand(2, 3, 32, 32) * 2 - 1])
    alignment = AlignmentNet(AlignmentNetConfig(channels, feature_dim=48, hidden_dim=16, stride=stride))
    save_reals("outputs/compare_reals/reals", pixel, alignment)
    Path("examples").symlink_to(REPOSITORY / "examples")
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 2
    names: dict = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"README block {number}", "exec"), names)
    assert names["painted"].shape == names["images"].shape
    assert names["drawn"].shape == (1, 3, 64, 64)
    assert torch.isfinite(names["loss"])
    assert names["features"].shape[-2:] == names["latents"].shape[-2:]


def test_the_first_example_is_ten_lines():
    block = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)[0]
    lines = [line for line in block.splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(lines) <= 10


def test_files_and_commands_that_it_names_exist():
    for target in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (REPOSITORY / target).exists(), target
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for command in re.findall(r"^make (\w+)", README, flags=re.MULTILINE):
        assert f"\n{command}:" in makefile
