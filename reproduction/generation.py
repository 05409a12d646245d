"""The same class-conditional generator in every space: DeepFusionDiT with the wide head, the class as its one word.

The paper's text-to-image set-up in small (sections 3.4 and 4.2): patch 1, shared blocks, flow matching with
logit-normal σ, shifted in training by √(C / 16) as there, in sampling by 3 for all. No guidance: with ten
classes it would hide how well each space is learned.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from frechet import frechet_distance
from torch import Tensor, nn
from torch.nn import functional as F

from psvae import PSVAE, DeepFusionDiT, DeepFusionDiTConfig, PixelVAE, flow
from reproduction.cifar import CLASSES, Split, to_images
from reproduction.classifiers import Judge, Judges, accuracy
from reproduction.measures import BATCH, as_saved, painter, rounded
from reproduction.training import Machine, Recipe, batched, done, end, fit

SAMPLING_SHIFT = 3.0  # the paper's, whatever the space
BASE_CHANNELS = 16  # the paper's, C_base of its shift


@dataclass(frozen=True)
class Sizes:
    """Of the generator and of what it is measured by."""

    width: int = 96
    layers: int = 4
    head_width: int = 160
    samples: int = 1000
    updates: int = 15
    more_updates: int = 50
    """The paper's: for a look at what fewer do."""
    measured: int = 3
    """Times, evenly over the steps."""
    pictures: int = 25_000
    """Of the training split, whose latents it learns."""


def config_for(channels: int, sizes: Sizes) -> DeepFusionDiTConfig:
    return DeepFusionDiTConfig(
        channels, hidden_size=sizes.width, num_layers=sizes.layers, num_attention_heads=sizes.width // 32,
        num_key_value_heads=sizes.width // 32, attention_head_dim=32, intermediate_size=sizes.width * 8 // 3,
        vocab_size=CLASSES, rope_theta=10000.0, qk_norm=True, attention_bias=False,
        head_width=sizes.head_width, head_num_heads=sizes.head_width // 32,
        head_intermediate_size=sizes.head_width * 8 // 3,
    )  # fmt: skip


@dataclass(frozen=True)
class Moments:
    """Of normalised latents: mean and std, ``N Z h w``, in halves."""

    mean: Tensor
    std: Tensor
    labels: Tensor

    def draw(self, places: Tensor) -> Tensor:
        mean, std = self.mean[places].float(), self.std[places].float()
        return mean + std * torch.randn_like(mean)


def encode(vae: PSVAE | PixelVAE, train: Split, count: int, machine: Machine) -> Moments:
    """Of the first ``count`` pictures, seen through the public encode."""

    def read(part: Tensor) -> Tensor:
        posterior = vae.encode(to_images(part)).latent_dist
        if not isinstance(vae, PSVAE):
            posterior = vae.latent_spec.normalize_posterior(posterior)
        return torch.stack([posterior.mean, posterior.std], dim=1)

    found = batched(read, train.pictures[:count], machine, dtype=torch.float16)
    return Moments(found[:, 0].contiguous(), found[:, 1].contiguous(), train.labels[:count])


def train_generator(
    moments: Moments, sizes: Sizes, recipe: Recipe, folder: Path, machine: Machine, look: Callable[[Any, int], None]
) -> Any:
    """The averaged weights; ``folder`` keeps them.

    Args:
        look: is shown the averaged weights at `Sizes.measured` steps, and the number of steps.
    """
    if done(folder):
        return DeepFusionDiT.from_pretrained(folder).to(machine.device).eval()
    channels, side = moments.mean.shape[1], moments.mean.shape[-1]
    torch.manual_seed(recipe.seed)
    model = DeepFusionDiT(config_for(channels, sizes)).to(machine.device)
    shift = flow.dimension_shift(channels, 1, side**2, base=BASE_CHANNELS * side**2)
    measured = {-(-recipe.steps * part // sizes.measured) for part in range(1, sizes.measured + 1)}

    def loss(model: nn.Module, places: Tensor, step: int) -> Tensor:
        latents = moments.draw(places).to(machine.device)
        noise, sigmas = torch.randn_like(latents), flow.sample_sigmas(len(latents), shift=shift).to(machine.device)
        classes = moments.labels[places, None].to(machine.device)
        output = model(flow.add_noise(latents, noise, sigmas), sigmas, input_ids=classes)
        return flow.flow_loss(output.sample, latents, noise)

    def each(averaged: nn.Module, step: int) -> None:
        if step in measured:
            look(averaged, step)

    trained: Any = fit(model, loss, recipe, len(moments.labels), folder, machine, each)
    trained.save_pretrained(folder)
    end(folder)
    return trained


class Blurred(NamedTuple):
    """A judge that sees half of the resolution."""

    judge: Judge

    def features(self, images: Tensor) -> Tensor:
        small = F.interpolate(images, scale_factor=0.5, mode="area")
        return self.judge.features(F.interpolate(small, scale_factor=2, mode="bilinear"))


class Measure:
    """Of made pictures: how often their class is right, and Fréchet distances from the test pictures.

    In the features of both judges; in those of the first with both sides blurred (``frechet_blurred``), which leaves
    texture out; and from the test pictures as the space reconstructs them (``frechet_decoded``), where the decoder's
    own faults cancel.
    """

    def __init__(self, vae: PSVAE | PixelVAE, test: Split, judges: Judges, machine: Machine) -> None:
        self.judges, self.machine = judges, machine
        real = to_images(test.pictures)
        decoded = as_saved(batched(painter(vae), real, machine, BATCH))
        self.references = {
            "frechet": (judges.classes, batched(judges.classes.features, real, machine)),
            "frechet_turns": (judges.turns, batched(judges.turns.features, real, machine)),
            "frechet_blurred": (Blurred(judges.classes), batched(Blurred(judges.classes).features, real, machine)),
            "frechet_decoded": (judges.classes, batched(judges.classes.features, decoded, machine)),
        }

    def __call__(self, made: Tensor) -> dict[str, float]:
        numbers = {
            name: frechet_distance(seen, batched(judge.features, made, self.machine))
            for name, (judge, seen) in self.references.items()
        }
        wanted = torch.arange(len(made)) % CLASSES
        return rounded(numbers | {"class_accuracy": accuracy(self.judges.classes, made, wanted, self.machine)})


@torch.inference_mode()
def sample(
    model: Any, vae: PSVAE | PixelVAE, shape: tuple[int, int, int, int], updates: int, seed: int, machine: Machine
) -> Tensor:
    """Pictures ``N 3 H W`` in [-1, 1], of 8 bits; the n-th is of class n modulo 10."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    classes, made = torch.arange(len(noise))[:, None] % CLASSES, []
    sigmas = flow.sigma_schedule(updates, shift=SAMPLING_SHIFT)
    for start, ids in zip(noise.split(250), classes.split(250), strict=True):
        with machine.autocast():
            prefix = model.encode_prefix(ids.to(machine.device))
            latents = flow.sample(flow.guided(model, {"full": prefix}, None), start.to(machine.device), sigmas)
            raw = latents if isinstance(vae, PSVAE) else vae.latent_spec.denormalize(latents)
            made.append(as_saved(vae.decode(raw).sample.float().cpu()))
    return torch.cat(made)
