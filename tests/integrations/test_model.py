"""What diffusers demands of a model and of an autoencoder, demand by demand (its own tester mixins)."""

import copy
import json
import pickle
import warnings

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers comes with psvae[diffusers]")

from psvae import PSVAE, AutoencoderPixelVAE, AutoencoderPSVAE, PixelVAE, PSVAEConfig  # noqa: E402
from psvae.errors import CheckpointError, ConfigError  # noqa: E402
from tests.base import assert_close, assert_equal, assert_same_state  # noqa: E402
from tests.tiny import fill_weights, images, tiny_pixel_vae, tiny_psvae, tiny_rae_config  # noqa: E402

WEIGHTS = "diffusion_pytorch_model"


@pytest.fixture(params=[AutoencoderPSVAE, AutoencoderPixelVAE], ids=lambda cls: cls.__name__)
def model(request):
    return make(request.param)


def make(cls):
    if cls is AutoencoderPSVAE:
        return cls.from_psvae(fill_weights(tiny_psvae()))
    return cls.from_pixel_vae(fill_weights(tiny_pixel_vae()))


def core_of(model):
    return model.to_psvae() if isinstance(model, AutoencoderPSVAE) else model.to_pixel_vae()


@torch.no_grad()
def paint(model, x=None):
    return model(images() if x is None else x).sample


# One implementation, one set of keys


def test_keys_and_numbers_are_the_cores(model):
    core, x = core_of(model), images()
    assert list(model.state_dict()) == list(core.state_dict())
    assert [name for name, _ in model.named_children()] == [name for name, _ in core.named_children()]
    with torch.no_grad():
        assert_equal([model(x).sample], [core(x).sample])
        wanted, got = core.encode(x).latent_dist, model.encode(x).latent_dist
        assert_equal([got.mean, got.std], [wanted.mean, wanted.std])
        assert_equal([model.decode(got.mode()).sample], [core.decode(got.mode()).sample])


def test_weights_are_shared_with_the_core(model):
    parameter = next(core_of(model).decoder.parameters())
    with torch.no_grad():
        parameter.zero_()
    assert next(model.decoder.parameters()) is parameter


@pytest.mark.parametrize("config", [tiny_rae_config(), None], ids=["rae", "psvae"])
def test_the_core_loads_the_folder_too(tmp_path, config):
    core = fill_weights(PSVAE(config) if config else tiny_psvae()).eval()
    core.latent_spec.mean.fill_(0.5)
    AutoencoderPSVAE.from_psvae(core).save_pretrained(tmp_path)
    loaded = PSVAE.from_pretrained(tmp_path)
    assert loaded.config == core.config
    assert_same_state(loaded, core)


def test_the_pixel_core_loads_the_folder_too(tmp_path):
    make(AutoencoderPixelVAE).save_pretrained(tmp_path)
    assert_same_state(PixelVAE.from_pretrained(tmp_path), fill_weights(tiny_pixel_vae()))


# Configuration


def test_config_is_what_callers_read():
    config = make(AutoencoderPSVAE).config
    assert (config.scaling_factor, config.shift_factor, config["latent_channels"]) == (1.0, 0.0, 8)
    assert (config.latents_mean, config.latents_std, config.force_upcast) == (None, None, False)
    assert 2 ** (len(config.block_out_channels) - 1) == config.spatial_compression_ratio == 8
    assert len(config.encoder_block_out_channels) == len(config.block_out_channels)
    pixel = make(AutoencoderPixelVAE).config
    assert (pixel.scaling_factor, pixel.shift_factor) == (0.18215, None)
    paper = PSVAEConfig.dinov2_base()
    assert len(paper.block_out_channels) == 5


def test_a_contradiction_is_refused():
    core = tiny_psvae().config.to_dict()
    with pytest.raises(ConfigError, match="latent_channels is 4; by the core's configuration it is 8"):
        AutoencoderPSVAE(core=core, latent_channels=4)
    with pytest.raises(ConfigError, match="no field 'sample_sise'; did you mean 'sample_size'"):
        AutoencoderPSVAE(core={**core, "sample_sise": 64})


def test_getattr(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.config.latent_channels == 8
        assert model.use_slicing is False
        assert callable(model.enable_tiling)
    with pytest.warns(FutureWarning, match="Accessing config attribute"):
        assert model.latent_channels == 8
    with pytest.raises(AttributeError, match=f"'{type(model).__name__}' object has no attribute 'no_such'"):
        model.no_such  # noqa: B018


# Save and load


def test_save_and_load(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == type(model).__name__
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert not loaded.training
    assert loaded.config["core"] == model.config["core"]
    assert [name for name, x in (*loaded.named_parameters(), *loaded.named_buffers()) if x.is_meta] == []
    assert_same_state(loaded, model)
    assert_equal([paint(loaded)], [paint(model)])
    assert_equal([paint(type(model).from_pretrained(tmp_path, low_cpu_mem_usage=False))], [paint(model)])


def test_variant(model, tmp_path):
    model.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / f"{WEIGHTS}.fp16.safetensors").exists()
    assert_equal([paint(type(model).from_pretrained(tmp_path, variant="fp16"))], [paint(model)])
    with pytest.raises(OSError, match="diffusion_pytorch_model"):
        type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards(model, tmp_path, variant):
    model.save_pretrained(tmp_path, max_shard_size="50KB", variant=variant)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_equal([paint(type(model).from_pretrained(tmp_path, variant=variant))], [paint(model)])
    assert_same_state(type(core_of(model)).from_pretrained(tmp_path, variant=variant), core_of(model))


@pytest.mark.parametrize("name", ["torch_dtype", "dtype"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtype(model, tmp_path, name, dtype):
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, **{name: dtype})
    assert loaded.dtype == dtype
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}


@pytest.mark.parametrize("fault", ["missing", "unexpected"])
def test_loading_is_strict(model, tmp_path, fault):
    from safetensors.torch import load_file, save_file

    model.save_pretrained(tmp_path)
    path = tmp_path / f"{WEIGHTS}.safetensors"
    state = load_file(path)
    if fault == "missing":
        del state["decoder.conv_in.bias"]
    else:
        state["decoder.extra"] = torch.zeros(1)
    save_file(state, path)
    with pytest.raises(CheckpointError, match=rf"{fault} keys: decoder\.(conv_in\.bias|extra)"):
        type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize("subfolder", ["", "vae"])
def test_folders_of_other_kinds_load_as_the_core_loads_them(model, tmp_path, subfolder):
    """So that an SD-VAE's folder needs one other import line."""
    core = core_of(model)
    core.save_pretrained(tmp_path / "own" / subfolder)
    loaded = type(model).from_pretrained(tmp_path / "own", subfolder=subfolder or None, torch_dtype=torch.bfloat16)
    assert_same_state(loaded, core.bfloat16())
    assert (loaded.dtype, loaded.training) == (torch.bfloat16, False)


def test_a_model_of_the_package_loads_without_the_network(monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was used"))
    loaded = AutoencoderPSVAE.from_pretrained("psvae-tiny")
    assert_same_state(loaded, PSVAE.from_pretrained("psvae-tiny"))


def test_an_autoencoder_kl_folder_loads(tmp_path):
    core = fill_weights(tiny_pixel_vae())
    core.export_diffusers(tmp_path)
    loaded = AutoencoderPixelVAE.from_pretrained(tmp_path)
    assert_same_state(loaded, core)
    assert loaded.config.scaling_factor == 0.18215
    with pytest.raises(CheckpointError, match="device_map and output_loading_info do not apply"):
        AutoencoderPixelVAE.from_pretrained(tmp_path, device_map="auto")


def test_a_folder_of_another_model_is_refused(model, tmp_path):
    diffusers.UNet2DModel(
        block_out_channels=(8, 8), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        layers_per_block=1, norm_num_groups=4,
    ).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(CheckpointError, match=r"config\.json of 'UNet2DModel'"):
        type(model).from_pretrained(tmp_path)
    with pytest.raises(OSError, match="absent"):
        type(model).from_pretrained(tmp_path / "absent")


def test_a_misshapen_tensor_is_named(model, tmp_path):
    from safetensors.torch import load_file, save_file

    model.save_pretrained(tmp_path)
    path = tmp_path / f"{WEIGHTS}.safetensors"
    save_file({**load_file(path), "decoder.conv_in.bias": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match=rf"{tmp_path} cannot be loaded: .*decoder\.conv_in\.bias"):
        type(model).from_pretrained(tmp_path)


def test_copies(model):
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert core_of(twin) is not core_of(model)
        assert next(core_of(twin).decoder.parameters()) is next(twin.decoder.parameters())
        assert_equal([paint(twin)], [paint(model)])


@torch.no_grad()
def test_a_replaced_child_is_the_one_that_runs(model):
    """Scripts write ``vae.decoder = torch.compile(vae.decoder)``."""

    class Zero(torch.nn.Module):
        def forward(self, z):
            return z.new_zeros(len(z), 3, 32, 32)

    model.decoder = Zero()
    assert not paint(model).any()
    assert not core_of(model)(images()).sample.any()


def test_from_config_builds_the_same(model):
    """What EMAModel and schedulers' scripts do."""
    assert type(model).from_config(model.config).config["core"] == model.config["core"]
    again = type(model)(model.config["core"])
    assert type(model).from_config(again.config).config["core"] == model.config["core"]


# Calls


@torch.no_grad()
def test_outputs(model):
    x = images()
    assert_equal([model(x, return_dict=False)[0]], [model(x).sample])
    assert model(sample=x).sample.shape == x.shape
    posterior = model.encode(x).latent_dist
    assert model.encode(x)["latent_dist"].mean.equal(posterior.mean)
    assert model.encode(x, return_dict=False)[0].mean.equal(posterior.mean)
    z = posterior.sample(torch.Generator().manual_seed(0))
    decoded = model.decode(z, return_dict=False, generator=torch.Generator())
    assert_equal([decoded[0]], [model.decode(z).sample])
    drawn = model(x, sample_posterior=True, generator=torch.Generator().manual_seed(0)).sample
    assert_close([drawn], [model.decode(z).sample])
    assert not drawn.equal(model(x).sample)


def test_determinism(model):
    assert_equal([paint(model)], [paint(model)])


@torch.no_grad()
def test_slicing(model):
    x = images(3)
    whole = model.encode(x).latent_dist.mode()
    painted = model.decode(whole).sample
    model.enable_slicing()
    assert model.use_slicing
    assert_close([model.encode(x).latent_dist.mode(), model.decode(whole).sample], [whole, painted])
    model.disable_slicing()
    assert not model.use_slicing


@torch.no_grad()
@pytest.mark.parametrize("core", [tiny_psvae, tiny_pixel_vae])
def test_tiling(core):
    """Random weights and small tiles are the worst case: group norms see a quarter of the image."""
    model = AutoencoderPSVAE.from_psvae(core()) if core is tiny_psvae else AutoencoderPixelVAE.from_pixel_vae(core())
    x = images(1, 64, 64)
    whole = paint(model, x)
    z = model.encode(x).latent_dist.mode()
    model.enable_tiling()
    assert model.use_tiling
    bare = model.decode(z).sample
    model.enable_tiling(tile_sample_min_height=48, tile_sample_min_width=48, tile_sample_stride_height=16)
    small = model.decode(z).sample
    assert not bare.equal(small)
    for tiled in (bare, small):
        assert not tiled.equal(whole)
        assert (tiled - whole).abs().mean() < 0.5
    model.disable_tiling()
    assert_close([model.decode(z).sample], [whole])


@torch.no_grad()
def test_forward_slices_and_tiles(model):
    """As AutoencoderKL's: `forward` is what diffusers' own test of tiling calls."""
    sizes, x = [], images(2, 64, 64)
    wanted = paint(model, x)
    model.decoder.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape)))
    model.use_slicing = True
    assert_close([paint(model, x)], [wanted])
    assert sizes == [(1, 3, 64, 64)] * 2
    sizes.clear()
    model.use_tiling = True
    tiled = paint(model, x)
    assert set(sizes) == {(1, 3, 32, 32)}
    assert 0 < (tiled - wanted).abs().mean() < 0.5
    model.disable_tiling()
    model.disable_slicing()
    assert_equal([paint(model, x)], [wanted])


@torch.no_grad()
@pytest.mark.parametrize("tile", [32, 64])
def test_tiling_is_no_further_off_than_that_of_autoencoder_kl(tmp_path, tile):
    core = tiny_pixel_vae(sample_size=tile)
    core.export_diffusers(tmp_path)
    x = images(1, 128, 128)
    errors = []
    for model in (AutoencoderPixelVAE.from_pixel_vae(core), diffusers.AutoencoderKL.from_pretrained(tmp_path)):
        z = model.encode(x).latent_dist.mode()
        whole = model.decode(z).sample
        model.enable_tiling()
        differences = (model.encode(x).latent_dist.mode() - z).abs(), (model.decode(z).sample - whole).abs()
        errors.append([number for d in differences for number in (d.max(), d.mean())])
    for ours, theirs in zip(*errors, strict=True):
        assert 0 < ours < 1.02 * theirs


# Training


def gradients(model):
    model.zero_grad()
    model.train()
    model(images()).sample.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_training_and_gradient_checkpointing(model):
    wanted = gradients(model)
    assert len(wanted) > 10
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    got = gradients(model)
    assert got.keys() == wanted.keys()
    assert_close([got[name] for name in wanted], wanted.values())
    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing


def test_train_reaches_the_core(model):
    model.train()
    model(images())
    assert core_of(model).training
    model.eval()
    paint(model)
    assert not core_of(model).training


# Memory


def test_offload_hooks_fire_on_encode_and_decode(model):
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Count(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            Count.calls += 1
            return args, kwargs

    add_hook_to_module(model, Count())
    with torch.no_grad():
        z = model.encode(images()).latent_dist.mode()
        assert Count.calls == 1
        model.decode(z)
        assert Count.calls == 2
        model(images())
    assert Count.calls == 3


def test_layerwise_casting(model):
    wanted = paint(model)
    model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    assert torch.float16 in {parameter.dtype for parameter in model.parameters()}
    assert_close([paint(model)], [wanted], tolerance=5e-2)


@torch.no_grad()
def test_sequential_offload(model):
    """As ``pipeline.enable_sequential_cpu_offload``: each module's own weights come for its own call alone."""
    from accelerate import cpu_offload

    wanted = paint(model)
    z = model.encode(images()).latent_dist.mode()
    cpu_offload(model, torch.device("cpu"), offload_buffers=len(model._parameters) > 0)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert_equal([model.encode(images()).latent_dist.mode(), model.decode(z).sample, paint(model)], [z, wanted, wanted])


def test_disk_offload(model, tmp_path):
    """Weights that wait on the disk come back for each half."""
    wanted = paint(model)
    model.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    loaded = type(model).from_pretrained(
        tmp_path / "saved", device_map="auto", max_memory={"cpu": "100KB"}, offload_folder=tmp_path / "offload"
    )
    assert "disk" in loaded.hf_device_map.values()
    assert_equal([paint(loaded)], [wanted])


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offload(model, kind):
    """Without an accelerator the devices are the same: this shows that the hooks bring what they took away."""
    wanted = paint(model)
    cpu, blocks = torch.device("cpu"), None if kind == "leaf_level" else 1
    model.enable_group_offload(cpu, offload_device=cpu, offload_type=kind, num_blocks_per_group=blocks)
    with torch.no_grad():
        assert_equal([model.decode(model.encode(images()).latent_dist.mode()).sample, paint(model)], [wanted, wanted])


def test_statistics_follow_the_latents():
    """No hook fires for them: they belong to no module that is called."""
    spec, z = core_of(make(AutoencoderPSVAE)).latent_spec, torch.zeros(1, 8, 4, 4, device="meta")
    assert spec.normalize(z).is_meta
    assert spec.denormalize(z).is_meta
