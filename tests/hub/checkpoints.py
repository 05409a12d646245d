"""What the checkpoint tests share: one tiny module of every class, and equality of two modules."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from psvae import (
    AlignmentNet,
    AlignmentNetConfig,
    DeepFusionDiT,
    DeepFusionDiTConfig,
    ViTPixelDecoder,
    ViTPixelDecoderConfig,
)
from tests.tiny import build, tiny_decoder, tiny_encoder, tiny_pixel_vae, tiny_psvae, tiny_vae


def tiny_generator(**fields: Any) -> DeepFusionDiT:
    """Two blocks of width 48."""
    config = DeepFusionDiTConfig.tiny(8).replace(
        hidden_size=48, num_layers=2, attention_head_dim=16, intermediate_size=80, head_width=64, head_num_heads=2,
        head_intermediate_size=96,
    )  # fmt: skip
    return build(DeepFusionDiT, config.replace(**fields))


def tiny_vit_decoder() -> ViTPixelDecoder:
    """One block of width 24."""
    config = ViTPixelDecoderConfig(8, width=24, depth=1, num_heads=3, mlp_dim=40, patch_size=8, grid=(4, 4))
    return build(ViTPixelDecoder, config)


BUILDERS = {
    "SemanticEncoder": tiny_encoder,
    "SemanticVAE": tiny_vae,
    "PixelDecoder": tiny_decoder,
    "ViTPixelDecoder": tiny_vit_decoder,
    "PSVAE": tiny_psvae,
    "PixelVAE": tiny_pixel_vae,
    "AlignmentNet": lambda: build(AlignmentNet, AlignmentNetConfig(8, 24, hidden_dim=64)),
    "DeepFusionDiT": tiny_generator,
}


def assert_same(got: nn.Module, wanted: nn.Module) -> None:
    """The same keys, bits, dtypes and configuration; buffers that no file holds too."""
    assert got.config == wanted.config
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(got, kind)()), dict(getattr(wanted, kind)())
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert ours[key].dtype == tensor.dtype, key
            assert torch.equal(ours[key], tensor), key


@torch.no_grad()
def fill(module: nn.Module, value: float) -> Any:
    """Every parameter and buffer that is saved becomes ``value``: a mixture of two saves shows."""
    for tensor in module.state_dict().values():
        tensor.fill_(value)
    return module


def values(module: nn.Module) -> set[float]:
    """The least and the greatest number of every tensor: one number in all if the module is one `fill`."""
    return {number.item() for tensor in module.state_dict().values() for number in tensor.aminmax()}


def weight_files(folder: Path) -> list[str]:
    """Names of everything in a folder that can hold weights, sorted."""
    return sorted(path.name for path in folder.iterdir() if "safetensors" in path.name)
