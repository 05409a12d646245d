"""The parts of `DeepFusionDiT`, of its configuration, and their first weights."""

from collections.abc import Iterable

from torch import nn

from psvae.generators.config import DeepFusionDiTConfig
from psvae.generators.head import LinearHead, WideHead
from psvae.generators.inputs import TextProjection
from psvae.nn.decoder import DecoderBlock

__all__ = ["decoder_blocks", "freeze_dead_ends", "head_of", "initialise", "text_projections"]


def decoder_blocks(config: DeepFusionDiTConfig) -> nn.ModuleList:
    """One set of the trunk's blocks."""
    return nn.ModuleList(
        DecoderBlock(
            config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.attention_head_dim,
            config.intermediate_size, bias=config.attention_bias, qk_norm=config.qk_norm,
            norm_eps=config.rms_norm_eps,
        )
        for _ in range(config.num_layers)
    )  # fmt: skip


def text_projections(config: DeepFusionDiTConfig) -> nn.ModuleList | None:
    """For another model's hidden states, one per block; None without them."""
    if config.text_hidden_size is None:
        return None
    return nn.ModuleList(
        TextProjection(
            config.text_hidden_size, config.num_key_value_heads, config.attention_head_dim, qk_norm=config.qk_norm,
            norm_eps=config.rms_norm_eps,
        )
        for _ in range(config.num_layers)
    )  # fmt: skip


def head_of(config: DeepFusionDiTConfig) -> LinearHead | WideHead:
    """The head that the configuration names."""
    patch_channels = config.in_channels * config.patch_size**2
    if config.head == "linear":
        return LinearHead(config.hidden_size, patch_channels)
    return WideHead(
        config.hidden_size, patch_channels, config.head_width, config.head_depth, config.head_num_heads,
        config.head_intermediate_size, norm_eps=config.head_norm_eps, rope_theta=config.head_rope_theta,
        final_modulation=config.head_final_modulation,
    )  # fmt: skip


def initialise(model: nn.Module, *, new: Iterable[nn.Module], head: nn.Module) -> None:
    """First weights.

    Blocks and words as a language model's and the embedding of σ as DiT's (std 0.02), other new layers Xavier, biases,
    modulations and the head's last layer zero (RAE, BAGEL).

    Args:
        new: of ``model``, layers that no language model and no DiT has.
        head: of ``model``.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for part in new:
        for module in part.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
    for name, module in head.named_modules():
        if isinstance(module, nn.Linear):
            zero = name.endswith(("modulation", "out"))
            (nn.init.zeros_ if zero else nn.init.xavier_uniform_)(module.weight)


def freeze_dead_ends(layers: nn.ModuleList, norm: nn.Module) -> None:
    """Of a text branch of its own, what the velocity does not depend on.

    Images read the text's keys and values, the last block's are made of ``norm1`` and ``qkv``: what follows them
    there leads to `DeepFusionDiT.encode_text` alone. Without gradients, it would make DDP wait or raise.
    """
    last = layers[-1]
    for name in ("proj", "norm2", "mlp", "q_norm"):
        last.get_submodule(name).requires_grad_(False)
    norm.requires_grad_(False)
