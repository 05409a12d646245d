"""Semantic, KL and pixel loss against their formulas, and which argument receives a gradient."""

import pytest
import torch
from torch import Tensor, nn

from psvae import DiagonalGaussian
from psvae.errors import ConfigError
from psvae.losses import cosine_similarity_map, kl_loss, pixel_loss, semantic_loss
from tests.tiny import features, images


def pair(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Features to train and features to match."""
    return features(seed=0).to(dtype), (features(seed=1) * 2.0 + 0.5).to(dtype)


# semantic_loss


def test_the_semantic_loss_is_its_formula() -> None:
    """Mean square over every element, and one minus the cosine of every token's features."""
    got, target = pair()
    square = sum(float((a - b) ** 2) for a, b in zip(got.flatten(), target.flatten(), strict=True)) / got.numel()
    cosines = []
    for item, wanted in zip(got, target, strict=True):
        for a, b in zip(item.flatten(1).T, wanted.flatten(1).T, strict=True):
            cosines.append(float(a @ b) / float(a.norm() * b.norm()))
    cosine = 1.0 - sum(cosines) / len(cosines)
    assert float(semantic_loss(got, target)) == pytest.approx(square + cosine, rel=1e-5)
    assert float(semantic_loss(got, target, cosine_weight=0.0)) == pytest.approx(square, rel=1e-5)
    assert float(semantic_loss(got, target, mse_weight=0.0)) == pytest.approx(cosine, rel=1e-5)
    weighted = semantic_loss(got, target, mse_weight=0.3, cosine_weight=2.0)
    assert float(weighted) == pytest.approx(0.3 * square + 2.0 * cosine, rel=1e-5)


def test_equal_features_cost_nothing() -> None:
    got, _ = pair()
    assert float(semantic_loss(got, got.clone())) == pytest.approx(0.0, abs=1e-6)
    assert float(semantic_loss(got, 3.0 * got, mse_weight=0.0)) == pytest.approx(0.0, abs=1e-6)


def test_opposite_features_cost_two() -> None:
    got, _ = pair()
    assert float(semantic_loss(got, -got, mse_weight=0.0)) == pytest.approx(2.0, abs=1e-6)


def test_only_the_first_argument_learns() -> None:
    got, target = (x.requires_grad_() for x in pair())
    semantic_loss(got, target).backward()
    assert got.grad is not None
    assert got.grad.abs().min() > 0
    assert target.grad is None


def test_the_gradient_leads_to_the_target() -> None:
    got, target = pair()
    got.requires_grad_()
    optimizer = torch.optim.Adam([got], lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        loss = semantic_loss(got, target)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.01


def test_the_semantic_loss_is_computed_in_fp32() -> None:
    """In bfloat16 the mean of squares would have two digits."""
    got, target = pair(torch.bfloat16)
    loss = semantic_loss(got, target)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(semantic_loss(got.double(), target.double())), rel=1e-5)


def test_features_of_zero_give_no_nan() -> None:
    got, target = torch.zeros(1, 4, 2, 2, requires_grad=True), torch.zeros(1, 4, 2, 2)
    loss = semantic_loss(got, target)
    loss.backward()
    assert torch.isfinite(loss)
    assert got.grad is not None
    assert torch.isfinite(got.grad).all()


def test_the_cosine_map_has_one_number_per_token() -> None:
    got, target = features(2, 3, 5), features(2, 3, 5, seed=1)
    cosines = cosine_similarity_map(got, target)
    assert cosines.shape == (2, 3, 5)
    a, b = got[1, :, 2, 4], target[1, :, 2, 4]
    assert float(cosines[1, 2, 4]) == pytest.approx(float(a @ b / (a.norm() * b.norm())), rel=1e-5)


# kl_loss


def posterior() -> DiagonalGaussian:
    return DiagonalGaussian(torch.randn(3, 16, 2, 4, generator=torch.Generator().manual_seed(0)))


def test_the_kl_loss_is_that_of_torch() -> None:
    ours = posterior()
    wanted = torch.distributions.kl_divergence(
        torch.distributions.Normal(ours.mean, ours.std), torch.distributions.Normal(0.0, 1.0)
    )
    assert torch.allclose(kl_loss(ours, reduction="sum"), wanted.sum((1, 2, 3)).mean(), rtol=1e-6)
    assert torch.allclose(kl_loss(ours, reduction="mean"), wanted.mean(), rtol=1e-6)
    ratio = kl_loss(ours, reduction="sum") / kl_loss(ours, reduction="mean")
    assert float(ratio) == pytest.approx(8 * 2 * 4, rel=1e-5), "the two differ by the size of the latent"


def test_the_kl_loss_is_zero_at_the_prior_and_nowhere_else() -> None:
    assert float(kl_loss(DiagonalGaussian(torch.zeros(1, 8, 2, 2)), reduction="sum")) == 0.0
    assert float(kl_loss(posterior(), reduction="mean")) > 0.0


def test_the_kl_loss_moves_mean_and_variance() -> None:
    raw = torch.randn(2, 8, 2, 2).requires_grad_()
    kl_loss(DiagonalGaussian(raw), reduction="sum").backward()
    assert raw.grad is not None
    mean, logvar = raw.detach().chunk(2, dim=1)
    assert torch.allclose(raw.grad, torch.cat([mean, 0.5 * (logvar.exp() - 1.0)], dim=1) / 2, atol=1e-6)


@pytest.mark.bad_input
def test_the_reduction_must_be_named() -> None:
    with pytest.raises(TypeError, match="reduction"):
        kl_loss(posterior())
    with pytest.raises(ConfigError, match="reduction is 'batchmean'; wanted 'none', 'sum' or 'mean'"):
        kl_loss(posterior(), reduction="batchmean")


# pixel_loss


class Perceptual(nn.Module):
    """As LPIPS: frozen features of both images, squared difference, one number per image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2)
        self.requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        difference = torch.tanh(self.conv(a)) - torch.tanh(self.conv(b))
        return difference.square().mean((1, 2, 3), keepdim=True)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_pixel_loss_is_its_formula(norm: str) -> None:
    got, target, perceptual = images(seed=0), images(seed=1), Perceptual()
    difference = got - target
    plain = difference.abs().mean() if norm == "l1" else difference.square().mean()
    term = perceptual(got, target).mean()
    assert torch.allclose(pixel_loss(got, target, norm=norm), plain)
    assert torch.allclose(pixel_loss(got, target, norm=norm, perceptual=perceptual), plain + term)
    weighted = pixel_loss(got, target, norm=norm, perceptual=perceptual, perceptual_weight=0.25)
    assert torch.allclose(weighted, plain + 0.25 * term)


def test_equal_images_cost_nothing() -> None:
    assert float(pixel_loss(images(), images(), perceptual=Perceptual())) == 0.0


def test_the_perceptual_term_reaches_the_reconstruction_and_not_the_target() -> None:
    """A perceptual network under ``no_grad`` would leave the first of these at zero without a word."""
    got, target, perceptual = images(seed=0).requires_grad_(), images(seed=1).requires_grad_(), Perceptual()
    with_term = pixel_loss(got, target, perceptual=perceptual, perceptual_weight=10.0)
    (of_both,) = torch.autograd.grad(with_term, got)
    (of_pixels,) = torch.autograd.grad(pixel_loss(got, target), got)
    assert (of_both - of_pixels).abs().max() > 1e-6
    wanted = images(seed=0).requires_grad_()
    (of_term,) = torch.autograd.grad(10.0 * perceptual(wanted, images(seed=1)).mean(), wanted)
    assert torch.allclose(of_both - of_pixels, of_term, atol=1e-7)
    with_term = pixel_loss(got, target, perceptual=perceptual)
    with_term.backward()
    assert target.grad is None
    assert all(parameter.grad is None for parameter in perceptual.parameters())


def test_the_pixel_loss_is_computed_in_fp32() -> None:
    got, target = images(seed=0).bfloat16(), images(seed=1).bfloat16()
    loss = pixel_loss(got, target, perceptual=Perceptual())
    assert loss.dtype == torch.float32
    wanted = pixel_loss(got.float(), target.float(), perceptual=Perceptual())
    assert float(pixel_loss(got, target)) == pytest.approx(
        float((got.double() - target.double()).abs().mean()), rel=1e-5
    )
    assert wanted.dtype == torch.float32


@pytest.mark.bad_input
def test_an_unknown_norm() -> None:
    with pytest.raises(ConfigError, match="norm is 'huber'; wanted 'l1' or 'l2'"):
        pixel_loss(images(), images(), norm="huber")
