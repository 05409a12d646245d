"""Alignment losses, against their formulas written out pair by pair."""

import math
import re

import pytest
import torch

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


def angle_and_distance(pairs):
    """Mean 1 − cos and mean smooth L1 of pairs of vectors."""
    angles = [1 - cosine(a, b) for a, b in pairs]
    distances = [huber(x) for a, b in pairs for x in (a - b).tolist()]
    return sum(angles) / len(angles), sum(distances) / len(distances)


def similarity(ours, theirs, margin):
    """Mean over the pairs of tokens of each image."""
    terms = []
    for one, other in zip(ours, theirs, strict=True):
        a, b = one.flatten(1).T, other.flatten(1).T
        terms += [
            max(0, abs(cosine(a[i], a[j]) - cosine(b[i], b[j])) - margin) for i in range(len(a)) for j in range(len(a))
        ]
    return sum(terms) / len(terms)


def test_alignment_is_cosine_and_smooth_l1():
    ours, theirs = maps()
    angle, distance = angle_and_distance(list(zip(tokens(ours), tokens(theirs), strict=True)))
    assert losses.alignment_loss(ours, theirs).item() == pytest.approx(0.9 * angle + 0.1 * distance, rel=1e-5)
    weighed = losses.alignment_loss(ours, theirs, cosine_weight=0.0, smooth_l1_weight=2.0)
    assert weighed.item() == pytest.approx(2 * distance, rel=1e-5)
    assert losses.alignment_loss(ours, ours).item() == pytest.approx(0, abs=1e-6)


def test_alignment_of_a_global_feature():
    ours, theirs = (x[..., 0, 0] for x in maps())
    angle, distance = angle_and_distance(list(zip(ours, theirs, strict=True)))
    assert losses.alignment_loss(ours, theirs).item() == pytest.approx(0.9 * angle + 0.1 * distance, rel=1e-5)
    by_hand = losses.alignment_loss(torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.5]]))  # differences of 1 and 0.5
    assert by_hand.item() == pytest.approx(0.9 * (1 - 26 / (5 * math.hypot(4, 3.5))) + 0.1 * (0.5 + 0.125) / 2)


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_margin_cosine(margin):
    ours, theirs = maps()
    found = [max(0, 1 - margin - cosine(a, b)) for a, b in zip(tokens(ours), tokens(theirs), strict=True)]
    wanted = sum(found) / len(found)
    assert losses.margin_cosine_loss(ours, theirs, margin=margin).item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("margin", [0.0, 0.25])
def test_margin_similarity_is_within_each_image(margin):
    ours, theirs = maps()
    for target in (theirs, theirs[:, :3]):  # of another width too
        wanted = similarity(ours, target, margin)
        assert losses.margin_similarity_loss(ours, target, margin=margin).item() == pytest.approx(wanted, rel=1e-4)


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


@pytest.mark.parametrize("loss", [losses.alignment_loss, losses.margin_cosine_loss, losses.margin_similarity_loss])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ((2, 6, 1, 1), (2, 6, 3, 2)),
        ((1, 6, 3, 2), (2, 6, 3, 2)),
        ((2, 6, 3, 2), (2, 6, 2, 3)),
        ((2, 6, 3, 2), (2, 6)),
        ((6,), (6,)),
    ],
)
def test_nothing_is_broadcast(loss, ours, theirs):
    wanted = rf"prediction has shape {re.escape(str(ours))} and the target {re.escape(str(theirs))}; wanted .*B, D"
    with pytest.raises(ShapeError, match=wanted):
        loss(torch.ones(ours), torch.ones(theirs))


def test_a_global_feature_has_no_pairs():
    with pytest.raises(ShapeError, match=r"\(2, 6\) and the target \(2, 6\); wanted \(B, D, h, w\)"):
        losses.margin_similarity_loss(torch.ones(2, 6), torch.ones(2, 6))


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


def test_pairs_on_the_meta_device():
    """To which autocast, and so leaving it, is unknown."""
    ours, theirs = (x.to("meta") for x in maps())
    assert losses.margin_similarity_loss(ours, theirs).shape == ()


@pytest.mark.parametrize("loss", [losses.alignment_loss, losses.margin_cosine_loss, losses.margin_similarity_loss])
def test_autocast_changes_nothing(loss):
    """Neither the value nor the gradient."""
    ours, theirs = maps()
    ours.requires_grad_()
    exact = loss(ours, theirs)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(ours, theirs)
    assert found.dtype == torch.float32
    assert found.equal(exact)
    (gradient,), (wanted,) = (torch.autograd.grad(value, ours) for value in (found, exact))
    assert gradient.equal(wanted)
