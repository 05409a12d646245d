"""EQ-VAE's transformation (arXiv 2502.09509): latents scaled and turned, to decode to the picture treated alike."""

from dataclasses import dataclass

import torch
from sampling import generator_of
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Turn:
    """A scale of 8/32 to 31/32, then one to three quarter turns."""

    SMALLEST, PARTS = 8, 32

    scale: float
    quarters: int

    @classmethod
    def draw(cls, share: float, *place: object) -> "Turn | None":
        """One for that share of the places, the same for a place every time."""
        noise = generator_of(*place, "turn")
        if torch.rand(1, generator=noise) >= share:
            return None
        parts = torch.randint(cls.SMALLEST, cls.PARTS, (1,), generator=noise)
        return cls(parts.item() / cls.PARTS, int(torch.randint(1, 4, (1,), generator=noise)))

    def latents(self, latents: Tensor) -> Tensor:
        """``B Z h w`` → ``B Z w' h'``, whole cells."""
        return self._turn(latents, [max(1, round(side * self.scale)) for side in latents.shape[-2:]])

    def images(self, images: Tensor, stride: int) -> Tensor:
        """The target of such latents."""
        return self._turn(images, [max(1, round(side // stride * self.scale)) * stride for side in images.shape[-2:]])

    def _turn(self, maps: Tensor, size: list[int]) -> Tensor:
        return torch.rot90(F.interpolate(maps, size, mode="bilinear"), self.quarters, (2, 3))
