"""timm's VisionTransformer with a configurable resize of its position table. Imports timm."""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ConfiguredPositions"]


class ConfiguredPositions(VisionTransformer):
    """Same parameters as its parent; three attributes decide how the table follows the grid.

    transformers' DINOv2 without registers, MAE and SigLIP resize without antialias; timm always with it.
    Meta's DINOv2 without registers adds an offset of 0.1 to the grid before it divides by the table's.
    """

    pos_embed: nn.Parameter
    position_mode: str
    position_antialias: bool
    position_offset: float

    def _pos_embed(self, x: Tensor) -> Tensor:  # x: B h w D
        batch, height, width, _ = x.shape
        prefix = [token.expand(batch, -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        positions = self._positions(height, width)
        x = x.flatten(1, 2)
        if self.no_embed_class:  # the table covers the patches alone
            return self.pos_drop(torch.cat([*prefix, x + positions], dim=1))
        return self.pos_drop(torch.cat([*prefix, x], dim=1) + positions)

    def _positions(self, height: int, width: int) -> Tensor:
        """The table for this grid; the rows of prefix tokens stay as they are."""
        native = tuple(self.patch_embed.grid_size)
        if (height, width) == native:
            return self.pos_embed
        table = self.pos_embed
        first = 0 if self.no_embed_class else self.num_prefix_tokens
        grid = table[:, first:].float().transpose(1, 2).unflatten(2, native)
        options = {"mode": self.position_mode, "antialias": self.position_antialias}
        if self.position_offset:  # the factor is not height / native: the samples shift with it
            factors = ((height + self.position_offset) / native[0], (width + self.position_offset) / native[1])
            grid = F.interpolate(grid, scale_factor=factors, **options)
        else:
            grid = F.interpolate(grid, size=(height, width), **options)
        resized = grid.flatten(2).transpose(1, 2).to(table.dtype)
        return torch.cat([table[:, :first], resized], dim=1)
