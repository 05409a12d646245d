"""Tiled decoding: equal to the whole where one tile is enough, close to it elsewhere."""

import pytest
import torch

from psvae.decoders import Tiling, decode_tiled
from psvae.errors import ConfigError
from tests.base import assert_close, assert_equal
from tests.tiny import PSVAE_VARIANTS, fill_weights, latents, tiny_psvae


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def model():
    return fill_weights(tiny_psvae())


def nearest(z):
    """A decoder whose tiles agree exactly: every cell becomes a block of 8 x 8 pixels."""
    return z[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)


def tile_sizes(model, z):
    """Grids that the decoder saw, in cells."""
    seen = []
    handle = model.decoder.register_forward_hook(lambda _, inputs, output: seen.append(tuple(inputs[0].shape[-2:])))
    image = model.decode(z).sample
    handle.remove()
    return seen, image


@pytest.mark.parametrize("grid", [(4, 4), (3, 2), (1, 4)])
def test_an_image_within_a_tile_is_decoded_whole(model, grid):
    z = latents(2, *grid)
    wanted = model.decode(z).sample
    model.enable_tiling()
    seen, image = tile_sizes(model, z)
    assert seen == [grid]
    assert_equal([image], [wanted])


@pytest.mark.parametrize("grid", [(8, 8), (4, 9), (11, 3), (5, 7)])
@pytest.mark.parametrize("tiling", [Tiling((4, 4), (3, 3)), Tiling((4, 3), (4, 2)), Tiling((5, 2), (1, 1))])
def test_tiles_that_agree_give_the_whole(grid, tiling):
    """Places, ramps and weights: with a decoder that is local, tiled is untiled."""
    z = latents(2, *grid)
    assert_close([decode_tiled(nearest, z, 8, tiling)], [nearest(z)])


@pytest.mark.parametrize("variant", PSVAE_VARIANTS)
@pytest.mark.parametrize("grid", [(24, 24), (9, 24)])
def test_tiled_is_close_to_whole(variant, grid):
    """Group norms and attention see one tile at a time. White noise and random weights are the worst case:
    images of std 0.5, whose values span more than 5."""
    model = fill_weights(tiny_psvae(variant))
    z = latents(1, *grid, channels=model.config.latent_channels)
    wanted = model.decode(z).sample
    model.enable_tiling(128, 128, 64, 64)
    seen, image = tile_sizes(model, z)
    assert set(seen) == {(min(16, grid[0]), 16)}
    assert image.shape == wanted.shape == (1, 3, 8 * grid[0], 8 * grid[1])
    assert (image - wanted).abs().max() < 1.0
    assert (image - wanted).square().mean().sqrt() < 0.12
    model.disable_tiling()
    assert_equal([model.decode(z).sample], [wanted])


def test_the_four_arguments_are_pixels(model):
    z = latents(1, 12, 12)
    model.enable_tiling(
        tile_sample_min_height=48,
        tile_sample_min_width=32,
        tile_sample_stride_height=24,
        tile_sample_stride_width=16,
    )
    seen, _ = tile_sizes(model, z)
    assert set(seen) == {(6, 4)}
    assert len(seen) == 3 * 5  # starts 0 3 6 by 0 2 4 6 8


def test_defaults_are_sample_size_and_three_quarters(model):
    model.enable_tiling()
    assert model.tiling == Tiling((4, 4), (3, 3))
    model.enable_tiling(tile_sample_min_width=64)
    assert model.tiling == Tiling((4, 8), (3, 6))
    seen, _ = tile_sizes(model, latents(1, 4, 9))
    assert seen == [(4, 8), (4, 8)]  # the last tile ends at the edge


@pytest.mark.parametrize(("tile", "step"), [((32, 32), (40, 32)), ((64, 64), (64, 72))])
def test_gaps_between_tiles_raise(model, tile, step):
    with pytest.raises(ConfigError, match=r"wanted 1 <= step <= tile"):
        model.enable_tiling(*tile, *step)


def test_tiling_and_slicing_together(model):
    z = latents(2, 8, 8)
    model.enable_tiling()
    wanted = model.decode(z).sample
    model.enable_slicing()
    assert_close([model.decode(z).sample], [wanted])


def test_bf16_tiles_keep_their_dtype(model):
    z = latents(1, 8, 8)
    model.enable_tiling()
    wanted = model.decode(z).sample
    image = model.bfloat16().decode(z.bfloat16()).sample
    assert image.dtype == torch.bfloat16
    assert (image.float() - wanted).norm() / wanted.norm() < 0.05
