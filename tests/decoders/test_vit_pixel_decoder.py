"""ViTPixelDecoder: RAE's decoder, against diffusers' port of it."""

import pytest
import torch

from psvae import ViTPixelDecoder, ViTPixelDecoderConfig
from psvae.errors import ConfigError, ShapeError
from psvae.nn.positions import sincos_positions
from tests.base import ModuleTests, assert_close
from tests.tiny import fill_weights, latents

TINY = ViTPixelDecoderConfig(8, width=24, depth=2, num_heads=3, mlp_dim=40, patch_size=8, grid=(4, 4))


class TestViTPixelDecoder(ModuleTests):
    module_class = ViTPixelDecoder
    config = TINY
    good_sizes = ((4, 4), (4, 4))
    repr_contains = ("Z=8", "grid=(4, 4)", "stride=8")
    presets = (
        ("vit_pixel_decoder_base", ViTPixelDecoderConfig.base()),
        ("vit_pixel_decoder_large", ViTPixelDecoderConfig.large()),
        ("vit_pixel_decoder_xlarge", ViTPixelDecoderConfig.xlarge()),
    )

    def inputs(self, height, width):
        return (latents(2, height, width),)

    def expected_shapes(self, height, width):
        return [(2, 3, 8 * height, 8 * width)]


@pytest.mark.parametrize("grid", [4, 16])
def test_equals_diffusers_rae_decoder(grid):
    """At grid 16 with diffusers' own table; elsewhere that table is rescaled, so ours is put in its place."""
    rae = pytest.importorskip("diffusers.models.autoencoders.autoencoder_rae", reason="comes with psvae[dev]")
    reference = fill_weights(
        rae.RAEDecoder(
            hidden_size=8, decoder_hidden_size=24, decoder_num_hidden_layers=2, decoder_num_attention_heads=3,
            decoder_intermediate_size=40, num_patches=grid**2, patch_size=8, image_size=8 * grid,
        )
    ).eval()  # fmt: skip
    decoder = ViTPixelDecoder(TINY.replace(grid=(grid, grid), output_mean=(0.5,) * 3, output_std=(0.5,) * 3)).eval()
    if grid != 16:
        reference.decoder_pos_embed.copy_(decoder.positions)
    assert_close([decoder.positions], [reference.decoder_pos_embed])
    theirs = reference.state_dict()
    ours = {
        "embed": "decoder_embed", "norm": "decoder_norm", "predict": "decoder_pred",
    }  # fmt: skip
    state = {f"{a}.{leaf}": theirs[f"{b}.{leaf}"] for a, b in ours.items() for leaf in ("weight", "bias")}
    state |= {"token": theirs["trainable_cls_token"], "positions": decoder.positions}
    names = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.to_out.0",
             "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}  # fmt: skip
    for i in range(2):
        for leaf in ("weight", "bias"):
            for a, b in names.items():
                state[f"blocks.{i}.{a}.{leaf}"] = theirs[f"decoder_layers.{i}.{b}.{leaf}"]
            state[f"blocks.{i}.attn.qkv.{leaf}"] = torch.cat(
                [theirs[f"decoder_layers.{i}.attention.to_{part}.{leaf}"] for part in "qkv"]
            )
    decoder.load_state_dict(state, strict=True)
    z = latents(2, grid, grid)
    with torch.no_grad():
        wanted = reference.unpatchify(reference(z.flatten(2).mT, drop_cls_token=False).logits)
        got = decoder(z)
    assert wanted.std() > 0.1
    assert_close([got], [wanted])  # mean and std of 0.5 make [-1, 1] of [0, 1]'s normalised form


def test_the_table_has_the_columns_half_first():
    table = sincos_positions(8, (2, 3))
    assert table.shape == (1, 7, 8)
    assert not table[0, 0].any()
    assert_close([table[0, 2, 0]], [torch.tensor(1.0).sin()])  # second token: column 1, row 0
    assert_close([table[0, 4, 4]], [torch.tensor(1.0).sin()])  # fourth token: column 0, row 1


def test_the_output_is_in_image_range():
    """A decoder that paints the mean paints the encoder's mean colour."""
    decoder = ViTPixelDecoder(TINY)
    torch.nn.init.zeros_(decoder.predict.weight)
    wanted = torch.tensor(TINY.output_mean) * 2 - 1
    with torch.no_grad():
        assert_close([decoder(latents())[1, :, 5, 7]], [wanted])


def test_a_files_own_table_is_kept(tmp_path):
    decoder = ViTPixelDecoder(TINY)
    decoder.positions.fill_(0.25)
    decoder.save_pretrained(tmp_path)
    assert ViTPixelDecoder.from_pretrained(tmp_path).positions.eq(0.25).all()


@pytest.mark.bad_input
def test_another_grid_is_refused():
    with pytest.raises(ShapeError, match=r"grid \(4, 5\); this decoder paints \(4, 4\) alone.* images of 32 x 32"):
        ViTPixelDecoder(TINY)(latents(1, 4, 5))


def test_faulty_configs():
    with pytest.raises(ConfigError, match="width is 26; wanted a multiple of 4 and of num_heads 3"):
        TINY.replace(width=26)
