"""The only file that touches timm: build a Vision Transformer as the configuration says.

timm builds every family (DINOv2, DINOv3, SigLIP2, MAE, CLIP) and knows where its published weights are.
What timm fixes in code but the latents depend on (how the position table is resized, whether the final
norm has weights) is set here.
"""

import copy
import difflib
import importlib
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from torch import Tensor, nn

from psvae.errors import CheckpointError, ConfigError, MissingDependencyError

__all__ = ["TIMM_POSITIONS", "build_vit", "fill_constant_buffers", "fitting_arguments", "published_statistics"]

RGB = tuple[float, float, float]
TIMM_POSITIONS = ("bicubic", True, 0.0)  # mode, antialias, offset


def import_timm() -> Any:
    """timm, or an error that names the usual cause and the mend."""
    try:
        with torch.device("cpu"):  # torch 2.7 computes while it is imported, and cannot on the meta device
            return importlib.import_module("timm")
    except (ImportError, RuntimeError) as error:  # a torchvision made for another torch raises RuntimeError
        raise MissingDependencyError(
            f"timm builds the encoder and could not be imported ({type(error).__name__}: {error}). It needs a "
            "torchvision that matches torch; install both from the same source in one command: "
            "pip install --upgrade torch torchvision timm"
        ) from error


def build_vit(
    name: str,
    model_args: dict[str, Any],
    *,
    layer: int,
    final_norm: Literal["plain", "affine", "none"],
    position_mode: str,
    position_antialias: bool,
    position_offset: float = 0.0,
    norm_eps: float | None = None,
    pretrained: bool = False,
    file: str | None = None,
) -> Any:
    """A timm ViT without head or pooling, up to one block, whose patch grid follows the image.

    Args:
        layer: the last block kept, negative from the end; later ones would only wait for gradients.
        pretrained: read timm's published weights, from its cache or the Hub.
        file: read this local file instead; timm resamples and converts as it does for its own.

    Raises:
        ConfigError: timm has no such model, refuses ``model_args``, or the model is not a plain ViT.
        CheckpointError: weights were asked for and could not be fetched, read or fitted.
        MissingDependencyError: timm or its torchvision cannot be imported.
    """
    timm = import_timm()
    _check_name(timm, name)
    overlay = None if file is None else {"file": file}
    arguments = {"num_classes": 0, "global_pool": "", "dynamic_img_size": True, **copy.deepcopy(model_args)}
    try:
        vit = timm.create_model(
            name, pretrained=pretrained or file is not None, pretrained_cfg_overlay=overlay, **arguments
        )
    except (OSError, RuntimeError, SafetensorError, HfHubHTTPError) as error:
        if not pretrained and file is None:  # a size that no tensor can have
            raise ConfigError(f"timm refused model_args {model_args!r} for {name!r}: {error}") from error
        source = f"timm's published weights of {name!r}" if file is None else f"{file!r} as weights of {name!r}"
        raise CheckpointError(
            f"could not load {source} ({type(error).__name__}: {error}). Go online once to fill the cache, pass the "
            "path of a local file of that architecture as file=..., or build without weights: pretrained=False"
        ) from error
    except (TypeError, ValueError, AssertionError, ArithmeticError, LookupError, AttributeError) as error:
        raise ConfigError(f"timm refused model_args {model_args!r} for {name!r}: {error}") from error
    if not all(hasattr(vit, part) for part in ("patch_embed", "blocks", "norm", "forward_intermediates")):
        raise ConfigError(f"{name!r} is a {type(vit).__name__}; wanted a Vision Transformer with patch tokens")
    depth = len(vit.blocks)
    if not -depth <= layer < depth:
        raise ConfigError(f"SemanticEncoderConfig.layer is {layer}; wanted {-depth} to {depth - 1} for {name!r}")
    vit.blocks = vit.blocks[: layer % depth + 1]
    _configure_positions(vit, name, position_mode, position_antialias, position_offset)
    if norm_eps is not None:
        for module in vit.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = norm_eps
    if final_norm == "none":
        vit.norm = nn.Identity()
    elif not isinstance(vit.norm, nn.LayerNorm):
        raise ConfigError(
            f"SemanticEncoderConfig.final_norm is {final_norm!r}; {name!r} ends in {type(vit.norm).__name__}, not in a "
            "LayerNorm: wanted 'none', or model_args without pooling"
        )
    elif final_norm == "plain":
        vit.norm = nn.LayerNorm(vit.embed_dim, eps=vit.norm.eps, elementwise_affine=False)
    vit.forward = vit.forward_intermediates  # called with (), so that the hooks of offloading bring its own parameters
    return vit


def _check_name(timm: Any, name: str) -> None:
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models("*vit*"), n=3, cutoff=0.4)
        nearest = f"; nearest: {', '.join(near)}" if near else ""
        raise ConfigError(f"timm {timm.__version__} has no model {name!r}{nearest}")


def _configure_positions(vit: Any, name: str, mode: str, antialias: bool, offset: float) -> None:
    """Resize the learned position table as configured; timm's own choice is bicubic with antialias, no offset."""
    if (mode, antialias, offset) == TIMM_POSITIONS:
        return
    from timm.models.vision_transformer import VisionTransformer

    if type(vit) not in (VisionTransformer,) or vit.pos_embed is None:
        raise ConfigError(
            f"position_mode={mode!r}, position_antialias={antialias}, position_offset={offset} came for {name!r}, "
            "which has no learned position table to resize; leave them at 'bicubic', True and 0"
        )
    from psvae.encoders._positions import ConfiguredPositions  # imports timm

    vit.__class__ = ConfiguredPositions
    vit.position_mode, vit.position_antialias, vit.position_offset = mode, antialias, offset


def fill_constant_buffers(model: nn.Module, device: torch.device | str) -> None:
    """Compute the buffers that no checkpoint holds (rotary frequencies) after a build on the meta device."""
    for module in model.modules():
        unfilled = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in unfilled:
            module.register_buffer(name, torch.empty_like(module.get_buffer(name), device=device), persistent=False)
        if unfilled:
            cast(Any, module)._init_buffers()  # timm's hook for exactly this


def fitting_arguments(
    name: str, model_args: dict[str, Any], state: Mapping[str, Tensor]
) -> tuple[dict[str, Any], float]:
    """The arguments with which timm's own ``create_model`` builds exactly the tensors of ``state``, and its norms' eps.

    Raises:
        ConfigError: it builds others, whatever the pooling and the final norm.
    """
    timm = import_timm()
    wanted = {key: tuple(tensor.shape) for key, tensor in state.items()}
    for extra in ({}, {"global_pool": ""}, {"final_norm": False}, {"global_pool": "", "final_norm": False}):
        try:
            with torch.device("meta"):
                vit = timm.create_model(name, num_classes=0, **copy.deepcopy(model_args), **extra)
        except TypeError:  # timm's Eva has no final_norm
            continue
        if {key: tuple(tensor.shape) for key, tensor in vit.state_dict().items()} == wanted:
            return {**model_args, **extra}, vit.blocks[0].norm1.eps
    raise ConfigError(f"timm's {name!r} has other tensors than this encoder: it cannot be exported under that name")


def published_statistics(name: str) -> tuple[RGB, RGB]:
    """The (mean, std) per colour that timm publishes for ``name``, for pixels in [0, 1].

    Raises:
        ConfigError: timm has no model or publishes no weights of that name.
    """
    timm = import_timm()
    _check_name(timm, name)
    try:
        published = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        raise ConfigError(f"timm publishes no weights named {name!r}: {error}") from error
    return tuple(published.mean), tuple(published.std)
