"""What `PSVAE` and `PixelVAE` return: named tuples that also answer to ``output["name"]``, as SD-style callers expect.

Tuples of tensors are what DDP, FSDP, ``torch.compile`` and ``torch.export`` look inside.
"""

from typing import Any, NamedTuple

from torch import Tensor

from psvae.latents import DiagonalGaussian

__all__ = ["DecoderOutput", "EncoderOutput", "PSVAEOutput", "PixelVAEOutput"]


def _item(self: tuple, key: Any) -> Any:
    return getattr(self, key) if isinstance(key, str) else tuple.__getitem__(self, key)


class EncoderOutput(NamedTuple):
    """``latent_dist``: the posterior over normalised latents ``B Z h w``."""

    latent_dist: DiagonalGaussian

    __getitem__ = _item


class DecoderOutput(NamedTuple):
    """``sample``: images ``B C H W``, nominally in [-1, 1]."""

    sample: Tensor

    __getitem__ = _item


class PSVAEOutput(NamedTuple):
    """Everything a loss needs, from one forward.

    Attributes:
        sample: reconstructed images ``B C H W``.
        features: ``B D h w``, the encoder's output (f′ in the paper).
        rebuilt_features: ``B D h w``, the semantic decoder's output (f″); ``None`` without a SemanticVAE.
        latents: ``B Z h w``, raw: before the statistics of `LatentSpec`.
        parameters: ``B 2Z h w``, mean and log-variance of the raw posterior; ``None`` without a SemanticVAE.
    """

    sample: Tensor
    features: Tensor
    rebuilt_features: Tensor | None
    latents: Tensor
    parameters: Tensor | None

    __getitem__ = _item

    @property
    def posterior(self) -> DiagonalGaussian:
        """The raw posterior, the one that the KL term regularises."""
        return DiagonalGaussian.point(self.latents) if self.parameters is None else DiagonalGaussian(self.parameters)


class PixelVAEOutput(NamedTuple):
    """Everything a loss needs, from one forward of `PixelVAE`.

    Attributes:
        sample: reconstructed images ``B C H W``.
        latents: ``B Z h w``, raw.
        parameters: ``B 2Z h w``, mean and log-variance of the posterior.
    """

    sample: Tensor
    latents: Tensor
    parameters: Tensor

    __getitem__ = _item

    @property
    def posterior(self) -> DiagonalGaussian:
        """The posterior that the KL term regularises."""
        return DiagonalGaussian(self.parameters)
