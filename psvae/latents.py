"""What a latent is: its distribution, its meaning, and the statistics that travel with it."""

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Generator, Tensor, nn

from psvae.errors import ConfigError, RangeWarning, ShapeError
from psvae.shapes import Latents, check_map

__all__ = ["DiagonalGaussian", "LatentSpec", "fit_latent_statistics"]

Reduction = Literal["none", "sum", "mean"]


class DiagonalGaussian:
    """The posterior q(z | x) = N(mean, diag(std²)) over latents ``B Z h w``.

    Same members as diffusers' ``DiagonalGaussianDistribution``. The log-variance is clamped to
    [-30, 20], as in Rombach et al. 2022, which the paper follows (section 3.3).

    Args:
        parameters: ``B 2Z h w``, mean and log-variance stacked on the channel axis.
        deterministic: a point instead of a Gaussian: std and var are zero, `kl` and `nll` too.
    """

    def __init__(self, parameters: Float[Tensor, "B ZZ h w"], deterministic: bool = False) -> None:
        self.parameters = parameters
        self.deterministic = deterministic
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.zeros_like(logvar) if deterministic else torch.exp(0.5 * self.logvar)
        self.var = torch.zeros_like(logvar) if deterministic else torch.exp(self.logvar)

    @classmethod
    def point(cls, latents: Latents) -> "DiagonalGaussian":
        """The distribution that always returns ``latents``."""
        return cls(torch.cat([latents, torch.zeros_like(latents)], dim=1), deterministic=True)

    @classmethod
    def cat(cls, parts: Sequence["DiagonalGaussian"]) -> "DiagonalGaussian":
        """Join along the batch."""
        return cls(torch.cat([part.parameters for part in parts]), parts[0].deterministic)

    def sample(self, generator: Generator | Sequence[Generator] | None = None) -> Latents:
        """mean + std·ε, ε ~ N(0, 1), always a fresh tensor that the caller may change in place.

        Args:
            generator: one for the batch, or a list of one per item, so that an item's noise does not
                depend on its neighbours. Noise is drawn on the generator's own device.
        """
        shape, dtype, device = self.mean.shape, self.mean.dtype, self.mean.device
        if isinstance(generator, Sequence):
            if len(generator) != shape[0]:
                raise ShapeError(f"{len(generator)} generators came for a batch of {shape[0]}; wanted one per item")
            noise = torch.stack([torch.randn(shape[1:], generator=g, device=g.device, dtype=dtype) for g in generator])
        else:
            where = device if generator is None else generator.device
            noise = torch.randn(shape, generator=generator, device=where, dtype=dtype)
        return self.mean + self.std * noise.to(device)

    def mode(self) -> Latents:
        """The mean."""
        return self.mean

    def kl(self, reduction: Reduction = "sum") -> Tensor:
        """KL(q ‖ N(0, 1)) = ½ (mean² + var − 1 − logvar), computed in fp32.

        Args:
            reduction: ``"none"`` keeps ``B Z h w``; ``"sum"`` adds over Z, h, w to ``B`` (what Rombach et
                al. average over the batch and weigh by 1e-6); ``"mean"`` averages over Z, h, w to ``B``.
        """
        mean, logvar = self.mean.float(), self.logvar.float()
        kl = torch.zeros_like(mean) if self.deterministic else 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar)
        return _reduce(kl, reduction)

    def nll(self, sample: Latents, dims: Sequence[int] = (1, 2, 3)) -> Tensor:
        """−log q(sample), summed over ``dims``; ``B`` by default."""
        mean, logvar = self.mean.float(), self.logvar.float()
        if self.deterministic:
            return torch.zeros_like(mean).sum(list(dims))
        nll = 0.5 * (math.log(2.0 * math.pi) + logvar + (sample.float() - mean).square() / logvar.exp())
        return nll.sum(list(dims))

    def __repr__(self) -> str:
        return f"DiagonalGaussian(shape={tuple(self.mean.shape)}, deterministic={self.deterministic})"


def _reduce(values: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return values
    if reduction in ("sum", "mean"):
        return getattr(values, reduction)(dim=(1, 2, 3))
    raise ConfigError(f"reduction is {reduction!r}; wanted 'none', 'sum' or 'mean'")


class LatentSpec(nn.Module):
    """What a latent says of itself; part of the state dict, so that it travels with the weights.

    Args:
        channels: Z.
        stride: pixels of the image per latent cell, on each axis.
        grid: ``None`` for statistics per channel, or (h, w) for statistics per element at that grid.
        applied_by: ``"encode"``: the model's encode applies them and its decode undoes them, so callers scale by
            1 and shift by 0 (`PSVAE`). ``"caller"``: encode gives raw latents, and `normalize` is the
            caller's to call (`PixelVAE`, which keeps AutoencoderKL's meaning).

    The buffers ``mean`` and ``std`` (``Z 1 1`` or ``Z h w``) start as 0 and 1;
    `fit_latent_statistics` fills them.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        channels: int,
        stride: int,
        grid: tuple[int, int] | None = None,
        applied_by: Literal["encode", "caller"] = "encode",
    ) -> None:
        super().__init__()
        self.channels, self.stride, self.grid, self.applied_by = channels, stride, grid, applied_by
        shape = (channels, *(grid or (1, 1)))
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))

    def normalize(self, latents: Latents) -> Latents:
        """(z − mean) / std."""
        self._check(latents)
        return (latents - self.mean.to(latents)) / self.std.to(latents)  # the device too: offloading leaves them behind

    def denormalize(self, latents: Latents) -> Latents:
        """z · std + mean, the inverse of `normalize`."""
        self._check(latents)
        return latents * self.std.to(latents) + self.mean.to(latents)

    def normalize_posterior(self, posterior: DiagonalGaussian) -> DiagonalGaussian:
        """The distribution of normalised latents: an affine map of a Gaussian is a Gaussian."""
        mean = self.normalize(posterior.mean)
        logvar = posterior.logvar - 2.0 * self.std.to(mean).log()
        return DiagonalGaussian(torch.cat([mean, logvar], dim=1), posterior.deterministic)

    def _check(self, latents: Tensor) -> None:
        check_map(latents, self.channels, "latents")
        if self.grid is not None and tuple(latents.shape[-2:]) != self.grid:
            raise ShapeError(
                f"latents have grid {tuple(latents.shape[-2:])}; the statistics are per element at {self.grid}: "
                "use images of that size, or fit statistics per channel (statistics_grid=None)"
            )

    def extra_repr(self) -> str:
        kind = "per channel" if self.grid is None else f"per element at {self.grid[0]}x{self.grid[1]}"
        return f"channels={self.channels}, stride={self.stride}, statistics={kind}, applied by {self.applied_by}"


@runtime_checkable
class _Codec(Protocol):
    latent_spec: LatentSpec

    def encode(self, images: Any, /) -> Any: ...


@torch.no_grad()
def fit_latent_statistics(
    vae: _Codec, batches: Iterable[Tensor], *, sample_posterior: bool = True
) -> tuple[Tensor, Tensor]:
    """Measure the mean and std of latents over ``batches`` and store them in ``vae.latent_spec``.

    One streaming pass with Chan's pairwise update in float64, so that neither a large mean nor many
    batches cost precision. With ``torch.distributed`` running, each process passes its own batches and all
    end with the statistics of the union. Whether they are per channel or per element is what the
    configuration says (``grid`` of `LatentSpec`).

    Args:
        vae: anything with ``encode(images).latent_dist`` and a `LatentSpec`.
        batches: image tensors ``B C H W`` in [-1, 1]. The model's mode is left as it is: call ``.eval()``.
        sample_posterior: measure ``latent_dist.sample()``, what most training scripts feed their
            generator: the variance of the means plus the mean of the variances, exactly, without
            drawing noise. ``False`` measures ``latent_dist.mode()``.

    Returns:
        (mean, std) as stored.

    Raises:
        ConfigError: no batch came, or ``vae`` has no `LatentSpec`.

    Warns:
        RangeWarning: a channel is constant over the data; its std is left at 1.
    """
    spec = getattr(vae, "latent_spec", None)
    if not isinstance(spec, LatentSpec):
        raise ConfigError(
            f"vae came as {type(vae).__name__}, which has no latent_spec to keep statistics in; wanted a PixelVAE or "
            "PSVAE: open the folder of a diffusers VAE with PixelVAE.from_pretrained(folder)"
        )
    over = (0, 2, 3) if spec.grid is None else (0,)
    old_mean, old_std = spec.mean.cpu().double(), spec.std.cpu().double()  # on the CPU: some devices lack float64
    count, mean, m2, noise = 0, *(torch.zeros_like(old_mean) for _ in range(3))
    for images in batches:
        posterior = vae.encode(images).latent_dist
        raw, var = posterior.mean.cpu().double(), posterior.var.cpu().double()
        if spec.applied_by == "encode":
            raw, var = raw * old_std + old_mean, var * old_std.square()
        size = raw.numel() // mean.numel()
        batch_mean = raw.mean(over, keepdim=True)[0]
        batch_m2 = (raw - batch_mean).square().sum(over, keepdim=True)[0]
        count, mean, m2 = _merge((count, mean, m2), (size, batch_mean, batch_m2))
        noise = noise + var.sum(over, keepdim=True)[0]
    if dist.is_available() and dist.is_initialized():
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (count, mean, m2, noise))
        count, mean, m2, noise = 0, *(torch.zeros_like(mean) for _ in range(3))
        for other_count, other_mean, other_m2, other_noise in gathered:
            count, mean, m2 = _merge((count, mean, m2), (other_count, other_mean, other_m2))
            noise = noise + other_noise
    if count == 0:
        raise ConfigError("batches is empty; wanted at least one image tensor (a generator can be read only once)")
    var = (m2 + noise) / count if sample_posterior else m2 / count
    constant = var <= 1e-24 * mean.square().clamp(min=1.0)
    if constant.any():
        dead = sorted(set(constant.nonzero()[:, 0].tolist()))
        warnings.warn(
            f"latent channels {dead} are constant over the data; their std stays 1", RangeWarning, stacklevel=3
        )
    std = torch.where(constant, torch.ones_like(var), var.sqrt())
    spec.mean.copy_(mean)
    spec.std.copy_(std)
    return spec.mean, spec.std


def _merge(a: tuple[int, Tensor, Tensor], b: tuple[int, Tensor, Tensor]) -> tuple[int, Tensor, Tensor]:
    """Chan et al. 1979: count, mean and sum of squared deviations of two samples taken together."""
    count = a[0] + b[0]
    if count == 0:
        return a
    delta = b[1] - a[1]
    return count, a[1] + delta * (b[0] / count), a[2] + b[2] + delta.square() * (a[0] * b[0] / count)
