"""Damaged headers and configurations of RAE's decoder and of AutoencoderRAE: our error or a correct load."""

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from psvae import PSVAE, ViTPixelDecoder
from psvae.errors import PSVAEError
from tests.hub.test_fuzz import EXAMPLES as MANY
from tests.hub.test_fuzz import JSON, weights_in, with_one_entry_changed, with_one_value_changed

pytest.importorskip("diffusers.models.autoencoders.autoencoder_rae", reason="comes with psvae[dev]")
pytest.importorskip("transformers", reason="comes with psvae[dev]")

from tests.hub.test_keymaps_rae import original_names, reference
from tests.hub.test_rae import siglip_rae

EXAMPLES = settings(MANY, max_examples=25)


def write_decoder(folder):
    save_file(original_names(reference()), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"decoder_num_attention_heads": 3, "layer_norm_eps": 1e-12}))


# who reads it, and who writes it
LAYOUTS = {"decoder": (ViTPixelDecoder, write_decoder), "siglip": (PSVAE, lambda folder: siglip_rae(folder, ""))}


@pytest.fixture(scope="module", params=LAYOUTS)
def whole(request, tmp_path_factory):
    """An intact folder of the layout, and what is in it."""
    reader, write = LAYOUTS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    write(folder)
    return folder, reader.from_pretrained(folder)


@pytest.fixture
def broken(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "copy")
    return tmp_path / "copy", whole[1]


def load_or_refuse(folder, model, made=()):
    """Refused by our own error, or loaded with exactly the weights that were saved, but for what is ``made``."""
    try:
        loaded = type(model).from_pretrained(folder)
    except PSVAEError:
        return
    wanted = model.state_dict()
    assert loaded.state_dict().keys() == wanted.keys()
    for key, tensor in loaded.state_dict().items():
        assert key in made or tensor.equal(wanted[key]), key


@EXAMPLES
@given(data=st.data())
def test_a_config_with_one_value_changed(broken, whole, data):
    folder, model = broken
    values = json.loads((whole[0] / "config.json").read_text())
    changed = with_one_value_changed(dict(values), data)
    (folder / "config.json").write_text(json.dumps(changed))
    of_grid = ("encoder_input_size", "encoder_patch_size")  # in the configuration alone: the table is made for them
    same = all(values.get(name) == changed.get(name) for name in of_grid)
    load_or_refuse(folder, model, () if same else ("decoder.positions",))


@EXAMPLES
@given(content=JSON)
def test_a_config_of_anything(broken, content):
    folder, model = broken
    (folder / "config.json").write_text(json.dumps(content))
    load_or_refuse(folder, model)


@EXAMPLES
@given(data=st.data())
def test_a_header_with_one_entry_changed(broken, whole, data):
    folder, model = broken
    weights_in(folder).write_bytes(with_one_entry_changed(weights_in(whole[0]).read_bytes(), data))
    load_or_refuse(folder, model)


@EXAMPLES
@given(where=st.integers(0, 8000), byte=st.integers(0, 255))
def test_a_header_with_one_byte_changed(broken, whole, where, byte):
    folder, model = broken
    raw = bytearray(weights_in(whole[0]).read_bytes())
    raw[where % (8 + int.from_bytes(raw[:8], "little"))] = byte
    weights_in(folder).write_bytes(bytes(raw))
    load_or_refuse(folder, model)
