"""PixelVAE: the face that keeps AutoencoderKL's meaning."""

import pytest
import torch

from psvae import PixelVAE, PixelVAEConfig, fit_latent_statistics
from psvae.encoders import PixelEncoder, PixelEncoderConfig
from psvae.errors import ConfigError, ShapeError
from tests.base import ModuleTests, assert_close, assert_equal
from tests.tiny import fill_weights, images, tiny_pixel_vae, tiny_pixel_vae_config


class TestPixelEncoder(ModuleTests):
    module_class = PixelEncoder
    config = tiny_pixel_vae_config().encoder
    good_sizes = ((32, 32), (24, 40))
    bad_sizes = ((33, 32), (32, 36))
    repr_contains = ("Z=8", "stride=8")
    presets = (("pixel_encoder_sd", PixelEncoderConfig()),)

    def inputs(self, height, width):
        return (images(2, height, width),)

    def expected_shapes(self, height, width):
        return [(2, 16, height // 8, width // 8)]


class TestPixelVAE(ModuleTests):
    module_class = PixelVAE
    config = tiny_pixel_vae_config()
    good_sizes = ((32, 32), (24, 40))
    bad_sizes = ((33, 32), (32, 36))
    repr_contains = ("Z=8", "stride=8", "applied by caller")
    presets = (
        ("pixel_vae_sd", PixelVAEConfig()),
        ("pixel_vae_sd3", PixelVAEConfig.sd3()),
        ("pixel_vae_flux", PixelVAEConfig.flux()),
        ("pixel_vae_va_vae", PixelVAEConfig.ldm(32)),
    )

    def inputs(self, height, width):
        return (images(2, height, width),)

    def expected_shapes(self, height, width):
        cells = (height // 8, width // 8)
        return [(2, 3, height, width), (2, 8, *cells), (2, 16, *cells)]


def filled(**fields):
    return fill_weights(tiny_pixel_vae(**fields))


@torch.no_grad()
def test_encode_and_decode():
    vae, x = filled(), images(2, 24, 40)
    encoded = vae.encode(x)
    posterior = encoded.latent_dist
    assert encoded[0] is encoded["latent_dist"] is posterior
    assert posterior.mean.shape == (2, 8, 3, 5)
    output = vae(x)
    assert_equal([output.latents, output.posterior.std], [posterior.mode(), posterior.std])
    decoded = vae.decode(posterior.mode(), generator=torch.Generator())
    assert_equal([decoded.sample, decoded[0], *vae.decode(posterior.mode(), return_dict=False)], [output.sample] * 3)
    assert_equal([vae(x, return_dict=False)[0]], [output.sample])
    assert not vae(x, sample_posterior=True).latents.equal(output.latents)


@torch.no_grad()
def test_statistics_are_the_callers_to_apply():
    vae, x = filled(), images()
    before = vae.encode(x).latent_dist.mode()
    vae.latent_spec.mean.fill_(2.0)
    vae.latent_spec.std.fill_(3.0)
    assert_equal([vae.encode(x).latent_dist.mode()], [before])
    assert_close([vae.latent_spec.normalize(before)], [(before - 2.0) / 3.0])


@torch.no_grad()
def test_fitting_statistics_twice_gives_the_same():
    """Encode never applies them, so a second fit must not undo the first."""
    vae, x = filled(), images(4)
    first = [t.clone() for t in fit_latent_statistics(vae, [x], sample_posterior=False)]
    assert_close(fit_latent_statistics(vae, [x], sample_posterior=False), first)
    latents = vae.encode(x).latent_dist.mode()
    assert_close([first[0]], [latents.mean((0, 2, 3), keepdim=True)[0]])


@torch.no_grad()
def test_slicing_and_tiling():
    vae, x = filled(), images(3)
    whole = vae.encode(x).latent_dist.parameters
    latents = vae.encode(x).latent_dist.mode()
    painted = vae.decode(latents).sample
    vae.enable_slicing()
    assert_close([vae.encode(x).latent_dist.parameters, vae.decode(latents).sample], [whole, painted])
    vae.disable_slicing()
    vae.enable_tiling(16, 16, 8, 8)
    assert not vae.decode(latents).sample.equal(painted)
    vae.disable_tiling()
    assert_equal([vae.decode(latents).sample], [painted])


@torch.no_grad()
def test_tiled_encode_equals_the_whole_where_the_encoder_is_local():
    """Places and ramps: an encoder that sees one cell at a time gives the same latents by tiles."""

    class Cells(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.pixel_unshuffle(x, 8)[:, :16]

    vae, x = filled(), images(2, 96, 136)
    vae.encoder = Cells()
    whole = vae.encode(x).latent_dist.parameters
    vae.enable_tiling(48, 32, 24, 16)
    assert_close([vae.encode(x).latent_dist.parameters], [whole])


@torch.no_grad()
def test_tiled_encode_is_close_to_whole():
    """Group norms and attention see one tile at a time; white noise and random weights are the worst case."""
    vae, x, seen = filled(), images(1, 192, 136), []
    vae.encoder.register_forward_hook(lambda module, inputs, output: seen.append(tuple(inputs[0].shape[-2:])))
    whole = vae.encode(x).latent_dist.mode()
    vae.enable_tiling(128, 128, 64, 64)
    seen.clear()
    tiled = vae.encode(x).latent_dist.mode()
    assert seen == [(128, 128)] * 4
    assert tiled.shape == whole.shape
    assert 0 < (tiled - whole).abs().max() < 0.5  # of latents with std 0.6
    assert (tiled - whole).square().mean().sqrt() < 0.1
    vae.enable_slicing()
    assert_close([vae.encode(x).latent_dist.mode()], [tiled])
    assert_equal([vae.encode(x[..., :128, :128]).latent_dist.mode()], [filled().encode(x[..., :128, :128])[0].mode()])
    with pytest.raises(ShapeError, match="images are 192 x 132; wanted multiples of the stride 8"):
        vae.encode(x[..., :132])


@torch.no_grad()
def test_tiling_by_its_flag_alone():
    """diffusers' scripts also write ``vae.use_tiling = True``."""
    vae, z = filled(), torch.zeros(1, 8, 8, 8)
    whole = vae.decode(z).sample
    vae.use_tiling = True
    assert not vae.decode(z).sample.equal(whole)


def test_sd_style_config():
    config = PixelVAEConfig()
    assert (config.scaling_factor, config.shift_factor, config.force_upcast) == (0.18215, None, True)
    assert config.block_out_channels == (128, 256, 512, 512)
    assert (config.latent_channels, config.spatial_compression_ratio) == (4, 8)
    assert 2 ** (len(PixelVAEConfig.ldm(32).block_out_channels) - 1) == 16
    assert (PixelVAEConfig.flux().scaling_factor, PixelVAEConfig.flux().shift_factor) == (0.3611, 0.1159)


def test_contradictions():
    encoder = tiny_pixel_vae_config().encoder
    with pytest.raises(ConfigError, match="encoder has stride 4 and the decoder 8; wanted the same"):
        tiny_pixel_vae_config(encoder=encoder.replace(channel_multipliers=(1, 1, 2)))
    with pytest.raises(ConfigError, match="encoder has latent_channels 4 and the decoder 8"):
        tiny_pixel_vae_config(encoder=encoder.replace(latent_channels=4))
    with pytest.raises(ConfigError, match=r"latents_mean is \(0.0,\); wanted None or 8 numbers"):
        tiny_pixel_vae_config(latents_mean=(0.0,))


@pytest.mark.bad_input
def test_bad_images():
    with pytest.raises(ShapeError, match="wanted multiples of the stride 8, nearest 32 x 32"):
        filled().encode(images(1, 33, 32))
