"""Damaged headers and configurations of encoders of other projects: our error or a correct load."""

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from psvae import SemanticEncoder
from psvae.errors import PSVAEError
from tests.hub.test_fuzz import EXAMPLES as MANY
from tests.hub.test_fuzz import JSON, weights_in, with_one_entry_changed, with_one_value_changed

pytest.importorskip("transformers", reason="transformers comes with psvae[dev]")

from tests.encoders import foreign

EXAMPLES = settings(MANY, max_examples=15)
FAMILIES = ("dinov2_reg_giant", "dinov3", "siglip", "mae")


def write_timm(folder):
    foreign.family_model("dinov2_reg").save_pretrained(folder / "theirs")
    SemanticEncoder.from_pretrained(folder / "theirs").export_timm(folder)
    shutil.rmtree(folder / "theirs")


def write_meta(folder):
    save_file(foreign.fill(foreign.MetaDINOv2(registers=2)).state_dict(), folder / "model.safetensors")


WRITERS = {
    "timm": write_timm,
    "meta": write_meta,
    **{family: lambda folder, f=family: foreign.family_model(f).save_pretrained(folder) for family in FAMILIES},
}


@pytest.fixture(scope="module", params=WRITERS)
def whole(request, tmp_path_factory):
    """An intact folder of the layout, and what is in it."""
    folder = tmp_path_factory.mktemp(request.param)
    WRITERS[request.param](folder)
    return folder, SemanticEncoder.from_pretrained(folder, final_norm="affine")


@pytest.fixture
def broken(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "copy")
    return tmp_path / "copy", whole[1]


def load_or_refuse(folder, encoder):
    """Refused by our own error, or loaded with exactly the weights that were saved."""
    try:
        loaded = SemanticEncoder.from_pretrained(folder, final_norm="affine")
    except PSVAEError:
        return
    wanted = encoder.state_dict()
    assert loaded.state_dict().keys() == wanted.keys()
    for key, tensor in loaded.state_dict().items():
        assert tensor.equal(wanted[key]), key


@EXAMPLES
@given(data=st.data())
def test_a_config_with_one_value_changed(broken, whole, data):
    folder, encoder = broken
    if not (folder / "config.json").exists():
        return  # Meta's files have none
    values = json.loads((whole[0] / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(with_one_value_changed(values, data)))
    load_or_refuse(folder, encoder)


@EXAMPLES
@given(content=JSON)
def test_a_config_of_anything(broken, content):
    folder, encoder = broken
    (folder / "config.json").write_text(json.dumps(content))
    load_or_refuse(folder, encoder)


@EXAMPLES
@given(data=st.data())
def test_a_header_with_one_entry_changed(broken, whole, data):
    folder, encoder = broken
    (folder / "model.safetensors").write_bytes(with_one_entry_changed(weights_in(whole[0]).read_bytes(), data))
    load_or_refuse(folder, encoder)


@pytest.mark.parametrize("shape", [(), (7,), (0, 0, 0, 0), (48, 3, 7, 7), (1, 17, 48)])
def test_a_tensor_of_another_shape(broken, shape):
    """Whole files in which one tensor after another has an unfit shape: the safetensors library takes them."""

    folder, _ = broken
    path = folder / "model.safetensors"
    state = load_file(path)
    for key in list(state)[:12] + list(state)[-4:]:
        if key.endswith("mask_token") or "head." in key or state[key].shape == shape:
            continue
        save_file({**state, key: torch.zeros(shape)}, path)
        with pytest.raises(PSVAEError):
            SemanticEncoder.from_pretrained(folder, final_norm="affine")
