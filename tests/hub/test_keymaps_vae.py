"""PixelVAE against diffusers' AutoencoderKL on random weights, in every layout that it reads and writes."""

import json
import re
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from psvae import PixelVAE, PixelVAEConfig
from psvae.decoders import PixelDecoderConfig
from psvae.encoders import PixelEncoderConfig
from psvae.errors import CheckpointError, CheckpointWarning, ConfigError, PSVAEError
from psvae.hub.keymaps.autoencoder_kl import AUTOENCODER_KL
from psvae.hub.keymaps.ldm import LDM
from tests.base import assert_close, assert_equal, assert_same_state
from tests.tiny import fill_weights, images, tiny_pixel_vae, tiny_pixel_vae_config

diffusers = pytest.importorskip("diffusers", reason="diffusers comes with psvae[dev]")

WEIGHTS = "diffusion_pytorch_model.safetensors"
SHAPE = {"latent_channels": 4, "block_out_channels": (32, 64, 64, 64), "layers_per_block": 1, "norm_num_groups": 32}
# name → (how the family differs from SD, in AutoencoderKL's words)
FAMILIES = {
    "sd": {},
    "sdxl": {"scaling_factor": 0.13025, "sample_size": 1024},
    "reals": {"sample_size": 256},
    "sd3": {
        "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 1.5305,
        "shift_factor": 0.0609, "force_upcast": True, "sample_size": 1024,
    },
    "flux": {
        "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 0.3611,
        "shift_factor": 0.1159, "sample_size": 1024,
    },
    "va_vae": {"latent_channels": 32, "block_out_channels": (32, 32, 64, 64, 128), "attends": True},
    "mar": {"latent_channels": 16, "block_out_channels": (32, 32, 64, 64, 128), "attends": True},
    "latents_mean": {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]},
    "no_middle_attention": {"mid_block_add_attention": False},
}  # fmt: skip
WITH_LDM_FILES = ("sd", "sdxl", "reals", "sd3", "flux", "va_vae", "mar")


def reference(**fields):
    """diffusers' own AutoencoderKL, weights filled."""
    values = {**SHAPE, **fields}
    attends = values.pop("attends", False)
    levels = len(values["block_out_channels"])
    down = ["DownEncoderBlock2D"] * levels
    up = ["UpDecoderBlock2D"] * levels
    if attends:
        down[-1], up[0] = "AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D"
    model = diffusers.AutoencoderKL(down_block_types=tuple(down), up_block_types=tuple(up), **values)
    return fill_weights(model).eval()


@torch.no_grad()
def assert_same_outputs(ours, theirs, size=(32, 48)):
    x = images(2, *size)
    wanted, got = theirs.encode(x).latent_dist, ours.encode(x).latent_dist
    assert wanted.mean.std() > 1e-3
    assert_close([got.mean, got.logvar, got.std], [wanted.mean, wanted.logvar, wanted.std])
    assert_close([ours.decode(wanted.mean).sample], [theirs.decode(wanted.mean).sample])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A diffusers folder of every family, and the model that wrote it."""
    found = {}
    for name, fields in FAMILIES.items():
        model = reference(**fields)
        found[name] = (tmp_path_factory.mktemp(name), model)
        model.save_pretrained(found[name][0])
    return found


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of SD's, to break."""
    for path in saved["sd"][0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


# diffusers


@pytest.mark.parametrize("family", FAMILIES)
def test_reads_a_diffusers_folder(saved, family, caplog):
    folder, model = saved[family]
    with caplog.at_level("INFO", "psvae"):
        vae = PixelVAE.from_pretrained(folder)
    assert "is a checkpoint of diffusers AutoencoderKL; not needed: nothing" in caplog.text
    assert not vae.training
    assert_same_outputs(vae, model, (32, 48))
    for name in ("scaling_factor", "shift_factor", "force_upcast", "sample_size", "latent_channels"):
        assert getattr(vae.config, name) == model.config[name], name
    assert list(vae.config.block_out_channels) == list(model.config.block_out_channels)
    mean = model.config.latents_mean or [0.0] * vae.config.latent_channels
    assert vae.latent_spec.mean.flatten().tolist() == pytest.approx(mean)


@pytest.mark.parametrize("family", FAMILIES)
def test_writes_a_diffusers_folder(saved, family, tmp_path):
    """Back to the file that was read: same names, same bits, same configuration."""
    folder, model = saved[family]
    PixelVAE.from_pretrained(folder).export_diffusers(tmp_path)
    assert_equal_files(tmp_path / WEIGHTS, folder / WEIGHTS)
    again, info = diffusers.AutoencoderKL.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_same_state(again, model)
    hidden = {"_name_or_path", "_diffusers_version", "_use_default_values"}
    got, wanted = ({k: v for k, v in m.config.items() if k not in hidden} for m in (again, model))
    assert json.dumps(got, sort_keys=True) == json.dumps(wanted, sort_keys=True)


def assert_equal_files(got, wanted):
    got, wanted = load_file(got), load_file(wanted)
    assert got.keys() == wanted.keys()
    assert_equal([got[key] for key in wanted], wanted.values())


def test_shards_and_variants(saved, tmp_path):
    _, model = saved["sd"]
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert_same_outputs(PixelVAE.from_pretrained(tmp_path / "shards"), model)
    model.save_pretrained(tmp_path / "fp16", variant="fp16")
    assert_same_outputs(PixelVAE.from_pretrained(tmp_path / "fp16", variant="fp16"), model)
    model.save_pretrained(tmp_path / "both", variant="fp16", max_shard_size="100KB")
    assert_same_outputs(PixelVAE.from_pretrained(tmp_path / "both", variant="fp16"), model)
    with pytest.raises(
        CheckpointError, match="has no weights of variant 'bf16'; pass variant='fp16': the folder holds"
    ):
        PixelVAE.from_pretrained(tmp_path / "fp16", variant="bf16")
    with pytest.raises(CheckpointError, match=r"has no model.safetensors .*the folder holds config.json, diffusion"):
        PixelVAE.from_pretrained(tmp_path / "fp16")


@pytest.mark.parametrize("as_kernels", [False, True])
def test_legacy_attention_names(folder, saved, as_kernels):
    """Files of 2022: query, key, value, proj_attn, some of them as 1x1 convolutions."""
    state = load_file(folder / WEIGHTS)
    legacy = {}
    for key, tensor in state.items():
        for now, then in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            if f".{now}." in key:
                key = key.replace(now, then)
                tensor = tensor[..., None, None].contiguous() if as_kernels and tensor.ndim == 2 else tensor
        legacy[key] = tensor
    assert legacy.keys() != state.keys()
    save_file(legacy, folder / WEIGHTS)
    assert_same_outputs(PixelVAE.from_pretrained(folder), saved["sd"][1])


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_training_are_taken_off(folder, saved, prefix):
    save_file({prefix + key: x for key, x in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    assert_same_outputs(PixelVAE.from_pretrained(folder), saved["sd"][1])


def test_fields_over_those_of_the_file(folder):
    assert PixelVAE.from_pretrained(folder, scaling_factor=0.5).config.scaling_factor == 0.5
    with pytest.raises(ConfigError, match="no field 'scaling_factr'; did you mean 'scaling_factor'"):
        PixelVAE.from_pretrained(folder, scaling_factr=0.5)


def test_own_format_comes_first(folder, tmp_path_factory):
    own = tmp_path_factory.mktemp("own")
    vae = PixelVAE.from_pretrained(folder)
    vae.save_pretrained(own)
    again = PixelVAE.from_pretrained(own)
    assert again.config == vae.config
    assert_same_state(again, vae)


# LDM


def small_vae():
    """32 groups: LDM files do not say how many."""
    halves = {"base_channels": 32, "channel_multipliers": (1, 1, 2, 2), "num_res_blocks": 1, "attention_levels": 0}
    config = PixelVAEConfig(PixelEncoderConfig(4, **halves), PixelDecoderConfig(4, **halves), scaling_factor=1.0)
    return PixelVAE(config)


def ldm_state(vae, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)
        vae.export_ldm(tmp_path)
    return load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize("family", WITH_LDM_FILES)
def test_ldm_names_are_those_that_diffusers_converts(saved, family, tmp_path):
    """Our LDM file, through diffusers' own converter, gives the AutoencoderKL that we started from."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    folder, model = saved[family]
    state = ldm_state(PixelVAE.from_pretrained(folder), tmp_path)
    converted = convert_ldm_vae_checkpoint(state, model.config)
    names = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    for key, tensor in state.items():  # attention outside the middle, which that converter does not know
        found = re.fullmatch(r"(encoder\.down|decoder\.up)\.(\d+)\.attn\.(\d+)\.(\w+)\.(\w+)", key)
        if found:
            half, level, index, part, leaf = found.groups()
            level = int(level) if "down" in half else len(model.config.block_out_channels) - 1 - int(level)
            place = f"{half}_blocks.{level}.attentions.{index}.{names[part]}.{leaf}"
            converted.pop(key, None)
            converted[place] = tensor.reshape(model.state_dict()[place].shape)
    again = reference(**FAMILIES[family])
    again.load_state_dict(converted, strict=True)
    assert_same_state(again, model)


@pytest.mark.parametrize("family", WITH_LDM_FILES)
def test_reads_an_ldm_file(saved, family, tmp_path, caplog):
    folder, model = saved[family]
    state = ldm_state(PixelVAE.from_pretrained(folder), tmp_path / "a")
    file = tmp_path / "vae.safetensors"
    save_file(state, file)
    with caplog.at_level("INFO", "psvae"):
        vae = PixelVAE.from_pretrained(file, scaling_factor=model.config.scaling_factor)
    assert "is a checkpoint of LDM" in caplog.text
    assert_same_outputs(vae, model)
    assert vae.config.scaling_factor == model.config.scaling_factor


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
def test_an_ldm_pickle_needs_permission(saved, tmp_path, wrap):
    folder, model = saved["va_vae"]
    state = ldm_state(PixelVAE.from_pretrained(folder), tmp_path / "a")
    state["loss.discriminator.main.0.weight"] = torch.zeros(3)  # training's own tensors, known and left out
    torch.save(wrap(state), tmp_path / "vavae.ckpt")
    with pytest.raises(CheckpointError, match="is a pickle, which can run code"):
        PixelVAE.from_pretrained(tmp_path / "vavae.ckpt")
    assert_same_outputs(PixelVAE.from_pretrained(tmp_path / "vavae.ckpt", allow_pickle=True), model)


OTHERS = {  # names of a whole generator's file that are not the autoencoder's
    "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
    "model_ema.decay": (),
    "cond_stage_model.transformer.text_model.embeddings.position_ids": (1, 77),
    "betas": (10,),
    **{f"model.diffusion_model.time_embed.{i}.weight": (2,) for i in range(30)},
}


@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("root", ["first_stage_model.", "vae."])
@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_reads_the_autoencoder_in_the_file_of_a_whole_generator(saved, family, root, ending, tmp_path, caplog):
    folder, model = saved[family]
    state = {root + key: x for key, x in ldm_state(PixelVAE.from_pretrained(folder), tmp_path / "a").items()}
    state |= {name: torch.zeros(shape) for name, shape in OTHERS.items()}
    file = tmp_path / f"model{ending}"
    save_file(state, file) if ending == ".safetensors" else torch.save({"state_dict": state}, file)
    with caplog.at_level("INFO", "psvae"):
        vae = PixelVAE.from_pretrained(file, allow_pickle=True, shift_factor=0.5)
    assert f"FLUX), read from the names that begin with '{root}'; it holds no scaling_factor: 1" in caplog.text
    assert " and 14 more" in caplog.text
    assert_same_outputs(vae, model)
    assert (vae.config.scaling_factor, vae.config.shift_factor) == (1.0, 0.5)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda s: s.pop("vae.encoder.norm_out.bias"), "1 missing: vae.encoder.norm_out.bias"),
        (lambda s: s.update({"vae.encoder.extra": torch.zeros(1)}), "1 unexpected: vae.encoder.extra"),
        (lambda s: s.update({"vae": torch.zeros(1)}), "1 unexpected: vae"),
    ],
)
def test_a_faulty_file_of_a_whole_generator(tmp_path, fault, message):
    state = {"vae." + key: x for key, x in ldm_state(small_vae(), tmp_path).items()} | {"unet.a": torch.zeros(1)}
    fault(state)
    save_file(state, tmp_path / "whole.safetensors")
    with pytest.raises(CheckpointError, match=message):
        PixelVAE.from_pretrained(tmp_path / "whole.safetensors")


def rewrite(path, change):
    state = load_file(path)
    save_file(state | change(state), path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_quantised_weights_are_refused(folder, dtype):
    rewrite(folder / WEIGHTS, lambda s: {"encoder.conv_in.bias": s["encoder.conv_in.bias"].to(dtype)})
    with pytest.raises(CheckpointError, match=rf"encoder.conv_in.bias of .* holds {dtype}; wanted floating point"):
        PixelVAE.from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_become_the_one_asked_for(folder, dtype):
    rewrite(folder / WEIGHTS, lambda s: {name: tensor.to(dtype) for name, tensor in s.items()})
    assert {x.dtype for x in PixelVAE.from_pretrained(folder).state_dict().values()} == {torch.float32}
    half = PixelVAE.from_pretrained(folder, dtype=torch.float16)
    assert {x.dtype for x in half.state_dict().values()} == {torch.float16}


def test_tensors_tied_in_a_pickle_are_apart_in_the_model(folder, tmp_path_factory):
    state, first, second = load_file(folder / WEIGHTS), *(f"encoder.mid_block.resnets.{i}.norm1.weight" for i in (0, 1))
    torch.save(state | {second: state[first]}, folder / "diffusion_pytorch_model.fp16.bin")
    vae = PixelVAE.from_pretrained(folder, variant="fp16", allow_pickle=True)
    one, other = vae.encoder.middle.block1.norm1.weight, vae.encoder.middle.block2.norm1.weight
    assert torch.equal(one, other)
    assert one.data_ptr() != other.data_ptr()
    vae.save_pretrained(tmp_path_factory.mktemp("own"))  # safetensors takes no shared storage


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants:UserWarning")  # torch's, on reading
def test_a_sparse_tensor_is_refused(folder):
    state = load_file(folder / WEIGHTS)
    state["encoder.conv_in.bias"] = state["encoder.conv_in.bias"].to_sparse()
    torch.save(state, folder / "x.pt")
    with pytest.raises(CheckpointError, match=r"'encoder.conv_in.bias' is a tensor of torch.sparse_coo"):
        PixelVAE.from_pretrained(folder / "x.pt", allow_pickle=True)


def test_a_whole_pipeline_says_which_subfolder(folder):
    whole = folder / "whole"
    (whole / "vae").mkdir(parents=True)
    for name in ("config.json", WEIGHTS):
        (whole / "vae" / name).write_bytes((folder / name).read_bytes())
    (whole / "model_index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds a pipeline, which is many models; pass subfolder='vae'"):
        PixelVAE.from_pretrained(whole)
    PixelVAE.from_pretrained(whole, subfolder="vae")


class Callback:
    """Something that a training framework leaves in its checkpoints."""


def test_a_pickle_holding_code_is_refused_by_name(tmp_path):
    torch.save({"state_dict": {}, "callbacks": Callback()}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=r"asks for .*Callback, which is code"):
        PixelVAE.from_pretrained(tmp_path / "x.ckpt", allow_pickle=True)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda s: s.pop("decoder.conv_in.weight"), "needs decoder.conv_in.weight to tell its architecture"),
        (lambda s: s.pop("encoder.down.1.block.0.norm1.weight"), "1 missing: encoder.down.1.block.0.norm1.weight"),
        (lambda s: s.update({"encoder.extra": torch.zeros(1)}), "1 unexpected: encoder.extra"),
        (lambda s: s.update({"encoder.norm_out.bias": torch.zeros(3)}), r"encoder.norm_out.bias is \(3,\), wanted"),
        (
            lambda s: s.update({"encoder.mid.attn_1.q.weight": torch.zeros(32, 32, 3, 3)}),
            r"attn_1.q.weight is \(32, 32",
        ),
        (lambda s: s.update({"encoder.down.1.block.0.conv1.weight": torch.zeros(48, 32, 3, 3)}), "multiples of"),
    ],
)
def test_a_faulty_ldm_file(tmp_path, fault, message):
    state = ldm_state(small_vae(), tmp_path)
    (tmp_path / "config.json").unlink()
    fault(state)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        PixelVAE.from_pretrained(tmp_path)


def test_a_ddconfig_that_contradicts_the_tensors(tmp_path):
    small_vae().export_ldm(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    values["ddconfig"]["ch_mult"] = [1, 2, 4, 4]
    path.write_text(json.dumps(values))
    with pytest.raises(
        CheckpointError, match=r"config.json says ch_mult \[1, 2, 4, 4\]; the tensors say \[1, 1, 2, 2\]"
    ):
        PixelVAE.from_pretrained(tmp_path)


# What cannot be read or written


def test_a_diffusers_folder_of_something_else(tmp_path):
    model = diffusers.UNet2DModel(block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
                                  down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    model.save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"a config.json of 'UNet2DModel' .*reads .* diffusers AutoencoderKL, LDM"
    ):
        PixelVAE.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_fn": "relu"}, "act_fn 'relu'; wanted 'silu'"),
        ({"block_out_channels": [32, 48, 64, 64]}, "wanted multiples of the first"),
        ({"block_out_channels": "wide"}, "wanted a list of whole numbers"),
        ({"down_block_types": ["DownEncoderBlock2D"]}, "wanted 4 of 'DownEncoderBlock2D'"),
        ({"resnet_scale": 2.0}, "unknown field 'resnet_scale'"),
        ({"latent_channels": 5}, "of another shape"),
        ({"layers_per_block": 2}, "missing"),
        ({"use_quant_conv": False}, "unexpected: quant_conv"),
        ({"norm_num_groups": 7}, "norm_groups is 7"),
        ({"latent_channels": None}, "latent_channels is None; wanted int"),
        (
            {"layers_per_block": 10**9},
            r"encoder\.num_res_blocks 1000000000; wanted a number of layers, and the weights have \d+",
        ),
        ({"in_channels": 10**18}, "in_channels is 1000000000000000000; wanted a whole number up to 2147483647"),
        ({"latent_channels": 2**30}, "cannot be built: .*overflowed"),
        ({"scaling_factor": 0}, r"scaling_factor is 0\.0; wanted a number that callers can divide by"),
    ],
)
def test_a_faulty_diffusers_config(folder, changes, message):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(PSVAEError, match=message):
        PixelVAE.from_pretrained(folder)


def test_faults_are_named_in_the_words_of_the_file(folder):
    state = load_file(folder / WEIGHTS)
    del state["decoder.up_blocks.0.resnets.0.conv1.bias"]
    save_file(state, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"1 missing: decoder.up_blocks.0.resnets.0.conv1.bias"):
        PixelVAE.from_pretrained(folder)


def test_what_autoencoder_kl_cannot_hold_is_refused(tmp_path):
    config = tiny_pixel_vae_config()
    with pytest.raises(CheckpointError, match="AutoencoderKL has one num_res_blocks for encoder and decoder"):
        PixelVAE(config.replace(decoder=config.decoder.replace(num_res_blocks=3))).export_diffusers(tmp_path)
    vae = PixelVAE(config.replace(statistics_grid=(4, 4)))
    vae.latent_spec.mean.fill_(1.0)
    with pytest.raises(CheckpointError, match="cannot hold statistics per element"):
        vae.export_diffusers(tmp_path)


@pytest.mark.parametrize("half", ["encoder", "decoder"])
@pytest.mark.parametrize(("field", "value"), [("norm_groups", 16), ("norm_eps", 1e-5)])
def test_norms_that_ldms_code_has_not_are_refused(tmp_path, half, field, value):
    config = small_vae().config
    vae = PixelVAE(config.replace(**{half: getattr(config, half).replace(**{field: value})}))
    with pytest.raises(ConfigError, match=rf"{half}\.{field} is {value}; LDM's code has .* use save_pretrained or"):
        vae.export_ldm(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_statistics_per_element_are_refused_in_an_ldm_folder(tmp_path):
    vae = PixelVAE(small_vae().config.replace(statistics_grid=(4, 4)))
    vae.latent_spec.mean.fill_(1.0)
    with pytest.raises(CheckpointError, match="LDM's layout cannot hold statistics per element"):
        vae.export_ldm(tmp_path)


LOST = {
    "scaling": {"scaling_factor": 0.18215},
    "flux": {"scaling_factor": 0.3611, "shift_factor": 0.1159},
    "statistics": {"latents_mean": (0.1, 0.2, 0.3, 0.4), "latents_std": (1.0, 2.0, 3.0, 4.0)},
    "nothing": {"shift_factor": 0.0},
}


@pytest.mark.parametrize("lost", LOST.values(), ids=LOST)
def test_an_ldm_folder_warns_of_what_it_cannot_carry(tmp_path, pytestconfig, lost):
    """By exactly the constants that, passed when loading, give the same model again."""
    small_vae().export_diffusers(tmp_path / "kl")
    vae = PixelVAE.from_pretrained(tmp_path / "kl", **lost)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        vae.export_ldm(tmp_path / "ldm")
    if "scaling_factor" not in lost and "latents_mean" not in lost:
        assert not caught
        return
    [warning] = caught
    assert warning.category is CheckpointWarning
    # At the caller's line; the checks of --shapes stand between.
    assert pytestconfig.getoption("--shapes") or warning.filename == __file__
    said = str(warning.message)
    assert f"has no place for {', '.join(lost)}: {tmp_path / 'ldm'} holds the weights alone" in said
    call = re.search(r"PixelVAE\.from_pretrained\(.*\)(?=, and)", said)[0]
    again = eval(call)
    assert again.config == vae.config
    assert_same_state(again, vae)


def test_fitted_statistics_are_among_what_an_ldm_folder_cannot_carry(tmp_path):
    vae = small_vae()
    vae.latent_spec.std.fill_(2.0)
    with pytest.warns(CheckpointWarning, match=r"latents_mean=\(0\.0, .*latents_std=\(2\.0, 2\.0, 2\.0, 2\.0\)"):
        vae.export_ldm(tmp_path)


def test_fitted_statistics_travel_in_a_diffusers_folder(tmp_path):
    vae = fill_weights(tiny_pixel_vae())
    vae.latent_spec.mean.copy_(torch.arange(8.0).view(8, 1, 1))
    vae.latent_spec.std.fill_(2.0)
    vae.export_diffusers(tmp_path)
    again = PixelVAE.from_pretrained(tmp_path)
    assert_same_state(again, vae)
    assert again.config.latents_std == (2.0,) * 8


# The key maps themselves


@pytest.mark.parametrize(
    "config",
    [PixelVAEConfig(), PixelVAEConfig.sd3(), PixelVAEConfig.ldm(32), PixelVAEConfig.ldm(4, (1, 2, 4, 4))],
    ids=["sd", "sd3", "va_vae", "f8"],
)
@pytest.mark.parametrize("layout", [AUTOENCODER_KL, LDM], ids=lambda layout: layout.name)
def test_a_key_map_is_one_to_one_and_its_config_survives(config, layout):
    with torch.device("meta"):
        state = PixelVAE(config).state_dict()
    rules = layout.rules(list(state), config.to_dict(), {})
    theirs = layout.needed(rules)
    weights = [key for key in state if not key.startswith("latent_spec.")]
    assert len(theirs) == len(set(theirs)) == len(weights)
    out = {}
    for key in weights:
        out |= rules[key].save(rules[key].theirs, state[key])
    assert list(out) == theirs
    for key in weights:
        assert rules[key].load(*(out[name] for name in rules[key].theirs)).shape == state[key].shape
    header = {name: tuple(tensor.shape) for name, tensor in out.items()}
    values = layout.read_config(layout.write_config(config.to_dict()), header)
    kept = config if "LDM" not in layout.name else config.replace(
        scaling_factor=1.0, shift_factor=None, sample_size=256
    )  # fmt: skip
    assert PixelVAEConfig.from_dict(values) == kept


def test_asymmetric_decoder_is_our_own_format_only(tmp_path):
    """A lighter decoder for the same latents: psvae's layout holds it."""
    config = PixelVAEConfig(
        PixelEncoderConfig(4, base_channels=16, channel_multipliers=(1, 2), num_res_blocks=1, norm_groups=8),
        PixelDecoderConfig(4, base_channels=8, channel_multipliers=(1, 1), attention_levels=0, norm_groups=8),
    )
    vae = fill_weights(PixelVAE(config))
    vae.save_pretrained(tmp_path)
    assert_same_state(PixelVAE.from_pretrained(tmp_path), vae.eval())
