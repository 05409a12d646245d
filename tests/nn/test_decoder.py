"""The language model's block, and rotary positions, where the comparisons with transformers do not look."""

import pytest
import torch

from psvae.errors import ConfigError
from psvae.nn.decoder import DecoderBlock, RMSNorm
from psvae.nn.rope import RopeScaling, grid_positions, rope, rotate
from tests.base import assert_close
from tests.tiny import build, fill_weights


class TinyBlock(DecoderBlock):
    def __init__(self, config):
        super().__init__(48, 4, 2, 12, 64, bias=True, qk_norm=True, norm_eps=1e-6, **config)


def turns(start, count):
    positions = torch.arange(start, start + count).expand(2, -1)
    return rope(positions[..., None].expand(-1, -1, 3), 12, 10000.0, "1d")


def tokens(count):
    return torch.randn(2, count, 48, generator=torch.Generator().manual_seed(0))


def past(count=0):
    return torch.zeros(2, 2, count, 12), torch.zeros(2, 2, count, 12)


def test_a_text_in_two_parts_is_one_text():
    """The second sees the first by its keys and values."""
    block, x = fill_weights(build(TinyBlock, {})), tokens(7)
    with torch.no_grad():
        whole, (keys, values) = block(x, turns(0, 7), past(), None, causal=True)
        first, seen = block(x[:, :4], turns(0, 4), past(), None, causal=True)
        second, own = block(x[:, 4:], turns(4, 3), seen, None, causal=True)
        full, _ = block(x, turns(0, 7), past(), None)
    assert_close([torch.cat([first, second], dim=1)], [whole])
    assert_close([torch.cat(pair, dim=2) for pair in zip(seen, own, strict=True)], [keys, values])
    assert_close([full[:, -1]], [whole[:, -1]])  # the last word sees all either way
    assert (full - whole)[:, 0].abs().max() > 1e-3


def test_only_the_distance_counts():
    """Rotary positions moved together leave the tokens as they are."""
    block, x = fill_weights(build(TinyBlock, {})), tokens(5)
    with torch.no_grad():
        near, _ = block(x, turns(0, 5), past(), None)
        far, _ = block(x, turns(100, 5), past(), None)
    assert_close([far], [near], 1e-4)


def test_norm_computes_in_fp32():
    """Squares overflow fp16 and round in bf16; the result has the input's dtype, under autocast too."""
    norm = RMSNorm(64, 1e-6)
    x = 300 * torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float16, torch.bfloat16):
        low = x.to(dtype)
        wanted = norm(low.float()).to(dtype)
        assert norm(low).dtype == dtype
        torch.testing.assert_close(norm(low), wanted, rtol=torch.finfo(dtype).eps, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x.bfloat16()).dtype == torch.bfloat16
        assert norm(x).dtype == torch.float32


def test_rotation_computes_in_fp32():
    x = torch.randn(2, 3, 5, 12, generator=torch.Generator().manual_seed(0)).bfloat16()
    got = rotate(x, turns(1000, 5))
    assert got.dtype == torch.bfloat16
    assert got.equal(rotate(x.float(), turns(1000, 5)).bfloat16())
    assert all(table.dtype == torch.float32 for table in turns(0, 2))


@pytest.mark.parametrize(
    ("image_rope", "places", "after"),
    [
        ("shared_index", [(5, 5, 5)] * 6, 6),
        ("1d", [(n, n, n) for n in range(5, 11)], 11),
        ("2d", [(5, 5 + row, 5 + column) for row in range(2) for column in range(3)], 8),
        ("mrope", [(5, 5 + row, 5 + column) for row in range(2) for column in range(3)], 8),
    ],
)
def test_places_of_a_picture(image_rope, places, after):
    """Two rows of three, behind 5 and behind 0 other tokens."""
    positions, free = grid_positions(torch.tensor([5, 0]), (2, 3), image_rope)
    assert positions[0].tolist() == [list(place) for place in places]
    assert positions[1].tolist() == [[axis - 5 for axis in place] for place in places]
    assert free.tolist() == [after, after - 5]


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"factor": 0.5}, "factor is 0.5; wanted at least 1"),
        ({"low_freq_factor": 4.0}, "low_freq_factor is 4.0; wanted below high_freq_factor"),
        ({"low_freq_factor": 0.0}, "low_freq_factor is 0.0; wanted below high_freq_factor"),
    ],
)
def test_scaling_that_cannot_be(fields, says):
    with pytest.raises(ConfigError, match=f"RopeScaling.{says}"):
        RopeScaling(**fields)
