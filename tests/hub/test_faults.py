"""A folder that cannot be loaded says what was found, what was wanted and what to do, and loads nothing."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from psvae import PSVAE, PixelDecoder, SemanticEncoder, SemanticVAE
from psvae.errors import CheckpointError, ConfigError
from tests.hub.checkpoints import assert_same, weight_files
from tests.tiny import tiny_decoder, tiny_decoder_config, tiny_encoder, tiny_psvae, tiny_vae

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a tiny decoder in one file."""
    tiny_decoder().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder with a tiny decoder in several shards."""
    tiny_decoder().save_pretrained(tmp_path, max_shard_size="20KB")
    return tmp_path


def edit_config(folder: Path, **changes: Any) -> None:
    """Change, add or (with ``...``) remove top-level fields of ``config.json``."""
    values = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def refusal(folder: Path | str, module: Any = PixelDecoder, **options: Any) -> str:
    """The message of the `CheckpointError` that loading must raise."""
    with pytest.raises(CheckpointError) as caught:
        module.from_pretrained(folder, **options)
    return str(caught.value)


# Where is it?


def test_no_such_folder_and_no_possible_hub_id(tmp_path: Path) -> None:
    message = refusal(tmp_path / "absent")
    assert f"'{tmp_path}/absent' is not a folder or file here, nor a Hub id of the form 'org/name'" in message


def test_a_path_to_the_weights_file_is_as_good_as_its_folder(saved: Path) -> None:
    assert_same(PixelDecoder.from_pretrained(saved / WEIGHTS), tiny_decoder())
    (saved / WEIGHTS).rename(saved / "best.safetensors")
    assert_same(PixelDecoder.from_pretrained(saved, file="best.safetensors"), tiny_decoder())
    assert "has no file 'worst.safetensors'; the folder holds" in refusal(saved, file="worst.safetensors")


def test_an_empty_folder(tmp_path: Path) -> None:
    assert "has no config.json; the folder holds nothing" in refusal(tmp_path)


def test_the_wrong_subfolder(saved: Path) -> None:
    assert f"{saved}/decoder has no config.json" in refusal(saved, subfolder="decoder")


def test_renamed_weights_are_named(saved: Path) -> None:
    (saved / WEIGHTS).rename(saved / "best.safetensors")
    message = refusal(saved)
    assert "has no model.safetensors (nor model.safetensors.index.json with shards)" in message
    assert "the folder holds README.md, best.safetensors, config.json" in message


@pytest.mark.parametrize(
    "name", ["model.fp16.safetensors", "diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "model.fp16.bin"]
)
def test_weights_of_a_variant_alone_say_which(saved: Path, name: str) -> None:
    (saved / WEIGHTS).rename(saved / name)
    assert "(nor model.safetensors.index.json with shards); pass variant='fp16': the folder holds" in refusal(saved)
    assert "no weights of variant 'fp61'; pass variant='fp16': the folder holds" in refusal(saved, variant="fp61")


def test_a_variant_is_read(saved: Path) -> None:
    (saved / WEIGHTS).rename(saved / "model.fp16.safetensors")
    assert_same(PixelDecoder.from_pretrained(saved, variant="fp16"), tiny_decoder())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("config.json", "config.json is a configuration, no weights: pass its folder; wanted a folder, a .safetensors"),
        (INDEX, "is a configuration, no weights: pass its folder"),
        ("photo.PNG", "photo.PNG is a picture, no weights; wanted a folder, a .safetensors file, or a .bin, .pt"),
        ("model.tar.gz", "is an archive, to be unpacked first, no weights"),
        ("README.md", "is text, no weights"),
        ("weights", "weights is no weights file; wanted a .safetensors file, or a .bin, .pt"),
    ],
)
def test_a_file_of_another_kind_is_no_pickle(saved: Path, name: str, said: str) -> None:
    if not (saved / name).exists():
        (saved / name).write_bytes(b"something else")
    for allowed in (False, True):
        message = refusal(saved / name, allow_pickle=allowed)
        assert said in message
        assert "pickle" not in message


def test_a_pickle_without_an_ending_is_one(saved: Path) -> None:
    torch.save(tiny_decoder().state_dict(), saved / "weights")
    assert "is a pickle, which can run code" in refusal(saved / "weights")
    assert_same(PixelDecoder.from_pretrained(saved / "weights", allow_pickle=True), tiny_decoder())


def test_the_old_name_of_dtype(saved: Path) -> None:
    with pytest.raises(ConfigError, match=r"torch_dtype came; .*: use dtype="):
        PixelDecoder.from_pretrained(saved, torch_dtype=torch.bfloat16)


# The configuration


def test_config_that_is_not_json(saved: Path) -> None:
    (saved / "config.json").write_text('{"latent_channels": 8,')
    assert "config.json is not valid JSON (Expecting property name" in refusal(saved)
    (saved / "config.json").write_bytes(b"\xff\xfe\x00")
    assert "config.json is not valid JSON ('utf-8' codec" in refusal(saved)


@pytest.mark.parametrize("text", ["[]", "3", '{"model_type": "dinov2"}'])
def test_config_of_another_library(saved: Path, text: str) -> None:
    (saved / "config.json").write_text(text)
    assert "has no '_class': it was not written by psvae's save_pretrained" in refusal(saved)


def test_another_class(saved: Path) -> None:
    message = refusal(saved, SemanticVAE)
    assert "holds a PixelDecoder; wanted a SemanticVAE: use PixelDecoder.from_pretrained" in message


def test_config_with_a_misspelt_field(saved: Path) -> None:
    edit_config(saved, latent_chanels=8)
    with pytest.raises(
        ConfigError, match="PixelDecoderConfig has no field 'latent_chanels'; did you mean 'latent_channels'"
    ):
        PixelDecoder.from_pretrained(saved)


def test_config_with_an_unknown_field(saved: Path) -> None:
    edit_config(saved, zzz=1)
    with pytest.raises(ConfigError, match="no field 'zzz'; valid fields: latent_channels, out_channels, base_channels"):
        PixelDecoder.from_pretrained(saved)


def test_config_with_a_field_out_of_range(saved: Path) -> None:
    edit_config(saved, latent_channels=0)
    with pytest.raises(ConfigError, match=r"PixelDecoderConfig\.latent_channels is 0; wanted at least 1"):
        PixelDecoder.from_pretrained(saved)


def test_config_with_a_field_of_the_wrong_type(saved: Path) -> None:
    edit_config(saved, channel_multipliers="1,2,4")
    with pytest.raises(
        ConfigError, match=r"PixelDecoderConfig.channel_multipliers is '1,2,4'; wanted tuple\[int, ...\]"
    ):
        PixelDecoder.from_pretrained(saved)


def test_a_fault_inside_a_nested_config_names_its_own_class(tmp_path: Path) -> None:
    tiny_psvae().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    edit_config(tmp_path, vae={**values["vae"], "num_head": 3})
    with pytest.raises(ConfigError, match="SemanticVAEConfig has no field 'num_head'; did you mean 'num_heads'"):
        PSVAE.from_pretrained(tmp_path)


# The weights


@pytest.mark.parametrize("keep", [0, 1, 7, 100, 0.5, 0.999])
def test_truncated_weights(saved: Path, keep: float) -> None:
    """Empty, cut in the header, cut in the data."""
    content = (saved / WEIGHTS).read_bytes()
    size = int(keep * len(content)) if isinstance(keep, float) else keep
    (saved / WEIGHTS).write_bytes(content[:size])
    message = refusal(saved)
    assert f"{WEIGHTS} ({size} bytes) is not a whole safetensors file" in message
    assert "it is empty, truncated or of another format: download or save it again" in message


def test_weights_of_another_format(saved: Path) -> None:
    torch.save(tiny_decoder().state_dict(), saved / WEIGHTS)
    assert "is not a whole safetensors file" in refusal(saved)


def test_one_error_lists_missing_unexpected_and_misshaped_keys(saved: Path) -> None:
    weights = load_file(saved / WEIGHTS)
    del weights["conv_in.bias"], weights["norm_out.weight"]
    weights["ema.decay"] = torch.zeros(1)
    weights["conv_out.weight"] = torch.zeros(4, 16, 3, 3)
    save_file(weights, saved / WEIGHTS)
    message = refusal(saved)
    assert "do not fit its configuration; nothing was loaded" in message
    assert "2 missing: conv_in.bias, norm_out.weight" in message
    assert "1 unexpected: ema.decay" in message
    assert "1 of another shape: conv_out.weight is (4, 16, 3, 3), wanted (3, 16, 3, 3)" in message


def test_each_fault_alone_is_enough(saved: Path) -> None:
    whole = load_file(saved / WEIGHTS)
    for changes, wanted in (
        ({"conv_in.bias": None}, "1 missing: conv_in.bias"),
        ({"more": torch.zeros(1)}, "1 unexpected: more"),
        ({"conv_in.bias": torch.zeros(33)}, "1 of another shape: conv_in.bias is (33,), wanted (32,)"),
    ):
        weights = {key: tensor for key, tensor in {**whole, **changes}.items() if tensor is not None}
        save_file(weights, saved / WEIGHTS)
        assert wanted in refusal(saved)


def test_weights_of_another_architecture(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    tiny_vae().save_pretrained(other)
    shutil.copy(other / WEIGHTS, saved / WEIGHTS)
    message = refusal(saved)
    assert "missing: conv_in.weight" in message
    assert "unexpected: decoder.blocks.0" in message
    assert message.count("and more") == 2  # twenty names of each are enough


def test_weights_of_the_same_class_at_another_size(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    tiny_decoder(latent_channels=16).save_pretrained(other)
    shutil.copy(other / WEIGHTS, saved / WEIGHTS)
    assert "1 of another shape: conv_in.weight is (32, 16, 3, 3), wanted (32, 8, 3, 3)" in refusal(saved)


# Shards


def test_a_missing_shard_is_named(sharded: Path) -> None:
    lost = next(name for name in weight_files(sharded) if name != INDEX)
    (sharded / lost).unlink()
    assert f"lacks shards that its index names: {lost}; the folder holds" in refusal(sharded)


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    hurt = [name for name in weight_files(sharded) if name != INDEX][-1]
    (sharded / hurt).write_bytes((sharded / hurt).read_bytes()[:-8])
    assert f"{hurt} (" in refusal(sharded)
    assert "is not a whole safetensors file" in refusal(sharded)


def test_shards_that_lack_a_key(sharded: Path) -> None:
    hurt = sharded / next(name for name in weight_files(sharded) if name != INDEX)
    weights = load_file(hurt)
    lost = sorted(weights)[0]
    save_file({key: tensor for key, tensor in weights.items() if key != lost}, hurt)
    assert f"1 missing: {lost}" in refusal(sharded)


@pytest.mark.parametrize("name", ["../stolen.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_an_index_that_points_outside_its_folder(sharded: Path, name: str) -> None:
    """Even a sound file: an index may only name its neighbours."""
    save_file(tiny_decoder().state_dict(), sharded.parent / "stolen.safetensors")
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"conv_in.weight": name}}))
    message = refusal(sharded)
    assert "names files outside its folder" in message
    assert name in message
    assert "not to be trusted" in message


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {"conv_in.weight": 3}}', '{"weight_map": {"a": null}}'],
)
def test_a_broken_index(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text)
    message = refusal(sharded)
    assert f"{INDEX} is not a shard index" in message
    assert "save or download it again" in message


def test_saving_over_a_broken_checkpoint_mends_it(sharded: Path) -> None:
    (sharded / INDEX).write_text("{")
    (sharded / "config.json").write_text("")
    tiny_decoder().save_pretrained(sharded)
    assert_same(PixelDecoder.from_pretrained(sharded), tiny_decoder())


# Pickles


class Exploit:
    """Runs code when a careless reader unpickles it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.mark,)


def as_pickle(folder: Path, content: Any, name: str = "pytorch_model.bin") -> None:
    (folder / WEIGHTS).unlink(missing_ok=True)
    torch.save(content, folder / name)


def test_a_pickle_is_refused_unless_allowed(saved: Path) -> None:
    as_pickle(saved, tiny_decoder().state_dict())
    message = refusal(saved)
    assert "pytorch_model.bin is a pickle, which can run code when read; wanted safetensors" in message
    assert "pass allow_pickle=True" in message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
@pytest.mark.parametrize("wrap", [dict, lambda state: {"state_dict": dict(state), "step": 3}])
def test_an_allowed_pickle_is_read(saved: Path, name: str, wrap: Any) -> None:
    as_pickle(saved, wrap(tiny_decoder().state_dict()), name)
    assert_same(PixelDecoder.from_pretrained(saved, allow_pickle=True), tiny_decoder())


def test_safetensors_come_before_a_pickle(saved: Path) -> None:
    torch.save(Exploit(saved / "owned"), saved / "pytorch_model.bin")
    assert_same(PixelDecoder.from_pretrained(saved, allow_pickle=True), tiny_decoder())
    assert not (saved / "owned").exists()


@pytest.mark.parametrize("allow", [False, True])
def test_a_malicious_pickle_never_runs(saved: Path, allow: bool) -> None:
    as_pickle(saved, {"conv_in.bias": Exploit(saved / "owned")})
    message = refusal(saved, allow_pickle=allow)
    assert ("could not be read with the restricted unpickler" in message) == allow
    assert not (saved / "owned").exists()
    pickle.loads(pickle.dumps(Exploit(saved / "owned")))
    assert (saved / "owned").exists()  # the exploit does work on a reader that trusts it


def test_a_truncated_pickle(saved: Path) -> None:
    as_pickle(saved, tiny_decoder().state_dict())
    path = saved / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:1000])
    assert "could not be read with the restricted unpickler" in refusal(saved, allow_pickle=True)


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {0: torch.zeros(1)}, torch.zeros(3)])
def test_a_pickle_without_a_state_dict(saved: Path, content: Any) -> None:
    as_pickle(saved, content)
    assert "does not hold a plain state dict of tensors" in refusal(saved, allow_pickle=True)


def test_a_pickle_is_as_strict_as_safetensors(saved: Path) -> None:
    state = dict(tiny_decoder().state_dict())
    del state["conv_in.bias"]
    as_pickle(saved, state)
    assert "1 missing: conv_in.bias" in refusal(saved, allow_pickle=True)


def test_saving_to_something_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(CheckpointError, match=r"could not save to .*taken \(.*taken is a file\)"):
        tiny_decoder().save_pretrained(tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


def test_an_encoder_config_that_asks_for_another_model(tmp_path: Path) -> None:
    tiny_encoder().save_pretrained(tmp_path)
    edit_config(tmp_path, name="vit_tiny_patch16_225")
    with pytest.raises(ConfigError, match="has no model 'vit_tiny_patch16_225'; nearest: vit_tiny_patch16_224"):
        SemanticEncoder.from_pretrained(tmp_path)


def test_a_decoder_of_another_configuration_is_not_loaded_silently(saved: Path) -> None:
    """The weights fit the shapes only: an edit of ``config.json`` that changes them is found."""
    edit_config(saved, num_res_blocks=tiny_decoder_config().num_res_blocks + 1)
    assert "missing: levels.0.blocks.3.norm1.weight" in refusal(saved)
