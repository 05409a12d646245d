"""Which loss reaches which module, in both stages of training."""

import pytest
import torch
from torch import Tensor, nn

from psvae import PSVAE, losses
from psvae.losses import PatchDiscriminator
from tests.stages import forward, frozen_encoder, move_off_the_frozen_copy, prepare, terms, total
from tests.tiny import PSVAE_VARIANTS, build, fill_weights, images, tiny_psvae

# Adding a constant to every key moves all logits of a query alike, and softmax takes that off again.
NO_GRADIENT_BY_DESIGN = ("attention.k.bias",)


def parts(model: PSVAE) -> dict[str, nn.Module]:
    """The modules that a gradient may or may not reach."""
    found: dict[str, nn.Module] = {"encoder": model.encoder, "decoder": model.decoder}
    if model.vae is not None:
        found |= {"vae.encoder": model.vae.encoder, "vae.decoder": model.vae.decoder}
    return found


def reached(model: PSVAE, loss: Tensor) -> set[str]:
    """The parts that a loss reaches. Each part must be reached whole, with finite gradients, or not at all."""
    model.zero_grad()
    loss.backward(retain_graph=True)
    found = set()
    for name, part in parts(model).items():
        gradients = {key: p.grad for key, p in part.named_parameters() if not key.endswith(NO_GRADIENT_BY_DESIGN)}
        if all(gradient is None for gradient in gradients.values()):
            continue
        for key, gradient in gradients.items():
            assert gradient is not None, f"{name}.{key} is left out"
            assert torch.isfinite(gradient).all(), f"{name}.{key}"
            assert gradient.abs().max() > 0, f"{name}.{key} has a gradient of zero"
        found.add(name)
    return found


def run(variant: str, stage: int) -> tuple[PSVAE, dict[str, Tensor], Tensor]:
    """A model after one forward, its losses, and the loss of the stage."""
    model = fill_weights(tiny_psvae(variant)).train()
    frozen = frozen_encoder(model)
    prepare(move_off_the_frozen_copy(model), stage)
    pixels = images(3)
    output = forward(model, pixels, stage)
    return model, terms(output, pixels, frozen), total(output, pixels, frozen, stage)


VAE = {"vae.encoder", "vae.decoder"}


def test_stage_1() -> None:
    """The encoder is frozen and the pixel decoder looks on: S-VAE learns from features alone."""
    model, found, loss = run("psvae", stage=1)
    assert reached(model, found["pixel"]) == {"decoder"}
    assert reached(model, found["rebuilt"]) == VAE
    assert reached(model, found["kl"]) == {"vae.encoder"}
    assert reached(model, loss) == VAE | {"decoder"}
    assert not found["features"].requires_grad


def test_stage_2() -> None:
    """Pixels reach the encoder through the latent; the semantic decoder learns from features alone."""
    model, found, loss = run("psvae", stage=2)
    assert reached(model, found["pixel"]) == {"encoder", "vae.encoder", "decoder"}
    assert reached(model, found["features"]) == {"encoder"}
    assert reached(model, found["rebuilt"]) == {"encoder"} | VAE
    assert reached(model, found["kl"]) == {"encoder", "vae.encoder"}
    assert reached(model, loss) == {"encoder", "decoder"} | VAE


@pytest.mark.parametrize(
    ("variant", "pixel_in_stage_2"),
    [
        ("mlp", {"encoder", "vae.encoder", "decoder"}),
        ("features", {"encoder", "decoder"} | VAE),
        ("rae", {"encoder", "decoder"}),
    ],
)
def test_the_other_wirings(variant: str, pixel_in_stage_2: set[str]) -> None:
    model, found, _ = run(variant, stage=1)
    assert reached(model, found["pixel"]) == {"decoder"}
    model, found, loss = run(variant, stage=2)
    assert reached(model, found["pixel"]) == pixel_in_stage_2
    assert reached(model, loss) == set(parts(model))


@pytest.mark.parametrize("variant", PSVAE_VARIANTS)
def test_detached_latents_stop_pixels_even_where_the_encoder_is_trained(variant: str) -> None:
    model = fill_weights(tiny_psvae(variant)).train()
    output = model(images(), sample_posterior=True, detach_latents=True)
    assert reached(model, losses.pixel_loss(output.sample, images())) == {"decoder"}


def test_a_frozen_encoder_keeps_no_graph() -> None:
    model = prepare(tiny_psvae().train(), stage=1)
    assert not model(images()).features.requires_grad


def test_the_losses_of_a_stage_add_up() -> None:
    """One backward of the sum, and one of each term, give the same gradients."""
    model, found, loss = run("psvae", stage=2)
    reached(model, loss)
    joint = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    for term in found.values():
        term.backward(retain_graph=True)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, joint[name], rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("stage", [1, 2])
def test_gradient_checkpointing_changes_no_gradient(stage: int) -> None:
    plain, _, loss = run("psvae", stage)
    loss.backward()
    model = fill_weights(tiny_psvae()).train()
    frozen = frozen_encoder(model)
    prepare(move_off_the_frozen_copy(model), stage)
    model.enable_gradient_checkpointing()
    total(forward(model, images(3), stage), images(3), frozen, stage).backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        assert ours.grad is None or torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6), name


def test_gradients_through_encode_and_decode() -> None:
    """Someone who trains a generator through the decoder, or an image through the encoder, needs these."""
    model = tiny_psvae()
    model.latent_spec.mean.fill_(0.5)
    model.latent_spec.std.fill_(2.0)
    pixels = images().requires_grad_()
    latents = model.encode(pixels).latent_dist.sample()
    model.decode(latents).sample.square().mean().backward()
    assert pixels.grad is not None
    assert torch.isfinite(pixels.grad).all()
    assert pixels.grad.abs().max() > 0


# The adversary


def adversary() -> tuple[PSVAE, PatchDiscriminator]:
    return prepare(tiny_psvae().train(), stage=2), build(PatchDiscriminator, 3).train()


def test_the_discriminators_step_leaves_the_autoencoder_alone() -> None:
    model, discriminator = adversary()
    image = model(images()).sample
    losses.discriminator_hinge_loss(discriminator(images()), discriminator(image.detach())).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, parameter in discriminator.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_the_generators_step_leaves_the_discriminator_alone() -> None:
    """Its parameters are frozen for the step; the gradient still passes through it to the image."""
    model, discriminator = adversary()
    discriminator.requires_grad_(False)
    image = model(images()).sample
    pixel, fooled = losses.pixel_loss(image, images()), losses.generator_hinge_loss(discriminator(image))
    weight = losses.adaptive_weight(pixel, fooled, model.decoder.conv_out.weight)
    assert reached(model, fooled) == {"encoder", "vae.encoder", "decoder"}
    (pixel + weight * fooled).backward()
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    assert weight > 0
