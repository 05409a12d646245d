"""What `SemanticEncoder` hands to the key maps of timm and transformers: a full description and every tensor."""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from psvae.config import Config
from psvae.encoders._timm import TIMM_POSITIONS, fitting_arguments
from psvae.errors import ConfigError
from psvae.hub.keymaps._vit import mlp_ratio

__all__ = ["timm_export", "transformers_export"]

_log = logging.getLogger("psvae")

# mode, antialias and offset with which transformers resizes each family's table; DINOv3 has none
POSITIONS = {
    "dinov2": ("bicubic", False, 0.0),
    "dinov2_with_registers": ("bicubic", True, 0.0),
    "siglip_vision_model": ("bicubic", False, 0.0),
    "siglip2_vision_model": ("bilinear", True, 0.0),
    "vit_mae": ("bicubic", False, 0.0),
}
ACTIVATIONS = {"GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "SiLU": "silu", "ReLU": "relu"}


def timm_export(encoder: Any) -> tuple[Config, dict[str, Tensor]]:
    """The configuration for timm's key map, and the tensors."""
    config, vit, state = encoder.config, encoder.vit, _with_affine_norm(encoder)
    name = config.name.split(".")[0]
    model_args = {**config.model_args, "depth": len(vit.blocks)}
    if vit.pos_embed is not None:
        height, width = vit.patch_embed.img_size
        model_args["img_size"] = height if height == width else (height, width)
    model_args, eps = fitting_arguments(name, model_args, {key.removeprefix("vit."): t for key, t in state.items()})
    _warn_of_positions("timm", config, vit, TIMM_POSITIONS)
    if eps != vit.blocks[0].norm1.eps:
        _log.warning(
            "timm's %s adds %g to the variance inside its norms, this encoder %g (norm_eps): features of the exported "
            "model will differ a little", name, eps, vit.blocks[0].norm1.eps,
        )  # fmt: skip
    return config.replace(name=name, model_args=model_args), state


def transformers_export(encoder: Any) -> tuple[str, Config, dict[str, Tensor]]:
    """The ``model_type``, the configuration for its key map, and the tensors.

    Raises:
        ConfigError: transformers has no such architecture, or the encoder has no final norm.
    """
    config, vit = encoder.config, encoder.vit
    if config.final_norm == "none":
        raise ConfigError(
            "SemanticEncoderConfig.final_norm is 'none'; transformers' models end in a norm: wanted 'plain' or 'affine'"
        )
    state = _with_affine_norm(encoder)
    family = _family(encoder)
    if family is None:
        raise ConfigError(
            f"transformers has no model of the architecture of {config.name!r}; it has {', '.join(POSITIONS)} and "
            "dinov3_vit. export_timm writes any architecture"
        )
    gated = "blocks.0.mlp.fc1.weight" not in vit.state_dict() or _is_packed(vit.blocks[0].mlp)
    model_args = _describe(vit, gated)
    if family in POSITIONS:
        _warn_of_positions("transformers", config, vit, POSITIONS[family])
    name = config.name.split(".")[0]
    if family.startswith("dinov2"):
        name = f"vit_{'giant' if gated else 'base'}_patch14_{'reg4_' if vit.reg_token is not None else ''}dinov2"
    eps = vit.blocks[0].norm1.eps
    return family, config.replace(name=name, model_args=model_args, norm_eps=eps, layer=-1), state


def _with_affine_norm(encoder: Any) -> dict[str, Tensor]:
    """Every tensor; a final norm without weights gets 1 and 0."""
    state = dict(encoder.state_dict())
    if encoder.config.final_norm == "plain":
        like = next(iter(encoder.vit.parameters()))
        state["vit.norm.weight"] = torch.ones(encoder.feature_dim, dtype=like.dtype, device=like.device)
        state["vit.norm.bias"] = torch.zeros_like(state["vit.norm.weight"])
    return state


def _warn_of_positions(library: str, config: Any, vit: Any, theirs: tuple[str, bool, float]) -> None:
    ours = (config.position_mode, config.position_antialias, config.position_offset)
    if vit.pos_embed is not None and ours != theirs:
        height, width = vit.patch_embed.img_size
        _log.warning(
            "%s stretches the position embeddings to other image sizes in another way (%s) than this encoder (%s): for "
            "inputs of %d x %d pixels its features equal this encoder's, for other sizes they differ a little",
            library, _in_words(theirs), _in_words(ours), height, width,
        )  # fmt: skip


def _in_words(positions: tuple[str, bool, float]) -> str:
    mode, antialias, offset = positions
    shifted = f", grid enlarged by {offset:g}" if offset else ""
    return f"{mode}, {'with' if antialias else 'without'} antialiasing{shifted}"


def _family(encoder: Any) -> str | None:
    """transformers' name of the architecture, by its parts."""
    vit, config = encoder.vit, encoder.config
    if type(vit).__name__ == "Eva":
        rotary = type(getattr(vit, "rope", None)).__name__ == "RotaryEmbeddingDinoV3"
        whole = vit.cls_token is not None and hasattr(vit.blocks[0], "gamma_1")
        return "dinov3_vit" if rotary and whole and vit.pos_embed is None else None
    height, width = vit.patch_embed.grid_size
    if vit.pos_embed is None or height != width:
        return None
    scaled = hasattr(vit.blocks[0].ls1, "gamma")
    if vit.cls_token is None:
        if scaled or vit.reg_token is not None:
            return None
        flexible = (config.position_mode, config.position_antialias) == ("bilinear", True)
        return "siglip2_vision_model" if flexible else "siglip_vision_model"
    if vit.reg_token is not None:
        return "dinov2_with_registers" if scaled and vit.no_embed_class else None
    if vit.no_embed_class:
        return None
    return "dinov2" if scaled else "vit_mae"


def _is_packed(mlp: Any) -> bool:
    """DINOv2's SwiGLU: gate and value in one layer."""
    return type(mlp).__name__ == "GluMlp" and not mlp.gate_last


def _describe(vit: Any, gated: bool) -> dict[str, Any]:
    """The arguments of timm's constructor, in full, as the key maps' readers write them."""
    block, eva = vit.blocks[0], type(vit).__name__ == "Eva"
    first = getattr(block.mlp, "fc1", None) or block.mlp.fc1_x
    arguments = {
        "embed_dim": vit.embed_dim,
        "depth": len(vit.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": mlp_ratio(first.out_features, vit.embed_dim),
        "patch_size": vit.patch_embed.patch_size[0],
        "qkv_bias": block.attn.q_bias is not None if eva else block.attn.qkv.bias is not None,
    }
    if eva:
        registers = 0 if vit.reg_token is None else vit.reg_token.shape[1]
        arguments |= {"num_reg_tokens": registers, "rope_temperature": vit.rope.temperature}
        return arguments | ({"swiglu_mlp": True, "swiglu_align_to": 1} if gated else {})
    arguments |= {"img_size": vit.patch_embed.img_size[0], "act_layer": _activation(block.mlp.act)}
    return arguments | ({"reg_tokens": vit.reg_token.shape[1]} if vit.reg_token is not None else {})


def _activation(module: nn.Module) -> str:
    name = type(module).__name__
    if name == "GELU":
        return "gelu_tanh" if getattr(module, "approximate", "none") == "tanh" else "gelu"
    return ACTIVATIONS.get(name, name)
