"""SiT's pictures: the same whoever makes them and however often the run is killed, never of two models in one file."""

import shutil

import numpy as np
import pytest
import torch
from diffusers.models import modeling_utils
from PIL import Image

from psvae import flow
from tests.base import assert_close, assert_equal
from tests.examples.generator_world import command, fresh_accelerator, run, script
from tests.examples.sit_world import CLASSES, SIZE, make_measured_vae, tiny_sit
from tests.tiny import latents, tiny_psvae

sample_sit, sampling, sit = map(script, ("sample_sit", "sampling", "sit"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A VAE with statistics, and the folder of a SiT in its latents."""
    root = tmp_path_factory.mktemp("sampling")
    make_measured_vae(root / "vae")
    vae = sampling.load_measured_vae(str(root / "vae"), None, torch.device("cpu"))
    sit.save_sit(tiny_sit(), vae.latent_spec, root / "sit")  # a trained one would be needed for hours
    return root


def sampling_options(world, output, **changes):
    default = {"model": str(world / "sit"), "vae": str(world / "vae"), "output": output, "count": 7,
               "batch_size": 2, "steps": 4, "guidance": 1.5}  # fmt: skip
    return sample_sit.Options(**{**default, **changes})


def sample(world, output, **changes):
    fresh_accelerator()
    sample_sit.main(sampling_options(world, output, **changes))
    with np.load(output.with_name(f"{output.name}.npz")) as content:
        assert list(content) == ["arr_0"]
        return content["arr_0"]


def test_the_npz_is_what_adm_reads_whoever_makes_it(world, tmp_path):
    alone = sample(world, tmp_path / "alone")
    assert (alone.dtype, alone.shape) == (np.uint8, (7, SIZE, SIZE, 3))
    assert len(np.unique(alone.reshape(7, -1), axis=0)) == 7
    asked = sampling_options(world, tmp_path / "two")
    words = [(f"--{key.replace('_', '-')}", getattr(asked, key)) for key in ("model", "vae", "output", "count")]
    words += [("--batch-size", 2), ("--steps", 4), ("--guidance", 1.5)]
    run(command("sample_sit", *(word for pair in words for word in pair), processes=2))
    with np.load(tmp_path / "two.npz") as content:
        assert np.array_equal(content["arr_0"], alone)
    (tmp_path / "alone" / "0000002.npy").unlink()  # as a kill would leave it
    before = (tmp_path / "alone" / "0000000.npy").stat().st_mtime_ns
    assert np.array_equal(sample(world, tmp_path / "alone"), alone)
    assert (tmp_path / "alone" / "0000000.npy").stat().st_mtime_ns == before
    with pytest.raises(SystemExit, match=r"holds pictures of another run.*\(seed: 0 before, 1 now\)"):
        sample(world, tmp_path / "alone", seed=1)


def test_the_first_pictures_are_shown(world, tmp_path, capsys, monkeypatch):
    """In order, eight to a row, also where a batch holds more."""
    monkeypatch.setattr(sample_sit, "SHOWN", 9)
    made = sample(world, tmp_path / "v1.5", count=11, steps=2)
    assert f"the first 9 to look at: {tmp_path}/v1.5.png" in capsys.readouterr().out
    with Image.open(tmp_path / "v1.5.png") as picture:
        grid, step = np.asarray(picture), SIZE + 2  # pixels between pictures
    assert grid.shape == (2 * step + 2, 8 * step + 2, 3)
    cells = [
        grid[row : row + SIZE, column : column + SIZE] for row in (2, step + 2) for column in range(2, 8 * step, step)
    ]
    assert np.array_equal(cells[:9], made[:9])
    assert not np.any(cells[9:])


def test_pictures_of_a_model_before_it_was_trained_further_are_no_others(world, tmp_path):
    """In the same folder, by the same command; nor are those of statistics or of a VAE that changed."""
    shutil.copytree(world / "sit", tmp_path / "sit")
    asked = {"model": str(tmp_path / "sit"), "count": 2, "steps": 2}
    before = sample(world, tmp_path / "made", **asked)
    assert np.array_equal(sample(world, tmp_path / "made", **asked), before)
    model, spec, file = tiny_sit(), tiny_psvae().latent_spec, tmp_path / "sit" / sit.STATISTICS
    model.proj_out_2.weight.data += 1.0
    spec.mean += 0.1
    kept = file.read_bytes()
    sit.save_sit(model, spec, tmp_path / "sit")
    said = r"made holds pictures of other weights than those that are in --model /\S+/sit and --vae /\S+/vae now, see"
    with pytest.raises(SystemExit, match=said):  # whose latents' statistics lie beside the SiT
        sample(world, tmp_path / "made", **asked)
    file.write_bytes(kept)
    with pytest.raises(SystemExit, match=r"that are in --model /\S+/sit now, see /\S+/made.json: remove the folder"):
        sample(world, tmp_path / "made", **asked)
    shutil.rmtree(tmp_path / "made")
    assert not np.array_equal(sample(world, tmp_path / "made", **asked), before)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"diffusion": -1.0}, "--diffusion is -1.0; wanted at least 0"), ({"count": 0}, "--count is 0; wanted at least 1"),
     ({"batch_size": 0}, "--batch-size is 0; wanted at"), ({"steps": 0}, "--steps is 0; wanted at least 1")],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)  # fmt: skip
def test_numbers_that_are_too_small_are_said(world, tmp_path, changes, said):
    with pytest.raises(SystemExit, match=said):
        sample(world, tmp_path / "out", **changes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "how",
    [{"guidance": 3.0}, {"guidance_interval": (0.0, 0.5)}, {"solver": "euler"}, {"solver": "heun"}, {"diffusion": 2.0},
     {"last_step": 0.3}, {"shift": 3.0}, {"seed": 1}, {"classes": (1,)}, {"dtype": "bfloat16"}],
    ids=lambda how: next(iter(how)),
)  # fmt: skip
def test_every_option_of_sampling_counts(world, tmp_path, how):
    samplers = [
        sample_sit.Sampler(sampling_options(world, tmp_path, **more), torch.device("cpu")) for more in ({}, how)
    ]
    assert not np.array_equal(*(sampler(range(2))[0] for sampler in samplers))


def test_classes_are_drawn_or_taken_in_turn(world, tmp_path):
    def classes(**how):
        sampler = sample_sit.Sampler(sampling_options(world, tmp_path, **how), torch.device("cpu"))
        return [sampler.class_of(number) for number in range(9)]

    assert classes(balanced=True) == [0, 1, 2] * 3
    assert classes(classes=(2, 0)) == [2, 0, 2, 0, 2, 0, 2, 0, 2]
    assert set(classes()) == {0, 1, 2}
    assert classes() != classes(seed=1)
    with pytest.raises(SystemExit, match="labels 3 are out of range; there are 3 classes, 0 to 2: see --classes"):
        classes(classes=(3,))


def test_a_vae_of_other_latents_is_refused(world, tmp_path):
    make_measured_vae(tmp_path / "rae", "rae")
    with pytest.raises(SystemExit, match=r"rae have 48 channels and the SiT .*sit makes 8; wanted the --vae"):
        sample(world, tmp_path / "out", vae=str(tmp_path / "rae"))


@pytest.mark.parametrize(("part", "refused"), [("encoder", True), ("decoder", False)])
def test_a_vae_of_the_same_shape_is_refused_where_its_latents_are_others(world, tmp_path, part, refused):
    """Statistics are the SiT's own, so they cannot differ."""
    shutil.copytree(world / "sit", tmp_path / "sit")
    vae = sampling.load_measured_vae(str(world / "vae"), None, torch.device("cpu"))
    sit.note_latents(vae, tmp_path / "sit")
    next(getattr(vae, part).parameters()).data += 0.1
    vae.save_pretrained(tmp_path / "vae")
    asked = {"model": str(tmp_path / "sit"), "count": 1, "steps": 2}
    sample(world, tmp_path / "same", **asked)
    if not refused:
        sample(world, tmp_path / "out", **asked, vae=str(tmp_path / "vae"))
        return
    said = r"the latents of \S+/vae are not those that \S+/sit was trained on \(another encoder\): wanted the --vae"
    with pytest.raises(SystemExit, match=said):
        sample(world, tmp_path / "out", **asked, vae=str(tmp_path / "vae"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_is_silent(world, tmp_path, monkeypatch, dtype):
    """diffusers warns of a cast after loading, of modules that it does not name."""
    said = []
    monkeypatch.setattr(modeling_utils.logger, "warning", lambda message, *_: said.append(message))
    sampler = sample_sit.Sampler(sampling_options(world, tmp_path, dtype=dtype), torch.device("cpu"))
    assert {p.dtype for p in sampler.model.parameters()} == {getattr(torch, dtype)}
    assert said == []


@torch.no_grad()
def test_saved_latents_are_what_the_pictures_are_decoded_from(world, tmp_path):
    """In batches that another run of the same command does not make again."""
    pictures = sample(world, tmp_path / "made", save_latents=True)
    assert np.array_equal(pictures, sample(world, tmp_path / "plain"))
    assert not (tmp_path / "plain-latents.npz").exists()

    def latents_of():
        with np.load(tmp_path / "made-latents.npz") as content:
            assert list(content) == ["latents"]
            return content["latents"]

    made = latents_of()
    assert (made.dtype, made.shape) == (np.float32, (7, 8, 4, 4))
    vae = sampling.load_measured_vae(str(world / "vae"), None, torch.device("cpu"))
    decoded = sampling.decode(vae, torch.from_numpy(made))
    seen = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
    assert float((decoded - seen).abs().max()) < 0.6 / 127.5
    (tmp_path / "made" / "0000004.npy").unlink()  # killed after the latents were written
    sample(world, tmp_path / "made", save_latents=True)
    assert np.array_equal(latents_of(), made)


@torch.no_grad()
def test_guidance_of_1_is_none():
    model, x, sigmas, labels = tiny_sit(), latents(), torch.tensor([0.3, 0.8]), torch.tensor([0, 2])
    plain = sit.velocity(model, x, sigmas, labels)
    assert_equal([sit.guided_velocity(model, labels, flow.Guidance(1.0))(x, sigmas)], [plain])
    half = sit.guided_velocity(model, labels, flow.Guidance(4.0, interval=(0.0, 0.5)))(x, sigmas)
    assert_close([half[1]], [plain[1]])
    none = sit.velocity(model, x, sigmas, torch.full_like(labels, CLASSES))
    assert_close([half[0]], [none[0] + 4 * (plain[0] - none[0])])


def test_an_sde_without_diffusion_is_euler():
    model, noise, sigmas = tiny_sit(), latents(seed=3), sample_sit.schedule("sde", 5)
    velocity = sit.guided_velocity(model, torch.tensor([0, 1]), flow.Guidance(1.0))
    draws = iter([noise, *(latents(seed=seed) for seed in range(10, 20))])
    assert_equal(
        [sample_sit.euler_maruyama(velocity, lambda: next(draws), sigmas, 0.0)], [flow.sample(velocity, noise, sigmas)]
    )


@pytest.mark.parametrize("diffusion", [0.5, 1.0, 2.0])
def test_an_sde_ends_in_the_data_whatever_its_diffusion(diffusion):
    """Of Gaussian data N(m, s²) the velocity is known."""
    mean, std = 0.7, 0.5

    def velocity(x, sigmas):
        at = sigmas[:, None]
        seen = (x - (1 - at) * mean) / ((1 - at).square() * std**2 + at.square())
        return at * seen - (mean + (1 - at) * std**2 * seen)

    generator = torch.Generator().manual_seed(0)
    made = sample_sit.euler_maruyama(
        velocity, lambda: torch.randn(20_000, 1, generator=generator), sample_sit.schedule("sde", 250, 0.004), diffusion
    )
    assert float(made.mean()) == pytest.approx(mean, abs=0.02)
    assert float(made.std()) == pytest.approx(std, rel=0.02)


def test_the_schedule_of_an_sde_is_sits():
    sigmas = sample_sit.schedule("sde", 250)
    assert len(sigmas) == 251
    assert_close([sigmas[-2:]], [torch.tensor([0.04, 0.0])])
    with pytest.raises(SystemExit, match="an SDE of 1 steps"):
        sample_sit.schedule("sde", 1)
