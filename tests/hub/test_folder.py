"""A folder written by ``save_pretrained`` gives back the module, bit for bit, however it was written."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from psvae import PSVAE, PixelDecoder, SemanticEncoder
from tests.hub.checkpoints import BUILDERS, assert_same, fill, values, weight_files
from tests.tiny import PSVAE_VARIANTS, images, tiny_decoder, tiny_encoder, tiny_psvae

SINGLE, INDEX = ["model.safetensors"], "model.safetensors.index.json"
SHARD = "20KB"  # several shards of a tiny module


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("shard_size", ["5GB", SHARD])
def test_round_trip(tmp_path: Path, name: str, shard_size: str) -> None:
    module = BUILDERS[name]()
    module.save_pretrained(tmp_path, max_shard_size=shard_size)
    loaded = type(module).from_pretrained(tmp_path)
    assert_same(loaded, module)
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert (weight_files(tmp_path) == SINGLE) == (shard_size == "5GB")


@pytest.mark.parametrize("variant", PSVAE_VARIANTS)
def test_every_wiring_of_the_autoencoder(tmp_path: Path, variant: str) -> None:
    model = tiny_psvae(variant)
    model.latent_spec.mean.normal_()
    model.latent_spec.std.uniform_(0.5, 2.0)
    model.save_pretrained(str(tmp_path))  # a string is as good as a path
    loaded = PSVAE.from_pretrained(str(tmp_path))
    assert_same(loaded, model)
    assert torch.equal(loaded(images()).sample, model(images()).sample)
    assert torch.equal(loaded.encode(images()).latent_dist.mean, model.encode(images()).latent_dist.mean)


@pytest.mark.parametrize("grid", [None, (4, 4)])
def test_the_statistics_travel_with_the_weights(tmp_path: Path, grid: tuple[int, int] | None) -> None:
    model = tiny_psvae(statistics_grid=grid)
    model.latent_spec.mean.normal_()
    model.save_pretrained(tmp_path)
    loaded = PSVAE.from_pretrained(tmp_path)
    assert loaded.latent_spec.mean.shape == (8, *(grid or (1, 1)))
    assert torch.equal(loaded.latent_spec.mean, model.latent_spec.mean)


def test_buffers_that_no_file_holds_are_computed_again(tmp_path: Path) -> None:
    """DINOv3's rotary frequencies are constants: loading builds on the meta device and must fill them."""
    encoder = tiny_encoder(name="vit_small_patch16_dinov3")
    encoder.save_pretrained(tmp_path)
    loaded = SemanticEncoder.from_pretrained(tmp_path)
    assert [name for name, _ in encoder.named_buffers() if name not in encoder.state_dict()]
    assert_same(loaded, encoder)
    assert torch.equal(loaded(images()), encoder(images()))


@pytest.mark.parametrize("before", ["5GB", SHARD, "30KB"])
@pytest.mark.parametrize("after", ["5GB", SHARD])
def test_overwriting_leaves_one_checkpoint(tmp_path: Path, before: str, after: str) -> None:
    fill(tiny_decoder(), 1.0).save_pretrained(tmp_path, max_shard_size=before)
    fill(tiny_decoder(), 2.0).save_pretrained(tmp_path, max_shard_size=after)
    assert values(PixelDecoder.from_pretrained(tmp_path)) == {2.0}
    if after == "5GB":
        assert weight_files(tmp_path) == SINGLE
    else:
        index = json.loads((tmp_path / INDEX).read_text())
        assert weight_files(tmp_path) == sorted({*index["weight_map"].values(), INDEX})
    assert not (tmp_path / ".saving").exists()


def test_overwriting_with_another_class(tmp_path: Path) -> None:
    tiny_psvae().save_pretrained(tmp_path, max_shard_size=SHARD)
    encoder = tiny_encoder()
    encoder.save_pretrained(tmp_path)
    assert_same(SemanticEncoder.from_pretrained(tmp_path), encoder)


def test_saving_twice_into_shards_of_the_same_names(tmp_path: Path) -> None:
    """A third save finds the plain names free again; none of the three may lose a shard."""
    for value in (1.0, 2.0, 3.0):
        fill(tiny_decoder(), value).save_pretrained(tmp_path, max_shard_size=SHARD)
        assert values(PixelDecoder.from_pretrained(tmp_path)) == {value}


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_files_can_be_read_by_whom_any_new_file_can(tmp_path: Path, shard_size: str) -> None:
    tiny_psvae().save_pretrained(tmp_path / "model", max_shard_size=shard_size)
    (tmp_path / "new").touch()
    assert {file.stat().st_mode for file in (tmp_path / "model").iterdir()} == {(tmp_path / "new").stat().st_mode}


def test_other_files_are_kept(tmp_path: Path) -> None:
    kept = {"notes.txt": "mine", "optimizer.safetensors": "not weights of the model", "samples/0.txt": "deep"}
    for name, text in kept.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for shard_size in ("5GB", SHARD, "5GB"):
        tiny_decoder().save_pretrained(tmp_path, max_shard_size=shard_size)
    assert {name: (tmp_path / name).read_text() for name in kept} == kept


def test_a_deep_folder_is_made(tmp_path: Path) -> None:
    tiny_decoder().save_pretrained(tmp_path / "runs" / "one")
    assert_same(PixelDecoder.from_pretrained(tmp_path / "runs" / "one"), tiny_decoder())


def test_subfolder(tmp_path: Path) -> None:
    tiny_decoder().save_pretrained(tmp_path / "decoder", max_shard_size=SHARD)
    tiny_encoder().save_pretrained(tmp_path / "encoder")
    assert_same(PixelDecoder.from_pretrained(tmp_path, subfolder="decoder"), tiny_decoder())
    assert_same(SemanticEncoder.from_pretrained(tmp_path, subfolder="encoder"), tiny_encoder())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_of_the_result_and_not_of_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_psvae()
    model.save_pretrained(tmp_path)
    loaded = PSVAE.from_pretrained(tmp_path, dtype=dtype)
    assert {tensor.dtype for tensor in (*loaded.parameters(), *loaded.buffers())} == {dtype}
    assert_same(loaded, model.to(dtype))


def test_a_half_precision_file_loads_in_fp32(tmp_path: Path) -> None:
    model = tiny_psvae().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}  # noqa: SIM118  (not a dict)
    loaded = PSVAE.from_pretrained(tmp_path)
    assert {tensor.dtype for tensor in loaded.parameters()} == {torch.float32}
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor.float()), key


@pytest.mark.parametrize("device", ["cpu", "cpu:0", torch.device("cpu")])
def test_device(tmp_path: Path, device: str | torch.device) -> None:
    tiny_psvae().save_pretrained(tmp_path)
    loaded = PSVAE.from_pretrained(tmp_path, device=device)
    assert {tensor.device.type for tensor in (*loaded.parameters(), *loaded.buffers())} == {"cpu"}


@pytest.mark.gpu
@pytest.mark.parametrize("shard_size", ["5GB", SHARD])
def test_device_gpu(tmp_path: Path, shard_size: str) -> None:
    model = tiny_psvae().cuda()
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    loaded = PSVAE.from_pretrained(tmp_path, device="cuda")
    assert {tensor.device.type for tensor in (*loaded.parameters(), *loaded.buffers())} == {"cuda"}
    assert_same(loaded, model)


def test_saving_does_not_change_the_module(tmp_path: Path) -> None:
    model = tiny_psvae().train()
    model.encoder.requires_grad_(False)
    model.decoder.to(memory_format=torch.channels_last)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    assert model.training
    assert not model.encoder.vit.pos_embed.requires_grad
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    loaded = PSVAE.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, before[key]) for key, tensor in loaded.state_dict().items())


def test_loading_draws_no_random_number_and_needs_no_real_init(tmp_path: Path) -> None:
    tiny_psvae().save_pretrained(tmp_path)
    before = torch.get_rng_state()
    PSVAE.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loaded_module_trains_and_owns_its_memory(tmp_path: Path) -> None:
    """Weights must not be views of the file: training after loading may not write through it."""
    decoder = tiny_decoder()
    decoder.save_pretrained(tmp_path)
    loaded = PixelDecoder.from_pretrained(tmp_path).train()
    optimizer = torch.optim.SGD(loaded.parameters(), lr=1.0)
    nn.functional.mse_loss(loaded(torch.randn(1, 8, 2, 2)), torch.zeros(1, 3, 16, 16)).backward()
    optimizer.step()
    assert not torch.equal(loaded.conv_in.weight, decoder.conv_in.weight)
    assert_same(PixelDecoder.from_pretrained(tmp_path), decoder)
