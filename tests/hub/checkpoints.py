"""What the checkpoint tests share: one tiny module of every class, and equality of two modules."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.tiny import tiny_decoder, tiny_encoder, tiny_pixel_vae, tiny_psvae, tiny_vae

BUILDERS = {
    "SemanticEncoder": tiny_encoder,
    "SemanticVAE": tiny_vae,
    "PixelDecoder": tiny_decoder,
    "PSVAE": tiny_psvae,
    "PixelVAE": tiny_pixel_vae,
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
