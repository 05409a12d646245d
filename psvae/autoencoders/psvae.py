"""PSVAE: image ↔ latent, the paper's Figure 5 behind the face of a Stable-Diffusion-style VAE.

image ─encoder─▶ features ─vae.encoder─▶ latent ─decoder─▶ image
                                           └─vae.decoder─▶ rebuilt features
"""

import os
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
from torch import Generator, Tensor, nn

from psvae.autoencoders.face import AutoencoderFace
from psvae.autoencoders.outputs import DecoderOutput, EncoderOutput, PSVAEOutput
from psvae.config import Config
from psvae.decoders import PixelDecoder, PixelDecoderConfig, ViTPixelDecoder, ViTPixelDecoderConfig
from psvae.encoders import SemanticEncoder, SemanticEncoderConfig
from psvae.errors import CheckpointError, ConfigError
from psvae.hub.keymaps.own import AUTOENCODER_PSVAE
from psvae.hub.keymaps.rae import AUTOENCODER_RAE
from psvae.hub.mixin import HubMixin
from psvae.hub.source import Source
from psvae.hub.statistics import load_latent_statistics, read_statistics
from psvae.latents import DiagonalGaussian, LatentSpec
from psvae.shapes import Features, Images, Latents, check_map
from psvae.vae import SemanticVAE, SemanticVAEConfig

__all__ = ["PSVAE", "PSVAEConfig"]


@dataclass(frozen=True)
class PSVAEConfig(Config):
    """The three modules and how they are wired.

    Attributes:
        encoder, vae, decoder: their configurations; the decoder convolutional or RAE's ViT. ``vae=None`` makes the
            features themselves the latents: RAE with a frozen encoder, RAE-HD (section 5.4) with a trained one.
        decoder_reads: ``"latents"`` (the paper), or ``"features"``: the semantic decoder's output, the
            "D_Pixel on D_Semantic" variant of Table 5.
        latent_noise: τ of RAE: in training, `PSVAE.forward` adds noise of a standard deviation drawn from
            [0, τ] for each item to the raw latents (RAE: 0.8), so that the decoder forgives a generator's errors.
        statistics_grid: ``None`` for latent statistics per channel, (h, w) for per element at that grid.
        sample_size: the image size the model was trained at; also the tile size of `enable_tiling`.
    """

    encoder: SemanticEncoderConfig = field(default_factory=SemanticEncoderConfig)
    vae: SemanticVAEConfig | None = field(default_factory=SemanticVAEConfig)
    decoder: PixelDecoderConfig | ViTPixelDecoderConfig = field(default_factory=PixelDecoderConfig)
    decoder_reads: Literal["latents", "features"] = "latents"
    latent_noise: float = 0.0
    statistics_grid: tuple[int, int] | None = None
    sample_size: int = 256

    def validate(self) -> None:
        stride = self.encoder.stride
        if self.decoder.stride != stride:
            raise ConfigError(
                f"the encoder has stride {stride} and the decoder {self.decoder.stride}; wanted the same: a conv "
                "decoder's channel_multipliers needs log2(stride) + 1 entries, a ViT decoder's patch_size is its stride"
            )
        if self.vae is None:
            self.require(self.decoder_reads == "latents", "decoder_reads", "'latents' where there is no SemanticVAE")
        else:
            reads = self.vae.latent_channels if self.decoder_reads == "latents" else self.vae.feature_dim
            if self.decoder.latent_channels != reads:
                raise ConfigError(
                    f"the decoder takes {self.decoder.latent_channels} channels and reads {self.decoder_reads} of "
                    f"{reads}; wanted the same: set decoder.latent_channels"
                )
        self.require(self.latent_noise >= 0, "latent_noise", "0 or a positive number")
        fits = self.sample_size >= stride and self.sample_size % stride == 0
        self.require(fits, "sample_size", f"a multiple of the stride {stride}")
        if isinstance(self.decoder, ViTPixelDecoderConfig):
            side = self.sample_size // stride
            self.require(
                self.decoder.grid == (side, side), "sample_size", f"that of the decoder's grid {self.decoder.grid}"
            )
        self.require(min(self.statistics_grid or (1,)) >= 1, "statistics_grid", "None or two numbers of at least 1")

    @classmethod
    def dinov2_base(cls, latent_channels: int = 96) -> "PSVAEConfig":
        """The paper's tokenizer (section 4.1): DINOv2-B, stride 16; it reports 96 and 32 channels."""
        return cls(
            vae=SemanticVAEConfig(latent_channels=latent_channels),
            decoder=PixelDecoderConfig(latent_channels=latent_channels),
        )

    @classmethod
    def siglip2_so400m(cls, latent_channels: int = 96) -> "PSVAEConfig":
        """The paper's second tokenizer (section 4.4): SigLIP2-so400m/14, stride 16."""
        half = (0.5, 0.5, 0.5)
        return cls(
            encoder=SemanticEncoderConfig(
                "vit_so400m_patch14_siglip_224.v2_webli", {"act_layer": "gelu_tanh"}, mean=half, std=half
            ),  # timm's patch-14 models use the exact GELU; SigLIP2 was trained with the tanh form
            vae=SemanticVAEConfig(
                feature_dim=1152, latent_channels=latent_channels, num_heads=16, mlp_dim=4304,
                activation="gelu_tanh", layer_scale=None,
            ),
            decoder=PixelDecoderConfig(latent_channels=latent_channels),
        )  # fmt: skip

    # What code written for AutoencoderKL reads from ``vae.config``.

    @property
    def latent_channels(self) -> int:
        """Z, of what `PSVAE.encode` returns."""
        return self.decoder.latent_channels if self.vae is None else self.vae.latent_channels

    @property
    def spatial_compression_ratio(self) -> int:
        """The stride."""
        return self.encoder.stride

    @property
    def block_out_channels(self) -> tuple[int, ...]:
        """Width of each decoder level; callers take the stride from its length, 2 ** (len − 1)."""
        if isinstance(self.decoder, ViTPixelDecoderConfig):
            return (self.decoder.width,) * self.decoder.stride.bit_length()
        return tuple(self.decoder.base_channels * m for m in self.decoder.channel_multipliers)

    encoder_block_out_channels = block_out_channels

    @property
    def in_channels(self) -> int:
        """Image channels in."""
        return 3

    @property
    def out_channels(self) -> int:
        """Image channels out."""
        return self.decoder.out_channels

    @property
    def scaling_factor(self) -> float:
        """1, as `PSVAE.encode` already returns normalised latents."""
        return 1.0

    @property
    def shift_factor(self) -> float:
        """0 and never None, as some callers add it unasked."""
        return 0.0

    @property
    def latents_mean(self) -> None:
        """None, as the statistics are applied inside, per channel, by `LatentSpec`."""

    @property
    def latents_std(self) -> None:
        """None, as `latents_mean`."""

    @property
    def force_upcast(self) -> bool:
        """False, as half precision decodes without overflow."""
        return False


class PSVAE(nn.Module, AutoencoderFace, HubMixin):
    """Images ``B 3 H W`` in [-1, 1] ↔ normalised latents ``B Z h w``, h = H / stride, w = W / stride.

    `encode` returns latents normalised by the statistics in ``latent_spec`` and `decode` undoes it, so callers
    scale by 1 and shift by 0. Built without weights: `from_encoder` starts from a pretrained encoder,
    `from_pretrained` loads a trained PSVAE.

    Args:
        config: see `PSVAEConfig`.
        encoder: used instead of a fresh one; `from_encoder` also keeps the configuration in step with it.

    Attributes:
        encoder: `SemanticEncoder`. vae: `SemanticVAE` or None. decoder: `PixelDecoder` or `ViTPixelDecoder`.
        latent_spec: `LatentSpec`.
    """

    config_class = PSVAEConfig
    foreign_formats = (AUTOENCODER_PSVAE, AUTOENCODER_RAE)
    pipeline_tag = "image-feature-extraction"
    card_tags = ("autoencoder",)

    def __init__(self, config: PSVAEConfig, encoder: SemanticEncoder | None = None) -> None:
        super().__init__()
        self.config = config
        self.encoder = SemanticEncoder(config.encoder) if encoder is None else encoder
        self.vae = None if config.vae is None else SemanticVAE(config.vae)
        if isinstance(config.decoder, ViTPixelDecoderConfig):
            self.decoder = ViTPixelDecoder(config.decoder)
        else:
            self.decoder = PixelDecoder(config.decoder)
        self.latent_spec = LatentSpec(config.latent_channels, config.encoder.stride, config.statistics_grid)
        wanted = config.decoder.latent_channels if config.vae is None else config.vae.feature_dim
        if self.encoder.feature_dim != wanted:
            field_name = "decoder.latent_channels" if config.vae is None else "vae.feature_dim"
            raise ConfigError(
                f"{config.encoder.name!r} has features of width {self.encoder.feature_dim}; {field_name} is {wanted}"
            )

    @classmethod
    def from_encoder(cls, encoder: SemanticEncoder, config: PSVAEConfig) -> Self:
        """A fresh SemanticVAE and PixelDecoder around an encoder that has weights: the start of stage 1.

        With ``config.vae.block_init == "encoder"`` the encoder's last blocks are copied into the SemanticVAE.

        Args:
            encoder: becomes part of the model; not copied.
            config: its ``encoder`` field is replaced by the encoder's own configuration.
        """
        model = cls(config.replace(encoder=encoder.config), encoder)
        if model.vae is not None and config.vae is not None and config.vae.block_init == "encoder":
            model.vae.copy_blocks(encoder.vit.blocks)
        return model

    @classmethod
    def from_rae(
        cls,
        folder_or_id: str | os.PathLike[str],
        *,
        encoder: SemanticEncoder,
        decoder: str,
        statistics: str | None,
        latent_noise: float = 0.0,
        allow_pickle: bool = False,
        revision: str | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        **fields: Any,
    ) -> Self:
        """RAE (arXiv 2510.11690) from the files of its own repository. diffusers' AutoencoderRAE folders need no more
        than `from_pretrained`.

        Args:
            folder_or_id: holds the decoder's and the statistics' files, such as ``"nyu-visionx/RAE-collections"``.
            encoder: as the decoder was trained on: ``SemanticEncoder.from_pretrained`` of
                ``"facebook/dinov2-with-registers-base"``.
            decoder: such as ``"decoders/dinov2/wReg_base/ViTXL_n08/model.pt"``.
            statistics: such as ``"stats/dinov2/wReg_base/imagenet1k/stat.pt"``; None leaves latents as they are.
            latent_noise: RAE's τ for further training of the decoder; see `PSVAEConfig`.
            allow_pickle: both published files are pickles.
            revision, local_files_only, token, cache_dir: as in `from_pretrained`.
            **fields: of `ViTPixelDecoderConfig`, over those that the file tells.

        Raises:
            CheckpointError: a file is absent, unreadable, or does not fit.
            ConfigError: the decoder takes another width or grid than encoder and statistics have.
        """
        source = Source(
            folder_or_id, "", revision=revision, local_files_only=local_files_only, token=token, cache_dir=cache_dir
        )
        files = [None if name is None else source.find(name) for name in (decoder, statistics)]
        for name, file in zip((decoder, statistics), files, strict=True):
            if name is not None and file is None:
                raise CheckpointError(f"{source} has no file {name!r}; {source.listing()}")
        colours = {"output_mean": encoder.config.mean, "output_std": encoder.config.std}
        painter = ViTPixelDecoder.from_pretrained(str(files[0]), allow_pickle=allow_pickle, **{**colours, **fields})
        grid = None
        if files[1] is not None:
            _, height, width = read_statistics(files[1], allow_pickle=allow_pickle)[1].shape
            grid = None if height == width == 1 else (height, width)
        if grid not in (None, painter.config.grid):
            raise ConfigError(
                f"the statistics are of grid {grid}, the decoder of {painter.config.grid}; wanted one grid"
            )
        config = PSVAEConfig(
            encoder=encoder.config, vae=None, decoder=painter.config, latent_noise=latent_noise, statistics_grid=grid,
            sample_size=painter.config.grid[0] * painter.config.stride,
        )  # fmt: skip
        with torch.device("meta"):
            model = cls(config, encoder)
        model.decoder, spec = painter, LatentSpec(config.latent_channels, encoder.config.stride, grid)
        model.latent_spec = spec
        if files[1] is not None:
            load_latent_statistics(spec, files[1], allow_pickle=allow_pickle)
        return model.eval()

    def forward(
        self,
        sample: Images,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: Generator | list[Generator] | None = None,
        detach_latents: bool = False,
    ) -> PSVAEOutput | tuple[Tensor]:
        """Image to image, with every intermediate that a loss needs. Train through this call, so that DDP and
        FSDP see the gradients.

        Args:
            sample: images ``B 3 H W`` in [-1, 1].
            sample_posterior: draw the latents; otherwise take the posterior's mean.
            return_dict: `PSVAEOutput`, or the 1-tuple ``(sample,)``.
            detach_latents: stop the pixel decoder's gradient at its input (stage 1, section 3.3).

        Raises:
            ShapeError: wrong rank, channels or size, or NaN. DtypeError: integer images.
        """
        features = self.encoder(sample)
        if self.vae is None:
            latents, parameters, rebuilt = features, None, None
        else:
            parameters = self.vae.encoder(features)
            posterior = DiagonalGaussian(parameters)
            latents = posterior.sample(generator) if sample_posterior else posterior.mode()
            rebuilt = self.vae.decoder(latents)
        if self.training and self.config.latent_noise > 0:
            latents = _add_noise(latents, self.config.latent_noise, generator)
        source = latents if rebuilt is None or self.config.decoder_reads == "latents" else rebuilt
        image = self.decoder(source.detach() if detach_latents else source)
        return PSVAEOutput(image, features, rebuilt, latents, parameters) if return_dict else (image,)

    def encode(self, images: Images, return_dict: bool = True) -> EncoderOutput | tuple[DiagonalGaussian]:
        """Images ``B 3 H W`` in [-1, 1] → ``.latent_dist`` over normalised latents ``B Z h w``.

        Raises:
            ShapeError: wrong rank, channels or size, or NaN. DtypeError: integer images.
        """
        check_map(images, self.config.in_channels, "images")  # the rest is for the encoder to check, once
        slices = images.split(1) if self.use_slicing else [images]
        raw = DiagonalGaussian.cat([self._posterior(self.encoder(part)) for part in slices])
        posterior = self.latent_spec.normalize_posterior(raw)
        return EncoderOutput(posterior) if return_dict else (posterior,)

    def decode(
        self, latents: Latents, return_dict: bool = True, generator: Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Normalised latents ``B Z h w`` → ``.sample``, images ``B C H W``, nominally in [-1, 1], not clamped.

        Args:
            generator: accepted because SD-style callers pass it; decoding is deterministic.

        Raises:
            ShapeError: wrong rank or channel count. DtypeError: integer latents.
        """
        check_map(latents, self.config.latent_channels, "latents")
        raw = self.latent_spec.denormalize(latents)
        image = torch.cat([self._paint(part) for part in (raw.split(1) if self.use_slicing else [raw])])
        return DecoderOutput(image) if return_dict else (image,)

    def features(self, images: Images) -> Features:
        """The encoder's features ``B D h w``."""
        return self.encoder(images)

    def decode_features(self, latents: Latents) -> Features:
        """Normalised latents ``B Z h w`` → rebuilt features ``B D h w``."""
        check_map(latents, self.config.latent_channels, "latents")
        raw = self.latent_spec.denormalize(latents)
        return raw if self.vae is None else self.vae.decoder(raw)

    def _posterior(self, features: Features) -> DiagonalGaussian:
        return DiagonalGaussian.point(features) if self.vae is None else DiagonalGaussian(self.vae.encoder(features))

    def _paint(self, raw: Latents) -> Images:
        reads_features = self.vae is not None and self.config.decoder_reads == "features"
        source = self.vae.decoder(raw) if self.vae is not None and reads_features else raw
        return self._decode_tiles(self.decoder, source)

    def enable_gradient_checkpointing(self) -> None:
        """Trade time for memory in training, in all three modules."""
        for part in (self.encoder, self.vae, self.decoder):
            if part is not None:
                part.enable_gradient_checkpointing()

    def disable_gradient_checkpointing(self) -> None:
        """Keep activations again."""
        for part in (self.encoder, self.vae, self.decoder):
            if part is not None:
                part.disable_gradient_checkpointing()

    def extra_repr(self) -> str:
        config = self.config
        return f"Z={config.latent_channels}, stride={config.encoder.stride}, decoder_reads={config.decoder_reads!r}"


def _add_noise(latents: Latents, tau: float, generator: Generator | list[Generator] | None) -> Latents:
    """z + σε with σ ~ U(0, τ), one σ per item (RAE, noise-augmented decoding)."""
    noise = DiagonalGaussian(torch.zeros_like(latents).repeat(1, 2, 1, 1)).sample(generator)
    first = generator[0] if isinstance(generator, list) else generator
    where = latents.device if first is None else first.device
    sigma = tau * torch.rand(len(latents), 1, 1, 1, generator=first, device=where)
    return latents + sigma.to(latents) * noise
