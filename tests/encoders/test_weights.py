"""`SemanticEncoder.from_timm`: the ways its weights can be out of reach."""

import pytest
import torch
from safetensors.torch import save_file

from psvae import SemanticEncoder
from psvae.errors import CheckpointError, ConfigError

NAME = "vit_small_patch14_reg4_dinov2.lvd142m"
SMALL = {"embed_dim": 48, "depth": 1, "num_heads": 3, "img_size": 28}


def test_offline_with_an_empty_cache_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"timm's published weights of 'vit_small.*Go online once.*file="):
        SemanticEncoder.from_timm(NAME)


def test_a_lost_file_and_one_of_another_architecture(tmp_path):
    with pytest.raises(CheckpointError, match=r"could not load '/nowhere/x\.safetensors'"):
        SemanticEncoder.from_timm(NAME, file="/nowhere/x.safetensors")
    path = tmp_path / "other.safetensors"
    save_file({"patch_embed.proj.weight": torch.zeros(48, 3, 14, 14)}, path)
    with pytest.raises(CheckpointError, match="could not load"):
        SemanticEncoder.from_timm(NAME, file=str(path), model_args=SMALL)


def test_a_name_that_timm_does_not_publish():
    with pytest.raises(ConfigError, match="no_such_tag"):
        SemanticEncoder.from_timm("vit_small_patch14_dinov2.no_such_tag")
