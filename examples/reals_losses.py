"""The terms that train a ReaLS VAE, and their weights. train_reals.py trains by them.

The paper's figure names MSE, LPIPS, the adversary, KL and alignment; what it leaves open is an option here.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from psvae import AlignmentOutput, DiagonalGaussian, PixelVAE, SemanticEncoder, losses
from psvae.encoders import EncoderTokens


@dataclass(frozen=True)
class LossOptions:
    """Weights of the terms. The paper's figure says which terms there are and gives no weight; each term is a mean
    unless it says otherwise."""

    mse: float = 1.0
    """Of the squared error; the figure's "MSE Loss"."""
    perceptual: float = 1.0
    """Of LPIPS (VGG), whose weights torchvision downloads; LDM's. 0 leaves it out."""
    kl: float = 1e-6
    """Of the KL to N(0, 1), for one run; open. Summed over a latent beside mean pixel terms, as in REPA-E, it pulls far
    harder than in LDM, as the scale of the released latents suggests of ReaLS."""
    kl_reduction: Literal["sum", "mean"] = "sum"
    """Over channels and cells; open, LDM's."""
    patch: float = 1.0
    """Of the alignment of every latent cell; open. 0, with `--losses.cls 0`, trains a plain VAE without a teacher."""
    cls: float = 1.0
    """Of the alignment of pooled latents to the CLS token; open."""
    cosine: float = 0.9
    """Of 1 - cosine in the alignment, known at second hand; AM-RADIO's."""
    smooth_l1: float = 0.1
    """Of smooth L1 in the alignment, likewise."""
    cls_form: Literal["both", "cosine"] = "both"
    """Of the CLS token's alignment: both parts, as the cells', or 1 - cosine alone, with weight 1, as AM-RADIO's of its
    summary token. Open."""
    form: Literal["reals", "margins"] = "reals"
    """Of the cells' alignment. `margins`: VA-VAE's two terms, to which it adds no CLS term (`--losses.cls 0`)."""
    margins: tuple[float, float] = (0.5, 0.25)
    """VA-VAE's, of the cosine and of the cells' similarity."""
    adaptive: bool = False
    """Multiply `patch` and `cls` by how many times harder the pixel terms pull at the encoder's last layer than the
    term itself does, each by its own ratio: with `--losses.patch 0.1`, VA-VAE's, the cells pull a tenth as hard as the
    pixels. Open."""
    detach: bool = False
    """Let the alignment network read the latents and teach the VAE nothing: a plain VAE to compare with."""
    adversarial: float = 0.5
    """Of the hinge PatchGAN; open, LDM's. 0 leaves the discriminator out."""
    adversarial_adaptive: bool = True
    """Multiply `adversarial` by how many times harder the pixel terms pull at the decoder's last layer than the
    adversary does; open, LDM's. REPA-E's weight is a fixed 0.1."""
    adversarial_start: int = 50_001
    """Step from which it counts; open, LDM's."""
    equivariance: float = 0.0
    """Share of steps on which latents and target are scaled and turned alike; no part of ReaLS (EQ-VAE: 0.5)."""


class Output(NamedTuple):
    """Of one pass of what is trained.

    Attributes:
        sample: decoded from the sampled latents, or from the transformed ones, ``B 3 H W``.
        latents: ``B Z h w``, sampled, raw.
        parameters: of the posterior.
        aligned: what the alignment network reads from the latents; None without one.
    """

    sample: Tensor
    latents: Tensor
    parameters: Tensor
    aligned: AlignmentOutput | None


Targets = tuple[Tensor, Tensor]  # of the alignment: patch features B D h w, and the CLS token B D


def aligns(weights: LossOptions) -> bool:
    """Or trains a plain VAE."""
    return bool(weights.patch or weights.cls)


@torch.no_grad()
def seen_by(teacher: SemanticEncoder, images: Tensor) -> EncoderTokens:
    """In bf16, whatever the VAE is trained in."""
    with torch.autocast(images.device.type, torch.bfloat16):
        return teacher(images, return_all=True)


def targets_of(kind: Literal["normed", "pre_norm"], seen: EncoderTokens) -> Targets:
    """Before or after the teacher's final norm.

    Without a CLS token its place takes the mean of the patch tokens: SigLIP's normed one; a pre-norm one is refused,
    unless its weight is 0.
    """
    if kind == "normed":
        return seen.features, seen.global_token
    return seen.pre_norm, seen.pre_norm.mean(dim=(2, 3)) if seen.pre_norm_cls is None else seen.pre_norm_cls


def training_terms(
    weights: LossOptions,
    output: Output,
    target: Tensor,
    vae: PixelVAE,
    *,
    aim: Targets | None = None,
    perceptual: nn.Module | None = None,
    adversary: nn.Module | None = None,
) -> dict[str, Tensor]:
    """The terms by name, and their weighted sum as ``total``.

    Args:
        target: images ``B 3 H W`` that ``output.sample`` is to be.
        vae: whose last layers the adaptive weights look at.
        aim: what the alignment is to find; None without one.
        perceptual: LPIPS with frozen weights, but not under no_grad: its gradient is the term.
        adversary: the discriminator, frozen likewise, where it counts by now.
    """
    pixel = losses.pixel_loss(output.sample, target, norm="l2")
    terms = {"mse": pixel.detach()}
    pixel = weights.mse * pixel
    if perceptual is not None:
        lpips = perceptual(output.sample.float(), target).mean()
        terms["lpips"], pixel = lpips.detach(), pixel + weights.perceptual * lpips
    kl = losses.kl_loss(DiagonalGaussian(output.parameters), reduction=weights.kl_reduction)
    terms["kl"], total = kl.detach(), pixel + weights.kl * kl
    if output.aligned is not None and aim is not None:
        last = vae.encoder.conv_out.weight
        pull = gradient(pixel, last) if weights.adaptive else None
        for name, term in alignment_terms(weights, output.aligned, aim).items():
            terms[f"align_{name}"], weight = term.detach(), getattr(weights, name)
            if pull is not None and weight:
                terms[f"ratio_{name}"] = losses.gradient_ratio(pull, gradient(term, last))
                weight = weight * terms[f"ratio_{name}"]
            total = total + weight * term
    if adversary is not None:
        fooled = losses.generator_hinge_loss(adversary(output.sample.float()))
        term = weights.adversarial * fooled
        if weights.adversarial_adaptive:
            term = term * losses.adaptive_weight(pixel, fooled, vae.decoder.conv_out.weight)
        terms["adversarial"], total = fooled.detach(), total + term
    return terms | {"latent_std": output.latents.detach().float().std(), "total": total}


def alignment_terms(weights: LossOptions, aligned: AlignmentOutput, aim: Targets) -> dict[str, Tensor]:
    """``patch`` and ``cls``, not weighted yet."""
    (patches, pooled), parts = aim, {"cosine_weight": weights.cosine, "smooth_l1_weight": weights.smooth_l1}
    if weights.form == "margins":
        cosine, similarity = weights.margins
        patch = losses.margin_cosine_loss(aligned.patch_features, patches, margin=cosine)
        patch = patch + losses.margin_similarity_loss(aligned.patch_features, patches, margin=similarity)
    else:
        patch = losses.alignment_loss(aligned.patch_features, patches, **parts)
    if weights.cls_form == "cosine":
        parts = {"cosine_weight": 1.0, "smooth_l1_weight": 0.0}
    return {"patch": patch, "cls": losses.alignment_loss(aligned.global_feature, pooled, **parts)}


def gradient(loss: Tensor, weight: Tensor) -> Tensor:
    """At a weight; the graph is kept."""
    return torch.autograd.grad(loss, weight, retain_graph=True)[0]
