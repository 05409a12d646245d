"""SemanticEncoder reads files of transformers, Meta and timm: the originating library's features, at any grid."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from psvae import SemanticEncoder
from psvae.errors import CheckpointError, ConfigError
from tests.base import assert_close
from tests.tiny import fill_weights, images

pytest.importorskip("transformers", reason="transformers comes with psvae[dev]")

import transformers

from tests.encoders import foreign

GRIDS = [(4, 4), (6, 6), (3, 5), (2, 8)]  # the first is native; the last has as many tokens
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of every family, and the model that wrote it."""
    found = {}
    for family in foreign.FAMILIES:
        found[family] = (tmp_path_factory.mktemp(family), foreign.family_model(family))
        found[family][1].save_pretrained(found[family][0])
    return found


@torch.no_grad()
def assert_same_features(encoder, reference, grids=GRIDS):
    stride = encoder.config.stride
    for height, width in grids:
        x = images(2, stride * height, stride * width)
        wanted = reference(x)
        assert wanted.std() > 0.1
        assert_close([encoder(x)], [wanted], TOLERANCE)


def write_state(folder, config, state):
    """A folder with these names, whatever the library's writer would make of them."""
    folder.mkdir(exist_ok=True)
    config.save_pretrained(folder)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / "model.safetensors")


# transformers


@pytest.mark.parametrize("family", foreign.FAMILIES)
def test_reads_a_transformers_folder(saved, family):
    folder, model = saved[family]
    patch = model.config.patch_size
    encoder = SemanticEncoder.from_pretrained(folder, final_norm="affine", stride=patch)
    assert not encoder.training
    assert_same_features(encoder, lambda x: foreign.features(model, x, family))
    plain = SemanticEncoder.from_pretrained(folder)
    assert plain.config.stride == 16
    assert plain.config.final_norm == "plain"
    assert plain.config.norm_eps == model.config.layer_norm_eps


@pytest.mark.parametrize("family", foreign.FAMILIES)
def test_reads_the_names_that_the_library_has_in_memory(family, tmp_path):
    """Other programs save ``state_dict()`` as it is: the names of the newest version."""
    model = foreign.family_model(family)
    write_state(tmp_path, model.config, model.state_dict())
    encoder = SemanticEncoder.from_pretrained(tmp_path, final_norm="affine", stride=model.config.patch_size)
    assert_same_features(encoder, lambda x: foreign.features(model, x, family), GRIDS[:2])


@pytest.mark.parametrize(
    ("family", "prefix"),
    [("siglip", "vision_model."), ("siglip2_naflex", "vision_model."), ("mae", "vit."), ("dinov2", "dinov2."),
     ("dinov2_reg", "dinov2_with_registers.")],
)  # fmt: skip
def test_reads_an_encoder_inside_a_larger_model(saved, family, prefix, tmp_path):
    folder, model = saved[family]
    state = {prefix + key: tensor for key, tensor in load_file(folder / "model.safetensors").items()}
    outside = {"siglip": "text_model.head.bias", "siglip2_naflex": "logit_scale", "mae": "decoder.mask_token"}
    state[outside.get(family, "classifier.weight")] = torch.zeros(1)
    write_state(tmp_path, model.config, state)
    encoder = SemanticEncoder.from_pretrained(tmp_path, final_norm="affine", stride=model.config.patch_size)
    assert_same_features(encoder, lambda x: foreign.features(model, x, family), GRIDS[:1])


def test_reads_a_whole_siglip_and_a_whole_mae(tmp_path, caplog):
    text = {**foreign.SMALL, **foreign.MLP, "vocab_size": 10, "bos_token_id": 0, "eos_token_id": 1}
    vision = foreign.FAMILIES["siglip"][1].to_dict()
    siglip = foreign.fill(transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision)))
    siglip.save_pretrained(tmp_path / "siglip", max_shard_size="40KB")
    assert (tmp_path / "siglip" / "model.safetensors.index.json").exists()
    with caplog.at_level("INFO", "psvae"):
        encoder = SemanticEncoder.from_pretrained(tmp_path / "siglip", final_norm="affine")
    assert "is a checkpoint of transformers' SigLIP; not needed: ['logit_bias', 'logit_scale', 'text_model." in (
        caplog.text
    )
    assert_same_features(encoder, lambda x: foreign.features(siglip.vision_model, x, "siglip"), GRIDS[:2])
    config = transformers.ViTMAEConfig(
        **foreign.SMALL, **foreign.MLP, image_size=64, patch_size=16, mask_ratio=0.0, decoder_hidden_size=32,
        decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=48,
    )  # fmt: skip
    mae = foreign.fill(transformers.ViTMAEForPreTraining(config))
    mae.save_pretrained(tmp_path / "mae")
    encoder = SemanticEncoder.from_pretrained(tmp_path / "mae", final_norm="affine")
    assert_same_features(encoder, lambda x: foreign.features(mae.vit, x, "mae"), GRIDS[:2])


def test_fields_that_a_file_leaves_out_are_the_librarys_defaults(tmp_path):
    """Files of older versions hold only what differs from the defaults."""
    config = {"model_type": "siglip", "vision_config": {**foreign.SMALL, **foreign.MLP, "image_size": 64}}
    foreign.family_model("siglip").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    encoder = SemanticEncoder.from_pretrained(tmp_path)
    assert encoder.config.model_args["act_layer"] == "gelu_tanh"
    assert encoder.config.norm_eps == 1e-6
    assert encoder.config.mean == (0.5, 0.5, 0.5)


def test_the_image_processor_beside_the_model_says_the_colours(tmp_path):
    """DINOv3's satellite models are not normalised by ImageNet's, and only that file says so."""
    foreign.family_model("dinov3").save_pretrained(tmp_path)
    assert SemanticEncoder.from_pretrained(tmp_path).config.mean == (0.485, 0.456, 0.406)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"image_mean": [0.43, 0.411, 0.296], "image_std": [0.213, 0.156, 0.143]}))
    config = SemanticEncoder.from_pretrained(tmp_path).config
    assert (config.mean, config.std) == ((0.43, 0.411, 0.296), (0.213, 0.156, 0.143))
    for content, said in (('{"image_mean": 0.5}', "mean is 0.5"), ("{", "preprocessor_config.json is not valid JSON")):
        path.write_text(content)
        with pytest.raises((CheckpointError, ConfigError), match=said):
            SemanticEncoder.from_pretrained(tmp_path)


def test_an_activation_and_an_eps_of_its_own(tmp_path):
    model = foreign.family_model("siglip", hidden_act="gelu", layer_norm_eps=0.1)
    model.save_pretrained(tmp_path)
    encoder = SemanticEncoder.from_pretrained(tmp_path, final_norm="affine")
    assert_same_features(encoder, lambda x: foreign.features(model, x, "siglip"), GRIDS[:1])


@pytest.mark.parametrize("family", ["dinov2_reg", "siglip", "dinov3"])
def test_an_earlier_layer_leaves_the_later_ones_in_the_file(saved, family):
    folder, model = saved[family]
    patch = model.config.patch_size
    encoder = SemanticEncoder.from_pretrained(folder, layer=-2, final_norm="none", stride=patch)
    assert len(encoder.vit.blocks) == 1
    x = images(2, 4 * patch, 4 * patch)
    options = {"interpolate_pos_encoding": True} if family == "siglip" else {}
    with torch.no_grad():
        states = model(foreign.normalised(x, family), output_hidden_states=True, **options).hidden_states
        wanted = states[1][:, -16:].mT.unflatten(2, (4, 4))
        assert_close([encoder(x)], [wanted], TOLERANCE)


# Meta


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_reads_metas_own_files(tmp_path, ending, registers, gated):
    model = foreign.fill(foreign.MetaDINOv2(registers=registers, gated=gated))
    path = tmp_path / f"dinov2_vitx14_pretrain{ending}"
    (save_file if ending == ".safetensors" else torch.save)(model.state_dict(), path)
    if ending == ".pth":
        with pytest.raises(CheckpointError, match="allow_pickle=True"):
            SemanticEncoder.from_pretrained(path)
    encoder = SemanticEncoder.from_pretrained(path, allow_pickle=True, final_norm="affine", stride=14)
    assert_same_features(encoder, model)
    assert encoder.config.position_offset == (0.0 if registers else 0.1)


def test_metas_offset_changes_the_features_off_the_native_grid(tmp_path):
    model = foreign.fill(foreign.MetaDINOv2())
    save_file(model.state_dict(), tmp_path / "meta.safetensors")
    with_offset = SemanticEncoder.from_pretrained(tmp_path / "meta.safetensors", stride=14)
    without = SemanticEncoder.from_pretrained(tmp_path / "meta.safetensors", stride=14, position_offset=0.0)
    x, native = images(1, 84, 84), images(1, 56, 56)
    with torch.no_grad():
        assert (with_offset(x) - without(x)).abs().max() > 1e-3
        assert torch.equal(with_offset(native), without(native))


def test_metas_dinov3_files_are_read_by_name(tmp_path):
    """They do not say their architecture: timm's name does, and timm converts their names."""
    name, size = "vit_small_patch16_dinov3_qkvb.lvd1689m", {"embed_dim": 48, "depth": 2, "num_heads": 3}
    model = fill_weights(timm.create_model(name, num_classes=0, **size)).eval()
    state = {"mask_token": torch.zeros(1, 48), "rope_embed.periods": torch.ones(4)}
    for key, tensor in model.state_dict().items():
        if key.endswith(("q_bias", "v_bias")):
            continue
        for ours, metas in (("reg_token", "storage_tokens"), ("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma")):
            key = key.replace(ours, metas)
        state[key] = tensor
    for index, block in enumerate(model.blocks):
        bias = torch.cat([block.attn.q_bias, torch.zeros(48), block.attn.v_bias]).detach()
        state |= {f"blocks.{index}.attn.qkv.bias": bias, f"blocks.{index}.attn.qkv.bias_mask": torch.ones(144)}
    save_file(state, tmp_path / "dinov3_vits16.safetensors")
    with pytest.raises(CheckpointError, match="and weights named like"):
        SemanticEncoder.from_pretrained(tmp_path / "dinov3_vits16.safetensors")
    file = str(tmp_path / "dinov3_vits16.safetensors")
    encoder = SemanticEncoder.from_timm(name, file=file, model_args=size, final_norm="affine")
    mean, std = (torch.tensor(getattr(encoder.config, part)).view(3, 1, 1) for part in ("mean", "std"))
    assert_same_features(
        encoder,
        lambda x: model.forward_features(((x + 1) / 2 - mean) / std)[:, 5:].mT.unflatten(2, (x.shape[-2] // 16, -1)),
    )


# timm

TIMM = {
    "dinov2_reg": ("vit_small_patch14_reg4_dinov2", {"img_size": 56}),
    "dinov2_giant": ("vit_giant_patch14_dinov2", {"img_size": 56}),
    "siglip2": ("vit_base_patch16_siglip_256", {"img_size": 64, "act_layer": "gelu_tanh"}),
    "mae": ("vit_base_patch16_224", {"img_size": 64}),
    "dinov3": ("vit_small_patch16_dinov3", {}),
    "dinov3_qkvb": ("vit_small_patch16_dinov3_qkvb", {}),
}


def timm_model(family):
    name, model_args = TIMM[family]
    small = {"embed_dim": 48, "depth": 2, "num_heads": 3}
    return fill_weights(timm.create_model(name, num_classes=5, **small, **model_args)).eval(), {**small, **model_args}


@pytest.mark.parametrize("family", TIMM)
def test_reads_a_timm_folder(family, tmp_path):
    model, model_args = timm_model(family)
    timm.models.save_for_hf(model, tmp_path, model_args=model_args, safe_serialization=True)
    encoder = SemanticEncoder.from_pretrained(tmp_path, final_norm="affine", stride=model.patch_embed.patch_size[0])
    grids = GRIDS if "dinov3" in family else GRIDS[:1]  # the others take their own size alone
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))

    def reference(x):
        height = x.shape[-2] // encoder.patch
        tokens = model.forward_features(((x + 1) / 2 - mean) / std)
        return tokens[:, model.num_prefix_tokens :].mT.unflatten(2, (height, -1))

    assert_same_features(encoder, reference, grids)


# faults


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of DINOv2's, to break."""
    for path in saved["dinov2"][0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def break_weights(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def test_faults_are_named_in_the_files_own_words(folder):
    def change(state):
        del state["encoder.layer.1.attention.attention.key.weight"]
        state["encoder.layer.0.mlp.fc3.weight"] = torch.zeros(2)
        state["encoder.layer.0.norm1.weight"] = torch.zeros(7)
        state["encoder.layer.0.attention.attention.query.weight"] = torch.zeros(96, 48)  # key and value make up for it
        state["encoder.layer.0.attention.attention.key.weight"] = torch.zeros(24, 48)
        state["encoder.layer.0.attention.attention.value.weight"] = torch.zeros(24, 48)

    break_weights(folder, change)
    with pytest.raises(CheckpointError) as caught:
        SemanticEncoder.from_pretrained(folder)
    said = str(caught.value)
    assert "1 missing: encoder.layer.1.attention.attention.key.weight" in said
    assert "1 unexpected: encoder.layer.0.mlp.fc3.weight" in said
    assert "encoder.layer.0.norm1.weight is (7,), wanted (48,)" in said
    assert "encoder.layer.0.attention.attention.query.weight + encoder.layer.0.attention.attention.key.weight" in said


def test_blocks_that_the_configuration_does_not_have_are_unexpected(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(CheckpointError, match=r"unexpected: encoder\.layer\.1\."):
        SemanticEncoder.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "clip"}, r"a config.json of 'clip'.*SemanticEncoder reads.*timm.*DINOv2"),
        ({"hidden_size": "48"}, "hidden_size '48'; wanted a positive int"),
        ({"hidden_size": True}, "hidden_size True; wanted a positive int"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000; the weights have"),
        ({"hidden_act": "relu6"}, "hidden_act 'relu6'; wanted 'gelu' or"),
        ({"layer_norm_eps": 0}, "layer_norm_eps 0; wanted a positive float"),
        ({"num_channels": 4}, "num_channels 4; wanted 3"),
        ({"image_size": [56, 70]}, r"image_size \[56, 70\]; wanted a positive int"),
        ({"image_size": [[]]}, "image_size"),
        ({"image_size": 70}, r"embeddings.position_embeddings is \(1, 17, 48\), wanted \(1, 26, 48\)"),
        ({"use_swiglu_ffn": True}, "missing: .*weights_in"),
        ({"num_attention_heads": 5}, "timm refused"),
    ],
)
def test_a_configuration_that_does_not_fit(folder, change, said):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises((CheckpointError, ConfigError), match=said):
        SemanticEncoder.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"key_bias": True}, "key_bias True"),
        ({"value_bias": False}, "value_bias False"),
        ({"hidden_act": "silu"}, "hidden_act 'silu'; wanted 'gelu'"),
        ({"num_register_tokens": 0}, "1 unexpected: embeddings.register_tokens"),
        ({"num_register_tokens": -1}, "num_register_tokens -1; wanted a positive int, or 0"),
    ],
)
def test_a_dinov3_that_timm_cannot_build(saved, change, said, tmp_path):
    for path in saved["dinov3"][0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=said):
        SemanticEncoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"depth": 10**9}, "depth of 1000000000; the weights have"),
        ({"checkpoint_path": "/etc/passwd"}, "model_args has 'checkpoint_path', which tells timm what to load"),
        ({"pretrained_cfg": {"file": "x"}}, "model_args has 'pretrained_cfg', which tells timm what to load"),
        ({"img_size": []}, "timm refused model_args"),
        ({"no_such": 1}, "timm refused model_args.*no_such"),
    ],
)
def test_timm_arguments_that_do_not_fit(change, said, tmp_path):
    model, model_args = timm_model("mae")
    timm.models.save_for_hf(model, tmp_path, model_args=model_args, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_args": model_args | change}))
    with pytest.raises((CheckpointError, ConfigError), match=said):
        SemanticEncoder.from_pretrained(tmp_path)


def test_meta_files_that_do_not_fit(tmp_path):
    state = foreign.fill(foreign.MetaDINOv2()).state_dict()
    path = tmp_path / "meta.safetensors"
    for key, tensor, said in (
        ("pos_embed", torch.zeros(1, 16, 128), r"pos_embed is \(1, 16, 128\)"),
        ("blocks.0.mlp.fc1.weight", torch.zeros(3), r"the first layer of blocks.0.mlp is \(3,\)"),
        ("patch_embed.proj.weight", torch.zeros(100, 3, 14, 14), "makes 100 channels; wanted heads of 64"),
        ("patch_embed.proj.weight", torch.zeros(128, 3, 14, 15), "wanted a kernel of 3 colours and a square patch"),
        ("ls.weight", torch.zeros(3), "1 unexpected: ls.weight"),
    ):
        save_file({**state, key: tensor}, path)
        with pytest.raises(CheckpointError, match=said):
            SemanticEncoder.from_pretrained(path)
    del state["blocks.1.mlp.fc2.bias"]
    save_file(state, path)
    with pytest.raises(CheckpointError, match=r"1 missing: blocks\.1\.mlp\.fc2\.bias"):
        SemanticEncoder.from_pretrained(path)


def test_an_offset_needs_a_table():
    with pytest.raises(ConfigError, match="has no learned position table"):
        SemanticEncoder.from_timm("vit_small_patch16_dinov3.lvd1689m", pretrained=False, position_offset=0.1)
    with pytest.raises(ConfigError, match="position_offset is 1"):
        SemanticEncoder.from_timm("vit_base_patch16_224.mae", pretrained=False, position_offset=1.0)
