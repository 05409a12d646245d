"""SemanticVAE: features ↔ latent, the KL-regularised bottleneck (paper, section 3.3, E_S and D_S).

features ─blocks, norm, MLP─▶ mean, logvar ─sample─▶ latent ─MLP, blocks, norm─▶ features
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

from psvae.config import Config
from psvae.errors import ConfigError
from psvae.hub.mixin import HubMixin
from psvae.latents import DiagonalGaussian
from psvae.nn.transformer import Activation, Mlp, TransformerBlock, init_linear
from psvae.shapes import Features, Latents, Tokens, check_dtype, check_map

__all__ = ["SemanticVAE", "SemanticVAEConfig"]


@dataclass(frozen=True)
class SemanticVAEConfig(Config):
    """The two halves, which mirror each other.

    Stated by the paper: three blocks of the encoder's kind and an MLP projection on each side, 96 latent
    channels (section 3.3, 4.1). Left open by it, chosen here: everything else.

    Attributes:
        feature_dim: D, the width of the features and of the blocks.
        latent_channels: Z. The paper's sweep has 32 to 256.
        depth: blocks on each side; 0 leaves the MLPs alone, the "2L-MLP" variant of Table 5.
        num_heads, mlp_dim, activation, norm_eps: of each block, as in DINOv2-B.
        layer_scale: initial γ of DINOv2's LayerScale, ``None`` for blocks without it (SigLIP2). 1e-5 as DINOv2 itself
            starts: fresh blocks begin as the identity. Measured on a small model, that rebuilds features far sooner
            than 1 does (docs/paper_to_code.md).
        projection_dim: hidden width of the two-layer GELU MLPs; ``None`` for D.
        block_init: ``"fresh"``, or ``"encoder"``: `PSVAE.from_encoder` copies the encoder's last blocks
            into both halves. "Inherited from the representation encoder" can be read either way.
        initial_logvar: the log-variance at initialisation, before the features have a say. Measured on a small model,
            little noise at first learns faster than the prior's own, 0 (docs/reproduction.md).
    """

    feature_dim: int = 768
    latent_channels: int = 96
    depth: int = 3
    num_heads: int = 12
    mlp_dim: int = 3072
    activation: Activation = "gelu"
    norm_eps: float = 1e-6
    layer_scale: float | None = 1e-5
    projection_dim: int | None = None
    block_init: Literal["fresh", "encoder"] = "fresh"
    initial_logvar: float = -4.0

    def validate(self) -> None:
        for name in ("feature_dim", "latent_channels", "num_heads", "mlp_dim"):
            self.require(getattr(self, name) >= 1, name, "at least 1")
        self.require(self.depth >= 0, "depth", "0 or more")
        self.require(self.norm_eps > 0, "norm_eps", "a positive number")
        self.require(-30 <= self.initial_logvar <= 20, "initial_logvar", "-30 to 20, where the posterior clamps it")
        self.require(self.projection_dim is None or self.projection_dim >= 1, "projection_dim", "None or at least 1")
        self.require(
            self.feature_dim % self.num_heads == 0, "num_heads", f"a divisor of feature_dim {self.feature_dim}"
        )


class SemanticVAE(nn.Module, HubMixin):
    """Features ``B D h w`` ↔ latents ``B Z h w`` on the same grid, any grid.

    The halves are the sub-modules ``encoder`` and ``decoder``; `encode` and `decode` call them, so hooks,
    ``compile()``, export and sharding work on each. Latents here are raw: `PSVAE` applies the statistics.
    """

    config_class = SemanticVAEConfig
    card_tags = ("autoencoder",)

    def __init__(self, config: SemanticVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = SemanticDownProjection(config)
        self.decoder = SemanticUpProjection(config)

    def encode(self, features: Features) -> DiagonalGaussian:
        """Features ``B D h w`` → the posterior over latents ``B Z h w``.

        Raises:
            ShapeError: wrong rank or feature width. DtypeError: integer features, or halves for float32 weights.
        """
        check_map(features, self.config.feature_dim, "features")
        return DiagonalGaussian(self.encoder(features))

    def decode(self, latents: Latents) -> Features:
        """Raw latents ``B Z h w`` → rebuilt features ``B D h w`` (f″ of the paper).

        Raises:
            ShapeError: wrong rank or channel count. DtypeError: integer latents, or halves for float32 weights.
        """
        check_map(latents, self.config.latent_channels, "latents")
        return self.decoder(latents)

    def forward(
        self, features: Features, sample_posterior: bool = True, generator: Generator | None = None
    ) -> tuple[Features, DiagonalGaussian]:
        """Encode, draw (or take the mean of) the posterior, decode: (rebuilt features, posterior)."""
        posterior = self.encode(features)
        latents = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(latents), posterior

    def copy_blocks(self, blocks: nn.ModuleList | nn.Sequential) -> None:
        """Copy the weights of an encoder's last ``depth`` blocks into both halves.

        Raises:
            ConfigError: the blocks have another structure (width, MLP kind, LayerScale, rotary attention).
        """
        depth = self.config.depth
        if len(blocks) < depth:
            raise ConfigError(f"the encoder has {len(blocks)} blocks; SemanticVAEConfig.depth is {depth}")
        for half in (self.encoder, self.decoder):
            for target, source in zip(half.blocks, list(blocks)[len(blocks) - depth :], strict=True):
                heads = getattr(getattr(source, "attn", None), "num_heads", None)
                if heads != self.config.num_heads:  # the one difference that no shape shows
                    raise ConfigError(f"the encoder's blocks have {heads} heads; num_heads is {self.config.num_heads}")
                try:
                    target.load_state_dict(source.state_dict())
                except RuntimeError as error:
                    raise ConfigError(
                        f"the encoder's {type(source).__name__} does not fit a SemanticVAE block; match feature_dim, "
                        f"mlp_dim and layer_scale, or use block_init='fresh'. {error}"
                    ) from error

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the blocks in backward instead of keeping their activations."""
        self.encoder.gradient_checkpointing = self.decoder.gradient_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        """Keep activations again."""
        self.encoder.gradient_checkpointing = self.decoder.gradient_checkpointing = False

    def extra_repr(self) -> str:
        return f"D={self.config.feature_dim}, Z={self.config.latent_channels}"


class SemanticDownProjection(nn.Module):
    """E_S: features ``B D h w`` → ``B 2Z h w``, mean and log-variance."""

    def __init__(self, config: SemanticVAEConfig) -> None:
        super().__init__()
        width, channels = config.feature_dim, config.latent_channels
        self.gradient_checkpointing = False
        self.blocks = _blocks(config)
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.project = Mlp(width, config.projection_dim or width, 2 * channels, config.activation)
        self.apply(init_linear)
        nn.init.constant_(self.project.fc2.bias[channels:], config.initial_logvar)

    def forward(self, features: Features) -> Float[Tensor, "B ZZ h w"]:
        check_dtype(features, self.project.fc1, "features")
        tokens = rearrange(features, "B D h w -> B (h w) D")
        tokens = _run(self, tokens)
        parameters = self.project(self.norm(tokens))
        return rearrange(parameters, "B (h w) ZZ -> B ZZ h w", h=features.shape[-2])


class SemanticUpProjection(nn.Module):
    """D_S: latents ``B Z h w`` → rebuilt features ``B D h w``."""

    def __init__(self, config: SemanticVAEConfig) -> None:
        super().__init__()
        width = config.feature_dim
        self.gradient_checkpointing = False
        self.project = Mlp(config.latent_channels, config.projection_dim or width, width, config.activation)
        self.blocks = _blocks(config)
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.apply(init_linear)

    def forward(self, latents: Latents) -> Features:
        check_dtype(latents, self.project.fc1, "latents")
        tokens = self.project(rearrange(latents, "B Z h w -> B (h w) Z"))
        tokens = _run(self, tokens)
        return rearrange(self.norm(tokens), "B (h w) D -> B D h w", h=latents.shape[-2])


def _blocks(config: SemanticVAEConfig) -> nn.ModuleList:
    arguments: dict[str, Any] = {
        "mlp_width": config.mlp_dim,
        "layer_scale": config.layer_scale,
        "activation": config.activation,
        "norm_eps": config.norm_eps,
    }
    return nn.ModuleList(
        TransformerBlock(config.feature_dim, config.num_heads, **arguments) for _ in range(config.depth)
    )


def _run(half: SemanticDownProjection | SemanticUpProjection, tokens: Tokens) -> Tokens:
    for block in half.blocks:
        if half.gradient_checkpointing and torch.is_grad_enabled():
            tokens = checkpoint(block, tokens, use_reentrant=False)
        else:
            tokens = block(tokens)
    return tokens
