"""PixelVAE: image ↔ latent by convolutions alone: the VAE of Stable Diffusion, SDXL, SD3, FLUX, ReaLS and VA-VAE.

image ─encoder, quant_conv─▶ latent ─post_quant_conv, decoder─▶ image
"""

import os
import warnings
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor, nn

from psvae.autoencoders.face import AutoencoderFace
from psvae.autoencoders.outputs import DecoderOutput, EncoderOutput, PixelVAEOutput
from psvae.config import Config
from psvae.decoders import PixelDecoder, PixelDecoderConfig
from psvae.encoders import PixelEncoder, PixelEncoderConfig
from psvae.errors import CheckpointError, CheckpointWarning, ConfigError
from psvae.hub.exporting import export
from psvae.hub.keymaps.autoencoder_kl import AUTOENCODER_KL
from psvae.hub.keymaps.ldm import LDM
from psvae.hub.keymaps.own import AUTOENCODER_PIXEL_VAE
from psvae.hub.mixin import HubMixin
from psvae.latents import DiagonalGaussian, LatentSpec
from psvae.shapes import Images, Latents, check_dtype, check_map

__all__ = ["PixelVAE", "PixelVAEConfig"]


def _sd_decoder(latent_channels: int = 4) -> PixelDecoderConfig:
    return PixelDecoderConfig(latent_channels, channel_multipliers=(1, 2, 4, 4), attention_levels=0)


@dataclass(frozen=True)
class PixelVAEConfig(Config):
    """Stable Diffusion 1 and 2 (``sd-vae-ft-mse``) by default.

    Attributes:
        encoder, decoder: the convolutional halves; strides and latent channels must agree.
        quant_conv, post_quant_conv: 1×1 convolutions behind the encoder and before the decoder; SD3 and FLUX
            have none.
        scaling_factor, shift_factor: what the caller applies, (latent − shift) · scale. Never applied inside.
            Shift None means 0.
        latents_mean, latents_std: as in diffusers' AutoencoderKL: for callers, per channel, never applied inside.
        force_upcast: half precision overflows in these weights, so pipelines decode in fp32.
        statistics_grid: of ``latent_spec``: None for per channel, (h, w) for per element at that grid.
        sample_size: the image size the model was trained at; also the tile size of `enable_tiling`.
    """

    encoder: PixelEncoderConfig = field(default_factory=PixelEncoderConfig)
    decoder: PixelDecoderConfig = field(default_factory=_sd_decoder)
    quant_conv: bool = True
    post_quant_conv: bool = True
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    statistics_grid: tuple[int, int] | None = None
    sample_size: int = 256

    def validate(self) -> None:
        for what in ("stride", "latent_channels"):
            ours, theirs = getattr(self.encoder, what), getattr(self.decoder, what)
            if ours != theirs:
                raise ConfigError(f"the encoder has {what} {ours} and the decoder {theirs}; wanted the same")
        for name in ("latents_mean", "latents_std"):
            values = getattr(self, name)
            fits = values is None or len(values) == self.latent_channels
            self.require(fits, name, f"None or {self.latent_channels} numbers, one per latent channel")
        stride = self.encoder.stride
        fits = self.sample_size >= stride and self.sample_size % stride == 0
        self.require(fits, "sample_size", f"a multiple of the stride {stride}")
        self.require(self.scaling_factor != 0, "scaling_factor", "a number that callers can divide by")
        self.require(min(self.statistics_grid or (1,)) >= 1, "statistics_grid", "None or two numbers of at least 1")

    @classmethod
    def ldm(
        cls, latent_channels: int, channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4), scaling_factor: float = 1.0
    ) -> "PixelVAEConfig":
        """LDM's f16 architecture: VA-VAE (32 channels) and MAR (16 channels, scaling 0.2325)."""
        return cls(
            PixelEncoderConfig(latent_channels, channel_multipliers=channel_multipliers, attention_levels=1),
            PixelDecoderConfig(latent_channels, channel_multipliers=channel_multipliers, attention_levels=1),
            scaling_factor=scaling_factor,
        )

    @classmethod
    def sd3(cls) -> "PixelVAEConfig":
        """Stable Diffusion 3: 16 channels, no quant convolutions."""
        return cls._without_quant_conv(1.5305, 0.0609)

    @classmethod
    def flux(cls) -> "PixelVAEConfig":
        """FLUX.1: 16 channels, no quant convolutions."""
        return cls._without_quant_conv(0.3611, 0.1159)

    @classmethod
    def _without_quant_conv(cls, scaling_factor: float, shift_factor: float) -> "PixelVAEConfig":
        return cls(
            PixelEncoderConfig(latent_channels=16), _sd_decoder(16),
            quant_conv=False, post_quant_conv=False, scaling_factor=scaling_factor, shift_factor=shift_factor,
            sample_size=1024,
        )  # fmt: skip

    # What code written for AutoencoderKL reads from ``vae.config``.

    @property
    def latent_channels(self) -> int:
        """Z."""
        return self.encoder.latent_channels

    @property
    def spatial_compression_ratio(self) -> int:
        """The stride."""
        return self.encoder.stride

    @property
    def block_out_channels(self) -> tuple[int, ...]:
        """Width of each level; callers take the stride from its length, 2 ** (len − 1)."""
        return tuple(self.encoder.base_channels * m for m in self.encoder.channel_multipliers)

    encoder_block_out_channels = block_out_channels

    @property
    def in_channels(self) -> int:
        """Image channels in."""
        return self.encoder.in_channels

    @property
    def out_channels(self) -> int:
        """Image channels out."""
        return self.decoder.out_channels


class PixelVAE(nn.Module, AutoencoderFace, HubMixin):
    """Images ``B C H W`` in [-1, 1] ↔ raw latents ``B Z h w``, h = H / stride, w = W / stride.

    Keeps the meaning of diffusers' ``AutoencoderKL``: the caller scales by ``config.scaling_factor`` and shifts by
    ``config.shift_factor``. Statistics in ``latent_spec`` (VA-VAE, REPA-E) are the caller's to apply too, by
    ``latent_spec.normalize`` and ``denormalize``.

    `from_pretrained` also reads diffusers folders and LDM checkpoints.

    Args:
        config: see `PixelVAEConfig`.

    Attributes:
        encoder: `PixelEncoder`. decoder: `PixelDecoder`. quant_conv, post_quant_conv: convolutions or identities.
        latent_spec: `LatentSpec`.
    """

    config_class = PixelVAEConfig
    foreign_formats = (AUTOENCODER_PIXEL_VAE, AUTOENCODER_KL, LDM)
    card_tags = ("autoencoder",)

    def __init__(self, config: PixelVAEConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.latent_channels
        self.encoder = PixelEncoder(config.encoder)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1) if config.quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(channels, channels, 1) if config.post_quant_conv else nn.Identity()
        self.decoder = PixelDecoder(config.decoder)
        stride = config.spatial_compression_ratio
        self.latent_spec = LatentSpec(channels, stride, config.statistics_grid, applied_by="caller")

    def forward(
        self,
        sample: Images,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: Generator | list[Generator] | None = None,
    ) -> PixelVAEOutput | tuple[Tensor]:
        """Image to image, with what a loss needs. Train through this call, so that DDP and FSDP see the gradients.

        Args:
            sample: images ``B C H W`` in [-1, 1].
            sample_posterior: draw the latents; otherwise take the posterior's mean.
            return_dict: `PixelVAEOutput`, or the 1-tuple ``(sample,)``.

        Raises:
            ShapeError: wrong rank, channels or size, or NaN. DtypeError: integer images, or halves for float32 weights.
        """
        parameters = self._moments(sample)
        posterior = DiagonalGaussian(parameters)
        latents = posterior.sample(generator) if sample_posterior else posterior.mode()
        image = self.decoder(self.post_quant_conv(latents))
        return PixelVAEOutput(image, latents, parameters) if return_dict else (image,)

    def encode(self, images: Images, return_dict: bool = True) -> EncoderOutput | tuple[DiagonalGaussian]:
        """Images ``B C H W`` in [-1, 1] → ``.latent_dist`` over raw latents ``B Z h w``.

        Raises:
            ShapeError: wrong rank, channels or size, or NaN. DtypeError: integer images, or halves for float32 weights.
        """
        check_map(images, self.config.in_channels, "images")  # the rest is for the encoder to check, once
        slices = images.split(1) if self.use_slicing else [images]
        posterior = DiagonalGaussian(torch.cat([self._encode_tiles(self._moments, part) for part in slices]))
        return EncoderOutput(posterior) if return_dict else (posterior,)

    def decode(
        self, latents: Latents, return_dict: bool = True, generator: Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Raw latents ``B Z h w`` → ``.sample``, images ``B C H W``, nominally in [-1, 1], not clamped.

        Args:
            generator: accepted because SD-style callers pass it; decoding is deterministic.

        Raises:
            ShapeError: wrong rank or channel count. DtypeError: integer latents, or halves for float32 weights.
        """
        check_map(latents, self.config.latent_channels, "latents")
        check_dtype(latents, self.post_quant_conv, "latents")  # without one, the decoder checks
        slices = latents.split(1) if self.use_slicing else [latents]
        image = torch.cat([self._decode_tiles(self.decoder, self.post_quant_conv(part)) for part in slices])
        return DecoderOutput(image) if return_dict else (image,)

    def _moments(self, images: Images) -> Tensor:
        return self.quant_conv(self.encoder(images))

    def enable_gradient_checkpointing(self) -> None:
        """Trade time for memory in training, in both halves."""
        self.encoder.enable_gradient_checkpointing()
        self.decoder.enable_gradient_checkpointing()

    def disable_gradient_checkpointing(self) -> None:
        """Keep activations again."""
        self.encoder.disable_gradient_checkpointing()
        self.decoder.disable_gradient_checkpointing()

    def export_diffusers(self, folder: str | os.PathLike[str], *, max_shard_size: str | int = "10GB") -> None:
        """Write a folder that diffusers' ``AutoencoderKL.from_pretrained`` opens.

        Statistics per channel go to ``latents_mean`` and ``latents_std`` of its configuration.

        Raises:
            CheckpointError: the statistics are per element, or the folder cannot be written.
        """
        config = self._config_with_statistics("AutoencoderKL")
        export(
            self, AUTOENCODER_KL, folder, config=config, stem="diffusion_pytorch_model", max_shard_size=max_shard_size
        )

    def export_ldm(self, folder: str | os.PathLike[str]) -> None:
        """Write LDM's names as ``model.safetensors``, and its ``ddconfig`` as ``config.json``.

        Neither has a place for what callers apply to latents: scaling, shift and statistics.

        Raises:
            ConfigError: the norms are not those of LDM's code, which would compute something else.
            CheckpointError: the statistics are per element, which nobody could pass when loading, or the folder
                cannot be written.

        Warns:
            CheckpointWarning: the file cannot carry some constants; their values, and how to pass them.
        """
        for half in ("encoder", "decoder"):
            for name, theirs in (("norm_groups", 32), ("norm_eps", 1e-6)):
                ours = getattr(getattr(self.config, half), name)
                if ours != theirs:
                    raise ConfigError(
                        f"{half}.{name} is {ours}; LDM's code has {theirs} and its files have no place for another, so "
                        "other readers would compute something else: use save_pretrained or export_diffusers"
                    )
        config = self._config_with_statistics("LDM's layout")
        read = {"scaling_factor": 1.0, "shift_factor": 0.0, "latents_mean": None, "latents_std": None}
        lost = {name: value for name, default in read.items() if (value := getattr(config, name) or default) != default}
        export(self, LDM, folder)
        if lost:
            passed = ", ".join(f"{name}={value!r}" for name, value in lost.items())
            warnings.warn(
                f"LDM's layout has no place for {', '.join(lost)}: {folder} holds the weights alone. Pass what it "
                f"lacks when loading, PixelVAE.from_pretrained({str(folder)!r}, {passed}), and tell other readers",
                CheckpointWarning,
                stacklevel=2,
            )

    def _config_with_statistics(self, layout: str) -> PixelVAEConfig:
        """The configuration with those of `LatentSpec` as ``latents_mean`` and ``latents_std``."""
        config, spec = self.config, self.latent_spec
        if (spec.mean == 0).all() and (spec.std == 1).all():
            return config
        if spec.grid is not None:
            raise CheckpointError(
                f"{layout} cannot hold statistics per element (grid {spec.grid}); wanted none: keep psvae's own with "
                "save_pretrained"
            )
        mean, std = _decimals(config.latents_mean, spec.mean), _decimals(config.latents_std, spec.std)
        return config.replace(latents_mean=mean, latents_std=std)

    def extra_repr(self) -> str:
        return f"Z={self.config.latent_channels}, stride={self.config.spatial_compression_ratio}"


def _decimals(written: tuple[float, ...] | None, buffer: Tensor) -> tuple[float, ...]:
    """The numbers of a buffer, as they were written where they still are the same in fp32."""
    values = buffer.float().flatten().tolist()
    return written if written is not None and torch.tensor(written).tolist() == values else tuple(values)
