"""The configuration of `DeepFusionDiT`, with the paper's sizes."""

import math
from dataclasses import dataclass
from typing import Literal

from psvae.config import Config
from psvae.nn.rope import ImageRope, RopeScaling

__all__ = ["DeepFusionDiTConfig"]


@dataclass(frozen=True)
class DeepFusionDiTConfig(Config):
    """The paper's generator on Qwen2.5-0.5B by default; names are those of transformers and diffusers.

    Stated by the paper (section 3.4): shared blocks of Qwen2.5, text causal, latents in full attention, 2D position
    and timestep added at the input as in BAGEL, RAE's wide head. Inferred from its parameter counts: the head's
    sizes and its missing final modulation. Open: ``image_rope``, ``qk_norm``.

    Attributes:
        in_channels: Z of the latents.
        patch_size: latent cells per token, on each axis.
        fusion: ``"shared"``, one set of blocks for all (the paper, Transfusion); ``"mot"``, a second set for images
            (BAGEL; LMFusion after `DeepFusionDiT.freeze_text`); ``"prefix"``, blocks for images alone, the text
            comes as keys and values of a language model or as hidden states. With ``"mot"`` the velocity does not
            depend on what follows the keys and values in the text's last block (``proj``, ``norm2``, ``mlp``,
            ``q_norm``), nor on ``norm``: these are built with ``requires_grad=False``, or DDP would miss their
            gradients; to train `DeepFusionDiT.encode_text` too, call ``requires_grad_()``.
        hidden_size, num_layers, num_attention_heads, num_key_value_heads, attention_head_dim, intermediate_size,
            rms_norm_eps, rope_theta, rope_scaling, attention_bias: of the blocks.
        vocab_size: of the text embedding; ``None`` for none: pass ``inputs_embeds``. None with ``fusion="prefix"``.
        qk_norm: RMSNorm of queries and keys (Qwen3, BAGEL), in every block. Off to take Qwen2.5's weights unchanged.
        image_position: ``"additive_2d"`` adds MAE's sine-cosine table of (row, column), computed for any grid.
        image_rope: rotary positions of an image's tokens. ``"shared_index"`` gives all one (BAGEL, with which
            the paper's additive positions come), ``"1d"``, ``"2d"``, ``"mrope"``: see `grid_positions`.
        time_conditioning: ``"additive"`` adds the embedding of σ to the noisy tokens, of 0 to source tokens.
        timestep_scale: σ is multiplied by it before the embedding: 1 in BAGEL, 1000 in diffusers' models.
        head: ``"ddt"``, RAE's wide head, or ``"linear"``.
        head_width, head_depth, head_num_heads, head_intermediate_size, head_rope_theta, head_norm_eps: of its blocks.
        head_final_modulation: modulate the head's last norm too, as RAE does.
        prediction: what the head gives, the velocity or the clean latents (``"sample"``, JiT). `DeepFusionDiT`
            returns the velocity in both cases.
        sigma_floor: with ``prediction="sample"``, v = (x_σ − x̂) / max(σ, floor).
        max_source_images: more are refused.
        text_hidden_size: with ``fusion="prefix"``, D of the hidden states that condition it; ``None`` if keys and
            values come instead.
        text_layers: how many layers of hidden states come: 1 for one feature that serves all.
        layer_map: for each block, which of these; ``None`` spreads them evenly, the last to the last.
    """

    in_channels: int = 96
    patch_size: int = 1
    fusion: Literal["shared", "mot", "prefix"] = "shared"
    hidden_size: int = 896
    num_layers: int = 24
    num_attention_heads: int = 14
    num_key_value_heads: int = 2
    attention_head_dim: int = 64
    intermediate_size: int = 4864
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = True
    vocab_size: int | None = 151936
    qk_norm: bool = False
    image_position: Literal["additive_2d", "none"] = "additive_2d"
    image_rope: ImageRope = "shared_index"
    time_conditioning: Literal["additive"] | None = "additive"
    timestep_scale: float = 1.0
    head: Literal["ddt", "linear"] = "ddt"
    head_width: int = 2048
    head_depth: int = 2
    head_num_heads: int = 16
    head_intermediate_size: int = 5461
    head_rope_theta: float = 10000.0
    head_norm_eps: float = 1e-6
    head_final_modulation: bool = False
    prediction: Literal["velocity", "sample"] = "velocity"
    sigma_floor: float = 0.05
    max_source_images: int = 1
    text_hidden_size: int | None = None
    text_layers: int = 1
    layer_map: tuple[int, ...] | None = None

    def validate(self) -> None:
        for name in (
            "in_channels", "patch_size", "hidden_size", "num_layers", "num_attention_heads", "num_key_value_heads",
            "intermediate_size", "head_width", "head_depth", "head_num_heads", "head_intermediate_size", "text_layers",
        ):  # fmt: skip
            self.require(getattr(self, name) >= 1, name, "at least 1")
        heads, pairs = self.num_attention_heads, self.num_key_value_heads
        self.require(heads % pairs == 0, "num_key_value_heads", f"a divisor of num_attention_heads {heads}")
        d = self.attention_head_dim
        self.require(d >= 8 and d % 2 == 0, "attention_head_dim", "an even number from 8")
        additive = self.image_position == "additive_2d"
        self.require(not additive or self.hidden_size % 4 == 0, "hidden_size", "a multiple of 4, for its positions")
        wide = self.head_width % (4 * self.head_num_heads) == 0
        self.require(self.head == "linear" or wide, "head_width", f"a multiple of 4 x {self.head_num_heads} heads")
        for name in ("rms_norm_eps", "rope_theta", "timestep_scale", "head_rope_theta", "head_norm_eps", "sigma_floor"):
            self.require(getattr(self, name) > 0, name, "a positive number")
        self.require(self.vocab_size is None or self.vocab_size >= 1, "vocab_size", "None or at least 1")
        ids = self.vocab_size is not None and self.fusion == "prefix"
        self.require(not ids, "vocab_size", "None with fusion='prefix', which embeds no words")
        self.require(self.max_source_images >= 0, "max_source_images", "0 or more")
        text = self.text_hidden_size is None or (self.fusion == "prefix" and self.text_hidden_size >= 1)
        self.require(text, "text_hidden_size", "at least 1 with fusion='prefix', None otherwise")
        if self.text_hidden_size is None:
            self.require(self.text_layers == 1, "text_layers", "1 without text_hidden_size: no hidden states come")
            self.require(self.layer_map is None, "layer_map", "None without text_hidden_size: no hidden states come")
        fits = self.layer_map is None or (
            len(self.layer_map) == self.num_layers and all(0 <= i < self.text_layers for i in self.layer_map)
        )
        self.require(fits, "layer_map", f"{self.num_layers} numbers from 0 to {self.text_layers - 1}")

    @property
    def text_layer_of_block(self) -> tuple[int, ...]:
        """For each block, which layer of the hidden states it reads."""
        if self.layer_map is not None:
            return self.layer_map
        blocks, layers = self.num_layers, self.text_layers
        return tuple(math.ceil((block + 1) * layers / blocks) - 1 for block in range(blocks))

    @classmethod
    def qwen2_5_0_5b(cls, in_channels: int = 96) -> "DeepFusionDiTConfig":
        """The paper's smaller generator."""
        return cls(in_channels)

    @classmethod
    def qwen2_5_1_5b(cls, in_channels: int = 96) -> "DeepFusionDiTConfig":
        """The paper's larger generator (section 4.3)."""
        return cls(
            in_channels, hidden_size=1536, num_layers=28, num_attention_heads=12, attention_head_dim=128,
            intermediate_size=8960,
        )  # fmt: skip

    @classmethod
    def qwen2_5_3b(cls, in_channels: int = 96) -> "DeepFusionDiTConfig":
        """On Qwen2.5-3B, the largest that the paper names."""
        return cls(
            in_channels, hidden_size=2048, num_layers=36, num_attention_heads=16, attention_head_dim=128,
            intermediate_size=11008,
        )  # fmt: skip

    @classmethod
    def tiny(cls, in_channels: int = 16, vocab_size: int = 64) -> "DeepFusionDiTConfig":
        """Trains on two CPU cores; ``make scenes`` trains a narrower one."""
        return cls(
            in_channels, hidden_size=256, num_layers=6, num_attention_heads=4, attention_head_dim=64,
            intermediate_size=704, vocab_size=vocab_size, rope_theta=10000.0, qk_norm=True, attention_bias=False,
            head_width=256, head_num_heads=4, head_intermediate_size=704,
        )  # fmt: skip
