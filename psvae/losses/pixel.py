"""The pixel term L_P without its adversary (paper, section 3.3, after Rombach et al. 2022)."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from psvae.errors import ConfigError
from psvae.shapes import Images

__all__ = ["pixel_loss"]


def pixel_loss(
    reconstruction: Images,
    target: Images,
    *,
    norm: Literal["l1", "l2"] = "l1",
    perceptual: nn.Module | None = None,
    perceptual_weight: float = 1.0,
) -> Float[Tensor, ""]:
    """mean ``|x̂ − x|`` (or squared) + perceptual_weight · mean perceptual(x̂, x), in fp32.

    Rombach et al. use L1 and LPIPS with weight 1, summed over pixels; the mean is chosen here, so that weights
    do not depend on the image size.

    Args:
        reconstruction, target: ``B C H W`` in [-1, 1].
        perceptual: a network called as ``perceptual(reconstruction, target)``, such as ``lpips.LPIPS(net="vgg")``
            with its parameters frozen; ``None`` leaves the term out. It runs with gradients: freeze its
            parameters, never wrap it in ``no_grad``.

    Raises:
        ConfigError: an unknown norm.
    """
    if norm not in ("l1", "l2"):
        raise ConfigError(f"norm is {norm!r}; wanted 'l1' or 'l2'")
    reconstruction, target = reconstruction.float(), target.detach().float()
    distance = F.l1_loss if norm == "l1" else F.mse_loss
    loss = distance(reconstruction, target)
    if perceptual is not None:
        loss = loss + perceptual_weight * perceptual(reconstruction, target).mean()
    return loss
