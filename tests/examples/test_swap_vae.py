"""The page on replacing an SD-VAE: its code runs in order, for both kinds of VAE."""

import re
from pathlib import Path

import pytest
import torch

from psvae import load_latent_statistics
from tests.test_adapt import PlainDiT
from tests.tiny import images, tiny_pixel_vae, tiny_psvae

PAGE = Path(__file__).parents[2] / "examples/swap_vae.md"


@pytest.mark.parametrize("build", [tiny_psvae, tiny_pixel_vae])
def test_the_blocks_run(build, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vae = build()
    model = PlainDiT(input_size=8, patch_size=2, in_channels=4)  # an SD-VAE's model with 4 x 4 tokens
    kept = model.blocks[0].weight.clone()
    names = {"torch": torch, "vae": vae, "images": images(2, 32, 32), "model": model}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 5
    with torch.no_grad():
        for number, block in enumerate(blocks):
            exec(compile(block, f"block {number}", "exec"), names)
        assert (names["channels"], names["height"], names["width"]) == (8, 4, 4)
        assert names["samples"].shape == (2, 3, 32, 32)
        assert names["x"].shape == (2, 8, 4, 4)
        assert names["model"](names["x"]).shape == (2, 16, 4, 4)
    before = [value.clone() for value in (vae.latent_spec.mean, vae.latent_spec.std)]
    assert load_latent_statistics(vae.latent_spec, tmp_path / "latents_stats.pt", allow_pickle=True) == "LightningDiT"
    assert build is tiny_psvae or all(map(torch.equal, (vae.latent_spec.mean, vae.latent_spec.std), before))
    assert model.blocks[0].weight.equal(kept)
