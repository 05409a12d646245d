"""The key maps of encoders in both directions, and what `SemanticEncoder` writes for timm and transformers."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file

from psvae import SemanticEncoder, SemanticEncoderConfig
from psvae.errors import CheckpointError, ConfigError
from psvae.hub.keymaps.encoders_transformers import TRANSFORMERS
from tests.base import assert_close, assert_equal
from tests.tiny import fill_weights, images

transformers = pytest.importorskip("transformers", reason="transformers comes with psvae[dev]")

from tests.encoders import foreign  # noqa: E402

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3}
# family → a timm model of it
FROM_TIMM = {
    "dinov2": ("vit_small_patch14_dinov2.lvd142m", {"img_size": 56}),
    "dinov2_reg": ("vit_small_patch14_reg4_dinov2.lvd142m", {"img_size": 56}),
    "dinov2_giant": ("vit_giant_patch14_dinov2.lvd142m", {"img_size": 56}),
    "siglip": ("vit_so400m_patch14_siglip_224.v2_webli", {"img_size": 56, "act_layer": "gelu_tanh"}),
    "mae": ("vit_base_patch16_224.mae", {"img_size": 64}),
    "dinov3": ("vit_small_patch16_dinov3_qkvb.lvd1689m", {}),
    "dinov3_no_bias": ("vit_small_patch16_dinov3.lvd1689m", {}),
    "dinov3_gated": ("vit_huge_plus_patch16_dinov3_qkvb.lvd1689m", {}),
}


def encoder_of(family, **fields):
    """As `SemanticEncoder.from_timm` makes it, weights filled; the stride is the patch, so that nothing is resized."""
    name, model_args = FROM_TIMM[family]
    config = {"final_norm": "affine", "stride": 14 if "patch14" in name else 16, **fields}
    if family == "siglip":
        config |= {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    return fill_weights(SemanticEncoder(SemanticEncoderConfig(name, {**SMALL, **model_args}, **config))).eval()


@torch.no_grad()
def timm_features(model, encoder, x):
    mean, std = (torch.tensor(getattr(encoder.config, name)).view(3, 1, 1) for name in ("mean", "std"))
    tokens = model.forward_features(((x + 1) / 2 - mean) / std)
    return tokens[:, model.num_prefix_tokens :].mT.unflatten(2, (x.shape[-2] // encoder.patch, -1))


def assert_loads_in_transformers(folder, encoder, family, grids=((4, 4),)):
    model, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    for grid in grids:
        x = images(2, encoder.patch * grid[0], encoder.patch * grid[1])
        with torch.no_grad():
            assert_close([foreign.features(model.eval(), x, family.partition("_g")[0])], [encoder(x)], 2e-5)
    return model


def assert_loads_in_timm(folder, encoder):
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = images(2, encoder.patch * 4, encoder.patch * 4)
    with torch.no_grad():
        assert_close([timm_features(model, encoder, x)], [encoder(x)], 2e-5)
    published = timm.data.resolve_model_data_config(model)
    assert (tuple(published["mean"]), tuple(published["std"])) == (encoder.config.mean, encoder.config.std)
    return model


# key maps


@pytest.mark.parametrize("family", foreign.FAMILIES)
def test_back_to_the_file_that_was_read(family, tmp_path):
    """transformers → psvae → transformers: the same names and bits, less what only training reads."""
    model = foreign.family_model(family)
    model.save_pretrained(tmp_path / "theirs")
    encoder = SemanticEncoder.from_pretrained(tmp_path / "theirs", final_norm="affine", stride=model.config.patch_size)
    encoder.export_transformers(tmp_path / "again")
    assert_loads_in_transformers(tmp_path / "again", encoder, family)
    wanted, got = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "again"))
    prefix = "vision_model." if "siglip" in family else ""  # of versions before 5.6, and read by those since
    wanted = {prefix + key: tensor for key, tensor in wanted.items() if not key.startswith("head.")}
    changed = {"embeddings.mask_token"}
    if "reg" in family:  # the class token's position is added to it for good
        changed |= {"embeddings.cls_token", "embeddings.position_embeddings"}
        assert_equal(
            [got["embeddings.cls_token"] + got["embeddings.position_embeddings"][:, :1]],
            [wanted["embeddings.cls_token"] + wanted["embeddings.position_embeddings"][:, :1]],
        )
    assert got.keys() - {"embeddings.mask_token"} == wanted.keys() - {"embeddings.mask_token"}
    same = sorted(wanted.keys() - changed)
    assert_equal([got[key] for key in same], [wanted[key] for key in same])
    ours, theirs = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("again", "theirs"))
    differing = {"architectures", "vision_use_head", "transformers_version", "dtype"}
    assert {k: theirs[k] for k in ours if k not in differing} == {k: v for k, v in ours.items() if k not in differing}


@pytest.mark.parametrize("family", foreign.FAMILIES)
def test_psvae_to_transformers_to_psvae(family, tmp_path):
    """The other direction: the same configuration and bits."""
    foreign.family_model(family).save_pretrained(tmp_path / "theirs")
    encoder = SemanticEncoder.from_pretrained(tmp_path / "theirs", final_norm="affine")
    encoder.export_transformers(tmp_path / "out")
    again = SemanticEncoder.from_pretrained(tmp_path / "out", final_norm="affine")
    assert again.config == encoder.config
    assert_equal(again.state_dict().values(), encoder.state_dict().values())


@pytest.mark.parametrize("family", foreign.FAMILIES)
def test_every_name_is_read_once(family, tmp_path):
    model = foreign.family_model(family)
    encoder = None
    for folder in (tmp_path / "a", tmp_path / "b"):
        (model if encoder is None else encoder).save_pretrained(folder)
        encoder = SemanticEncoder.from_pretrained(folder, final_norm="affine")
    layout = TRANSFORMERS[model.config.model_type]
    rules = layout.rules(list(encoder.state_dict()), encoder.config.to_dict(), {})
    names = [name for rule in rules.values() for name in rule.theirs]
    shared = {"embeddings.position_embeddings"} if "reg" in family else set()
    assert {name for name in names if names.count(name) > 1} == shared
    out = {}
    for key, tensor in encoder.state_dict().items():
        out |= rules[key].save(rules[key].theirs, tensor)
    not_read = {"embeddings.mask_token"} | ({"embeddings.register_tokens"} if family == "dinov3_bare" else set())
    assert set(names) == out.keys() - not_read


# exports


@pytest.mark.parametrize("family", FROM_TIMM)
def test_exports_to_transformers(family, tmp_path, caplog):
    encoder = encoder_of(family)
    encoder.export_transformers(tmp_path)
    grids = (
        [(4, 4), (3, 5), (6, 6)] if family in ("dinov2_reg", "dinov3", "dinov3_no_bias", "dinov3_gated") else [(4, 4)]
    )
    assert_loads_in_transformers(tmp_path, encoder, family, grids)
    said = "transformers stretches the position embeddings to other image sizes in another way (bicubic, without anti"
    assert (said in caplog.text) == (len(grids) == 1)
    height, width = encoder.vit.patch_embed.img_size
    assert (f"for inputs of {height} x {width} pixels its features equal" in caplog.text) == (len(grids) == 1)


@pytest.mark.parametrize("family", FROM_TIMM)
def test_exports_to_timm(family, tmp_path, caplog):
    encoder = encoder_of(family)
    encoder.export_timm(tmp_path)
    model = assert_loads_in_timm(tmp_path, encoder)
    assert not caplog.text
    assert model(images(1, encoder.patch * 4, encoder.patch * 4)).shape[-1] == 48
    again = SemanticEncoder.from_pretrained(tmp_path, final_norm="affine", stride=encoder.config.stride)
    assert_equal(again.state_dict().values(), encoder.state_dict().values())
    with torch.no_grad():
        x = images(1, encoder.patch * 3, encoder.patch * 5)
        assert_equal([again(x)], [encoder(x)])


@pytest.mark.parametrize("family", foreign.FAMILIES)
def test_from_transformers_to_timm(family, tmp_path, caplog):
    model = foreign.family_model(family)
    model.save_pretrained(tmp_path / "theirs")
    patch = model.config.patch_size
    encoder = SemanticEncoder.from_pretrained(tmp_path / "theirs", final_norm="affine", stride=patch)
    encoder.export_timm(tmp_path / "timm")
    assert_loads_in_timm(tmp_path / "timm", encoder)
    positions_differ = family in ("dinov2", "dinov2_giant", "siglip", "siglip2_naflex", "mae")
    assert ("timm stretches the position embeddings to other image sizes" in caplog.text) == positions_differ
    assert ("adds 1e-06 to the variance inside its norms, this encoder 1e-12" in caplog.text) == (family == "mae")


@pytest.mark.parametrize("family", ["dinov2_reg", "siglip", "mae", "dinov3"])
def test_a_plain_norm_and_a_cut_are_exported(family, tmp_path):
    encoder = encoder_of(family, final_norm="plain", layer=-2)
    encoder.export_timm(tmp_path / "timm")
    encoder.export_transformers(tmp_path / "transformers")
    model = assert_loads_in_timm(tmp_path / "timm", encoder)
    assert len(model.blocks) == 1
    assert torch.equal(model.norm.weight, torch.ones(48))
    assert torch.equal(model.norm.bias, torch.zeros(48))
    model = assert_loads_in_transformers(tmp_path / "transformers", encoder, family)
    assert model.config.num_hidden_layers == 1


def test_no_final_norm(tmp_path):
    encoder = encoder_of("dinov2", final_norm="none")
    encoder.export_timm(tmp_path / "timm")
    assert_loads_in_timm(tmp_path / "timm", encoder)
    with pytest.raises(ConfigError, match="final_norm is 'none'; transformers' models end in a norm"):
        encoder.export_transformers(tmp_path / "transformers")
    with pytest.raises(ConfigError, match="has other tensors than this encoder"):
        encoder_of("dinov3", final_norm="none").export_timm(tmp_path / "dinov3")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["timm"]


@pytest.mark.parametrize(
    ("name", "model_args", "said"),
    [
        ("vit_pe_core_tiny_patch16_384.fb", {"img_size": 64}, "no model of the architecture of 'vit_pe_core_tiny"),
        ("vit_base_patch16_clip_224.openai", {"img_size": 64}, "no place for 'norm_pre.weight'"),
        ("vit_base_patch16_224.mae", {"img_size": (64, 32)}, "no model of the architecture of 'vit_base"),
        ("vit_base_patch16_224.mae", {"img_size": 64, "act_layer": "relu"}, "activation is 'relu'"),
        ("vit_small_patch14_dinov2.lvd142m", {"img_size": 56, "mlp_ratio": 2.5}, "MLP is 120 wide"),
        ("vit_base_patch16_224.mae", {"img_size": 64, "qk_norm": True}, "no place for 'blocks.0.attn.q_norm.weight'"),
    ],
)
def test_what_transformers_lacks(name, model_args, said, tmp_path):
    encoder = SemanticEncoder(SemanticEncoderConfig(name, {**SMALL, **model_args}, final_norm="affine"))
    with pytest.raises(ConfigError, match=said):
        encoder.export_transformers(tmp_path / "out")
    encoder.export_timm(tmp_path / "timm")  # which has every one of them
    timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)


def test_shards_and_a_half_precision_encoder(tmp_path):
    encoder = encoder_of("dinov2_reg", final_norm="plain").to(torch.bfloat16)
    encoder.export_transformers(tmp_path, max_shard_size="50KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    model = transformers.AutoModel.from_pretrained(tmp_path)
    assert model.layernorm.weight.dtype == torch.bfloat16
    again = SemanticEncoder.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert_equal(again.state_dict().values(), encoder.state_dict().values())


def test_meta_files_are_read_and_not_written(tmp_path):
    [meta] = [layout for layout in SemanticEncoder.foreign_formats if layout.name == "Meta's DINOv2"]
    assert meta.write_config is None
    from psvae.hub.exporting import export

    with pytest.raises(CheckpointError, match="reads Meta's DINOv2 and does not write it"):
        export(encoder_of("dinov2"), meta, tmp_path / "out")
