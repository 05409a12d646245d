"""Align latents with a teacher's features: ReaLS' two terms, and VA-VAE's two with margins.

All are means, so that weights do not depend on the image size; targets receive no gradient; computed in fp32, also
under autocast.
"""

from contextlib import nullcontext

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from psvae.errors import ShapeError

__all__ = ["alignment_loss", "margin_cosine_loss", "margin_similarity_loss"]


def alignment_loss(
    prediction: Tensor, target: Tensor, *, cosine_weight: float = 0.9, smooth_l1_weight: float = 0.1
) -> Float[Tensor, ""]:
    """λ1 · mean (1 − cos) + λ2 · mean smooth-L1, the cosine per token (ReaLS, arXiv 2502.00359).

    Form and weights are known at second hand: from a project that names ReaLS as their source, and from AM-RADIO
    (arXiv 2312.06709, section 3.4), which has the same. Smooth L1 with beta 1.

    Args:
        prediction: patch features ``B D h w`` or a global feature ``B D``, trained.
        target: the teacher's, of the same shape. Receives no gradient.

    Raises:
        ShapeError: the two differ, or have no axis D.
    """
    prediction, target = _pair(prediction, target)
    cosine = 1.0 - F.cosine_similarity(prediction, target, dim=1).mean()
    return cosine_weight * cosine + smooth_l1_weight * F.smooth_l1_loss(prediction, target)


def margin_cosine_loss(prediction: Tensor, target: Tensor, *, margin: float = 0.5) -> Float[Tensor, ""]:
    """mean relu(1 − margin − cos(z'ᵢ, fᵢ)) over the tokens (VA-VAE, arXiv 2501.01423, L_mcos).

    Args:
        prediction: projected latents ``B D h w``, trained.
        target: the teacher's features ``B D h w``.

    Raises:
        ShapeError: the two differ, or have no axis D.
    """
    prediction, target = _pair(prediction, target)
    return F.relu(1.0 - margin - F.cosine_similarity(prediction, target, dim=1)).mean()


def margin_similarity_loss(prediction: Tensor, target: Tensor, *, margin: float = 0.25) -> Float[Tensor, ""]:
    """mean relu(``|cos(z'ᵢ, z'ⱼ) − cos(fᵢ, fⱼ)|`` − margin) over the pairs of an image's tokens (VA-VAE, L_mdms).

    Args:
        prediction: projected latents ``B D h w``, trained.
        target: the teacher's features on the same grid; their width may differ.

    Raises:
        ShapeError: another batch or grid, or not 4 axes.
    """
    ours, theirs = tuple(prediction.shape), tuple(target.shape)
    if len(ours) != 4 or len(theirs) != 4 or (ours[0], *ours[2:]) != (theirs[0], *theirs[2:]):
        raise ShapeError(
            f"the prediction has shape {ours} and the target {theirs}; wanted (B, D, h, w) with the same B, h and w, "
            "whatever the widths: the grids meet by AlignmentNetConfig's merge and the teacher's image size"
        )
    place = prediction.device.type  # autocast would multiply in half precision, and does not know "meta"
    with nullcontext() if place == "meta" else torch.autocast(place, enabled=False):
        difference = _similarities(prediction) - _similarities(target.detach())
    return F.relu(difference.abs() - margin).mean()


def _similarities(features: Tensor) -> Float[Tensor, "B N N"]:
    """Cosines between the tokens of each image."""
    tokens = F.normalize(features.float().flatten(2), dim=1)
    return torch.einsum("bdi,bdj->bij", tokens, tokens)


def _pair(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if prediction.shape != target.shape or prediction.ndim < 2:
        raise ShapeError(
            f"the prediction has shape {tuple(prediction.shape)} and the target {tuple(target.shape)}; wanted one, "
            "(B, D, h, w) or (B, D): the teacher's width and grid are AlignmentNetConfig's feature_dim, and merge with "
            "the teacher's image size"
        )
    return prediction.float(), target.detach().float()
