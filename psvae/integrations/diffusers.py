"""PSVAE and PixelVAE as diffusers models: a pipeline runs them, saves them and loads them.

Each class holds the modules of its core and calls it: same state-dict keys, no second implementation. In
``model_index.json`` they are ``["psvae", name]``.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Generator, Tensor

from psvae.autoencoders import PSVAE, PixelVAE
from psvae.errors import CheckpointError, ConfigError, MissingDependencyError
from psvae.hub.source import packaged
from psvae.shapes import Images, Latents

try:
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput
    from diffusers.models.modeling_outputs import AutoencoderKLOutput
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.utils.accelerate_utils import apply_forward_hook
except (ImportError, RuntimeError) as error:  # a torchvision made for another torch raises RuntimeError
    raise MissingDependencyError(
        f"diffusers could not be imported ({type(error).__name__}: {error}); install it with pip install "
        "'psvae[diffusers]'"
    ) from error

__all__ = ["AutoencoderPSVAE", "AutoencoderPixelVAE", "ModelMixin"]

# What pipelines and training scripts read off ``vae.config``; all of it follows from the core's configuration.
_READ_BY_CALLERS = (
    "in_channels", "out_channels", "latent_channels", "block_out_channels", "encoder_block_out_channels",
    "spatial_compression_ratio", "sample_size", "scaling_factor", "shift_factor", "latents_mean", "latents_std",
    "force_upcast",
)  # fmt: skip

_PLACE = ("subfolder", "revision", "token", "cache_dir", "local_files_only")  # where to look, as the core names it


class _Autoencoder(ModelMixin, AutoencoderMixin, ConfigMixin):
    """What both classes share: a core whose children are this module's children.

    Args:
        core: the core's configuration as a dict; its defaults where None.
        in_channels: this and all that follow are written for callers to read. They follow from ``core``:
            leave them out.

    Raises:
        ConfigError: a field of ``core`` is unknown or invalid, or another argument contradicts it.
    """

    core_class: ClassVar[Any]
    _supports_gradient_checkpointing = True
    _no_split_modules = ("Block", "EvaBlock", "TransformerBlock", "ResidualBlock", "SpatialAttention")
    _core: Any

    @register_to_config
    def __init__(
        self,
        core: Mapping[str, Any] | None = None,
        in_channels: int | None = None,
        out_channels: int | None = None,
        latent_channels: int | None = None,
        block_out_channels: Sequence[int] | None = None,
        encoder_block_out_channels: Sequence[int] | None = None,
        spatial_compression_ratio: int | None = None,
        sample_size: int | None = None,
        scaling_factor: float | None = None,
        shift_factor: float | None = None,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        force_upcast: bool | None = None,
    ) -> None:
        super().__init__()
        config = self.core_class.config_class.from_dict(core or {})
        given = {name: value for name, value in locals().items() if name in _READ_BY_CALLERS and value is not None}
        true = {name: _plain(getattr(config, name)) for name in _READ_BY_CALLERS}
        for name, value in given.items():
            if _plain(value) != true[name]:
                raise ConfigError(
                    f"{name} is {value!r}; by the core's configuration it is {true[name]!r}: leave it out"
                )
        self.register_to_config(core=config.to_dict(), _use_default_values=list(true), **true)
        self._adopt(self.core_class(config))

    def _adopt(self, core: Any) -> None:
        object.__setattr__(self, "_core", core)  # not a child: its keys would come twice
        self._modules = core._modules  # one dict: a child that is replaced in either is replaced in both

    @classmethod
    def _around(cls, core: Any) -> Self:
        with torch.device("meta"):
            model = cls(core=core.config.to_dict())
        model._adopt(core)
        return model.train(core.training)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As every diffusers model, and strict: diffusers alone leaves missing weights empty and says nothing.

        Folders that are not of this class are read as the core reads them: psvae's own, its packaged models by name,
        and those of other projects, such as ``AutoencoderKL``'s. From those, ``subfolder``, ``revision``,
        ``variant``, ``torch_dtype`` and the options of the Hub are taken.

        Raises:
            CheckpointError: of another model, or weights are missing, unexpected or mis-shaped, all listed.
        """
        pretrained_model_name_or_path = packaged(pretrained_model_name_or_path) or pretrained_model_name_or_path
        place = {name: kwargs[name] for name in _PLACE if kwargs.get(name) is not None}
        kind = cls.load_config(pretrained_model_name_or_path, **place).get("_class_name")  # type: ignore[union-attr]
        if kind != cls.__name__:
            return cls._from_core_format(pretrained_model_name_or_path, place, kwargs)
        wants_report = kwargs.pop("output_loading_info", False)
        try:
            loaded: Any = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        except ConfigError:
            raise
        except ValueError as error:  # diffusers' word for a mis-shaped tensor, without the name of the folder
            raise CheckpointError(f"{pretrained_model_name_or_path} cannot be loaded: {error}") from error
        model, report = loaded
        faults = {kind: keys for kind, keys in report.items() if keys}
        if faults:
            said = "; ".join(f"{kind.replace('_', ' ')}: {', '.join(map(str, keys))}" for kind, keys in faults.items())
            raise CheckpointError(
                f"the weights of {pretrained_model_name_or_path} do not fit its configuration. {said}"
            )
        return (model, report) if wants_report else model

    @classmethod
    def _from_core_format(cls, name: Any, place: dict[str, Any], options: dict[str, Any]) -> Self:
        if options.get("device_map") is not None or options.get("output_loading_info"):
            raise CheckpointError(
                f"{name} was not saved by {cls.__name__}: device_map and output_loading_info do not apply; load it "
                "without them, and save_pretrained it where they are needed"
            )
        dtype = options.get("torch_dtype") or options.get("dtype") or torch.float32
        return cls._around(cls.core_class.from_pretrained(name, variant=options.get("variant"), dtype=dtype, **place))

    @apply_forward_hook
    def encode(self, x: Images, return_dict: bool = True) -> AutoencoderKLOutput | tuple[Any]:
        """Images ``B C H W`` in [-1, 1] → ``.latent_dist``, as the core's ``encode``."""
        (posterior,) = self._core.encode(x, return_dict=False)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)  # type: ignore[arg-type]

    @apply_forward_hook
    def decode(
        self, z: Latents, return_dict: bool = True, generator: Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Latents ``B Z h w`` → ``.sample``, images ``B C H W``; ``generator`` is accepted and not needed."""
        (image,) = self._core.decode(z, return_dict=False)
        return DecoderOutput(sample=image) if return_dict else (image,)

    def forward(
        self,
        sample: Images,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: Generator | list[Generator] | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Image to image: ``B C H W`` in [-1, 1] → ``.sample``, the same shape.

        Slices and tiles where they are enabled, but not in training.
        """
        if self.training or not (self.use_slicing or self.use_tiling):
            (image,) = self._core(sample, sample_posterior, False, generator)
        else:
            posterior = self._core.encode(sample).latent_dist
            latents = posterior.sample(generator) if sample_posterior else posterior.mode()
            (image,) = self._core.decode(latents, return_dict=False)
        return DecoderOutput(sample=image) if return_dict else (image,)

    def train(self, mode: bool = True) -> Self:
        """Training mode, the core's too: it is no child."""
        self._core.training = mode
        return super().train(mode)

    @property
    def use_slicing(self) -> bool:
        """Whether batches run one item at a time."""
        return self._core.use_slicing

    @use_slicing.setter
    def use_slicing(self, value: bool) -> None:
        self._core.use_slicing = value

    @property
    def use_tiling(self) -> bool:
        """Whether large images are run tile by tile."""
        return self._core.use_tiling

    @use_tiling.setter
    def use_tiling(self, value: bool) -> None:
        self._core.use_tiling = value

    def enable_slicing(self) -> None:
        """Encode and decode a batch one item at a time."""
        self._core.enable_slicing()

    def disable_slicing(self) -> None:
        """Whole batches again."""
        self._core.disable_slicing()

    def enable_tiling(
        self,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_sample_stride_height: int | None = None,
        tile_sample_stride_width: int | None = None,
    ) -> None:
        """Run large images tile by tile: sizes and steps in pixels, as the core's ``enable_tiling``."""
        self._core.enable_tiling(
            tile_sample_min_height, tile_sample_min_width, tile_sample_stride_height, tile_sample_stride_width
        )

    def disable_tiling(self) -> None:
        """Whole images again."""
        self._core.disable_tiling()

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Any = None) -> None:
        """Trade time for memory in training; the function is PyTorch's own, whatever is passed."""
        self._core.enable_gradient_checkpointing()

    def disable_gradient_checkpointing(self) -> None:
        """Keep activations again."""
        self._core.disable_gradient_checkpointing()


class AutoencoderPSVAE(_Autoencoder):
    """`PSVAE` as a diffusers model. Latents come normalised: ``scaling_factor`` is 1 and ``shift_factor`` 0."""

    core_class = PSVAE
    _group_offload_block_modules = ("encoder", "vae", "decoder")

    @classmethod
    def from_psvae(cls, psvae: PSVAE) -> Self:
        """Around an existing model; the weights are shared."""
        return cls._around(psvae)

    def to_psvae(self) -> PSVAE:
        """The model inside; the weights are shared."""
        return self._core


class AutoencoderPixelVAE(_Autoencoder):
    """`PixelVAE` as a diffusers model, with ``AutoencoderKL``'s meaning: the caller scales and shifts."""

    core_class = PixelVAE
    _group_offload_block_modules = ("encoder", "quant_conv", "post_quant_conv", "decoder")

    @classmethod
    def from_pixel_vae(cls, pixel_vae: PixelVAE) -> Self:
        """Around an existing model; the weights are shared."""
        return cls._around(pixel_vae)

    def to_pixel_vae(self) -> PixelVAE:
        """The model inside; the weights are shared."""
        return self._core


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


# Pipelines write ``[module, class]`` into model_index.json: the package's name, so that inner files stay free to move.
AutoencoderPSVAE.__module__ = AutoencoderPixelVAE.__module__ = "psvae"
