"""The semantic term L_S: stay close to the frozen encoder's features (paper, section 3.3)."""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from psvae.shapes import Features

__all__ = ["cosine_similarity_map", "semantic_loss"]


def semantic_loss(
    features: Features, target: Features, *, mse_weight: float = 1.0, cosine_weight: float = 1.0
) -> Float[Tensor, ""]:
    """mse_weight · mean (f − f*)² + cosine_weight · mean (1 − cos(f, f*)), the cosine per token.

    The paper names "an ℓ2 loss and a cosine-similarity loss"; their weights and reductions are not stated and
    are chosen here: means, 1 and 1. In stage 2 it is applied twice, to the encoder's features and to the
    rebuilt ones. Computed in fp32.

    Args:
        features: ``B D h w``, trained.
        target: ``B D h w``, from the frozen encoder. Receives no gradient.
    """
    features, target = features.float(), target.detach().float()
    mse = F.mse_loss(features, target)
    return mse_weight * mse + cosine_weight * (1.0 - cosine_similarity_map(features, target).mean())


def cosine_similarity_map(a: Features, b: Features) -> Float[Tensor, "B h w"]:
    """Cosine between the features of each token."""
    return F.cosine_similarity(a.float(), b.float(), dim=1)
