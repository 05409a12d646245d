"""SemanticEncoder against timm's own model: same weights, same preprocessed input, same numbers.

The families are timm's real names, shrunk by ``model_args``; every weight, norms included, has a value that
matters (`fill_weights`).
"""

from functools import cache

import pytest
import timm
import torch
from torch.nn import functional as F

from psvae import SemanticEncoder, SemanticEncoderConfig
from tests.base import assert_close, assert_equal, assert_same_state
from tests.tiny import fill_weights, images

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3}
FAMILIES = {
    "dinov2_reg": ("vit_small_patch14_reg4_dinov2.lvd142m", {"img_size": 56}),
    "dinov2": ("vit_small_patch14_dinov2.lvd142m", {"img_size": 56}),
    "dinov2_giant": ("vit_giant_patch14_reg4_dinov2.lvd142m", {"img_size": 56}),  # its MLP is a SwiGLU
    "siglip2": ("vit_so400m_patch14_siglip_224.v2_webli", {"img_size": 56, "act_layer": "gelu_tanh"}),
    "mae": ("vit_base_patch16_224.mae", {"img_size": 64}),
    "dinov3": ("vit_small_patch16_dinov3.lvd1689m", {"img_size": 64}),  # rotary positions
}
LEARNED_POSITIONS = [family for family in FAMILIES if family != "dinov3"]
GRIDS = [(4, 4), (6, 6), (3, 5), (7, 2)]  # the first is native


def family_config(family, **fields):
    name, model_args = FAMILIES[family]
    return SemanticEncoderConfig(**{"name": name, "model_args": {**SMALL, **model_args}, "stride": 16, **fields})


@cache
def timm_model(family):
    """As a user of timm would build it: its own head, pooling and affine norm."""
    name, model_args = FAMILIES[family]
    return fill_weights(timm.create_model(name, dynamic_img_size=True, **SMALL, **model_args)).eval()


def encoder_like(model, config):
    """A SemanticEncoder with the weights of timm's ``model``."""
    encoder = SemanticEncoder(config).eval()
    wanted = encoder.vit.state_dict()
    encoder.vit.load_state_dict({key: value for key, value in model.state_dict().items() if key in wanted})
    return encoder


def preprocessed(x, config, patch):
    """The input of timm's model, written out: resize to patch x grid, [-1, 1] → [0, 1], mean and std."""
    size = (patch * x.shape[-2] // config.stride, patch * x.shape[-1] // config.stride)
    if x.shape[-2:] != size:
        x = F.interpolate(x, size, mode="bicubic", antialias=False)
    mean, std = torch.tensor(config.mean).view(3, 1, 1), torch.tensor(config.std).view(3, 1, 1)
    return ((x + 1.0) / 2.0 - mean) / std


@torch.no_grad()
def timm_tokens(model, pixels):
    """timm's own forward pass: (normed tokens, tokens before the norm), prefix tokens included."""
    before = []
    handle = model.norm.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0]))
    normed = model.forward_features(pixels)
    handle.remove()
    return normed, before[0]


def as_map(tokens, model, grid):
    """Patch tokens, without the prefix, as ``B D h w``."""
    return tokens[:, model.num_prefix_tokens :].mT.reshape(len(tokens), -1, *grid)


def without_affine(tokens, norm):
    """What the norm gave before it applied its weight and bias."""
    return (tokens - norm.bias) / norm.weight


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_output_equals_timm(family, grid):
    model = timm_model(family)
    patch = model.patch_embed.patch_size[0]
    x = images(2, 16 * grid[0], 16 * grid[1])  # stride 16: resized inside where the patch is 14
    config = family_config(family)
    normed, pre_norm = timm_tokens(model, preprocessed(x, config, patch))
    plain = without_affine(normed, model.norm)
    global_token = normed[:, 0] if model.cls_token is not None else normed.mean(1)
    with torch.no_grad():
        affine = encoder_like(model, family_config(family, final_norm="affine"))(x, return_all=True)
        bare = encoder_like(model, config)(x, return_all=True)
        none = encoder_like(model, family_config(family, final_norm="none"))(x)
    wanted = [as_map(normed, model, grid), as_map(pre_norm, model, grid), global_token]
    assert_close(affine[:3], wanted)
    for tokens in (affine, bare):
        if model.cls_token is None:
            assert tokens.pre_norm_cls is None
        else:  # what DINOv2's get_intermediate_layers(norm=False, return_class_token=True) gives
            assert_close([tokens.pre_norm_cls], [pre_norm[:, 0]])
    assert_close(bare[:2], [as_map(plain, model, grid), as_map(pre_norm, model, grid)])
    assert_close([bare.global_token], [without_affine(global_token, model.norm)])
    assert_close([none], [as_map(pre_norm, model, grid)])
    assert not torch.allclose(bare.features, affine.features, atol=1e-2)  # or the affine part would go untested


@pytest.mark.parametrize("family", ["dinov2_reg", "siglip2"])
def test_stride_equal_to_patch_is_not_resized(family):
    model, config = timm_model(family), family_config(family, stride=14)
    x = images(2, 42, 70)
    with torch.no_grad():
        features = encoder_like(model, config)(x)
    normed, _ = timm_tokens(model, preprocessed(x, config, 14))
    assert_close([features], [as_map(without_affine(normed, model.norm), model, (3, 5))])


@pytest.mark.parametrize(("mode", "antialias"), [("bilinear", False), ("bicubic", True)])
def test_resize_options(mode, antialias):
    model = timm_model("dinov2_reg")
    config = family_config("dinov2_reg", resize_mode=mode, resize_antialias=antialias)
    x = images(2, 48, 80)
    with torch.no_grad():
        features = encoder_like(model, config)(x)
    resized = F.interpolate(x, (42, 70), mode=mode, antialias=antialias)
    normed, _ = timm_tokens(model, preprocessed(resized, config.replace(stride=14), 14))
    assert_close([features], [as_map(without_affine(normed, model.norm), model, (3, 5))])


@pytest.mark.parametrize(("mode", "antialias"), [("bicubic", False), ("bilinear", False), ("bilinear", True)])
@pytest.mark.parametrize("family", LEARNED_POSITIONS)
def test_position_options(family, mode, antialias):
    """The reference is a timm model of that very size, its table resized by hand."""
    model, (name, model_args), grid = timm_model(family), FAMILIES[family], (2, 3)
    patch = model.patch_embed.patch_size[0]
    prefix = model.pos_embed.shape[1] - 16  # positions of the class token, where the table has one
    table = model.pos_embed[:, prefix:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    table = F.interpolate(table, grid, mode=mode, antialias=antialias).flatten(2).mT
    state = {**model.state_dict(), "pos_embed": torch.cat([model.pos_embed[:, :prefix], table], dim=1)}
    size = (patch * grid[0], patch * grid[1])
    sized = timm.create_model(name, **{**SMALL, **model_args, "img_size": size}).eval()
    sized.load_state_dict(state)
    config = family_config(family, position_mode=mode, position_antialias=antialias, final_norm="affine")
    encoder = encoder_like(model, config)
    x = images(2, 32, 48)
    with torch.no_grad():
        wanted = sized.forward_features(preprocessed(x, config, patch))
        assert_close([encoder(x)], [as_map(wanted, model, grid)])
        default = encoder_like(model, family_config(family, final_norm="affine"))
        assert not torch.allclose(default(x), encoder(x), atol=1e-3)
        native = images(2, 64, 64)
        assert_equal([default(native)], [encoder(native)])


@pytest.mark.parametrize("layer", [-2, 0])
def test_an_earlier_layer(layer):
    model = timm_model("dinov2_reg")
    outputs = []
    handle = model.blocks[0].register_forward_hook(lambda _, inputs, output: outputs.append(output))
    config = family_config("dinov2_reg", layer=layer, final_norm="affine")
    x = images(2, 64, 64)
    with torch.no_grad():
        model.forward_features(preprocessed(x, config, 14))
        handle.remove()
        assert_close([encoder_like(model, config)(x)], [as_map(model.norm(outputs[0]), model, (4, 4))])


@pytest.mark.parametrize("family", FAMILIES)
def test_from_timm_reads_a_file_of_timm(family, tmp_path):
    model, (name, model_args) = timm_model(family), FAMILIES[family]
    path = tmp_path / "timm.pth"
    torch.save(model.state_dict(), path)
    encoder = SemanticEncoder.from_timm(name, file=str(path), model_args={**SMALL, **model_args})
    published = timm.get_pretrained_cfg(name)
    assert (encoder.config.mean, encoder.config.std) == (published.mean, published.std)
    config = family_config(family, mean=published.mean, std=published.std)
    assert encoder.config == config
    assert not encoder.training
    x = images(2, 48, 80)
    with torch.no_grad():
        assert_equal([encoder(x)], [encoder_like(model, config)(x)])


def test_from_timm_resamples_a_file_of_another_size(tmp_path):
    """timm's own conversion runs: a table trained at 56 px serves a model of 84 px."""
    model, (name, model_args) = timm_model("dinov2_reg"), FAMILIES["dinov2_reg"]
    path = tmp_path / "timm.pth"
    torch.save(model.state_dict(), path)
    encoder = SemanticEncoder.from_timm(
        name, file=str(path), model_args={**SMALL, **model_args, "img_size": 84}, stride=14, final_norm="affine"
    )
    x = images(2, 84, 84)
    wanted, _ = timm_tokens(model, preprocessed(x, encoder.config, 14))
    with torch.no_grad():
        assert_close([encoder(x)], [as_map(wanted, model, (6, 6))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_tables_survive_a_load(dtype, tmp_path):
    """No checkpoint holds DINOv3's frequencies: a build on the meta device must compute them."""
    encoder = encoder_like(timm_model("dinov3"), family_config("dinov3"))
    encoder.save_pretrained(tmp_path)
    loaded = SemanticEncoder.from_pretrained(tmp_path, dtype=dtype)
    wanted = encoder.to(dtype)
    assert "vit.rope.periods" in dict(loaded.named_buffers())
    assert "vit.rope.periods" not in loaded.state_dict()
    assert_same_state(loaded, wanted)
    for x in (images(2, 64, 64), images(2, 48, 80)):
        with torch.no_grad():
            assert_equal([loaded(x.to(dtype))], [wanted(x.to(dtype))])
