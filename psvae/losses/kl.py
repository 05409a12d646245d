"""The KL term L_KL that keeps latents near N(0, 1) (paper, section 3.3, after Rombach et al. 2022)."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from psvae.latents import DiagonalGaussian

__all__ = ["kl_loss"]


def kl_loss(posterior: DiagonalGaussian, *, reduction: Literal["sum", "mean"]) -> Float[Tensor, ""]:
    """KL(q ‖ N(0, 1)), averaged over the batch.

    The paper gives neither weight nor reduction, and they belong together: Rombach et al. sum over Z, h, w and
    weigh by 1e-6; re-implementations average over Z, h, w and weigh by 1e-4. So the reduction must be named.

    Args:
        posterior: the raw posterior, before latent statistics (`PSVAEOutput.posterior`).
        reduction: over Z, h, w: ``"sum"`` or ``"mean"``.
    """
    return posterior.kl(reduction).mean()
