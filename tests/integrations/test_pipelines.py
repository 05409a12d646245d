"""Pipelines of diffusers run on our latents, save, and reload whole."""

import json

import numpy as np
import pytest

pytest.importorskip("diffusers", reason="diffusers comes with psvae[diffusers]")
pytest.importorskip("transformers", reason="transformers comes with psvae[diffusers]")

from diffusers import DiffusionPipeline

from psvae import AutoencoderPSVAE
from tests.integrations.tiny_pipelines import PIPELINES, inpaint, run, tiny_vae


@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline_runs_saves_and_reloads(name, tmp_path):
    pipeline, call = PIPELINES[name](tiny_vae(), tmp_path / "tokenizer")
    image = run(name, pipeline, call)
    assert image.shape == (1, 64, 64, 3)
    assert np.isfinite(image).all()
    assert image.std() > 0
    pipeline.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved/model_index.json").read_text())
    assert index["vae"] == ["psvae", "AutoencoderPSVAE"]
    absent = {name: None for name, part in pipeline.components.items() if part is None}  # diffusers saves no None
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved", **absent)
    assert type(again) is type(pipeline)
    assert type(again.vae) is AutoencoderPSVAE
    assert np.allclose(run(name, again, call), image, atol=1e-5)


def test_inpainting_of_stable_diffusion_counts_channels_itself(tmp_path):
    """diffusers' own limit: that pipeline takes UNets of 4 or 9 channels alone. FLUX's does not count."""
    pipeline, call = inpaint(tiny_vae(), tmp_path)
    with pytest.raises(ValueError, match="should have either 4 or 9 input channels, not 96"):
        run("inpaint", pipeline, call)
    pipeline.unet.register_to_config(in_channels=4)  # nothing else in it minds 96
    image = run("inpaint", pipeline, call)
    assert image.shape == (1, 64, 64, 3)
    assert image.std() > 0
