"""The two training stages of the paper in a few lines, for the tests of gradients."""

import copy
from typing import Any

import torch
from torch import Generator, Tensor, nn

from psvae import PSVAE, PSVAEOutput, losses


def frozen_encoder(model: PSVAE) -> nn.Module:
    """The copy that both semantic terms hold on to."""
    return copy.deepcopy(model.encoder).requires_grad_(False)


def prepare(model: PSVAE, stage: int) -> PSVAE:
    """Stage 1 freezes the encoder; stage 2 trains everything."""
    model.encoder.requires_grad_(stage == 2)
    return model


def forward(model: Any, pixels: Tensor, stage: int, first: int = 0) -> PSVAEOutput:
    """One forward of the model or its distributed wrapper. Item i draws the noise of seed ``first + i``."""
    generators = [Generator().manual_seed(first + i) for i in range(len(pixels))]
    return model(pixels, sample_posterior=True, generator=generators, detach_latents=stage == 1)


def terms(output: PSVAEOutput, pixels: Tensor, frozen: nn.Module) -> dict[str, Tensor]:
    """Each loss by name. The weight of the KL is large here, so that its gradient is visible."""
    target = frozen(pixels)
    found = {
        "pixel": losses.pixel_loss(output.sample, pixels),
        "features": losses.semantic_loss(output.features, target),
    }
    if output.rebuilt_features is not None:
        found["rebuilt"] = losses.semantic_loss(output.rebuilt_features, target)
        found["kl"] = 0.1 * losses.kl_loss(output.posterior, reduction="mean")
    return found


def total(output: PSVAEOutput, pixels: Tensor, frozen: nn.Module, stage: int) -> Tensor:
    """The sum that each stage trains on."""
    found = terms(output, pixels, frozen)
    return sum((loss for name, loss in found.items() if stage == 2 or name != "features"), torch.zeros(()))


def move_off_the_frozen_copy(model: PSVAE) -> PSVAE:
    """Features that equal their target have a semantic gradient of zero: take a small step first."""
    with torch.no_grad():
        for index, parameter in enumerate(model.encoder.parameters()):
            noise = torch.randn(parameter.shape, generator=Generator().manual_seed(index))
            parameter.add_(0.02 * noise)
    return model
