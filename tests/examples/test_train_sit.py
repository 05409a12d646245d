"""SiT in our latents: its training resumes to the bit, its samples do not depend on who makes them, its numbers are
named for what they are."""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import time

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from PIL import Image
from safetensors.torch import load_file

from psvae import PSVAE, PixelVAE, fit_latent_statistics, flow
from psvae.alignment import alignment_net
from psvae.hub.statistics import write_mean_std
from tests.base import assert_close, assert_equal
from tests.examples.generator_world import command, environment, fresh_accelerator, png, run, script
from tests.hub.server import commit_of
from tests.hub.test_hub import fill_cache
from tests.processes import in_processes
from tests.tiny import fill_weights, images, latents, tiny_encoder, tiny_pixel_vae, tiny_psvae

train_sit, sample_sit, sampling, sit, labelled = map(script, ("train_sit", "sample_sit", "sampling", "sit", "labelled"))
frechet, cache_latents = script("frechet"), script("cache_latents")
SIZE, STEPS, CLASSES = 32, 6, 3


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Twelve images of three classes, their cached latents, a PSVAE with statistics, PixelVAEs with and without."""
    root = tmp_path_factory.mktemp("sit")
    for number in range(12):
        folder = root / "images" / f"class{number % CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(png(number))
    vae = fill_weights(tiny_psvae())
    fit_latent_statistics(vae, [images(8)])
    vae.save_pretrained(root / "vae")
    pixel = fill_weights(tiny_pixel_vae(scaling_factor=1.0))
    pixel.save_pretrained(root / "unmeasured")
    for fields in ({}, {"moments": True}):
        fresh_accelerator()
        output = root / ("moments" if fields else "latents")
        cache_latents.main(
            cache_latents.Options(
                str(root / "vae"), str(root / "images"), output, size=SIZE, shard_size=5, workers=0, **fields
            )
        )
    return root


def options(world, output, data="images", **changes):
    told = {name: changes.pop(name) for name in ("classes", "flip", "size") if name in changes}
    default = {
        "data": labelled.LabelledOptions(str(world / data), **{"size": SIZE, "workers": 0, **told}),
        "vae": str(world / "vae"), "model": "tiny/2", "output": output, "steps": STEPS, "batch_size": 4, "lr": 1e-3,
        "ema": 0.5, "mixed_precision": "no", "tracker": "none", "checkpoint_every": 1, "sample_every": 3,
    }  # fmt: skip
    return train_sit.Options(**{**default, **changes})


def train(world, output, data="images", **changes):
    fresh_accelerator()
    return train_sit.main(options(world, output, data, **changes))["loss"]


def command_line(world, output, *more, processes=1):
    """`options`, as a user types them."""
    return command(
        "train_sit", "--data.path", world / "images", "--data.size", SIZE, "--data.workers", 0, "--vae", world / "vae",
        "--model", "tiny/2", "--output", output, "--steps", STEPS, "--batch-size", 4, "--lr", 1e-3, "--ema", 0.5,
        "--mixed-precision", "no", "--tracker", "none", "--checkpoint-every", 1, "--sample-every", 3,
        *more, processes=processes,
    )  # fmt: skip


def weights(output):
    return load_file(output / "model" / "diffusion_pytorch_model.safetensors")


def tiny_sit(classes=CLASSES, **fields):
    """With weights that say something: a fresh one returns zero."""
    return fill_weights(sit.build_sit("tiny/2", 8, 4, classes, **fields)).eval()


# The model


@pytest.mark.parametrize(("preset", "millions"), [("B/2", 130), ("L/2", 458), ("XL/2", 675)])
def test_the_presets_have_the_sizes_of_the_paper(preset, millions):
    with torch.device("meta"):
        model = sit.build_sit(preset, 4, 32, 1000)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=5e-3)


@torch.no_grad()
def test_it_begins_as_sit_does():
    model = sit.build_sit("tiny/2", 8, 4, CLASSES)
    x, time_, labels = latents(), torch.tensor([0.2, 0.9]), torch.tensor([0, 2])
    assert_equal([model(x, timestep=time_, class_labels=labels).sample], [torch.zeros_like(x)])
    query, hidden = model.transformer_blocks[0].attn1.to_q.weight, model.transformer_blocks[0].ff.net[0].proj.weight
    assert float(query.abs().max()) == pytest.approx(math.sqrt(6 / (192 + 3 * 192)), rel=1e-2)  # of the joined layer
    assert float(hidden.abs().max()) == pytest.approx(math.sqrt(6 / (192 + 4 * 192)), rel=1e-2)
    assert not any(p.abs().max() for name, p in model.named_parameters() if name.endswith("bias"))


@torch.no_grad()
def test_no_label_is_dropped_but_by_us():
    """diffusers' blocks would drop each for itself while training."""
    model = tiny_sit().train()
    x, labels = latents(64), torch.arange(64) % CLASSES
    first, second = (model(x, timestep=torch.full((64,), 0.5), class_labels=labels).sample for _ in range(2))
    assert_equal([first], [second])
    with_class, without = (
        model(x[:1], timestep=torch.tensor([0.5]), class_labels=torch.tensor([label])).sample for label in (0, CLASSES)
    )
    assert not with_class.allclose(without, atol=1e-3)


@torch.no_grad()
def test_the_velocity_is_of_our_convention():
    model, x, sigmas, labels = tiny_sit(), latents(), torch.tensor([0.25, 1.0]), torch.tensor([1, 0])
    seen = model(x, timestep=torch.tensor([0.75, 0.0]), class_labels=labels).sample
    assert_equal([sit.velocity(model, x, sigmas, labels)], [-seen])


@torch.no_grad()
def test_diffusers_opens_what_was_saved(tmp_path):
    model = tiny_sit()
    sit.save_sit(model, tiny_psvae().latent_spec, tmp_path)
    theirs = DiTTransformer2DModel.from_pretrained(tmp_path)
    inputs = {"timestep": torch.tensor([0.2, 0.9]), "class_labels": torch.tensor([0, CLASSES])}
    assert_equal([theirs(latents(), **inputs).sample], [model(latents(), **inputs).sample])


# Training


@pytest.fixture(scope="module")
def unbroken(world):
    train(world, world / "unbroken")
    return world / "unbroken"


def test_a_run_leaves_a_model_and_pictures(unbroken):
    model = sit.load_sit(str(unbroken / "model"))
    assert model.config.num_embeds_ada_norm == CLASSES
    assert not any(p.isnan().any() for p in model.parameters())
    assert [path.name for path in sorted((unbroken / "samples").iterdir())] == ["step0000003.png", "step0000006.png"]
    with Image.open(unbroken / "samples" / "step0000006.png") as grid:
        assert grid.size == (CLASSES * (SIZE + 2) + 2, 2 * (SIZE + 2) + 2)
    assert [path.name for path in sorted((unbroken / "checkpoints").iterdir())] == ["step0000004", "step0000005"]
    assert json.loads((unbroken / "options.json").read_text())["betas"] == [0.9, 0.999]


def test_a_killed_run_continues_bit_exactly(world, unbroken):
    output = world / "killed"
    process = subprocess.Popen(
        command_line(world, output), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 300
    while not (output / "checkpoints" / "step0000002").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.time() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "model").exists()
    train(world, output, resume=True)
    assert_equal([weights(output)], [weights(unbroken)])
    last = "samples/step0000006.png"
    assert (output / last).read_bytes() == (unbroken / last).read_bytes()


def in_step(rank, world, output):
    """Trained by one of two processes: its weights. Each sees other pictures."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "ACCELERATE_USE_CPU": "1",
    }  # fmt: skip
    fresh_accelerator()
    asked = options(world, output)
    training = train_sit.Training(asked, train_sit.accelerator_for(asked, "no"))
    assert training.accelerator.num_processes == 2
    stream = training._stream()
    for _ in range(2):
        training._train_step(stream)
        training.step += 1
    return {name: p.detach() for name, p in training.accelerator.unwrap_model(training.model).named_parameters()}


def test_two_processes_train_together(world, tmp_path):
    """Through an unwrapped module each would follow its own half of the batch."""
    (tmp_path / "meeting").mkdir()
    ranks = in_processes(in_step, tmp_path / "meeting", world, tmp_path / "two")
    assert_equal(ranks[0].values(), ranks[1].values())
    assert any(p.abs().max() > 0 for name, p in ranks[0].items() if name.startswith("proj_out"))  # zero at first


def test_two_processes_from_the_command_line(world, tmp_path):
    """One of them speaks."""
    line = command_line(world, tmp_path, "--steps", 2, "--vae", scaled(world, tmp_path / "vae", 100.0), processes=2)
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(SCALE) == 1
    assert all(p.isfinite().all() for p in weights(tmp_path).values())


def test_a_batch_can_be_overfitted(world, tmp_path):
    """One draw of twelve images: at every noise level the network can know which one it sees."""
    first, last = (
        train(
            world, tmp_path / str(steps), "latents", steps=steps, flip=False, batch_size=12, checkpoint_every=999,
            sample_every=999,
        )
        for steps in (1, 250)
    )  # fmt: skip
    assert first > 1.5
    assert last < 0.5 * first


@pytest.mark.parametrize("data", ["latents", "moments"])
def test_cached_latents_are_those_of_the_images(world, data):
    """With moments they are drawn anew; both are as the pictures' own."""
    vae = sampling.load_measured_vae(str(world / "vae"), None, torch.device("cpu"))
    cached, pictures = (
        labelled.open_data(options(world, world / "none", name, flip=False).data, 0, vae) for name in (data, "images")
    )
    assert cached.labels() == pictures.labels() == [0] * 4 + [1] * 4 + [2] * 4
    batch = labelled.collate([cached[place, place] for place in range(12)])
    images_ = labelled.collate([pictures[place, place] for place in range(12)])
    assert batch.labels.tolist() == images_.labels.tolist()
    posterior = vae.encode(images_.content).latent_dist
    mean, logvar = batch.content.chunk(2, 1)
    if data == "moments":
        assert_close([mean, logvar], [posterior.mean, posterior.logvar])
    else:
        assert float(((mean - posterior.mean) / posterior.std).std()) == pytest.approx(1, abs=0.1)
        assert_equal([logvar], [torch.full_like(logvar, -30)])


def test_half_of_the_images_are_mirrored_by_position_alone(world):
    vae = sampling.load_measured_vae(str(world / "vae"), None, torch.device("cpu"))
    data = labelled.open_data(options(world, world / "none").data, 0, vae)
    plain = labelled.open_data(options(world, world / "none", flip=False).data, 0, vae)[0, 0][0]
    kinds = [data[position, 0][0] for position in range(40)]
    assert all(kind.equal(plain) or kind.equal(plain.flip(-1)) for kind in kinds)
    assert 10 < sum(kind.equal(plain) for kind in kinds) < 30
    assert_equal([data[7, 0][0]], [kinds[7]])


def test_labels_are_dropped_as_often_as_asked(world, tmp_path):
    fresh_accelerator()
    asked = options(world, tmp_path, drop_label=1.0)
    training = train_sit.Training(asked, train_sit.accelerator_for(asked, "no"))
    seen = []
    embedding = training.model.transformer_blocks[0].norm1.emb.class_embedder.embedding_table
    embedding.register_forward_hook(lambda _module, inputs, _output: seen.extend(inputs[0].tolist()))
    training._train_step(training._stream())
    assert set(seen) == {CLASSES}


# Bad input


def test_a_nan_stops_saves_and_is_named(world, tmp_path):
    with pytest.raises(SystemExit, match=r"step 1: the velocity loss became NaN or infinite; the state before it is"):
        train(world, tmp_path, lr=1e37, steps=3, checkpoint_every=100)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step0000001"]
    for _ in range(2):  # and where that checkpoint exists
        with pytest.raises(SystemExit, match=r"step 1: the velocity loss became NaN or infinite; the state before it"):
            train(world, tmp_path, lr=1e37, steps=3, checkpoint_every=100, resume=True)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step0000001"]


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_nan_gradient_of_a_finite_loss_spoils_nothing(world, unbroken, tmp_path, clip):
    """Older checkpoints stay too, and --resume goes on as if nothing had been."""
    fresh_accelerator()
    asked = options(world, tmp_path, clip=clip, keep_checkpoints=1)
    training = train_sit.Training(asked, train_sit.accelerator_for(asked, "no"))
    stream = training._stream()
    training._train_step(stream)
    training.step += 1
    training._save_checkpoint()
    training._train_step(stream)
    training.step += 1
    before = {name: p.detach().clone() for name, p in training.model.named_parameters()}
    next(training.model.parameters()).register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(SystemExit, match=r"step 2: gradient of the velocity loss became NaN .*--resume and a smaller"):
        training._train_step(stream)
    assert_equal(dict(training.model.named_parameters()).values(), before.values())
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step0000001", "step0000002"]
    train(world, tmp_path, clip=clip, resume=True)
    if clip is None:
        assert_equal([weights(tmp_path)], [weights(unbroken)])


def test_starting_over_checkpoints_is_refused(world, unbroken):
    with pytest.raises(SystemExit, match="holds checkpoints of an earlier run: pass --resume"):
        train(world, unbroken)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"classes": 2}, r"labels 2 are out of range; there are 2 classes, 0 to 1"),
        ({"data": "images/class0"}, r"class0 has no labels, or one class alone: .*--data.classes 1 trains without"),
        ({"data": "moments", "vae": "rae"}, r"holds latents of 8 channels, and the VAE makes 48: pass the --vae"),
        ({"vae": "unmeasured"}, r"have no statistics, .*: pass --statistics \(mean_std.json of ReaLS"),
        ({"size": 30}, r"an image side is 30; wanted a multiple of the stride 8"),
        ({"size": 24}, r"latents are 3 x 3, which patches of 2 do not fill: take --patch-size 1"),
        ({"batch_size": 3, "accumulate": 2}, r"--batch-size 3 is not shared by 2 processes times --accumulate"),
        ({"data": "nowhere"}, r"nowhere holds no images"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else None,
)
def test_what_cannot_be_trained_is_said(world, tmp_path, changes, said):
    changes = dict(changes)
    if changes.get("vae") == "rae":
        rae = fill_weights(tiny_psvae("rae"))
        fit_latent_statistics(rae, [images(8)])
        rae.save_pretrained(tmp_path / "rae")
        changes["vae"] = str(tmp_path / "rae")
    elif "vae" in changes:
        changes["vae"] = str(world / changes["vae"])
    with pytest.raises(SystemExit, match=said):
        train(world, tmp_path / "out", **changes)
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_a_cache_of_another_vae_is_refused(world, tmp_path):
    """With as many channels; by its weights, and not by what a PixelVAE leaves to the caller."""
    other = PSVAE.from_pretrained(world / "vae")
    next(other.encoder.parameters()).data += 0.01
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit, match=r"latents holds latents of another VAE \(vae: '.*' before, '.*' now\): pass"):
        train(world, tmp_path / "out", "latents", vae=str(tmp_path / "other"))

    vae, cache = scaled(world, tmp_path / "vae", 1.0), tmp_path / "cache"
    fresh_accelerator()
    pictures = str(world / "images")
    cache_latents.main(cache_latents.Options(str(world / "unmeasured"), pictures, cache, size=SIZE, workers=0))
    assert train(world, tmp_path / "out", cache, vae=vae, steps=1) > 0


def test_an_image_beside_the_classes_is_refused(world, tmp_path):
    for name in ("a/0", "b/1", "2"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.png").write_bytes(png(0))
    with pytest.raises(SystemExit, match="labels -1 are out of range; there are 2 classes"):
        train(world, tmp_path / "out", data=tmp_path)
    assert train(world, tmp_path / "out", data=tmp_path, classes=1, steps=1) > 0


@torch.no_grad()
def test_one_scalar_of_reals_brings_latents_to_unit_scale(world, tmp_path, capsys):
    """Instead of AutoencoderKL's constant, which would scale them twice."""
    vae = fill_weights(tiny_pixel_vae())
    fit_latent_statistics(vae, [images(8)])
    write_mean_std(vae.latent_spec, tmp_path / "mean_std.json")
    raw = vae.encode(images(8)).latent_dist.mode()
    vae.save_pretrained(tmp_path)
    loaded = sampling.load_measured_vae(str(tmp_path), None, torch.device("cpu"))
    assert "its latents go by the statistics" in capsys.readouterr().out
    told = json.loads((tmp_path / "mean_std.json").read_text())
    seen = sampling.scale_latents(loaded, raw)
    assert_close([seen], [(raw - told["mean"]) / told["std"]])
    assert_close([sampling.unscale_latents(loaded, seen)], [raw])


def test_statistics_that_nobody_can_look_for_are_not_passed_over_in_silence(tmp_path, monkeypatch, capsys):
    """The constant serves; where the cache remembers that there are none, there is nothing to say."""
    fill_weights(tiny_pixel_vae()).export_diffusers(tmp_path / "sd")
    cache = tmp_path / "cache"
    fill_cache(cache, "org/sd", commit_of(1), tmp_path / "sd")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def said():
        vae = sampling.load_measured_vae("org/sd", None, torch.device("cpu"))
        assert vae.config.scaling_factor == 0.18215
        return capsys.readouterr().out

    assert re.fullmatch(
        r"mean_std.json of org/sd is not in the local cache and the Hub cannot .* online once.*\n", said()
    )
    absent = cache / "models--org--sd" / ".no_exist" / commit_of(1) / "mean_std.json"
    absent.parent.mkdir(parents=True)
    absent.touch()
    assert said() == ""


SCALE = "statistics are another model's or data's, or were applied twice"


def scaled(world, folder, times):
    """A VAE whose mean_std.json makes its latents so many times too narrow."""
    vae = PixelVAE.from_pretrained(world / "unmeasured")
    vae.save_pretrained(folder)
    fit_latent_statistics(vae, [torch.cat([images(8, seed=seed) for seed in range(3)])])
    write_mean_std(vae.latent_spec, folder / "mean_std.json")
    told = json.loads((folder / "mean_std.json").read_text())
    (folder / "mean_std.json").write_text(json.dumps({"mean": told["mean"], "std": times * told["std"]}))
    return str(folder)


@pytest.mark.parametrize(("times", "warned"), [(10.0, 1), (0.1, 1), (2.4, 0), (0.4, 0)])
def test_a_wrong_scale_is_warned_of(world, tmp_path, capsys, times, warned):
    """As AlignmentNet warns, once whenever a run begins."""
    asked = {"vae": scaled(world, tmp_path / "vae", times), "accumulate": 2}
    train(world, tmp_path / "out", steps=2, **asked)
    assert capsys.readouterr().err.count(SCALE) == warned
    train(world, tmp_path / "out", steps=4, resume=True, **asked)
    assert capsys.readouterr().err.count(SCALE) == warned
    assert alignment_net._FAR == train_sit.FAR


# Sampling


def sampling_options(world, unbroken, output, **changes):
    default = {"model": str(unbroken / "model"), "vae": str(world / "vae"), "output": output, "count": 7,
               "batch_size": 2, "steps": 4, "guidance": 1.5}  # fmt: skip
    return sample_sit.Options(**{**default, **changes})


def sample(world, unbroken, output, **changes):
    fresh_accelerator()
    sample_sit.main(sampling_options(world, unbroken, output, **changes))
    with np.load(output.with_name(f"{output.name}.npz")) as content:
        assert list(content) == ["arr_0"]
        return content["arr_0"]


def test_the_npz_is_what_adm_reads_whoever_makes_it(world, unbroken, tmp_path):
    alone = sample(world, unbroken, tmp_path / "alone")
    assert (alone.dtype, alone.shape) == (np.uint8, (7, SIZE, SIZE, 3))
    assert len(np.unique(alone.reshape(7, -1), axis=0)) == 7
    asked = sampling_options(world, unbroken, tmp_path / "two")
    words = [(f"--{key.replace('_', '-')}", getattr(asked, key)) for key in ("model", "vae", "output", "count")]
    words += [("--batch-size", 2), ("--steps", 4), ("--guidance", 1.5)]
    run(command("sample_sit", *(word for pair in words for word in pair), processes=2))
    with np.load(tmp_path / "two.npz") as content:
        assert np.array_equal(content["arr_0"], alone)
    (tmp_path / "alone" / "0000002.npy").unlink()  # as a kill would leave it
    before = (tmp_path / "alone" / "0000000.npy").stat().st_mtime_ns
    assert np.array_equal(sample(world, unbroken, tmp_path / "alone"), alone)
    assert (tmp_path / "alone" / "0000000.npy").stat().st_mtime_ns == before
    with pytest.raises(SystemExit, match=r"holds pictures of another run.*\(seed: 0 before, 1 now\)"):
        sample(world, unbroken, tmp_path / "alone", seed=1)


@pytest.mark.parametrize(
    "how",
    [{"guidance": 3.0}, {"guidance_interval": (0.0, 0.5)}, {"solver": "euler"}, {"solver": "heun"}, {"diffusion": 2.0},
     {"last_step": 0.3}, {"shift": 3.0}, {"seed": 1}, {"classes": (1,)}, {"dtype": "bfloat16"}],
    ids=lambda how: next(iter(how)),
)  # fmt: skip
def test_every_option_of_sampling_counts(world, tmp_path, how):
    vae = sampling.load_measured_vae(str(world / "vae"), None, torch.device("cpu"))
    sit.save_sit(tiny_sit(), vae.latent_spec, tmp_path / "model")  # a trained one would be needed for hours
    samplers = [
        sample_sit.Sampler(sampling_options(world, tmp_path, tmp_path, **more), torch.device("cpu"))
        for more in ({}, how)
    ]
    assert not np.array_equal(*(sampler(range(2))[0] for sampler in samplers))


def test_classes_are_drawn_or_taken_in_turn(world, unbroken, tmp_path):
    def classes(**how):
        sampler = sample_sit.Sampler(sampling_options(world, unbroken, tmp_path, **how), torch.device("cpu"))
        return [sampler.class_of(number) for number in range(9)]

    assert classes(balanced=True) == [0, 1, 2] * 3
    assert classes(classes=(2, 0)) == [2, 0, 2, 0, 2, 0, 2, 0, 2]
    assert set(classes()) == {0, 1, 2}
    assert classes() != classes(seed=1)
    with pytest.raises(SystemExit, match="labels 3 are out of range; there are 3 classes, 0 to 2"):
        classes(classes=(3,))


def test_a_vae_of_other_latents_is_refused(world, tmp_path):
    other = fill_weights(tiny_psvae("rae"))
    fit_latent_statistics(other, [images(8)])
    other.save_pretrained(tmp_path / "rae")
    sit.save_sit(tiny_sit(), tiny_psvae().latent_spec, tmp_path / "model")
    (tmp_path / "model" / sit.STATISTICS).unlink()  # they would not fit either
    with pytest.raises(SystemExit, match=r"rae have 48 channels and the SiT .*model makes 8; wanted the --vae"):
        sample(world, tmp_path, tmp_path / "out", vae=str(tmp_path / "rae"))


@torch.no_grad()
def test_saved_latents_are_what_the_pictures_are_decoded_from(world, unbroken, tmp_path):
    """In batches that another run of the same command does not make again."""
    pictures = sample(world, unbroken, tmp_path / "made", save_latents=True)
    assert np.array_equal(pictures, sample(world, unbroken, tmp_path / "plain"))
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
    sample(world, unbroken, tmp_path / "made", save_latents=True)
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


# Distances


def gaussian(mean, covariance, count=50, seed=0):
    """Rows whose mean and covariance are exactly these."""
    rows = torch.randn(count, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = rows - rows.mean(0)
    white = rows @ torch.linalg.inv(torch.linalg.cholesky(rows.T.cov())).T
    return white @ torch.linalg.cholesky(torch.tensor(covariance, dtype=torch.float64)).T + torch.tensor(mean)


def test_the_distance_of_two_gaussians():
    first, second = gaussian([0.0, 1.0], [[4.0, 0.0], [0.0, 1.0]]), gaussian([3.0, 5.0], [[1.0, 0.0], [0.0, 9.0]], 70)
    assert frechet.frechet_distance(first, second) == pytest.approx(25 + 1 + 4)  # |μ|² + Σ (σ₁ − σ₂)², axis by axis
    assert frechet.frechet_distance(first, first) == pytest.approx(0, abs=1e-9)
    one, two = gaussian([0.0, 0.0], [[2.0, 0.9], [0.9, 1.0]]), gaussian([0.0, 0.0], [[1.0, -0.5], [-0.5, 3.0]])
    product = one.T.cov() @ two.T.cov()  # of 2 x 2: Tr √M = √(Tr M + 2 √det M)
    between = torch.sqrt(product.trace() + 2 * product.det().sqrt())
    assert frechet.frechet_distance(one, two) == pytest.approx(float(7 - 2 * between))
    with pytest.raises(SystemExit, match="the features hold NaN"):
        frechet.frechet_distance(first * math.nan, second)


def random_inception(file):
    """Of torch-fidelity, as it comes from its file: random weights, each layer normalised over two pictures."""
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", reason="comes with psvae[train]")

    class Fresh(fidelity.FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            """Nothing to load yet."""

    torch.save({}, file)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Fresh("inception-v3-compat", ["2048"], str(file))
        for layer in network.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.momentum = 1.0
        network.train()(torch.from_numpy(pixels(2, 0)).permute(0, 3, 1, 2))
        torch.nn.init.normal_(network.fc.weight, std=0.02)
    torch.save(network.state_dict(), file)
    return fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(file))


def pixels(count, seed, brightest=255):
    """uint8 N H W 3."""
    return np.random.default_rng(seed).integers(0, brightest, (count, SIZE, SIZE, 3), dtype=np.uint8)


@torch.no_grad()
def test_inceptions_numbers_are_those_of_torch_fidelity(tmp_path, monkeypatch):
    """By its own functions, of features taken one by one; manifolds and score as ADM's evaluator writes them."""
    network = random_inception(tmp_path / "inception.pth")
    metric_fid = pytest.importorskip("torch_fidelity.metric_fid")
    monkeypatch.setattr(frechet, "SCORED", 3)  # more than one score to average
    sets = {"samples": pixels(6, 1, brightest=9), "reference": pixels(4, 2, brightest=240)}
    sets["samples"][1:] += sets["reference"][0]  # five alike, and a black one
    for name, array in sets.items():
        np.savez(tmp_path / f"{name}.npz", arr_0=array)
    numbers = frechet.main(
        frechet.Options(
            samples=str(tmp_path / "samples.npz"), reference=str(tmp_path / "reference.npz"), batch_size=4, workers=0,
            inception=tmp_path / "inception.pth",
        )
    )  # fmt: skip
    assert list(numbers) == ["samples", "reference", "fid", "sfid", "is", "precision", "recall"]

    maps = []
    network.Mixed_6d.branch1x1.bn.register_forward_hook(lambda _module, _inputs, output: maps.append(output.clone()))
    made, real = (torch.from_numpy(array).permute(0, 3, 1, 2) for array in sets.values())
    (made, logits), (real, _) = network(made), network(real)
    spatial = [found[:, :7].relu().permute(0, 2, 3, 1).flatten(1) for found in maps]  # ADM: mixed_6/conv, [..., :7]
    assert spatial[0].shape == (6, 2023)

    def distance(first, second):
        basis = torch.linalg.qr(torch.cat([first, second]).double().T).Q  # their span, where it is the same
        statistics = [metric_fid.fid_features_to_statistics(rows.double() @ basis) for rows in (first, second)]
        return metric_fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]

    assert numbers["fid"] == pytest.approx(distance(made, real), rel=1e-3)
    assert numbers["sfid"] == pytest.approx(distance(*spatial), rel=1e-3)
    parts = logits.double().softmax(1).split(3)
    scores = [math.exp((part * (part.log() - part.mean(0, keepdim=True).log())).sum(1).mean()) for part in parts]
    assert numbers["is"] == pytest.approx(np.mean(scores), rel=1e-3)
    assert numbers["is"] > 1.01

    def inside(points, others):
        """Of the points, those within some other's distance to its third nearest neighbour."""
        radii = torch.tensor([sorted((one - other).norm() for other in others)[3] for one in others])
        return np.mean(
            [any((point - one).norm() <= r for one, r in zip(others, radii, strict=True)) for point in points]
        )

    assert numbers["precision"] == pytest.approx(inside(made, real)) == pytest.approx(5 / 6)
    assert numbers["recall"] == pytest.approx(inside(real, made))
    assert numbers["precision"] != numbers["recall"]


def test_three_pictures_have_no_third_neighbour(tmp_path):
    pytest.importorskip("torch_fidelity", reason="comes with psvae[train]")
    (tmp_path / "inception.pth").touch()
    np.savez(tmp_path / "few.npz", arr_0=pixels(3, 1))
    few = str(tmp_path / "few.npz")
    with pytest.raises(SystemExit, match=r"3 pictures came, .*the 3 nearest others: wanted more of each"):
        frechet.main(frechet.Options(samples=few, reference=few, inception=tmp_path / "inception.pth", workers=0))


def test_the_distance_is_named_for_its_encoder_and_never_fid(world, tmp_path, capsys):
    fill_weights(tiny_encoder()).save_pretrained(tmp_path / "teacher")
    files = sorted((world / "images").rglob("*.png"))
    np.savez(tmp_path / "samples.npz", arr_0=np.stack([np.array(Image.open(file)) for file in files]))
    asked = frechet.Options(
        samples=str(tmp_path / "samples.npz"), reference=str(world / "images"), encoder=str(tmp_path / "teacher"),
        inception=tmp_path / "none.pth", workers=0, output=tmp_path / "numbers.json",
    )  # fmt: skip
    numbers = frechet.main(asked)
    assert numbers["frechet_distance"] == pytest.approx(0, abs=1e-6)  # the same pictures
    assert numbers["features"].startswith(str(tmp_path / "teacher"))
    assert set(numbers) == {"samples", "reference", "frechet_distance", "features"}
    assert json.loads((tmp_path / "numbers.json").read_text()) == numbers
    assert "no FID, sFID, Inception score, precision and recall:" in capsys.readouterr().out
    halved = dataclasses.replace(asked, samples=str(world / "images" / "class0"), size=SIZE)
    assert frechet.main(halved)["frechet_distance"] > 0.01
    with pytest.raises(SystemExit, match="nothing to measure with: pass --encoder"):
        frechet.main(dataclasses.replace(asked, encoder=None))
    np.savez(tmp_path / "wrong.npz", arr_0=np.zeros((2, 3, 8, 8), np.float32))
    with pytest.raises(SystemExit, match=r"holds float32 of shape \(2, 3, 8, 8\); wanted uint8, N H W 3"):
        frechet.main(dataclasses.replace(asked, samples=str(tmp_path / "wrong.npz")))
