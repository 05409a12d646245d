"""Damaged headers and configurations of every layout: our error or a correct load, never a deep traceback."""

import contextlib
import copy
import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.modules.module import register_module_module_registration_hook

from psvae import PSVAE, PixelVAE, PixelVAEConfig
from psvae.decoders import PixelDecoderConfig
from psvae.encoders import PixelEncoderConfig
from psvae.errors import PSVAEError
from tests.hub.checkpoints import BUILDERS
from tests.tiny import tiny_psvae

EXAMPLES = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def vae():
    halves = {"base_channels": 32, "channel_multipliers": (1, 2), "num_res_blocks": 1, "attention_levels": 0}
    return PixelVAE(
        PixelVAEConfig(PixelEncoderConfig(4, **halves), PixelDecoderConfig(4, **halves), scaling_factor=1.0)
    )


WRITERS = {
    "psvae": lambda model, folder: model.save_pretrained(folder),
    "diffusers": lambda model, folder: model.export_diffusers(folder),
    "ldm": lambda model, folder: model.export_ldm(folder),
}


@pytest.fixture(scope="module", params=WRITERS)
def whole(request, tmp_path_factory):
    """An intact folder of the layout, and the model in it."""
    folder, model = tmp_path_factory.mktemp(request.param), vae()
    WRITERS[request.param](model, folder)
    return folder, model


@pytest.fixture
def broken(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "copy")
    return tmp_path / "copy", whole[1]


def load_or_refuse(folder, model):
    """Refused by our own error, or loaded with exactly the weights that were saved."""
    try:
        loaded = PixelVAE.from_pretrained(folder)
    except PSVAEError:
        return
    wanted = model.state_dict()
    assert loaded.state_dict().keys() == wanted.keys()
    for key, tensor in loaded.state_dict().items():
        if not key.startswith("latent_spec."):  # its numbers may stand in the configuration
            assert tensor.equal(wanted[key]), key


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 10**6)
    | st.sampled_from([2**31 - 1, 10**12, 10**30])
    | st.floats()
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def paths(values, prefix=()):
    """Where every value of a nested dict stands."""
    for key, value in values.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from paths(value, (*prefix, key))


def with_one_value_changed(values, data):
    """A configuration in which one value, at any depth, is another or gone."""
    where = data.draw(st.sampled_from(sorted(paths(values))))
    inner = values
    for key in where[:-1]:
        inner = inner[key]
    if data.draw(st.booleans()):
        inner[where[-1]] = data.draw(JSON)
    else:
        del inner[where[-1]]
    return values


def with_one_entry_changed(raw, data):
    """The bytes of a safetensors file in whose header one entry is another or gone."""
    (length,) = struct.unpack("<Q", raw[:8])
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    key = data.draw(st.sampled_from(sorted(header)))
    change = data.draw(st.sampled_from(["drop", "rename", "shape", "dtype", "offsets", "anything"]))
    entry = header.pop(key)
    if change == "rename":
        header[data.draw(st.sampled_from(sorted(header)) | st.text(max_size=20))] = entry
    elif change != "drop":
        field = {"shape": "shape", "dtype": "dtype", "offsets": "data_offsets"}.get(change)
        value = data.draw(JSON if field != "shape" else st.lists(st.integers(0, 4096), max_size=5))
        header[key] = value if field is None or not isinstance(entry, dict) else {**entry, field: value}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@EXAMPLES
@given(data=st.data())
def test_a_config_with_one_value_changed(broken, whole, data):
    folder, model = broken
    values = json.loads((whole[0] / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(with_one_value_changed(values, data)))
    load_or_refuse(folder, model)


@EXAMPLES
@given(content=JSON)
def test_a_config_of_anything(broken, content):
    folder, model = broken
    (folder / "config.json").write_text(json.dumps(content))
    load_or_refuse(folder, model)


def weights_in(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


@EXAMPLES
@given(data=st.data())
def test_a_header_with_one_entry_changed(broken, whole, data):
    folder, model = broken
    weights_in(folder).write_bytes(with_one_entry_changed(weights_in(whole[0]).read_bytes(), data))
    load_or_refuse(folder, model)


@EXAMPLES
@given(where=st.integers(0, 4000), byte=st.integers(0, 255))
def test_a_header_with_one_byte_changed(broken, whole, where, byte):
    folder, model = broken
    raw = bytearray(weights_in(whole[0]).read_bytes())
    raw[where] = byte
    weights_in(folder).write_bytes(bytes(raw))
    load_or_refuse(folder, model)


@EXAMPLES
@given(raw=st.binary(max_size=64))
def test_weights_of_anything(broken, raw):
    folder, model = broken
    weights_in(folder).write_bytes(raw)
    load_or_refuse(folder, model)


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        (("vae", "depth"), 10**9, r"vae\.depth 1000000000; wanted a number of layers, and the weights have"),
        (
            ("encoder", "model_args", "depth"),
            10**9,
            r"encoder\.model_args\.depth 1000000000; wanted a number of layers",
        ),
        (("encoder", "model_args", "depth"), [10**9], r"encoder\.model_args\.depth \[1000000000\]; wanted a number"),
        (("encoder", "model_args", "embed_dim"), 3 * 2**40, "timm refused model_args"),
        (("decoder", "num_res_blocks"), 10**9, r"decoder\.num_res_blocks 1000000000; wanted a number of layers"),
        (("decoder", "latent_channels"), 2**31, "latent_channels is 2147483648; wanted a whole number up to"),
        (("statistics_grid",), [10**9, 10**9], "cannot be built: .*overflowed"),
        (("statistics_grid",), [0, 4], r"statistics_grid is \(0, 4\); wanted None or two numbers of at least 1"),
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_built(tmp_path, where, value, said):
    tiny_psvae().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    inner = values
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(PSVAEError, match=said):
        PSVAE.from_pretrained(tmp_path)


def test_the_intact_folder_loads(whole):
    folder, model = whole
    loaded = PixelVAE.from_pretrained(folder)
    assert all(torch.equal(loaded.state_dict()[key], tensor) for key, tensor in model.state_dict().items())


def places_of_whole_numbers(values, prefix=()):
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        if isinstance(value, dict | list):
            yield from places_of_whole_numbers(value, (*prefix, key))
        elif type(value) is int:
            yield (*prefix, key)


@contextlib.contextmanager
def at_most_submodules(limit, place):
    """Building more stops here, not when the memory is full."""
    count = 0

    def registered(*_):
        nonlocal count
        count += 1
        assert count <= limit, f"{place} builds more layers than the weights hold"

    hook = register_module_module_registration_hook(registered)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("name", BUILDERS)
def test_no_number_builds_more_layers_than_the_weights_hold(tmp_path, name):
    """A field that counts layers is known by its name: `psvae.hub.mixin.LAYER_COUNTS`."""
    module = BUILDERS[name]()
    module.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    whole = json.loads(path.read_text())
    for *outer, last in places_of_whole_numbers(whole):
        values = inner = copy.deepcopy(whole)
        for key in outer:
            inner = inner[key]
        inner[last] = 10**9
        path.write_text(json.dumps(values))
        with at_most_submodules(1000, (*outer, last)), contextlib.suppress(PSVAEError):
            type(module).from_pretrained(tmp_path)
