"""AlignmentNet: latent → the teacher's features (ReaLS, arXiv 2502.00359, the figure's MLP_patch and MLP_cls).

latent ─MLP_patch, cell by cell─▶ patch features;  latent ─mean over the grid, MLP_cls─▶ global feature
"""

import math
import warnings
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from psvae.config import Config
from psvae.errors import RangeWarning, ShapeError
from psvae.hub.mixin import HubMixin
from psvae.latents import LatentSpec
from psvae.nn.transformer import init_linear
from psvae.shapes import Features, Latents, check_dtype, check_map, readable

__all__ = ["AlignmentNet", "AlignmentNetConfig", "AlignmentOutput"]

_FAR = 3.0  # times as far from their mean, or as near, as the statistics say
_ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu}


@dataclass(frozen=True)
class AlignmentNetConfig(Config):
    """Sizes of the two MLPs.

    The paper says that there are two, that one reads every latent cell and the other pooled latents, and no more:
    each field is a choice made here.

    Attributes:
        latent_channels: Z.
        feature_dim: D, the teacher's width; DINOv2-B's by default.
        num_layers: linear layers of each MLP. Three with SiLU, as REPA's and SoftVQ-VAE's projectors.
        hidden_dim: their width in between.
        activation: between them.
        merge: latent cells per feature on each axis. 1: a teacher token for each latent cell, so a teacher of patch
            14 sees 14 px per cell (448 for 32 x 32 latents), as the figure is drawn. 2: one for 2 x 2 cells (224).
        pooling: how MLP_cls sees the grid.
        stride: pixels of the image per latent cell on each axis.
    """

    latent_channels: int = 4
    feature_dim: int = 768
    num_layers: int = 3
    hidden_dim: int = 1024
    activation: Literal["silu", "gelu"] = "silu"
    merge: Literal[1, 2] = 1
    pooling: Literal["mean", "max"] = "mean"
    stride: int = 8

    def validate(self) -> None:
        for name in ("latent_channels", "feature_dim", "num_layers", "hidden_dim", "stride"):
            self.require(getattr(self, name) >= 1, name, "at least 1")


class AlignmentOutput(NamedTuple):
    """What the teacher would have seen.

    Attributes:
        patch_features: ``B D h w``, on the latents' grid, or on half of it on each axis with ``merge=2``.
        global_feature: ``B D``.
    """

    patch_features: Features
    global_feature: Float[Tensor, "B D"]


class AlignmentNet(nn.Module, HubMixin):
    """Latents ``B Z h w`` of any VAE → `AlignmentOutput`.

    Reads raw latents, as the VAE's posterior gives them. A generator sees them normalised: ``latent_spec`` keeps
    the statistics, and ``normalized=True`` undoes them first.
    """

    config_class = AlignmentNetConfig
    pipeline_tag = "feature-extraction"

    def __init__(self, config: AlignmentNetConfig) -> None:
        super().__init__()
        self.config = config
        self.latent_spec = LatentSpec(config.latent_channels, config.stride, applied_by="caller")
        self.patch = AlignmentMlp(config.latent_channels * config.merge**2, config)
        self.cls = AlignmentMlp(config.latent_channels, config)
        self.apply(init_linear)

    def forward(self, latents: Latents, normalized: bool = False) -> AlignmentOutput:
        """Features that the latents carry.

        Args:
            latents: ``B Z h w``, raw; or with ``normalized``, as a generator sees and makes them.

        Raises:
            ShapeError: wrong rank or channels, or a grid that ``merge`` does not divide. DtypeError: integers, or
                halves for float32 weights.

        Warns:
            RangeWarning: the scale says that statistics were applied twice or not at all, or is NaN. Not looked at in
                training with gradients, where reading values would hold up a GPU at every step.
        """
        config = self.config
        check_map(latents, config.latent_channels, "latents")
        check_dtype(latents, self.cls.layers[0], "latents")
        height, width = latents.shape[-2:]
        merge = config.merge
        if height % merge or width % merge:
            near = " x ".join(str(max(merge, round(side / merge) * merge)) for side in (height, width))
            raise ShapeError(
                f"latents have the grid {height} x {width}; wanted multiples of merge={merge}, nearest {near}, so that "
                "each teacher token has its cells: use another image size, or an AlignmentNet with merge=1"
            )
        self._warn_of_scale(latents, normalized)
        if normalized:
            latents = self.latent_spec.denormalize(latents)
        cells = rearrange(latents, "B Z (h a) (w b) -> B h w (Z a b)", a=merge, b=merge)
        pooled = latents.mean(dim=(2, 3)) if config.pooling == "mean" else latents.amax(dim=(2, 3))
        return AlignmentOutput(rearrange(self.patch(cells), "B h w D -> B D h w"), self.cls(pooled))

    def _warn_of_scale(self, latents: Latents, normalized: bool) -> None:
        """Once there are statistics: normalised, latents lie about 1 from 0, on average."""
        spec = self.latent_spec
        if (self.training and torch.is_grad_enabled()) or not readable(latents):
            return
        if ((spec.mean == 0) & (spec.std == 1)).all():
            return
        seen = latents.detach().float()
        found = (seen if normalized else spec.normalize(seen)).square().mean().sqrt().item()
        if math.isnan(found):
            said = "latents hold NaN; wanted numbers: look at the step that made them"
        elif not 1 / _FAR <= found <= _FAR:
            remedy = (
                "raw latents come without it, and latent_spec.normalize is called once"
                if normalized
                else "latents that a generator made, or that latent_spec.normalize returned, come with normalized=True"
            )
            said = (
                f"latents lie {found:.3g} standard deviations from their mean, on average; wanted about 1: the "
                f"statistics were applied twice, or not at all; this call has normalized={normalized}: {remedy}"
            )
        else:
            return
        warnings.warn(said, RangeWarning, stacklevel=5)  # past forward and the two calls of nn.Module

    def enable_gradient_checkpointing(self) -> None:
        """Recompute both MLPs in backward instead of keeping their activations."""
        self.patch.gradient_checkpointing = self.cls.gradient_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        """Keep activations again."""
        self.patch.gradient_checkpointing = self.cls.gradient_checkpointing = False

    def extra_repr(self) -> str:
        return f"Z={self.config.latent_channels}, D={self.config.feature_dim}, merge={self.config.merge}"


class AlignmentMlp(nn.Module):
    """Linear layers on the last axis with an activation between: ``… in`` → ``… D``.

    `psvae.nn.transformer.Mlp` is another: two layers, under timm's names.
    """

    def __init__(self, width: int, config: AlignmentNetConfig) -> None:
        super().__init__()
        widths = [width, *[config.hidden_dim] * (config.num_layers - 1), config.feature_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.act = _ACTIVATIONS[config.activation]
        self.gradient_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(self._layers, x, use_reentrant=False)
        return self._layers(x)

    def _layers(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.act(layer(x))
        return self.layers[-1](x)
