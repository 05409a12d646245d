"""PSVAE behind the face of a Stable-Diffusion-style VAE: what callers of AutoencoderKL do and read."""

import pytest
import torch

from psvae import PSVAEConfig, fit_latent_statistics
from tests.base import assert_close, assert_equal
from tests.tiny import PSVAE_VARIANTS, fill_weights, images, latents, tiny_psvae, tiny_psvae_config

VARIANTS = pytest.mark.parametrize("variant", PSVAE_VARIANTS)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def model_of(variant="psvae", **fields):
    """Filled weights, and latent statistics that are not 0 and 1."""
    model = fill_weights(tiny_psvae(variant, **fields))
    index = torch.arange(model.latent_spec.mean.numel(), dtype=torch.float32).view_as(model.latent_spec.mean)
    model.latent_spec.mean.copy_(0.3 * index.cos())
    model.latent_spec.std.copy_(1.0 + 0.5 * index.sin())
    return model


@VARIANTS
def test_encode_and_decode(variant):
    model, x = model_of(variant), images(2, 24, 40)
    channels = model.config.latent_channels
    encoded = model.encode(x)
    posterior = encoded.latent_dist
    assert posterior.mean.shape == (2, channels, 3, 5)
    decoded = model.decode(posterior.mode())
    assert decoded.sample.shape == x.shape
    # the three ways in which callers read an output
    assert encoded[0] is encoded["latent_dist"] is posterior
    assert model.encode(x, return_dict=False)[0].mean.equal(posterior.mean)
    assert decoded[0] is decoded["sample"] is decoded.sample
    (sample,) = model.decode(posterior.mode(), return_dict=False)
    assert_equal([sample], [decoded.sample])
    assert_equal([model.decode(posterior.mode(), generator=torch.Generator()).sample], [sample])


@VARIANTS
def test_decode_of_encode_is_the_forward_pass(variant):
    """The statistics cancel: `encode` applies them and `decode` undoes them."""
    model, x = model_of(variant), images()
    assert_close([model.decode(model.encode(x).latent_dist.mode()).sample], [model(x).sample])


@VARIANTS
def test_latents_are_normalised_raw_ones(variant):
    model, x = model_of(variant), images()
    output, posterior = model(x), model.encode(x).latent_dist
    mean, std = model.latent_spec.mean, model.latent_spec.std
    assert_close([posterior.mode()], [(output.latents - mean) / std])
    assert_close([posterior.std], [output.posterior.std / std])


def test_sd_style_call_site():
    """As written in training scripts for AutoencoderKL, scaling included."""
    vae, x = model_of(), images()
    z = vae.encode(x).latent_dist.sample(torch.Generator().manual_seed(0))
    z = (z - vae.config.shift_factor) * vae.config.scaling_factor
    image = vae.decode(z / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
    assert image.shape == x.shape
    assert 2 ** (len(vae.config.block_out_channels) - 1) == 8


@pytest.mark.parametrize("config", [tiny_psvae_config(), PSVAEConfig(), PSVAEConfig.siglip2_so400m()], ids=str)
def test_config_fields_that_callers_read(config):
    stride = config.encoder.stride
    assert 2 ** (len(config.block_out_channels) - 1) == config.spatial_compression_ratio == stride
    assert config.encoder_block_out_channels == config.block_out_channels
    assert config.latent_channels == config.vae.latent_channels
    assert (config.in_channels, config.out_channels) == (3, 3)
    assert (config.scaling_factor, config.shift_factor, config.force_upcast) == (1.0, 0.0, False)
    assert (config.latents_mean, config.latents_std) == (None, None)
    assert config.sample_size % stride == 0


@VARIANTS
def test_forward_takes_what_autoencoder_kl_takes(variant):
    model, x = model_of(variant), images()
    mean = model(x)
    assert_equal([model(sample=x, sample_posterior=False, return_dict=False)[0], mean["sample"]], [mean[0], mean[0]])
    drawn = [
        model(x, sample_posterior=True, generator=torch.Generator().manual_seed(seed)).latents for seed in (0, 0, 1)
    ]
    assert_equal(drawn[:1], drawn[1:2])
    random = variant != "rae"  # without a SemanticVAE there is no noise to draw
    assert (not drawn[0].equal(drawn[2])) is random
    assert (not drawn[0].equal(mean.latents)) is random
    # one generator per item: an item's noise does not depend on its neighbours
    both = model(x, sample_posterior=True, generator=[torch.Generator().manual_seed(s) for s in (3, 4)])
    second = model(x[1:], sample_posterior=True, generator=[torch.Generator().manual_seed(4)])
    assert_close([second.latents], [both.latents[1:]])


def test_sample_leaves_the_posterior_alone():
    posterior = model_of().encode(images()).latent_dist
    before = posterior.mean.clone()
    posterior.sample().add_(1.0)
    assert_equal([posterior.mean], [before])


@VARIANTS
def test_output_has_what_losses_need(variant):
    model, x = model_of(variant), images()
    output = model(x)
    assert_equal([model.features(x)], [output.features])
    if variant == "rae":
        assert output.rebuilt_features is None
        assert output.parameters is None
        assert output.latents is output.features
        assert output.posterior.kl().abs().max() == 0
    else:
        assert_equal([output.posterior.mean, model.vae.encoder(output.features)], [output.latents, output.parameters])
        assert_equal([model.vae.decode(output.latents)], [output.rebuilt_features])
        assert_close([model.decode_features(model.encode(x).latent_dist.mode())], [output.rebuilt_features])


def test_detached_latents_stop_the_pixel_gradient():
    model, x = model_of(), images()
    with torch.enable_grad():
        model(x, detach_latents=True).sample.mean().backward()
    reached = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == {"decoder"}


def test_decoder_on_features_reads_the_rebuilt_features():
    model, x = model_of("features"), images()
    output = model(x)
    assert_equal([output.sample], [model.decoder(output.rebuilt_features)])


@VARIANTS
def test_fitted_latents_are_standard(variant):
    model = model_of(variant)
    data = [images(4, seed=seed) for seed in range(4)]
    fit_latent_statistics(model, data, sample_posterior=False)
    z = torch.cat([model.encode(x).latent_dist.mode() for x in data])
    assert z.mean((0, 2, 3)).abs().max() < 0.01
    assert (z.std((0, 2, 3)) - 1.0).abs().max() < 0.01


@VARIANTS
def test_slicing_equals_the_whole_batch(variant):
    model, x = model_of(variant), images(3, 24, 40)
    whole = model.encode(x).latent_dist
    image = model.decode(whole.mode()).sample
    batches = []
    for half in (model.encoder, model.decoder):
        half.register_forward_hook(lambda module, inputs, output: batches.append(len(output)))
    model.enable_slicing()
    sliced = model.encode(x).latent_dist
    assert_close([sliced.mean, sliced.std, model.decode(whole.mode()).sample], [whole.mean, whole.std, image])
    model.disable_slicing()
    model.decode(whole.mode())
    assert batches == [1, 1, 1, 1, 1, 1, 3]


@VARIANTS
def test_dtype_and_device_are_the_weights(variant):
    model = model_of(variant)
    assert (model.dtype, model.device) == (torch.float32, torch.device("cpu"))
    half = model.bfloat16()
    assert half.dtype == torch.bfloat16
    assert half.encode(images().bfloat16()).latent_dist.sample().dtype == torch.bfloat16


@VARIANTS
def test_hooks_fire_on_every_half(variant):
    """encode and decode call sub-modules by ``()``: what FSDP, offloading and compile in place rely on."""
    model, fired = model_of(variant), []
    halves = {"encoder": model.encoder, "decoder": model.decoder}
    if model.vae is not None:
        halves |= {"vae.encoder": model.vae.encoder, "vae.decoder": model.vae.decoder}
    for name, half in halves.items():
        half.register_forward_hook(lambda *_, name=name: fired.append(name))
    z = model.encode(images()).latent_dist.mode()
    assert fired == (["encoder"] if variant == "rae" else ["encoder", "vae.encoder"])
    fired.clear()
    model.decode(z)
    assert fired == (["vae.decoder", "decoder"] if variant == "features" else ["decoder"])
    fired.clear()
    model(images())
    assert sorted(fired) == sorted(halves)
    fired.clear()
    model.decode_features(z)
    assert fired == ([] if variant == "rae" else ["vae.decoder"])


@pytest.mark.compile
def test_compiling_a_half_in_place_keeps_the_keys():
    torch.compiler.reset()
    model, z = model_of(), latents()
    keys, wanted = list(model.state_dict()), model.decode(z).sample
    model.decoder.compile(backend="eager", fullgraph=True)
    model.encoder.compile(backend="eager", fullgraph=True)
    assert_close([model.decode(z).sample], [wanted])
    assert model.encode(images()).latent_dist.mean.isfinite().all()
    assert list(model.state_dict()) == keys
