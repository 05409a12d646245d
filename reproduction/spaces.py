"""The spaces that the papers compare, each trained from the same encoder, with equal decoders, data and steps.

    rae            the encoder's features themselves; the decoder alone is trained
    rae-hd         the same, with the encoder trained too (section 5.4)
    s-vae          stage 1: a semantic VAE on frozen features (section 3.3)
    ps-vae-Z       stage 2: the encoder trained too; Z channels (Figure 11)
    p-vae          the network of PS-VAE trained on pixels alone (section 5.1)
    mlp            PS-VAE whose semantic VAE is two MLPs without blocks (Table 5)
    on-features    PS-VAE whose decoder reads the rebuilt features (Table 5)
    kept-moved     a decoder that reads only the channels of rae-hd that moved most (section 5.4); kept-still: those
                   that moved least; kept-frozen: those that moved most, as the frozen encoder has them
    plain, reals   a convolutional VAE, without and with ReaLS' alignment

A space is the last of its phases. What both S-VAE and PS-VAE begin with is trained once; the second phase draws the
pictures after the first one's, so that every space sees the same ones in the same order.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from psvae import (
    PSVAE,
    AlignmentNet,
    AlignmentNetConfig,
    PixelDecoder,
    PixelDecoderConfig,
    PixelVAE,
    PixelVAEConfig,
    PSVAEConfig,
    SemanticEncoder,
    SemanticVAEConfig,
    fit_latent_statistics,
    load_reals,
    losses,
    save_reals,
)
from psvae.encoders import PixelEncoderConfig
from reproduction.cifar import SIDE, Split, to_images
from reproduction.classifiers import PATCH
from reproduction.training import Machine, Recipe, done, end, fit

DECODER: dict[str, Any] = {"base_channels": 32, "num_res_blocks": 1, "norm_groups": 8, "attention_levels": 0}
MULTIPLIERS = {4: (1, 2, 4), 8: (1, 2, 4, 4)}  # by stride
ALIGNMENT = 0.25  # weight of each of ReaLS' two terms; the paper gives none
STATISTICS_PICTURES = 5000


@dataclass(frozen=True)
class Weights:
    """Of the loss terms, each a mean: defaults of examples/train_tokenizer.py, whose KL the ablation then changed."""

    semantic: float = 0.1
    mse: float = 1.0
    cosine: float = 1.0
    pixel: float = 1.0
    kl: float = 1e-5
    warmup: float = 0.2
    """Share of the steps over which the weight of the KL term grows."""


@dataclass(frozen=True)
class Phase:
    """One training of one space.

    Attributes:
        mode: ``frozen`` trains all but the encoder, the decoder on detached latents (stage 1); ``tuned`` trains all
            (stage 2); ``pixels`` all, without the semantic terms.
        after: the phase that it goes on from; None starts from the encoder.
        halves: the share of a space's steps that it takes, in halves.
        channels: Z; None for the features themselves.
        depth: blocks on each side of the semantic VAE.
        changes: further fields of `SemanticVAEConfig`.
    """

    mode: Literal["frozen", "tuned", "pixels"]
    after: str | None = None
    halves: int = 1
    channels: int | None = 16
    depth: int = 3
    reads: Literal["latents", "features"] = "latents"
    weights: Weights = Weights()
    changes: dict[str, Any] = field(default_factory=dict)


SWEEP = (4, 8, 16, 32, 64)  # a cell has 48 numbers of pixels
COARSE_PS_VAE = "ps-vae-24"  # for cells of 192: an eighth of them, the paper's share


def two_stages(name: str, **fields: Any) -> dict[str, Phase]:
    return {f"{name}-stage1": Phase("frozen", **fields), name: Phase("tuned", f"{name}-stage1", **fields)}


PHASES: dict[str, Phase] = {
    "rae-half": Phase("frozen", channels=None),
    "rae": Phase("frozen", "rae-half", channels=None),
    "rae-hd": Phase("tuned", "rae-half", channels=None),
    **{name: phase for z in SWEEP for name, phase in two_stages(f"ps-vae-{z}", channels=z).items()},
    "s-vae": Phase("frozen", "ps-vae-16-stage1"),
    "p-vae": Phase("pixels", halves=2),
    **two_stages("mlp", depth=0),
    **two_stages("on-features", reads="features"),
    **two_stages(COARSE_PS_VAE, channels=24),
}
ABLATED: dict[str, dict[str, Phase]] = {
    "KL weight": {
        **two_stages("kl-1e-6", weights=Weights(kl=1e-6)),
        **two_stages("kl-1e-4", weights=Weights(kl=1e-4)),
        **two_stages("kl-1e-3", weights=Weights(kl=1e-3)),
        **two_stages("kl-1e-2", weights=Weights(kl=1e-2)),
        **two_stages("kl-1e-1", weights=Weights(kl=1e-1)),
    },
    "L_s : L_p": {
        **two_stages("ratio-1-0.1", weights=Weights(semantic=1.0, pixel=0.1, kl=1e-6)),  # L_KL : L_p as elsewhere
        **two_stages("ratio-1-1", weights=Weights(semantic=1.0)),
    },
    "terms of L_s": {
        **two_stages("mse-alone", weights=Weights(cosine=0.0)),
        **two_stages("cosine-alone", weights=Weights(mse=0.0)),
    },
    "first log σ²": {**two_stages("logvar-0", changes={"initial_logvar": 0.0})},
    "first weights of the blocks": {
        **two_stages("fresh-unscaled", changes={"layer_scale": None}),
        **two_stages("from-encoder", changes={"layer_scale": None, "block_init": "encoder"}),  # which has none
    },
}
PHASES |= {name: phase for group in ABLATED.values() for name, phase in group.items()}
CONVOLUTIONAL = ("plain", "reals")
PS_VAE = "ps-vae-16"


def fingerprint() -> str:
    """Of all the numbers above: trainings of others do not mix with those of these."""
    numbers = [{name: asdict(phase) for name, phase in PHASES.items()}, DECODER, MULTIPLIERS, ALIGNMENT]
    return hashlib.sha256(json.dumps([*numbers, STATISTICS_PICTURES]).encode()).hexdigest()[:16]


# PS-VAE and its variants


def decoder_config(channels: int, stride: int = PATCH) -> PixelDecoderConfig:
    return PixelDecoderConfig(channels, channel_multipliers=MULTIPLIERS[stride], **DECODER)


def build(phase: Phase, encoder: SemanticEncoder) -> PSVAE:
    width, heads = encoder.feature_dim, encoder.feature_dim // 32
    vae = None
    if phase.channels is not None:
        vae = SemanticVAEConfig(width, phase.channels, phase.depth, heads, 4 * width, **phase.changes)
    reads = width if phase.channels is None or phase.reads == "features" else phase.channels
    config = PSVAEConfig(
        encoder.config, vae, decoder_config(reads, encoder.config.stride), decoder_reads=phase.reads, sample_size=SIDE
    )
    return PSVAE.from_encoder(encoder, config)


def train_phase(name: str, encoder_folder: Path, folder: Path, train: Split, recipe: Recipe, machine: Machine) -> None:
    """Writes ``folder/name``; the phase before it is there."""
    if done(folder / name):
        return
    phase = PHASES[name]
    torch.manual_seed(recipe.seed)
    frozen = SemanticEncoder.from_pretrained(encoder_folder).to(machine.device).eval().requires_grad_(False)
    if phase.after is None:
        model = build(phase, SemanticEncoder.from_pretrained(encoder_folder))
    else:
        model = PSVAE.from_pretrained(folder / phase.after)
    model.to(machine.device).requires_grad_(True)
    model.encoder.requires_grad_(phase.mode != "frozen")
    steps = recipe.steps * phase.halves // 2
    recipe = replace(recipe, steps=steps, first_step=0 if phase.after is None else recipe.steps // 2)

    def loss(model: nn.Module, places: Tensor, step: int) -> Tensor:
        images = train.images(places).to(machine.device)
        return psvae_loss(model, frozen, images, phase, share=(step + 1) / steps)

    trained: Any = fit(model, loss, recipe, len(train.labels), folder / name, machine)
    fit_statistics(trained, train, machine)
    trained.save_pretrained(folder / name)
    end(folder / name)


def psvae_loss(model: nn.Module, frozen: nn.Module, images: Tensor, phase: Phase, share: float) -> Tensor:
    """Section 3.3: w_s (L_s(f') + L_s(f'')) + w_kl L_KL + w_p L_P; in stage 1 the decoder's gradient ends at its input.

    Args:
        share: of this phase's steps that are done, for the growth of the KL weight in the first phase.
    """
    weights = phase.weights
    output = model(images, sample_posterior=True, detach_latents=phase.mode == "frozen")
    total = weights.pixel * losses.pixel_loss(output.sample, images)
    if output.parameters is not None:
        grown = min(1.0, share / weights.warmup) if phase.after is None else 1.0
        total = total + grown * weights.kl * losses.kl_loss(output.posterior, reduction="mean")
    if phase.mode != "pixels":
        with torch.no_grad():
            target = frozen(images) if phase.mode == "tuned" else output.features
        read = [output.rebuilt_features, output.features if phase.mode == "tuned" else None]
        for features in (features for features in read if features is not None):
            term = losses.semantic_loss(features, target, mse_weight=weights.mse, cosine_weight=weights.cosine)
            total = total + weights.semantic * term
    return total


def fit_statistics(model: PSVAE | PixelVAE, train: Split, machine: Machine) -> None:
    seen = train.pictures[:STATISTICS_PICTURES].split(250)
    fit_latent_statistics(model.eval(), (to_images(part).to(machine.device) for part in seen))


# The shortcut test


class Kept(nn.Module):
    """A decoder that reads some channels of a frozen space.

    Attributes:
        channels: which.
    """

    def __init__(self, space: PSVAE, channels: list[int]) -> None:
        super().__init__()
        self.space, self.channels = space.eval().requires_grad_(False), channels
        self.decoder = PixelDecoder(decoder_config(len(channels)))

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.space.features(images)
        return self.decoder(features[:, self.channels])


def moved(tuned: SemanticEncoder, frozen: SemanticEncoder, images: Tensor, machine: Machine) -> Tensor:
    """``D``: how far each channel is from the frozen encoder's, as a mean of squares."""
    total = torch.zeros(frozen.feature_dim)
    with torch.inference_mode():
        for part in images.split(250):
            part = part.to(machine.device)
            total += (tuned(part) - frozen(part)).square().sum(dim=(0, 2, 3)).float().cpu()
    return total / (len(images) * (SIDE // PATCH) ** 2)


def train_kept(
    which: Literal["moved", "still", "frozen"], count: int, encoder_folder: Path, folder: Path, train: Split,
    recipe: Recipe, machine: Machine,
) -> Kept:  # fmt: skip
    """A decoder on ``count`` channels; `folder` keeps it."""
    tuned = PSVAE.from_pretrained(folder / "rae-hd").to(machine.device)
    frozen = SemanticEncoder.from_pretrained(encoder_folder).to(machine.device).eval()
    order = moved(tuned.encoder.eval(), frozen, train.images(slice(0, 2000)), machine).argsort(descending=True)
    channels = sorted((order[-count:] if which == "still" else order[:count]).tolist())
    space = PSVAE.from_pretrained(folder / "rae") if which == "frozen" else tuned
    torch.manual_seed(recipe.seed)
    model, place = Kept(space, channels).to(machine.device), folder / f"kept-{which}"
    if done(place):
        model.decoder = PixelDecoder.from_pretrained(place).to(machine.device)
        return model

    def loss(model: nn.Module, places: Tensor, step: int) -> Tensor:
        images = train.images(places).to(machine.device)
        return losses.pixel_loss(model(images), images)

    fit(model, loss, recipe, len(train.labels), place, machine)
    model.decoder.save_pretrained(place)
    end(place)
    return model


# Convolutional VAEs


class Aligned(nn.Module):
    """A VAE, and the network that looks for the encoder's features in its latents."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        encoder = PixelEncoderConfig(latent_channels=channels, channel_multipliers=MULTIPLIERS[PATCH], **DECODER)
        self.vae = PixelVAE(PixelVAEConfig(encoder, decoder_config(channels), sample_size=SIDE))
        self.vae.quant_conv.bias.data[channels:] = SemanticVAEConfig.initial_logvar  # as PS-VAE's
        self.alignment = AlignmentNet(AlignmentNetConfig(channels, width, hidden_dim=2 * width, stride=PATCH))


def train_convolutional(
    name: str, encoder_folder: Path, folder: Path, train: Split, recipe: Recipe, channels: int, machine: Machine
) -> None:
    """``plain`` or ``reals``; writes the folder that `load_reals` reads."""
    if done(folder / name):
        return
    torch.manual_seed(recipe.seed)
    frozen = SemanticEncoder.from_pretrained(encoder_folder).to(machine.device).eval().requires_grad_(False)
    model = Aligned(frozen.feature_dim, channels).to(machine.device)

    def loss(model: Any, places: Tensor, step: int) -> Tensor:
        images = train.images(places).to(machine.device)
        output = model.vae(images, sample_posterior=True)
        aligned = model.alignment(output.latents.detach() if name == "plain" else output.latents)
        with torch.no_grad():
            seen = frozen(images, return_all=True)
        patch = losses.alignment_loss(aligned.patch_features, seen.features)
        pooled = losses.alignment_loss(aligned.global_feature, seen.features.mean(dim=(2, 3)))
        pixel, kl = losses.pixel_loss(output.sample, images), losses.kl_loss(output.posterior, reduction="mean")
        return pixel + Weights().kl * kl + ALIGNMENT * (patch + pooled)

    trained: Any = fit(model, loss, recipe, len(train.labels), folder / name, machine)
    fit_statistics(trained.vae, train, machine)
    save_reals(folder / name, trained.vae, trained.alignment)
    end(folder / name)


def load_space(name: str, folder: Path, train: Split, machine: Machine) -> PSVAE | PixelVAE:
    """With statistics per channel: the files of ReaLS have room for one mean and std."""
    if name not in CONVOLUTIONAL:
        return PSVAE.from_pretrained(folder / name).to(machine.device).eval().requires_grad_(False)
    vae = load_reals(folder / name)[0].to(machine.device).eval().requires_grad_(False)
    fit_statistics(vae, train, machine)
    return vae
