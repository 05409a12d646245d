"""timm's VisionTransformer with a configurable resize of its position table. Imports timm."""

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

__all__ = ["ConfiguredPositions"]


class ConfiguredPositions(VisionTransformer):
    """Same parameters as its parent; ``position_mode`` and ``position_antialias`` decide the resize.

    transformers' DINOv2 without registers, MAE and SigLIP resize without antialias; timm always with it.
    """

    pos_embed: nn.Parameter
    position_mode: str
    position_antialias: bool

    def _pos_embed(self, x: Tensor) -> Tensor:  # x: B h w D
        batch, height, width, _ = x.shape
        prefix = [token.expand(batch, -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        positions = resample_abs_pos_embed(
            self.pos_embed,
            new_size=[height, width],
            old_size=list(self.patch_embed.grid_size),
            num_prefix_tokens=0 if self.no_embed_class else self.num_prefix_tokens,
            interpolation=self.position_mode,
            antialias=self.position_antialias,
        )
        x = x.flatten(1, 2)
        if self.no_embed_class:  # the table covers the patches alone
            return self.pos_drop(torch.cat([*prefix, x + positions], dim=1))
        return self.pos_drop(torch.cat([*prefix, x], dim=1) + positions)
