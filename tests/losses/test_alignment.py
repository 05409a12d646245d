"""Alignment losses, against their formulas written out pair by pair."""

import math

import pytest
import torch
from torch.nn import functional as F

from psvae import losses
from psvae.errors import ShapeError
from tests.tiny import features


def maps(width=6):
    return features(2, 3, 2, seed=1)[:, :width], features(2, 3, 2, seed=2)[:, :width]


def tokens(x):
    return [x[b, :, i, j] for b in range(len(x)) for i in range(x.shape[2]) for j in range(x.shape[3])]


def cosine(a, b):
    return (a @ b / (a.norm() * b.norm())).item()


def huber(x):
    return 0.5 * x**2 if abs(x) < 1 else abs(x) - 0.5


def test_alignment_is_cosine_and_smooth_l1():
    ours, theirs = maps()
    pairs = list(zip(tokens(ours), tokens(theirs), strict=True))
    angle = sum(1 - cosine(a, b) for a, b in pairs) / len(pairs)
    distance = sum(huber(x) for a, b in pairs for x in (a - b).tolist()) / ours.numel()
    assert losses.alignment_loss(ours, theirs).item() == pytest.approx(0.9 * angle + 0.1 * distance, rel=1e-5)
    weighed = losses.alignment_loss(ours, theirs, cosine_weight=0.0, smooth_l1_weight=2.0)
    assert weighed.item() == pytest.approx(2 * distance, rel=1e-5)
    assert losses.alignment_loss(ours[..., 0, 0], theirs[..., 0, 0]).item() > 0  # a global feature, B D
    assert losses.alignment_loss(ours, ours).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_margin_cosine(margin):
    ours, theirs = maps()
    found = [max(0, 1 - margin - cosine(a, b)) for a, b in zip(tokens(ours), tokens(theirs), strict=True)]
    wanted = sum(found) / len(found)
    assert losses.margin_cosine_loss(ours, theirs, margin=margin).item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("margin", [0.0, 0.25])
def test_margin_similarity_is_within_each_image(margin):
    ours, theirs = maps()
    terms = []
    for one, other in zip(ours, theirs, strict=True):
        a, b = one.flatten(1).T, other.flatten(1).T
        terms += [
            max(0, abs(cosine(a[i], a[j]) - cosine(b[i], b[j])) - margin) for i in range(len(a)) for j in range(len(a))
        ]
    wanted = sum(terms) / len(terms)
    assert losses.margin_similarity_loss(ours, theirs, margin=margin).item() == pytest.approx(wanted, rel=1e-4)
    assert losses.margin_similarity_loss(ours, theirs[:, :3]).item() >= 0  # of another width


@pytest.mark.parametrize("loss", [losses.alignment_loss, losses.margin_cosine_loss, losses.margin_similarity_loss])
def test_only_the_prediction_gets_a_gradient(loss):
    ours, theirs = (x.clone().requires_grad_() for x in maps())
    loss(ours, theirs).backward()
    assert ours.grad.isfinite().all()
    assert ours.grad.any()
    assert theirs.grad is None


def test_the_teachers_width_is_named():
    ours, theirs = maps()
    for loss in (losses.alignment_loss, losses.margin_cosine_loss):
        with pytest.raises(ShapeError, match=r"\(2, 6, 3, 2\).*\(2, 4, 3, 2\).*feature_dim"):
            loss(ours, theirs[:, :4])


def test_gradient_ratio():
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([0.5])
    assert losses.gradient_ratio(a, b).item() == pytest.approx(5 / 0.5001)
    assert losses.gradient_ratio(a, torch.zeros(1), maximum=100.0).item() == 100
    assert not losses.gradient_ratio(a.requires_grad_(), b).requires_grad
    assert math.isclose(losses.gradient_ratio(a.bfloat16(), b.bfloat16()).item(), 5 / 0.5001, rel_tol=1e-3)


def test_the_adversary_is_balanced_by_the_same_ratio():
    weight = torch.tensor([2.0], requires_grad=True)
    ratio = losses.adaptive_weight((3 * weight).sum(), (0.5 * weight).sum(), weight)
    assert ratio.item() == pytest.approx(losses.gradient_ratio(torch.tensor([3.0]), torch.tensor([0.5])).item())


def test_half_precision_is_computed_in_fp32():
    ours, theirs = maps()
    exact = losses.alignment_loss(ours.bfloat16().float(), theirs.bfloat16().float())
    assert losses.alignment_loss(ours.bfloat16(), theirs.bfloat16()).equal(exact)
    assert F.smooth_l1_loss(ours, theirs) > 0
