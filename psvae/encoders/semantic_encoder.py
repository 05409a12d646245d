"""SemanticEncoder: image → features, by a pretrained Vision Transformer (paper, section 3.3, E_V)."""

import json
import os
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from psvae.config import Config
from psvae.encoders._export import timm_export, transformers_export
from psvae.encoders._timm import build_vit, fill_constant_buffers, published_statistics
from psvae.errors import ConfigError
from psvae.hub.exporting import export
from psvae.hub.keymaps.encoders_meta import META_DINOV2
from psvae.hub.keymaps.encoders_timm import TIMM
from psvae.hub.keymaps.encoders_transformers import TRANSFORMERS
from psvae.hub.mixin import HubMixin
from psvae.shapes import Features, Images, check_images

__all__ = ["EncoderTokens", "SemanticEncoder", "SemanticEncoderConfig"]

RGB = tuple[float, float, float]
# arguments of timm.create_model that are no part of an architecture: a config.json must not choose files to read
LOADING = ("cache_dir", "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class SemanticEncoderConfig(Config):
    """Everything that changes the encoder's numbers.

    The defaults are the paper's: DINOv2-B (with registers, as RAE, which it follows), last layer, final
    norm without weights, a 224 px view of a 256 px image (section 4.1).

    Attributes:
        name: a timm Vision Transformer, such as ``vit_base_patch14_reg4_dinov2.lvd142m``.
        model_args: arguments for timm's constructor, such as ``{"embed_dim": 192, "depth": 4}``.
        stride: image pixels per token. The image is resized inside to ``patch·h × patch·w``; with
            stride = patch nothing is resized.
        mean, std: normalisation of pixels in [0, 1].
        resize_mode, resize_antialias: how the image is resized inside. RAE: bicubic, no antialias.
        layer: which block's output, negative from the end; later blocks are left out.
        final_norm: ``"plain"`` (LayerNorm without weights, RAE), ``"affine"`` (the encoder's own) or ``"none"``.
        position_mode, position_antialias: how a learned position table follows the grid.
        position_offset: added to the grid's height and width before they are divided by the table's. Meta's DINOv2
            without registers: 0.1.
        norm_eps: of every LayerNorm; None is the architecture's own.
    """

    name: str = "vit_base_patch14_reg4_dinov2.lvd142m"
    model_args: dict[str, Any] = field(default_factory=dict)
    stride: int = 16
    mean: RGB = IMAGENET_MEAN
    std: RGB = IMAGENET_STD
    resize_mode: Literal["bicubic", "bilinear"] = "bicubic"
    resize_antialias: bool = False
    layer: int = -1
    final_norm: Literal["plain", "affine", "none"] = "plain"
    position_mode: Literal["bicubic", "bilinear"] = "bicubic"
    position_antialias: bool = True
    position_offset: float = 0.0
    norm_eps: float | None = None

    def validate(self) -> None:
        self.require(bool(self.name), "name", "a timm model name")
        self.require(self.stride >= 1, "stride", "at least 1")
        self.require(min(self.std) > 0, "std", "three positive numbers")
        self.require(0 <= self.position_offset < 1, "position_offset", "0 up to but not including 1")
        self.require(self.norm_eps is None or self.norm_eps > 0, "norm_eps", "a positive number or None")
        loading = sorted(set(self.model_args) & set(LOADING))
        if loading:
            raise ConfigError(
                f"SemanticEncoderConfig.model_args has {loading[0]!r}, which tells timm what to load; wanted arguments "
                "of the architecture alone: weights come by from_pretrained and from_timm"
            )
        try:
            json.dumps(self.model_args, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"model_args {self.model_args!r} cannot be saved as JSON ({error}); use names") from error


class EncoderTokens(NamedTuple):
    """All that one pass of the encoder knows.

    Attributes:
        features: ``B D h w``, after the final norm.
        pre_norm: ``B D h w``, before it.
        global_token: ``B D``, the normed CLS token, or the mean of the normed patch tokens where there is none.
        pre_norm_cls: ``B D``, the CLS token before the norm, which DINOv2's depth heads read beside ``pre_norm``; None
            where there is none, as in SigLIP.
    """

    features: Features
    pre_norm: Features
    global_token: Float[Tensor, "B D"]
    pre_norm_cls: Float[Tensor, "B D"] | None


class SemanticEncoder(nn.Module, HubMixin):
    """Images ``B 3 H W`` in [-1, 1] → features ``B D h w``, h = H / stride, w = W / stride.

    Any H and W that are multiples of the stride, rectangles too. Class and register tokens are dropped.
    Built without weights; `from_timm` brings the published ones. `from_pretrained` also reads folders of timm and
    of transformers (DINOv2 with and without registers, DINOv3, SigLIP, SigLIP 2, ViT-MAE) and Meta's DINOv2 files.
    Of those, positions, activation, eps, mean and std are the originating library's; the stride becomes 16
    for patch 14 and the patch otherwise, and the final norm stays ``"plain"`` unless
    ``from_pretrained(..., final_norm="affine")`` asks for the file's own.

    Args:
        config: see `SemanticEncoderConfig`.

    Attributes:
        feature_dim: D.
        patch: the patch size of the Vision Transformer, in pixels of its own input.
    """

    config_class = SemanticEncoderConfig
    foreign_formats = (TIMM, *TRANSFORMERS.values(), META_DINOV2)
    pipeline_tag = "image-feature-extraction"
    mean: Tensor
    std: Tensor

    def __init__(self, config: SemanticEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.vit = build_vit(config.name, config.model_args, **_choices(config))
        self.feature_dim: int = self.vit.embed_dim
        self.patch: int = self.vit.patch_embed.patch_size[0]
        # a build on the meta device must still hold these numbers: no checkpoint brings them
        device = "cpu" if torch.empty(0).is_meta else None  # torch 2.7 does not tell its default in a `with`
        self.register_buffer("mean", torch.tensor(config.mean, device=device).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std, device=device).view(3, 1, 1), persistent=False)

    @classmethod
    def from_timm(cls, name: str, *, pretrained: bool = True, file: str | None = None, **fields: Any) -> Self:
        """Build from a timm name, with timm's published mean and std, and its weights.

        Args:
            pretrained: fetch the published weights (timm's cache, then the Hub). ``False`` leaves them random.
            file: a local weights file to read instead.
            **fields: other fields of `SemanticEncoderConfig`.
        """
        mean, std = published_statistics(name)
        config = SemanticEncoderConfig.from_dict({"name": name, "mean": mean, "std": std, **fields})
        if not pretrained and file is None:
            return cls(config)
        with torch.device("meta"):
            encoder = cls(config)
        encoder.vit = build_vit(name, config.model_args, pretrained=pretrained, file=file, **_choices(config))
        return encoder.eval()

    def forward(self, images: Images, return_all: bool = False) -> Features | EncoderTokens:
        """Encode images.

        Args:
            images: ``B 3 H W`` in [-1, 1].
            return_all: return `EncoderTokens`: also the global token, and both before the norm.

        Raises:
            ShapeError: wrong rank, channels or size, or NaN. DtypeError: integer images.
        """
        stride, patch = self.config.stride, self.patch
        check_images(images, stride)
        height, width = images.shape[-2] // stride, images.shape[-1] // stride
        pixels = self._preprocess(images, (patch * height, patch * width))
        has_prefix = self.vit.num_prefix_tokens > 0  # SigLIP has patch tokens alone, and timm then gives no pair
        [found] = self.vit(
            pixels,
            indices=1,  # the last block: those after config.layer were not built
            output_fmt="NLC",
            return_prefix_tokens=has_prefix,
            intermediates_only=True,
        )
        pre_norm, prefix = found if has_prefix else (found, None)
        tokens = self.vit.norm(pre_norm)
        features = _to_map(tokens, height)
        if not return_all:
            return features
        cls = prefix[:, 0] if prefix is not None and self.vit.cls_token is not None else None
        global_token = tokens.mean(dim=1) if cls is None else self.vit.norm(cls)
        return EncoderTokens(features, _to_map(pre_norm, height), global_token, cls)

    def _preprocess(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """[-1, 1] → the encoder's own size, mean and std."""
        if images.shape[-2:] != size:
            mode, antialias = self.config.resize_mode, self.config.resize_antialias
            images = F.interpolate(images.float(), size, mode=mode, antialias=antialias).to(images.dtype)
        return (images * 0.5 + 0.5 - self.mean) / self.std

    def export_timm(self, folder: str | os.PathLike[str], *, max_shard_size: str | int = "5GB") -> None:
        """Write a folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads.

        A plain final norm is written as weight 1 and bias 0; blocks that ``layer`` cut off are not written. timm
        takes images of its own size, normalised by ``mean`` and ``std``: the resize from the stride stays here.

        Raises:
            ConfigError: timm's class of that name cannot hold these tensors.
            CheckpointError: the folder cannot be written.
        """
        config, state = timm_export(self)
        export(self, TIMM, folder, config=config, state=state, max_shard_size=max_shard_size)

    def export_transformers(self, folder: str | os.PathLike[str], *, max_shard_size: str | int = "5GB") -> None:
        """Write a folder that ``transformers.AutoModel.from_pretrained(folder)`` loads.

        DINOv2 with and without registers, DINOv3, SigLIP (without its pooling head) and ViT-MAE. A plain final norm
        is written as weight 1 and bias 0; blocks that ``layer`` cut off are not written. The names are those of
        the published files, which transformers 4.57 and 5.23 both read. No image processor is written: its resize
        is not this encoder's.

        Raises:
            ConfigError: transformers has no model of this architecture.
            CheckpointError: the folder cannot be written.
        """
        family, config, state = transformers_export(self)
        export(self, TRANSFORMERS[family], folder, config=config, state=state, max_shard_size=max_shard_size)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the blocks in backward instead of keeping their activations."""
        self.vit.set_grad_checkpointing(True)

    def disable_gradient_checkpointing(self) -> None:
        """Keep activations again."""
        self.vit.set_grad_checkpointing(False)

    def _fill_constant_buffers(self, device: torch.device | str) -> None:
        fill_constant_buffers(self.vit, device)

    def extra_repr(self) -> str:
        return f"{self.config.name}, D={self.feature_dim}, patch={self.patch}, stride={self.config.stride}"


def _choices(config: SemanticEncoderConfig) -> dict[str, Any]:
    """What `build_vit` needs beside name and arguments."""
    return {
        "layer": config.layer,
        "final_norm": config.final_norm,
        "position_mode": config.position_mode,
        "position_antialias": config.position_antialias,
        "position_offset": config.position_offset,
        "norm_eps": config.norm_eps,
    }


def _to_map(tokens: Float[Tensor, "B N D"], height: int) -> Features:
    return tokens.transpose(1, 2).unflatten(2, (height, -1))
