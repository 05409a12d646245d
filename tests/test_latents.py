"""The posterior against diffusers' and torch's, and the statistics that make latents have mean 0 and std 1."""

import warnings
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Generator, Tensor, nn

from psvae import PSVAE, DiagonalGaussian, LatentSpec, fit_latent_statistics
from psvae.autoencoders import EncoderOutput
from psvae.errors import ConfigError, RangeWarning, ShapeError
from tests.tiny import PSVAE_VARIANTS, images, tiny_psvae

SHAPE = (3, 8, 4, 5)


def parameters(spread: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """``B 2Z h w``; a spread of 30 reaches past both ends of the clamp."""
    shape = (SHAPE[0], 2 * SHAPE[1], *SHAPE[2:])
    return (torch.randn(shape, generator=Generator().manual_seed(0)) * spread).to(dtype)


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


# DiagonalGaussian


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_the_moments_are_those_of_diffusers(spread: float, deterministic: bool) -> None:
    ours = DiagonalGaussian(parameters(spread), deterministic)
    theirs = DiagonalGaussianDistribution(parameters(spread), deterministic)
    for name in ("mean", "logvar", "std", "var", "parameters"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert torch.equal(ours.mode(), theirs.mode())
    assert ours.logvar.min() >= -30
    assert ours.logvar.max() <= 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("many", [False, True])
def test_samples_are_those_of_diffusers(many: bool, dtype: torch.dtype) -> None:
    def generator() -> Any:
        return [seeded(i) for i in range(SHAPE[0])] if many else seeded(0)

    ours = DiagonalGaussian(parameters(dtype=dtype)).sample(generator())
    theirs = DiagonalGaussianDistribution(parameters(dtype=dtype)).sample(generator())
    assert ours.dtype == dtype
    assert torch.equal(ours, theirs)


def test_samples_without_a_generator_follow_the_global_seed() -> None:
    posterior = DiagonalGaussian(parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first = posterior.sample()
        torch.manual_seed(1)
        assert torch.equal(posterior.sample(), first)
        assert not torch.equal(posterior.sample(), first)


def test_a_generator_per_item_frees_it_from_its_neighbours() -> None:
    whole = DiagonalGaussian(parameters()).sample([seeded(i) for i in range(3)])
    alone = DiagonalGaussian(parameters()[1:2]).sample([seeded(1)])
    assert torch.equal(whole[1:2], alone)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_wrong_number_of_generators(count: int) -> None:
    with pytest.raises(ShapeError, match=f"{count} generators came for a batch of 3; wanted one per item"):
        DiagonalGaussian(parameters()).sample([seeded(i) for i in range(count)])


def test_kl_and_nll_are_those_of_diffusers() -> None:
    ours, theirs = DiagonalGaussian(parameters()), DiagonalGaussianDistribution(parameters())
    sample = torch.randn(SHAPE, generator=seeded(2))
    assert torch.allclose(ours.kl(), theirs.kl(), rtol=1e-6)
    assert torch.allclose(ours.nll(sample), theirs.nll(sample), rtol=1e-6)
    assert torch.allclose(ours.nll(sample, dims=(1, 2)), theirs.nll(sample, dims=(1, 2)), rtol=1e-6)


def test_kl_and_nll_are_those_of_torch() -> None:
    ours = DiagonalGaussian(parameters())
    theirs = torch.distributions.Normal(ours.mean, ours.std)
    prior = torch.distributions.Normal(torch.zeros_like(ours.mean), torch.ones_like(ours.mean))
    sample = theirs.sample()
    assert torch.allclose(ours.kl("none"), torch.distributions.kl_divergence(theirs, prior), atol=1e-6)
    assert torch.allclose(ours.nll(sample), -theirs.log_prob(sample).sum((1, 2, 3)), rtol=1e-5)


def test_kl_reductions() -> None:
    posterior = DiagonalGaussian(parameters())
    whole = posterior.kl("none")
    assert whole.shape == SHAPE
    assert whole.min() >= 0
    assert torch.equal(posterior.kl(), whole.sum((1, 2, 3)))
    assert torch.equal(posterior.kl("sum"), whole.sum((1, 2, 3)))
    assert torch.equal(posterior.kl("mean"), whole.mean((1, 2, 3)))


@pytest.mark.bad_input
def test_kl_of_an_unknown_reduction() -> None:
    with pytest.raises(ConfigError, match="reduction is 'batch'; wanted 'none', 'sum' or 'mean'"):
        DiagonalGaussian(parameters()).kl("batch")


def test_kl_in_half_precision_is_computed_in_fp32() -> None:
    """A variance rounded to bfloat16 before 1 is taken off would leave little but the rounding."""
    near_prior = (parameters() * 0.05).to(torch.bfloat16)
    kl = DiagonalGaussian(near_prior).kl("none")
    wanted = DiagonalGaussian(near_prior.double()).kl("none")
    assert kl.dtype == torch.float32
    assert kl.min() >= 0
    assert torch.allclose(kl, wanted.float(), rtol=1e-3, atol=1e-6)
    sample = torch.zeros(SHAPE, dtype=torch.bfloat16)
    assert torch.allclose(DiagonalGaussian(near_prior).nll(sample), DiagonalGaussian(near_prior.float()).nll(sample))


def test_a_point_is_deterministic() -> None:
    latents = torch.randn(SHAPE)
    point = DiagonalGaussian.point(latents)
    for got in (point.sample(), point.sample(seeded(0)), point.mode()):
        assert torch.equal(got, latents)
    for got in (point.std, point.var, point.kl("none")):
        assert torch.equal(got, torch.zeros_like(latents))
    for got in (point.kl(), point.kl("mean"), point.nll(latents)):
        assert torch.equal(got, torch.zeros(SHAPE[0]))
    assert point.nll(latents, dims=(1, 2)).shape == (SHAPE[0], SHAPE[3])


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_sample_is_the_callers_own(deterministic: bool) -> None:
    """Training scripts scale latents in place: that must not reach the posterior."""
    posterior = DiagonalGaussian(parameters(), deterministic)
    before = posterior.mean.clone()
    posterior.sample().mul_(0.18215).add_(1.0)
    assert torch.equal(posterior.mean, before)
    assert torch.equal(posterior.parameters, parameters())


def test_the_gradient_of_a_sample_is_reparametrised() -> None:
    raw = parameters().requires_grad_()
    posterior = DiagonalGaussian(raw)
    noise = (posterior.sample(seeded(0)) - posterior.mean).detach() / posterior.std.detach()
    posterior.sample(seeded(0)).sum().backward()
    assert raw.grad is not None
    of_mean, of_logvar = raw.grad.chunk(2, dim=1)
    assert torch.equal(of_mean, torch.ones(SHAPE))
    assert torch.allclose(of_logvar, 0.5 * posterior.std.detach() * noise, atol=1e-6)


def test_cat_joins_the_batch() -> None:
    parts = [DiagonalGaussian(part) for part in parameters().split(1)]
    assert torch.equal(DiagonalGaussian.cat(parts).parameters, parameters())
    points = [DiagonalGaussian.point(torch.ones(1, 8, 2, 2))] * 2
    assert DiagonalGaussian.cat(points).deterministic
    assert "(2, 8, 2, 2), deterministic=True" in repr(DiagonalGaussian.cat(points))


# LatentSpec


def spec(grid: tuple[int, int] | None = None) -> LatentSpec:
    """Statistics that are not 0 and 1."""
    result = LatentSpec(channels=8, stride=8, grid=grid)
    result.mean.copy_(torch.randn(result.mean.shape, generator=seeded(3)) * 5)
    result.std.copy_(torch.rand(result.std.shape, generator=seeded(4)) * 3 + 0.1)
    return result


@pytest.mark.parametrize("grid", [None, (4, 5)])
def test_denormalise_undoes_normalise(grid: tuple[int, int] | None) -> None:
    latents = torch.randn(SHAPE) * 3
    normalised = spec(grid).normalize(latents)
    assert torch.allclose(normalised, (latents - spec(grid).mean) / spec(grid).std)
    assert torch.allclose(spec(grid).denormalize(normalised), latents, atol=1e-5)


def test_fresh_statistics_change_nothing() -> None:
    latents = torch.randn(SHAPE)
    fresh = LatentSpec(channels=8, stride=8)
    assert torch.equal(fresh.normalize(latents), latents)
    assert torch.equal(fresh.denormalize(latents), latents)
    assert set(fresh.state_dict()) == {"mean", "std"}


@pytest.mark.parametrize("grid", [None, (4, 5)])
def test_the_normalised_posterior_has_the_normalised_samples(grid: tuple[int, int] | None) -> None:
    raw = DiagonalGaussian(parameters())
    normalised = spec(grid).normalize_posterior(raw)
    assert torch.allclose(normalised.mode(), spec(grid).normalize(raw.mode()), atol=1e-6)
    assert torch.allclose(normalised.std, raw.std / spec(grid).std, rtol=1e-5)
    assert torch.allclose(normalised.sample(seeded(0)), spec(grid).normalize(raw.sample(seeded(0))), atol=1e-4)


def test_the_normalised_posterior_of_a_point_is_a_point() -> None:
    latents = torch.randn(SHAPE)
    normalised = spec().normalize_posterior(DiagonalGaussian.point(latents))
    assert normalised.deterministic
    assert torch.equal(normalised.sample(), spec().normalize(latents))


def test_latents_keep_their_dtype() -> None:
    latents = torch.randn(SHAPE, dtype=torch.bfloat16)
    assert spec().normalize(latents).dtype == torch.bfloat16
    assert spec().denormalize(latents).dtype == torch.bfloat16


def test_statistics_per_element_need_their_grid() -> None:
    for act in (spec((4, 4)).normalize, spec((4, 4)).denormalize):
        with pytest.raises(
            ShapeError, match=r"grid \(4, 5\); the statistics are per element at \(4, 4\): use images of"
        ):
            act(torch.randn(SHAPE))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((2, 4, 4, 5), r"latents have 4 channels, shape \(2, 4, 4, 5\); wanted 8"),
        ((8, 4, 5), r"latents have shape \(8, 4, 5\); wanted 4 axes, .*; add a batch axis"),
    ],
)
def test_a_spec_takes_latents_of_its_channels(shape: tuple[int, ...], said: str) -> None:
    for act in (spec().normalize, spec().denormalize):
        with pytest.raises(ShapeError, match=said):
            act(torch.randn(shape))


def test_what_a_spec_says_of_itself() -> None:
    assert repr(spec()) == "LatentSpec(channels=8, stride=8, statistics=per channel, applied by encode)"
    assert "per element at 4x5" in repr(spec((4, 5)))


# fit_latent_statistics


class Affine(nn.Module):
    """The smallest codec: a latent is a pixel times ``scale`` plus ``offset``, with a fixed log-variance."""

    def __init__(self, scale: float = 1.0, offset: float = 0.0, logvar: float = -30.0) -> None:
        super().__init__()
        self.scale, self.offset, self.logvar = scale, offset, logvar
        self.latent_spec = LatentSpec(channels=3, stride=1)

    def encode(self, pixels: Tensor) -> EncoderOutput:
        mean = pixels * self.scale + self.offset
        raw = DiagonalGaussian(torch.cat([mean, torch.full_like(mean, self.logvar)], dim=1))
        return EncoderOutput(self.latent_spec.normalize_posterior(raw))


def photographs(count: int = 24, size: int = 32) -> list[Tensor]:
    """Images that differ in colour and contrast, one to a batch: random latents then have some variance."""
    noise = images(count, size, size)
    tint, contrast = torch.rand(2, count, 3, 1, 1, generator=seeded(5)).unbind()
    return list(((noise * contrast + 2 * tint - 1).clamp(-1, 1)).split(1))


def moments(vae: PSVAE, batches: Iterable[Tensor], draws: int) -> tuple[Tensor, Tensor]:
    """Mean and std of latents from the public call, as a training script would see them; per channel."""
    with torch.no_grad():
        posteriors = [vae.encode(batch).latent_dist for batch in batches]
    if draws == 0:
        latents = torch.cat([posterior.mode() for posterior in posteriors])
    else:
        latents = torch.cat([p.sample(seeded(i * draws + n)) for i, p in enumerate(posteriors) for n in range(draws)])
    over = (0, 2, 3) if vae.latent_spec.grid is None else (0,)
    return latents.double().mean(over), latents.double().std(over, correction=0)


def fitted(vae: PSVAE, batches: Iterable[Tensor], **options: Any) -> PSVAE:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mean, std = fit_latent_statistics(vae, batches, **options)
    assert mean is vae.latent_spec.mean
    assert std is vae.latent_spec.std
    return vae


@pytest.mark.parametrize("variant", PSVAE_VARIANTS)
@pytest.mark.parametrize("grid", [None, (4, 4)])
def test_fitted_latents_have_mean_0_and_std_1(variant: str, grid: tuple[int, int] | None) -> None:
    vae = fitted(tiny_psvae(variant, statistics_grid=grid), photographs(), sample_posterior=False)
    assert vae.latent_spec.mean.shape[1:] == (grid or (1, 1))
    mean, std = moments(vae, photographs(), draws=0)
    assert mean.abs().max() < 1e-3
    assert (std - 1).abs().max() < 1e-3


@pytest.mark.parametrize("grid", [None, (4, 4)])
def test_fitted_samples_have_mean_0_and_std_1(grid: tuple[int, int] | None) -> None:
    """Within 1 %: half a million draws per channel; per element, ten standard errors would not fit."""
    vae = fitted(tiny_psvae(statistics_grid=grid), photographs(), sample_posterior=True)
    mean, std = moments(vae, photographs(), draws=1200)
    allowed = 0.01 if grid is None else 0.03
    assert mean.abs().max() < allowed
    assert (std - 1).abs().max() < allowed


@pytest.mark.parametrize("grid", [None, (4, 4)])
def test_the_variance_of_samples_is_exact(grid: tuple[int, int] | None) -> None:
    """No noise is drawn: the variance of the means plus the mean of the variances is 1 on the fitted data."""
    vae = fitted(tiny_psvae(statistics_grid=grid), photographs())
    with torch.no_grad():
        posteriors = [vae.encode(batch).latent_dist for batch in photographs()]
    over = (0, 2, 3) if grid is None else (0,)
    means, variances = (torch.cat([getattr(p, name) for p in posteriors]).double() for name in ("mean", "var"))
    assert torch.allclose(means.var(over, correction=0) + variances.mean(over), torch.ones(1).double(), atol=1e-4)
    assert means.mean(over).abs().max() < 1e-4


def test_sampling_counts_or_not() -> None:
    """Latents of variance 1/3 (uniform pixels) with posterior noise of variance 1."""
    pixels = [images(4, 64, 64)]
    spread = torch.cat(pixels).double().var((0, 2, 3), correction=0)
    for sample_posterior, wanted in ((False, spread), (True, spread + 1.0)):
        _, std = fit_latent_statistics(Affine(logvar=0.0), pixels, sample_posterior=sample_posterior)
        assert torch.allclose(std.double().square().flatten(), wanted, rtol=1e-5)


def test_no_random_number_is_drawn_and_no_gradient_kept() -> None:
    before = torch.get_rng_state()
    vae = fitted(tiny_psvae(), photographs())
    assert torch.equal(torch.get_rng_state(), before)
    assert not vae.latent_spec.std.requires_grad


@pytest.mark.parametrize("sizes", [[24], [1] * 24, [7, 1, 13, 3], [23, 1]])
def test_uneven_batches_count_by_their_items(sizes: list[int]) -> None:
    data = torch.cat(photographs())
    wanted = fitted(tiny_psvae(), [data]).latent_spec
    got = fitted(tiny_psvae(), iter(data.split(sizes))).latent_spec
    assert torch.allclose(got.mean, wanted.mean, atol=1e-6)
    assert torch.allclose(got.std, wanted.std, rtol=1e-5)


def test_images_of_several_sizes() -> None:
    vae = tiny_psvae()
    batches = [images(2, 32, 32), images(1, 64, 32), images(3, 40, 48)]
    fitted(vae, batches, sample_posterior=False)
    with torch.no_grad():
        latents = torch.cat(
            [vae.encode(batch).latent_dist.mode().transpose(0, 1).flatten(1) for batch in batches], dim=1
        )
    assert latents.mean(1).abs().max() < 1e-3
    assert (latents.std(1, correction=0) - 1).abs().max() < 1e-3


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e6])
def test_a_large_mean_costs_no_precision(offset: float) -> None:
    """Σx² − (Σx)²/n loses all digits at 1e4 in fp32, and four of the std's at 1e6 even in fp64."""
    pixels = [batch.double() for batch in images(64, 16, 16).split(5)]
    wanted = torch.cat(pixels).std((0, 2, 3), correction=0)
    mean, std = fit_latent_statistics(Affine(offset=offset), pixels)
    assert torch.allclose(std.flatten().double(), wanted, rtol=1e-6)
    assert torch.allclose(mean.flatten().double(), torch.cat(pixels).mean((0, 2, 3)) + offset, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("sample_posterior", [False, True])
def test_fitting_again_changes_nothing(sample_posterior: bool) -> None:
    """The second fit sees normalised latents and must still store the statistics of the raw ones."""
    vae = fitted(tiny_psvae(), photographs(), sample_posterior=sample_posterior)
    first = {name: buffer.clone() for name, buffer in vae.latent_spec.state_dict().items()}
    fitted(vae, photographs(), sample_posterior=sample_posterior)
    assert torch.allclose(vae.latent_spec.mean, first["mean"], atol=1e-6)
    assert torch.allclose(vae.latent_spec.std, first["std"], rtol=1e-5)


def test_reconstructions_do_not_depend_on_the_statistics() -> None:
    vae, pixels = tiny_psvae(), images()
    with torch.no_grad():
        before = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
        fitted(vae, photographs())
        after = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
    assert torch.allclose(after, before, atol=1e-4)


def test_the_mode_and_grad_state_of_the_model_are_left_alone() -> None:
    vae = tiny_psvae().train()
    fitted(vae, photographs(4))
    assert vae.training
    assert torch.is_grad_enabled()


def test_constant_channels_are_named_and_keep_std_1() -> None:
    pixels = images(4)
    pixels[:, 1] = 0.25
    vae = Affine()
    with pytest.warns(RangeWarning, match=r"latent channels \[1\] are constant over the data; their std stays 1"):
        mean, std = fit_latent_statistics(vae, [pixels], sample_posterior=False)
    assert std.flatten()[1] == 1
    assert mean.flatten()[1] == 0.25
    assert (vae.encode(pixels).latent_dist.mean[:, 1] == 0).all()


def test_no_batches() -> None:
    vae = tiny_psvae()
    for nothing in ([], iter(()), (batch for batch in [])):
        with pytest.raises(ConfigError, match="batches is empty; wanted at least one image tensor"):
            fit_latent_statistics(vae, nothing)
    assert torch.equal(vae.latent_spec.std, torch.ones(8, 1, 1))


@pytest.mark.bad_input
def test_a_vae_of_diffusers_keeps_no_statistics() -> None:
    theirs: Any = AutoencoderKL(block_out_channels=(32,), norm_num_groups=32)
    with pytest.raises(ConfigError, match=r"vae came as AutoencoderKL, .*with PixelVAE.from_pretrained\(folder\)"):
        fit_latent_statistics(theirs, [images()])


def test_statistics_per_element_refuse_other_sizes_and_keep_what_they_had() -> None:
    vae = tiny_psvae(statistics_grid=(4, 4))
    with pytest.raises(ShapeError, match=r"grid \(4, 6\); the statistics are per element at \(4, 4\)"):
        fit_latent_statistics(vae, [images(), images(2, 32, 48)])
    assert torch.equal(vae.latent_spec.std, torch.ones(8, 4, 4))
