"""The adversarial term against LDM's: its discriminator, its hinge losses, its adaptive weight."""

import functools
import itertools

import pytest
import torch
from torch import Tensor, nn

from psvae.losses import PatchDiscriminator, adaptive_weight, discriminator_hinge_loss, generator_hinge_loss
from tests.tiny import build, images, tiny_decoder


class NLayerDiscriminator(nn.Module):
    """The discriminator of pix2pix that LDM uses, written out from its code: one nn.Sequential."""

    def __init__(self, input_nc: int = 3, ndf: int = 64, n_layers: int = 3) -> None:
        super().__init__()
        sequence: list[nn.Module] = [nn.Conv2d(input_nc, ndf, 4, 2, 1), nn.LeakyReLU(0.2, True)]
        multiplier = 1
        for n in range(1, n_layers + 1):
            previous, multiplier = multiplier, min(2**n, 8)
            conv = functools.partial(nn.Conv2d, kernel_size=4, stride=2 if n < n_layers else 1, padding=1, bias=False)
            width = ndf * multiplier
            sequence += [conv(ndf * previous, width), nn.BatchNorm2d(width), nn.LeakyReLU(0.2, True)]
        self.main = nn.Sequential(*sequence, nn.Conv2d(ndf * multiplier, 1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def tiny_discriminator(**options: int) -> PatchDiscriminator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PatchDiscriminator(**{"base_channels": 8, **options})


# PatchDiscriminator


def test_the_default_has_ldms_parameters() -> None:
    """Convolutions of 16 cells, with bias at both ends and batch norm between: 2.77 M."""
    widths = [64, 128, 256, 512]
    first, last = 3 * widths[0] * 16 + widths[0], widths[-1] * 16 + 1
    between = sum(a * b * 16 + 2 * b for a, b in itertools.pairwise(widths))
    assert first + between + last == 2_765_633
    assert count(PatchDiscriminator()) == 2_765_633


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4, 5])
def test_it_is_ldms_discriminator(num_layers: int) -> None:
    """The same weights in the same order give the same logits."""
    ours, theirs = tiny_discriminator(num_layers=num_layers), NLayerDiscriminator(ndf=8, n_layers=num_layers)
    ordered = [ours.conv_in, *(m for pair in zip(ours.convs, ours.norms, strict=True) for m in pair), ours.conv_out]
    layers = [module for module in theirs.main if not isinstance(module, nn.LeakyReLU)]
    for mine, other in zip(ordered, layers, strict=True):
        other.load_state_dict(mine.state_dict())
    assert count(ours) == count(theirs)
    size = 16 * 2**num_layers
    assert torch.allclose(ours(images(2, size, size)), theirs(images(2, size, size)), atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(256, 256), (64, 96), (32, 32), (33, 47)])
def test_one_logit_per_patch(height: int, width: int) -> None:
    """Three halvings, then two convolutions that each take one row and one column: 30 x 30 for 256 x 256."""
    logits = tiny_discriminator()(images(2, height, width))
    assert logits.shape == (2, 1, height // 8 - 2, width // 8 - 2)


def test_a_logit_sees_a_patch_of_70_pixels() -> None:
    """The receptive field that gives the discriminator its name; batch norm would mix all pixels, so eval."""
    pixels = images(1, 160, 160).requires_grad_()
    logits = tiny_discriminator().eval()(pixels)
    logits[0, 0, 8, 8].backward()
    assert pixels.grad is not None
    seen = pixels.grad[0].abs().sum(0).nonzero()
    extent = seen.max(0).values - seen.min(0).values + 1
    assert extent.tolist() == [70, 70]


def test_initial_weights_are_ldms() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        discriminator = PatchDiscriminator()
    for conv in (discriminator.conv_in, *discriminator.convs, discriminator.conv_out):
        assert conv.weight.std().item() == pytest.approx(0.02, rel=0.1)
    for norm in discriminator.norms:
        assert norm.weight.mean().item() == pytest.approx(1.0, abs=0.01)
        assert norm.weight.std().item() == pytest.approx(0.02, rel=0.3)
        assert torch.equal(norm.bias, torch.zeros_like(norm.bias))


# Hinge losses


def test_the_discriminators_hinge() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    # relu(1 - real) = 0, 0.5, 2; relu(1 + fake) = 0, 1, 2
    assert float(discriminator_hinge_loss(real, fake)) == pytest.approx(0.5 * (2.5 / 3 + 3.0 / 3))
    assert float(discriminator_hinge_loss(torch.full((4,), 1.0), torch.full((2,), -1.0))) == 0.0


def test_a_sure_discriminator_learns_nothing() -> None:
    real, fake = torch.full((3,), 1.5, requires_grad=True), torch.full((3,), -1.5, requires_grad=True)
    discriminator_hinge_loss(real, fake).backward()
    for logits in (real, fake):
        assert logits.grad is not None
        assert torch.equal(logits.grad, torch.zeros(3))


def test_the_generators_hinge() -> None:
    fake = torch.tensor([-3.0, 0.0, 1.0], requires_grad=True)
    loss = generator_hinge_loss(fake)
    loss.backward()
    assert loss.item() == pytest.approx(2.0 / 3)
    assert fake.grad is not None
    assert torch.allclose(fake.grad, torch.full((3,), -1.0 / 3))


def test_hinge_losses_are_computed_in_fp32() -> None:
    logits = torch.randn(2, 1, 30, 30).bfloat16()
    assert discriminator_hinge_loss(logits, logits).dtype == torch.float32
    assert generator_hinge_loss(logits).dtype == torch.float32


# adaptive_weight


def at_the_last_layer() -> tuple[Tensor, Tensor, Tensor]:
    """Two losses that share a linear layer, whose gradients are known: 3·x and 4·y summed over rows."""
    weight = torch.randn(2, 3, requires_grad=True)
    reconstruction = (weight @ torch.tensor([1.0, 2.0, 2.0])).sum()  # gradient: two rows (1, 2, 2), norm 3·√2
    generator = (weight @ torch.tensor([3.0, 0.0, 4.0])).sum()  # two rows (3, 0, 4), norm 5·√2
    return reconstruction, generator, weight


def test_the_adaptive_weight_by_hand() -> None:
    reconstruction, generator, weight = at_the_last_layer()
    root = 2.0**0.5
    assert float(adaptive_weight(reconstruction, generator, weight)) == pytest.approx(3 * root / (5 * root + 1e-4))
    assert float(adaptive_weight(reconstruction, generator, weight, eps=0.0)) == pytest.approx(0.6)


def test_the_adaptive_weight_balances_the_two_gradients() -> None:
    """Scaling a loss moves its weight so that the products keep their proportion."""
    reconstruction, generator, weight = at_the_last_layer()
    plain = adaptive_weight(reconstruction, generator, weight, eps=0.0)
    assert torch.allclose(adaptive_weight(10 * reconstruction, generator, weight, eps=0.0), 10 * plain)
    assert torch.allclose(adaptive_weight(reconstruction, 10 * generator, weight, eps=0.0), plain / 10)
    both = adaptive_weight(7 * reconstruction, 7 * generator, weight, eps=0.0)
    assert torch.allclose(both, plain)


def test_the_adaptive_weight_is_clamped_and_a_constant() -> None:
    reconstruction, generator, weight = at_the_last_layer()
    assert float(adaptive_weight(reconstruction, 1e-9 * generator, weight, eps=0.0)) == 1e4
    assert float(adaptive_weight(reconstruction, 0.0 * generator, weight)) == 1e4
    assert float(adaptive_weight(reconstruction, generator, weight, maximum=0.5)) == 0.5
    assert float(adaptive_weight(0.0 * reconstruction, generator, weight)) == 0.0
    assert not adaptive_weight(reconstruction, generator, weight).requires_grad


def test_the_adaptive_weight_on_a_real_decoder() -> None:
    """The graphs are kept, no ``grad`` is written, and backward still works afterwards."""
    decoder, discriminator = tiny_decoder(), build(PatchDiscriminator, 3)
    image = decoder(torch.randn(1, 8, 4, 4))
    reconstruction, generator = image.abs().mean(), generator_hinge_loss(discriminator(image))
    last = decoder.conv_out.weight
    ratio = adaptive_weight(reconstruction, generator, last)
    assert all(p.grad is None for p in (*decoder.parameters(), *discriminator.parameters()))
    (a,), (b,) = (torch.autograd.grad(loss, last, retain_graph=True) for loss in (reconstruction, generator))
    assert float(ratio) == pytest.approx(float(a.norm() / (b.norm() + 1e-4)), rel=1e-5)
    (reconstruction + ratio * generator).backward()
    assert last.grad is not None
    assert torch.allclose(last.grad, a + ratio * b, rtol=1e-4, atol=1e-5)
