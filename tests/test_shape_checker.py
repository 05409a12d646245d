"""``pytest --shapes`` does check: an annotation that is broken raises."""

import jaxtyping
import pytest
import torch

from tests.tiny import latents, tiny_decoder, tiny_vae


@pytest.fixture(autouse=True)
def _only_under_the_option(request):
    if not request.config.getoption("--shapes"):
        pytest.skip("only under --shapes")


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_a_missing_axis_is_caught(half):
    with pytest.raises(jaxtyping.TypeCheckError, match=r"Semantic(Down|Up)Projection"):
        getattr(tiny_vae(), half)(torch.zeros(1, 48, 4))


def test_integers_are_caught():
    with pytest.raises(jaxtyping.TypeCheckError, match="PixelDecoder"):
        tiny_decoder()(latents().long())


def test_two_arguments_that_disagree_are_caught():
    from psvae.losses import semantic_loss

    with pytest.raises(jaxtyping.TypeCheckError, match="semantic_loss"):
        semantic_loss(torch.zeros(2, 48, 4, 4), torch.zeros(2, 48, 4, 1))
