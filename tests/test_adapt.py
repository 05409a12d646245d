"""A generator fitted to another latent: new first and last layers, the rest as it was."""

from types import SimpleNamespace

import pytest
import torch
from timm.layers.patch_embed import PatchEmbed
from torch import nn

from psvae.adapt import latent_shape, resize_latent_io
from psvae.errors import ConfigError, DtypeError, ShapeError
from tests.base import assert_close, assert_equal
from tests.tiny import tiny_pixel_vae, tiny_psvae

diffusers = pytest.importorskip("diffusers", reason="diffusers comes with psvae[dev]")


class PlainDiT(nn.Module):
    """The names and calls of DiT, SiT and LightningDiT, one layer deep."""

    def __init__(self, input_size=8, patch_size=2, in_channels=4, width=16, learn_sigma=True):
        super().__init__()
        self.in_channels, self.patch_size = in_channels, patch_size
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.x_embedder.num_patches, width), requires_grad=False)
        self.blocks = nn.ModuleList([nn.Linear(width, width)])
        self.final_layer = nn.Module()
        self.final_layer.linear = nn.Linear(width, patch_size**2 * self.out_channels)

    def forward(self, x):
        tokens = self.final_layer.linear(self.blocks[0](self.x_embedder(x) + self.pos_embed))
        side, p, c = int(tokens.shape[1] ** 0.5), self.patch_size, self.out_channels
        tokens = tokens.reshape(x.shape[0], side, side, p, p, c)
        return torch.einsum("nhwpqc->nchpwq", tokens).reshape(x.shape[0], c, side * p, side * p)


def dit():
    return diffusers.DiTTransformer2DModel(
        sample_size=8, in_channels=4, out_channels=8, num_layers=1, patch_size=2, attention_head_dim=4,
        num_attention_heads=2, num_embeds_ada_norm=10,
    )  # fmt: skip


def sd3():
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=16, pooled_projection_dim=8,
        pos_embed_max_size=8,
    )  # fmt: skip


def flux():
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def dc_config():
    """Of AutoencoderDC: no stride, and the levels of the encoder alone."""
    return SimpleNamespace(latent_channels=32, encoder_block_out_channels=(128, 256, 512, 512, 1024, 1024))


def call(model, x):
    """The output for latents ``x``, whatever else the model reads."""
    batch, step = x.shape[0], torch.zeros(x.shape[0])
    if isinstance(model, PlainDiT):
        return model(x)
    if isinstance(model, diffusers.DiTTransformer2DModel):
        return model(x, step.long(), class_labels=torch.zeros(batch, dtype=torch.long)).sample
    text, pooled = torch.zeros(batch, 3, 8), torch.zeros(batch, 8)
    if isinstance(model, diffusers.SD3Transformer2DModel):
        return model(x, text, pooled, step).sample
    side = x.shape[-1] // 2
    packed = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(batch, side * side, -1)
    ids = torch.zeros(side * side, 3)
    return model(packed, text, pooled, step, ids, torch.zeros(3, 3)).sample


MODELS = {"plain": PlainDiT, "plain_without_sigma": lambda: PlainDiT(learn_sigma=False), "dit": dit, "sd3": sd3}
NEW = ("x_embedder", "pos_embed.proj", "final_layer.linear", "proj_out")


@pytest.mark.parametrize("name", [*MODELS, "flux"])
def test_new_layers_fit_and_the_rest_stays(name):
    torch.manual_seed(0)
    model = {**MODELS, "flux": flux}[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    patch, side = (2, 8) if name == "flux" else (1, 4)
    assert resize_latent_io(model, 96, patch) is model
    after = model.state_dict()
    assert after.keys() == before.keys()
    changed = [key for key in after if after[key].shape != before[key].shape]
    kept = [key for key in after if not key.startswith(NEW)]
    assert changed
    assert all(key.startswith(NEW) for key in changed)
    assert_equal([after[key] for key in kept], [before[key] for key in kept])
    x = torch.randn(2, 96, side, side)
    y = call(model.eval(), x)
    times = 2 if name in ("plain", "dit") else 1
    wanted = (2, 16, 384) if name == "flux" else (2, times * 96, 4, 4)
    assert y.shape == wanted
    assert not y.any()  # the output starts at zero, as DiT's
    y.sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for key, p in model.named_parameters() if "proj_out" in key
               or "final_layer" in key)  # fmt: skip


@pytest.mark.parametrize("build", [dit, sd3, flux])
def test_diffusers_models_save_and_reload(build, tmp_path):
    model = resize_latent_io(build(), 96, 2 if build is flux else 1)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert_equal(again.state_dict().values(), model.state_dict().values())
    assert again.config.in_channels == (384 if build is flux else 96)
    if build is not flux:
        assert (again.config.patch_size, again.config.sample_size) == (1, 4)  # the grid of tokens is as it was


@torch.no_grad()
def test_pixart_at_1024_px_reloads_with_its_positions(tmp_path):
    """diffusers draws the scale of its position table, and a module, from the sample size, which changes here."""
    model = diffusers.PixArtTransformer2DModel(
        sample_size=128, patch_size=2, in_channels=4, out_channels=8, num_layers=1, attention_head_dim=6,
        num_attention_heads=2, cross_attention_dim=12, caption_channels=8,
    ).eval()  # fmt: skip
    resize_latent_io(model, 96, 1)
    nn.init.normal_(model.proj_out.weight)
    model.save_pretrained(tmp_path)
    again = diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path)
    inputs = {
        "encoder_hidden_states": torch.ones(1, 3, 8), "timestep": torch.ones(1), "return_dict": False,
        "encoder_attention_mask": torch.ones(1, 3),
        "added_cond_kwargs": {"resolution": torch.full((1, 2), 1024.0), "aspect_ratio": torch.ones(1, 1)},
    }  # fmt: skip
    x = torch.randn(1, 96, 64, 64)
    assert_close([again(x, **inputs)[0]], [model(x, **inputs)[0]], tolerance=1e-4)


def test_models_that_read_more_than_the_latent_are_refused():
    fields = {"num_layers": 1, "joint_attention_dim": 8, "pooled_projection_dim": 8, "num_attention_heads": 2}
    inpainting = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=33, out_channels=16, attention_head_dim=8, caption_projection_dim=16,
        pos_embed_max_size=8, **fields,
    )  # fmt: skip
    fill = diffusers.FluxTransformer2DModel(
        in_channels=96, out_channels=16, num_single_layers=1, attention_head_dim=16, axes_dims_rope=(4, 4, 8), **fields
    )
    for model, said in ((inpainting, "takes 33 channels and gives 16"), (fill, "takes 96 channels and gives 16")):
        before = [value.clone() for value in model.state_dict().values()]
        with pytest.raises(ConfigError, match=f"{said}: it reads more than the latent"):
            resize_latent_io(model, 96, 1)
        assert_equal(model.state_dict().values(), before)


@pytest.mark.parametrize("name", [*MODELS, "flux"])
def test_the_patch_size_stays_unless_given(name):
    model = resize_latent_io({**MODELS, "flux": flux}[name](), 96)
    y = call(model.eval(), torch.randn(2, 96, 8, 8))
    times = 2 if name in ("plain", "dit") else 1
    assert y.shape == ((2, 16, 384) if name == "flux" else (2, times * 96, 8, 8))


@pytest.mark.parametrize("patch", [1, 3])
def test_odd_patches(patch):
    model = resize_latent_io(PlainDiT(input_size=9, patch_size=3), 7, patch)
    assert model(torch.randn(1, 7, 3 * patch, 3 * patch)).shape == (1, 14, 3 * patch, 3 * patch)


def test_dtype_stays():
    model = resize_latent_io(PlainDiT().bfloat16(), 96, 1)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_unknown_models_and_numbers():
    with pytest.raises(ConfigError, match="Linear has no layers that psvae knows; wanted an x_embedder"):
        resize_latent_io(nn.Linear(2, 2), 96, 1)
    with pytest.raises(ConfigError, match="patch_size came as 0; wanted an int of at least 1, or None"):
        resize_latent_io(PlainDiT(), 96, 0)


@pytest.mark.bad_input
@pytest.mark.parametrize(("channels", "patch", "said"), [
    ("96", 1, "channels came as '96'; wanted an int of at least 1, such as vae.config.latent_channels"),
    ((96, 16, 16), None, r"channels came as \(96, 16, 16\)"),
    (96, 1.0, "patch_size came as 1.0; wanted an int of at least 1, or None to keep the model's own"),
])  # fmt: skip
def test_numbers_of_another_type(channels, patch, said):
    model = PlainDiT()
    before = model.x_embedder.proj
    with pytest.raises(ConfigError, match=said):
        resize_latent_io(model, channels, patch)
    assert model.x_embedder.proj is before


def test_latent_shape():
    assert latent_shape(tiny_psvae(), 32) == (8, 4, 4)
    assert latent_shape(tiny_pixel_vae(), (32, 48)) == (8, 4, 6)
    kl = diffusers.AutoencoderKL(block_out_channels=(32, 32, 32), down_block_types=("DownEncoderBlock2D",) * 3,
                                 up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1)  # fmt: skip
    assert latent_shape(kl, 64) == (4, 16, 16)
    assert latent_shape(SimpleNamespace(config=dc_config()), 64) == (32, 2, 2)
    with pytest.raises(ShapeError, match="an image side is 36; wanted a multiple of the stride 8, nearest 32"):
        latent_shape(tiny_psvae(), (32, 36))
    assert latent_shape(tiny_psvae(), torch.zeros(2, 3, 32, 48).shape[-2:]) == (8, 4, 6)
    with pytest.raises(ShapeError, match=r"came as \(2, 3, 32, 48\); wanted one side .* pass images.shape\[-2:\]"):
        latent_shape(tiny_psvae(), torch.zeros(2, 3, 32, 48).shape)
    with pytest.raises(ConfigError, match="the configuration of Linear has no latent_channels"):
        latent_shape(nn.Linear(1, 1), 64)
    with pytest.raises(ConfigError, match="has no latent_channels"):
        latent_shape(diffusers.UNet2DModel(block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2,
                                           up_block_types=("UpBlock2D",) * 2, layers_per_block=1), 64)  # fmt: skip


@pytest.mark.bad_input
@pytest.mark.parametrize(("size", "said"), [
    (256.0, "came as 256.0; wanted pixels as one int"), ("256", "came as '256'"), ((256, 1.5), r"came as \(256, 1.5\)"),
    (torch.zeros(1, 3, 8, 8), "came as a tensor; wanted pixels as one int or"), (None, "came as None"),
])  # fmt: skip
def test_latent_shape_of_no_size(size, said):
    with pytest.raises(DtypeError, match=said):
        latent_shape(tiny_psvae(), size)
