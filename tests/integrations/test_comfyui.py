"""The descriptor for ComfyUI: its numbers are the VAE's own, in Python, in the written class and by the command."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from psvae import LatentSpec, PixelVAEConfig, fit_latent_statistics
from psvae.cli import main
from psvae.errors import ConfigError, ShapeError
from psvae.integrations.comfyui import LatentFormat, Preview, fit_preview, latent_format
from tests.tiny import fill_weights, images, latents, tiny_pixel_vae, tiny_psvae

PREVIEW = Preview(((0.5, 0.25, -1.0),) * 8, (0.1, 0.0, -0.1), 0.9)
BASE = "class LatentFormat:\n    temporal_downscale_ratio = 1\n    scale_factor = 2.0\n"


def measured(vae):
    """With statistics."""
    fit_latent_statistics(vae, [images(4, seed=1)])
    assert (vae.latent_spec.std != 1).any()
    return vae


def sd():
    return fill_weights(tiny_pixel_vae(scaling_factor=0.3611, shift_factor=0.1159))


def written(text, folder, name="PSVAELatent"):
    """The class in a file of that text, imported."""
    file = folder / "written_latent.py"
    file.write_text(text, encoding="utf-8")
    module_spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return getattr(module, name)()


def expected(vae, applied, raw):
    """What the VAE's own classes say that a generator sees."""
    if applied == "statistics":
        return vae.latent_spec.normalize(raw)
    return (raw - vae.config.shift_factor) * vae.config.scaling_factor if applied == "constants" else raw


@pytest.fixture(
    params=[
        ("psvae", None), ("constants", "constants"), ("statistics", "statistics"), ("spec", "statistics"),
    ],
    ids=lambda case: case[0],
)  # fmt: skip
def case(request):
    """(source, its VAE, what is applied)."""
    name, applied = request.param
    vae = measured(fill_weights(tiny_psvae()) if name == "psvae" else sd()) if name != "constants" else sd()
    return vae.latent_spec if name == "spec" else vae, vae, applied


def test_in_and_out_are_the_vae_s_own(case):
    source, vae, applied = case
    found = latent_format(source, by=applied)
    assert found.applied == applied
    raw = latents(2, 3, 5) * 2 + 1
    seen = found.process_in(raw)
    assert seen.equal(expected(vae, applied, raw))
    torch.testing.assert_close(found.process_out(seen), raw, rtol=1e-5, atol=1e-5)
    if applied == "statistics":
        assert found.process_out(seen).equal(vae.latent_spec.denormalize(seen))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_written_class_gives_the_same_numbers(case, tmp_path, dtype):
    source, _, applied = case
    found = latent_format(source, by=applied, preview=PREVIEW)
    theirs = written(found.to_python(), tmp_path)
    raw = (latents(2, 3, 5) * 2 + 1).to(dtype)
    assert theirs.process_in(raw).equal(found.process_in(raw))
    assert theirs.process_out(raw).equal(found.process_out(raw))
    assert theirs.process_in(raw).dtype == dtype
    assert (theirs.latent_channels, theirs.latent_dimensions, theirs.spacial_downscale_ratio) == (8, 2, 8)
    assert torch.tensor(theirs.latent_rgb_factors).shape == (8, 3)
    assert theirs.latent_rgb_factors_bias == [0.1, 0.0, -0.1]


def test_of_a_psvae_the_latents_of_encode_are_the_generator_s():
    """Statistics are applied inside: nothing is applied twice."""
    vae = measured(fill_weights(tiny_psvae()))
    with torch.no_grad():
        found = vae.encode(images(4, seed=1)).latent_dist.mode()
        assert latent_format(vae).process_in(found).equal(found)
        painted = vae.decode(latent_format(vae).process_out(found)).sample
        torch.testing.assert_close(painted, vae.decode(found).sample)
    assert latent_format(vae).to_dict()["latents_mean"] is None


def test_inside_comfyui_it_is_a_subclass(tmp_path, monkeypatch):
    """So that members which later versions add have their defaults."""
    (tmp_path / "comfy").mkdir()
    (tmp_path / "comfy" / "__init__.py").write_text("")
    (tmp_path / "comfy" / "latent_formats.py").write_text(BASE)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("comfy", "comfy.latent_formats"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    theirs = written(latent_format(sd()).to_python("Mine"), tmp_path, "Mine")
    for name in ("comfy", "comfy.latent_formats"):
        sys.modules.pop(name)
    assert type(theirs).__bases__[0].__module__ == "comfy.latent_formats"
    assert (theirs.temporal_downscale_ratio, theirs.scale_factor) == (1, 0.3611)


@pytest.mark.bad_input  # JSON's lists for tuples
def test_json_says_it_in_words(case):
    source, _, applied = case
    found = latent_format(source, by=applied, preview=PREVIEW)
    content = json.loads(found.to_json())
    assert content["process_in"] == {
        None: "latent",
        "constants": "(latent - shift_factor) * scale_factor",
        "statistics": "(latent - latents_mean) / latents_std",
    }[applied]  # fmt: skip
    fields = {name: value for name, value in content.items() if not name.startswith("process_")}
    assert LatentFormat.from_dict(fields) == found


def test_presets():
    """A shift of None is 0; SD3's constants are ComfyUI's."""
    found = latent_format(tiny_pixel_vae())
    assert (found.applied, found.scale_factor, found.shift_factor) == ("constants", 0.18215, 0.0)
    assert (PixelVAEConfig.sd3().scaling_factor, PixelVAEConfig.sd3().shift_factor) == (1.5305, 0.0609)
    assert latent_format(tiny_pixel_vae(scaling_factor=1.0)).applied is None


# The preview


class Mixing:
    """A VAE whose latents are a known affine map of each cell's mean colour, and of noise that colours do not know."""

    def __init__(self, **constants):
        vae = tiny_pixel_vae(**constants)
        self.latent_spec, self.config = vae.latent_spec, vae.config
        generator = torch.Generator().manual_seed(0)
        self.matrix = torch.randn(8, 3, generator=generator)
        self.offset = torch.randn(8, 1, 1, generator=generator)

    def encode(self, pictures):
        colours = F.avg_pool2d(pictures, 8)
        found = torch.einsum("ZC,BChw->BZhw", self.matrix, colours) + self.offset
        distribution = type("Point", (), {"mode": lambda _: found})()
        return type("Output", (), {"latent_dist": distribution})()


@pytest.mark.parametrize("by", ["constants", "statistics"])
def test_preview_finds_a_planted_map(by):
    vae = Mixing(scaling_factor=0.5, shift_factor=2.0)
    vae.latent_spec.mean.fill_(1.5)
    vae.latent_spec.std.copy_(torch.linspace(0.5, 3, 8).view(8, 1, 1))
    pictures = images(3, 48, 64)
    found = fit_preview(vae, [pictures[:1], pictures[1:]], by=by)
    seen = latent_format(vae, by=by).process_in(vae.encode(pictures).latent_dist.mode())
    drawn = F.linear(seen.movedim(1, -1), torch.tensor(found.factors).T, torch.tensor(found.bias)).movedim(-1, 1)
    torch.testing.assert_close(drawn, F.avg_pool2d(pictures, 8), rtol=0, atol=1e-4)  # factors have six digits
    assert found.explained == pytest.approx(1.0, abs=1e-6)
    assert fit_preview(vae, pictures, by=by)[:2] == found[:2]


def test_preview_of_a_real_vae_is_least_squares():
    """Against a solver, over all cells at once; a dead channel gets zeros."""
    vae = measured(sd())
    with torch.no_grad():
        for parameter in (vae.quant_conv.weight, vae.quant_conv.bias):
            parameter[3] = 0.0
    pictures = images(6, 64, 40, seed=2)
    found = fit_preview(vae, pictures.split(4), by="constants")
    with torch.no_grad():
        seen = latent_format(vae, by="constants").process_in(vae.encode(pictures).latent_dist.mode())
    rows = seen.movedim(1, -1).flatten(0, 2).double()
    rows = torch.cat([rows[:, [0, 1, 2, 4, 5, 6, 7]], torch.ones_like(rows[:, :1])], dim=1)
    colours = F.avg_pool2d(pictures, 8).movedim(1, -1).flatten(0, 2).double()
    wanted = torch.linalg.lstsq(rows, colours).solution
    got = torch.tensor([*found.factors, found.bias], dtype=torch.float64)
    assert found.factors[3] == (0.0, 0.0, 0.0)
    torch.testing.assert_close(got[[0, 1, 2, 4, 5, 6, 7, 8]], wanted, rtol=0, atol=1e-5)
    error = (rows @ wanted - colours).square().mean(0).sum() / colours.var(0, correction=0).sum()
    assert found.explained == pytest.approx(1 - float(error), abs=1e-6)
    assert 0.01 < found.explained < 0.9


# What is refused


def test_both_kinds_must_be_chosen_from():
    vae = measured(sd())
    with pytest.raises(ConfigError, match=r"both scaling_factor 0.3611 and statistics.*by='constants' or by='stat"):
        latent_format(vae)


@pytest.mark.parametrize(
    ("make", "by", "message"),
    [
        (sd, "statistics", r"which this VAE does not leave to callers \(it has constants\)"),
        (tiny_psvae, "constants", r"by is 'constants'.*\(its encode normalises\); leave by out"),
        (lambda: LatentSpec(4, 8, applied_by="caller"), "constants", "it has neither"),
        pytest.param(sd, "scale", "by is 'scale'; wanted 'statistics' or 'constants'", marks=pytest.mark.bad_input),
    ],
)
def test_what_is_not_there_is_not_applied(make, by, message):
    with pytest.raises(ConfigError, match=message):
        latent_format(make(), by=by)


def test_statistics_per_element_hold_for_one_grid():
    spec = LatentSpec(8, 8, grid=(4, 4), applied_by="caller")
    spec.std.fill_(2.0)
    with pytest.raises(ConfigError, match=r"per element at grid \(4, 4\); wanted per channel"):
        latent_format(spec)


def test_other_mistakes():
    found = latent_format(sd())
    with pytest.raises(ShapeError, match="latents have 4 channels"):
        found.process_in(latents(1, channels=4))
    for name in ("two words", "class"):
        with pytest.raises(ConfigError, match="wanted a Python name"):
            found.to_python(name)
    with pytest.raises(ConfigError, match="the pictures have 4 latent cells; wanted more than 9"):
        fit_preview(sd(), images(1, 16, 16))
    with pytest.raises(ShapeError, match="wanted multiples of the stride 8"):
        fit_preview(sd(), images(1, 33, 32))
    with pytest.raises(ConfigError, match="latents_mean is None; wanted 8 rows"):
        LatentFormat(8, 8, applied="statistics", latents_std=(1.0,) * 8)


# The command

PHOTOGRAPHS = sorted((Path(__file__).parents[2] / "examples" / "photographs").glob("*.jpg"))


def test_what_is_no_vae_is_refused():
    for source, came in (("psvae-tiny", "str"), (sd().encoder, "PixelEncoder")):
        for make in (latent_format, lambda x: fit_preview(x, torch.zeros(1, 3, 32, 32))):
            with pytest.raises(ConfigError, match=f"a {came} came; wanted a PSVAE, a PixelVAE or a LatentSpec"):
                make(source)
    with pytest.raises(ConfigError, match="a LatentSpec came; wanted a PSVAE or a PixelVAE"):
        fit_preview(sd().latent_spec, torch.zeros(1, 3, 32, 32))


def test_the_command_writes_the_class(tmp_path, capsys):
    vae = measured(sd())
    vae.save_pretrained(tmp_path / "vae")
    where = [str(tmp_path / "vae"), str(tmp_path / "mine.py")]
    chosen = ["--by", "statistics", "--name", "Mine", "--images", *map(str, PHOTOGRAPHS[:2])]
    assert main(["descriptor", *where, *chosen]) == 0
    said = capsys.readouterr().out
    assert "of the colours' variance over 2 images" in said
    assert "8 channels, stride 8, process_in applies statistics" in said
    theirs = written((tmp_path / "mine.py").read_text(encoding="utf-8"), tmp_path, "Mine")
    assert theirs.process_in(latents()).equal(vae.latent_spec.normalize(latents()))
    assert len(theirs.latent_rgb_factors) == 8


def test_the_command_reads_a_file_of_statistics(tmp_path):
    vae = sd()
    vae.save_pretrained(tmp_path / "vae")
    numbers = {"mean": 0.5, "std": 2.0}  # of all channels, as ReaLS writes
    (tmp_path / "mean_std.json").write_text(json.dumps(numbers))
    options = ["--by", "statistics", "--statistics", str(tmp_path / "mean_std.json")]
    assert main(["descriptor", str(tmp_path / "vae"), str(tmp_path / "mine.json"), *options]) == 0
    found = json.loads((tmp_path / "mine.json").read_text(encoding="utf-8"))
    assert (found["latents_mean"], found["latents_std"]) == ([0.5] * 8, [2.0] * 8)
    assert found["latent_rgb_factors"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["x.txt"], "x.txt is neither a .py nor a .json file"),
        (["x.py"], "say which, --by constants or --by statistics"),
        (["x.py", "--by", "constants", "--images", "."], ". is a folder; wanted image files"),
    ],
)
def test_the_command_s_mistakes_are_one_line(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    measured(sd()).save_pretrained("vae")
    assert main(["descriptor", "vae", *options]) == 2
    assert message in capsys.readouterr().err
    assert not Path("x.py").exists()
