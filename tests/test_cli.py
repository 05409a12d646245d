"""The psvae command: what it says, what it writes, how it refuses."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import psvae
from psvae import PSVAE, PixelVAE
from psvae.cli import main
from tests.alignment.test_alignment_net import tiny_net
from tests.base import assert_same_state
from tests.tiny import fill_weights, tiny_encoder, tiny_pixel_vae, tiny_pixel_vae_config, tiny_psvae


@pytest.fixture
def kl(tmp_path):
    """A diffusers folder."""
    fill_weights(tiny_pixel_vae()).export_diffusers(tmp_path / "kl")
    return tmp_path / "kl"


@pytest.fixture
def own(tmp_path):
    """A folder of our own."""
    tiny_psvae().save_pretrained(tmp_path / "own")
    return tmp_path / "own"


def test_inspect_a_diffusers_folder(kl, capsys):
    assert main(["inspect", str(kl)]) == 0
    said = capsys.readouterr().out
    for line in ("diffusers AutoencoderKL", "PixelVAE", "0.18215", "not needed:", "problems:                   none"):
        assert line in said
    assert "licence:                    not stated" in said


def test_inspect_reads_a_licence(kl, capsys):
    (kl / "README.md").write_text("---\ntags: [x]\nlicense: mit\n---\n# A model\n")
    main(["inspect", str(kl)])
    assert "licence:                    mit" in capsys.readouterr().out


def test_inspect_our_own(own, capsys):
    assert main(["inspect", str(own)]) == 0
    said = capsys.readouterr().out
    assert "format:                     psvae" in said
    assert "latent_spec.mean (8, 1, 1)" in said


def test_inspect_finds_problems(kl, capsys):
    path = kl / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    del state["quant_conv.bias"]
    save_file(state, path)
    assert main(["inspect", str(kl)]) == 1
    assert "1 missing: quant_conv.bias" in capsys.readouterr().out


WELL, WRONG = "problems:                   none", "problems:                   "


@pytest.mark.parametrize(
    ("content", "code", "said"),
    [
        ('{"mean": 0.5, "std": 2}', 0, ["mean_std.json:              mean 0.5, std 2: what a generator's", WELL]),
        ('{"mean": [1, 2], "std": 2}', 1, ["cannot be used", f"{WRONG}/", "mean_std.json holds {'mean': [1, 2]"]),
        (None, 0, ["mean_std.json:              none beside the weights", WELL]),
    ],
)
def test_inspect_says_whether_reals_statistics_are_there(kl, capsys, content, code, said):
    if content is not None:
        (kl / "mean_std.json").write_text(content)
    assert main(["inspect", str(kl)]) == code
    shown = capsys.readouterr().out
    assert [line for line in said if line not in shown] == []


@pytest.mark.parametrize(
    "how", ["{root}/vae", "{root}/vae/diffusion_pytorch_model.safetensors", "{root} --subfolder vae"]
)
def test_inspect_misses_the_statistics_of_a_reals_folder(tmp_path, capsys, how):
    vae = fill_weights(tiny_pixel_vae())
    vae.latent_spec.std.fill_(2.0)
    psvae.save_reals(tmp_path, vae, tiny_net())
    words = ["inspect", *how.format(root=tmp_path).split()]
    assert main(words) == 0
    assert "mean_std.json:              mean 0, std 2: what a generator's" in capsys.readouterr().out
    (tmp_path / "vae" / "mean_std.json").unlink()
    assert main(words) == 1
    assert f"{WRONG}{tmp_path}/vae lies beside alignment/, as of ReaLS, and has no mean_std" in capsys.readouterr().out


def test_inspect_looks_for_no_statistics_where_there_are_no_latents(tmp_path, capsys):
    tiny_encoder().save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    assert "mean_std.json" not in capsys.readouterr().out


@pytest.mark.parametrize("to", ["psvae", "diffusers"])
def test_convert_a_pixel_vae(kl, tmp_path, capsys, to):
    assert main(["convert", str(kl), str(tmp_path / "out"), "--to", to]) == 0
    assert f"PixelVAE as {to}" in capsys.readouterr().out
    assert_same_state(PixelVAE.from_pretrained(tmp_path / "out"), PixelVAE.from_pretrained(kl))


def test_convert_to_ldm(tmp_path, capsys):
    """Its files have no place for the scaling; the rest of the warning is for Python."""
    halves = {"base_channels": 32, "channel_multipliers": (1, 1, 2, 2), "num_res_blocks": 1, "norm_groups": 32}
    config = tiny_pixel_vae_config()
    tiny_pixel_vae(encoder=config.encoder.replace(**halves), decoder=config.decoder.replace(**halves)).save_pretrained(
        tmp_path / "own"
    )
    assert main(["convert", str(tmp_path / "own"), str(tmp_path / "out"), "--to", "ldm"]) == 0
    assert capsys.readouterr().err.startswith("psvae: warning: LDM's layout has no place for scaling_factor: ")
    assert "encoder.down.0.block.0.conv1.weight" in load_file(tmp_path / "out/model.safetensors")


def test_convert_a_psvae(own, tmp_path):
    pytest.importorskip("diffusers", reason="comes with psvae[diffusers]")
    assert main(["convert", str(own), str(tmp_path / "out"), "--to", "diffusers"]) == 0
    assert_same_state(PSVAE.from_pretrained(tmp_path / "out"), PSVAE.from_pretrained(own))


def test_reconstruct(kl, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 255, (35, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert main(["reconstruct", str(tmp_path / "a.png"), "--model", str(kl), "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "cropped from 50 x 35 to 48 x 32" in said
    assert " dB" in said
    both = np.asarray(Image.open(tmp_path / "out/a_side_by_side.png"))
    assert both.shape == (32, 96, 3)
    assert np.array_equal(both[:, :48], pixels[:32, :48])
    assert np.array_equal(both[:, 48:], np.asarray(Image.open(tmp_path / "out/a_reconstructed.png")))


def test_reconstruct_leaves_the_photograph_alone(kl, tmp_path):
    photograph = tmp_path / "a.png"
    Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8)).save(photograph)
    before = photograph.read_bytes()
    assert main(["reconstruct", str(photograph), "--model", str(kl), "--output", str(tmp_path)]) == 0
    assert photograph.read_bytes() == before


def test_reconstruct_turns_a_photograph_as_its_camera_says(kl, tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.fromarray(np.zeros((32, 48, 3), dtype=np.uint8)).save(tmp_path / "a.jpg", exif=exif)
    assert main(["reconstruct", str(tmp_path / "a.jpg"), "--model", str(kl), "--output", str(tmp_path / "out")]) == 0
    with Image.open(tmp_path / "out/a_reconstructed.png") as picture:
        assert picture.size == (32, 48)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "{root}/absent"], "is not a folder or file here"),
        (["convert", "{kl}", "{kl}", "--to", "psvae"], "holds something; choose another folder, or pass --overwrite"),
        (
            ["convert", "{kl}", "{root}/x", "--to", "timm"],
            "a PixelVAE has no layout 'timm'; wanted one of: psvae, diff",
        ),
        (
            ["convert", "{own}", "{root}/x", "--to", "ldm"],
            "a PSVAE has no layout 'ldm'; wanted one of: psvae, diffusers",
        ),
        (["reconstruct", "{root}/no.png", "--model", "{kl}"], "no.png cannot be read as an image"),
        (["reconstruct", "a/x.png", "b/x.jpg", "--model", "{kl}"], "several images are named x"),
        (
            ["reconstruct", "x.png", "--model", "{kl}", "--device", "foo"],
            "--device is 'foo', which cannot be used here",
        ),
        (["convert", "{own}", "{root}/x.ckpt/new", "--to", "diffusers"], "Not a directory"),
        (["inspect", "{root}/other"], "is of no layout that psvae reads (names like a, b); it reads its own and: LDM"),
        (["inspect", "{root}/x.ckpt"], "is a pickle, which can run code"),
        (["inspect", "{root}/x.ckpt"], "pass --allow-pickle: it is then read"),
        (["convert", "{kl}", "{root}/x", "--to", "ldm"], "encoder.norm_groups is 8; LDM's code has 32"),
        (["reconstruct", "{root}", "--model", "{kl}"], "is a folder; wanted image files, such as {root}/*.png"),
        (["reconstruct", "x.png", "--model", "{root}/variants"], "pass --variant fp16: the folder holds"),
        (["inspect", "{root}/pipeline"], "holds a pipeline, which is many models; pass --subfolder vae or another"),
        (["inspect", "{kl}/config.json"], "config.json is a configuration, no weights: pass its folder"),
    ],
)
def test_mistakes_are_one_line(kl, own, tmp_path, capsys, arguments, message):
    (tmp_path / "other").mkdir()
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "other/model.safetensors")
    torch.save({}, tmp_path / "x.ckpt")
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline/model_index.json").write_text("{}")
    (tmp_path / "variants").mkdir()
    for path in kl.iterdir():
        (tmp_path / "variants" / path.name.replace(".safetensors", ".fp16.safetensors")).write_bytes(path.read_bytes())
    filled = [word.format(root=tmp_path, kl=kl, own=own) for word in arguments]
    assert main([*filled, *(["--output", str(tmp_path / "out")] if arguments[0] == "reconstruct" else [])]) == 2
    error = capsys.readouterr().err
    assert message.format(root=tmp_path) in error
    assert error.startswith("psvae: ")
    assert error.count("\n") == 1


def test_every_command_reads_the_same_places(kl, tmp_path, capsys):
    """A variant in a subfolder, by the same flags."""
    Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    inner = tmp_path / "whole/inner"
    inner.mkdir(parents=True)
    for path in kl.iterdir():
        (inner / path.name.replace(".safetensors", ".fp16.safetensors")).write_bytes(path.read_bytes())
    (inner / "diffusion_pytorch_model.fp16.safetensors").rename(inner / "a.safetensors")
    (inner / "diffusion_pytorch_model.fp16.safetensors").symlink_to(inner / "a.safetensors")
    out = tmp_path / "out"
    for place in (["--variant", "fp16"], ["--file", "a.safetensors"]):
        for command in (
            ["inspect", str(tmp_path / "whole")],
            ["convert", str(tmp_path / "whole"), str(out / place[1]), "--to", "psvae"],
            ["reconstruct", str(tmp_path / "a.png"), "--model", str(tmp_path / "whole"), "--output", str(out)],
        ):  # fmt: skip
            assert main([*command, "--subfolder", "inner", *place]) == 0, capsys.readouterr()
        assert_same_state(PixelVAE.from_pretrained(out / place[1]), PixelVAE.from_pretrained(kl))


def test_inspect_says_what_it_recognised(tmp_path, capsys):
    vae = tiny_pixel_vae(**{
        half: getattr(tiny_pixel_vae_config(), half).replace(base_channels=32, norm_groups=32)
        for half in ("encoder", "decoder")
    }, scaling_factor=1.0)  # fmt: skip
    vae.export_ldm(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({f"first_stage_model.{name}": x for name, x in state.items()} | {"unet.x": torch.zeros(1)},
              tmp_path / "whole.safetensors")  # fmt: skip
    assert main(["inspect", str(tmp_path / "whole.safetensors")]) == 0
    said = capsys.readouterr().out
    assert "files:                      whole.safetensors" in said
    assert "read from the names that begin with 'first_stage_model.'; it holds no scaling_factor" in said


def test_inspect_of_an_absurd_depth_does_not_build_it(own, capsys):
    path = own / "config.json"
    values = json.loads(path.read_text())
    values["vae"]["depth"] = 10**9
    path.write_text(json.dumps(values))
    assert main(["inspect", str(own)]) == 1
    assert "has vae.depth 1000000000; wanted a number of layers" in capsys.readouterr().out


def test_a_reader_that_closes_early_is_no_error(kl):
    """As ``psvae inspect x | head -1``."""
    for arguments in (["inspect", str(kl)], ["--help"]):
        process = subprocess.Popen(
            [sys.executable, "-m", "psvae.cli", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        process.stdout.close()
        assert process.stderr.read() == b""
        process.stderr.close()
        assert process.wait() == 141


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"psvae {psvae.__version__}\n"


def test_help_and_exit_codes_of_the_process(tmp_path):
    def run(*arguments):
        return subprocess.run([sys.executable, "-m", "psvae.cli", *arguments], capture_output=True, text=True)

    shown = run("--help")
    assert shown.returncode == 0
    assert all(command in shown.stdout for command in ("inspect", "convert", "reconstruct"))
    refused = run("inspect", str(tmp_path / "absent"))
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr
