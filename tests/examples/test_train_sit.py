"""SiT in our latents: its size and first weights, and a training that resumes to the bit."""

import json
import math
import os
import re
import signal
import subprocess
import time

import huggingface_hub.constants
import pytest
import torch
from diffusers import DiTTransformer2DModel
from PIL import Image
from safetensors.torch import load_file

from psvae import PSVAE, PixelVAE, fit_latent_statistics
from psvae.alignment import alignment_net
from psvae.hub.statistics import write_mean_std
from tests.base import assert_close, assert_equal
from tests.examples.generator_world import command, environment, fresh_accelerator, make_table, png, script
from tests.examples.sit_world import CLASSES, SIZE, make_measured_vae, make_pictures, tiny_sit
from tests.hub.server import commit_of
from tests.hub.test_hub import fill_cache
from tests.processes import in_processes
from tests.tiny import fill_weights, images, latents, tiny_pixel_vae, tiny_psvae

train_sit, sampling, sit, labelled = map(script, ("train_sit", "sampling", "sit", "labelled"))
cache_latents = script("cache_latents")
STEPS = 6


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Twelve images of three classes, their cached latents, a PSVAE with statistics, PixelVAEs with and without."""
    root = tmp_path_factory.mktemp("sit")
    make_pictures(root / "images")
    make_measured_vae(root / "vae")
    pixel = fill_weights(tiny_pixel_vae(scaling_factor=1.0))
    pixel.save_pretrained(root / "unmeasured")
    for fields in ({}, {"moments": True}):
        fresh_accelerator()
        output = root / ("moments" if fields else "latents")
        cache_latents.main(
            cache_latents.Options(
                str(root / "images"), size=SIZE, vae=str(root / "vae"), output=output, shard_size=5, workers=0, **fields
            )
        )
    return root


def options(world, output, data="images", **changes):
    told = {name: changes.pop(name) for name in ("classes", "flip", "size", "split") if name in changes}
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


@pytest.mark.parametrize(("ema", "weights"), [(0.5, "averaged weights"), (0.0, "weights")])
def test_a_run_says_where_its_model_is(world, tmp_path, capsys, ema, weights):
    train(world, tmp_path, steps=1, ema=ema)
    said = f"1 steps done; the {weights} are saved, for sample_sit.py's --model: {tmp_path / 'model'}\n"
    assert capsys.readouterr().out.endswith(said)


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


@pytest.mark.parametrize("clip", [None, 0.0, 1.0])
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
    if not clip:
        assert_equal([weights(tmp_path)], [weights(unbroken)])


def test_starting_over_checkpoints_is_refused(world, unbroken):
    with pytest.raises(SystemExit, match="holds checkpoints of an earlier run: pass --resume"):
        train(world, unbroken)


def other_vae(folder, kind):
    """With a part of its own, of the same shape."""
    vae = fill_weights(tiny_psvae())
    if kind == "statistics":
        vae.latent_spec.mean += 0.5
    else:
        next(getattr(vae, kind).parameters()).data += 0.1
    vae.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def begun(world, tmp_path):
    """A run with a checkpoint, of a VAE whose statistics are told."""
    vae = fill_weights(tiny_psvae())
    vae.save_pretrained(tmp_path / "vae")
    told = tmp_path / "mean_std.json"
    told.write_text('{"mean": 0.1, "std": 2.0}')
    asked = {"vae": str(tmp_path / "vae"), "statistics": told}
    train(world, tmp_path / "out", steps=2, **asked)
    return tmp_path / "out", asked


def refusal(world, output, **changes):
    before = (output / "options.json").read_bytes()
    with pytest.raises(SystemExit) as refused:
        train(world, output, steps=4, resume=True, **changes)
    assert (output / "options.json").read_bytes() == before
    return str(refused.value)


def test_a_run_goes_on_in_the_same_latents_alone(world, begun, tmp_path):
    """Another decoder changes none of them."""
    output, asked = begun
    vae = other_vae(tmp_path / "a", "encoder")
    assert re.fullmatch(
        rf"the latents of {vae} are not those that {output} was trained on \(another encoder\): wanted the --vae and "
        r"--statistics in options.json there, or another --output",
        refusal(world, output, **{**asked, "vae": vae}),
    )
    make_measured_vae(tmp_path / "rae", "rae")  # of other channels
    assert "another encoder" in refusal(world, output, vae=str(tmp_path / "rae"))
    told = tmp_path / "told.json"
    told.write_text('{"mean": 0.1, "std": 1.9}')
    assert "(another statistics or scale)" in refusal(world, output, **{**asked, "statistics": told})
    vae = other_vae(tmp_path / "b", "decoder")
    assert train(world, output, steps=4, resume=True, **{**asked, "vae": vae}) > 0


def test_a_checkpoint_of_another_network_is_named(world, begun):
    """Also of a run from before latents were noted."""
    output, asked = begun
    (output / sit.LATENTS).unlink()
    said = (
        r"checkpoints holds checkpoints of another network \(size mismatch for .*\): wanted the --model, --patch-size"
    )
    assert re.search(said, refusal(world, output, patch_size=1, **asked))


def test_images_that_are_all_damaged_are_said(world, tmp_path):
    for number in range(2):
        (tmp_path / "data" / f"class{number}").mkdir(parents=True)
        (tmp_path / "data" / f"class{number}" / "0.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit, match=r"none of the 2 images of \S+/data can be read: \S+/0.png cannot be read \("):
        train(world, tmp_path / "out", data=tmp_path / "data")
    assert not (tmp_path / "out" / "checkpoints").exists()
    (tmp_path / "data" / "class1" / "1.png").write_bytes(png(0))
    assert train(world, tmp_path / "out", data=tmp_path / "data", steps=1) > 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"classes": 2}, r"labels 2 are out of range; there are 2 classes, 0 to 1: see --data.classes"),
        ({"data": "images/class0"}, r"class0 has no labels, or one class alone: .*--data.classes 1 trains without"),
        ({"data": "moments", "vae": "rae"}, r"holds latents of 8 channels, and the VAE makes 48: pass the --vae"),
        ({"vae": "unmeasured"}, r"have no statistics, .*: pass --statistics \(mean_std.json of ReaLS"),
        ({"size": 30}, r"an image side is 30; wanted a multiple of the stride 8"),
        ({"size": 24}, r"latents are 3 x 3, which patches of 2 do not fill: take --patch-size 1"),
        ({"batch_size": 3, "accumulate": 2}, r"--batch-size 3 is not shared by 2 processes times --accumulate"),
        ({"data": "nowhere"}, r"there is no folder \S+/nowhere; .* for a Hugging Face dataset name its --data.split"),
        ({"data": "images/class0/0.png"}, r"class0/0.png is a file; wanted a folder of images"),
        ({"data": "vae"}, r"vae holds no images \(.bmp, .*\); for a Hugging Face dataset name its --data.split"),
        *(
            ({name: 0}, rf"--{name.replace('_', '-')} is 0; wanted at least 1")
            for name in train_sit.LEAST[1]
            if "." not in name
        ),
        ({"classes": 0}, r"--data.classes is 0; wanted at least 1"),
        ({"clip": -1.0}, r"--clip is -1.0; wanted at least 0"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else None,
)
def test_what_cannot_be_trained_is_said(world, tmp_path, changes, said):
    changes = dict(changes)
    if changes.get("vae") == "rae":
        make_measured_vae(tmp_path / "rae", "rae")
        changes["vae"] = str(tmp_path / "rae")
    elif "vae" in changes:
        changes["vae"] = str(world / changes["vae"])
    with pytest.raises(SystemExit, match=said):
        train(world, tmp_path / "out", **changes)
    assert not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.parametrize("name", ["log_every", "keep_checkpoints"])
def test_a_training_refuses_too_small_numbers_by_itself(world, tmp_path, name):
    """As generation.py builds it, without the program."""
    fresh_accelerator()
    asked = options(world, tmp_path, **{name: 0})
    with pytest.raises(SystemExit, match=r"is 0; wanted at least 1"):
        train_sit.Training(asked, train_sit.accelerator_for(asked, "no"))


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
    cache_latents.main(
        cache_latents.Options(pictures, size=SIZE, vae=str(world / "unmeasured"), output=cache, workers=0)
    )
    assert train(world, tmp_path / "out", cache, vae=vae, steps=1) > 0


@pytest.mark.parametrize("cached", [False, True])
def test_an_image_beside_the_classes_is_refused(world, tmp_path, capsys, cached):
    """Where there are no subfolders at all, all is one class."""
    for name in ("a/0", "b/1", "2"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / f"{name}.png").write_bytes(png(0))

    def data(folder, name):
        if not cached:
            return folder
        fresh_accelerator()
        output = tmp_path / name
        cache_latents.main(
            cache_latents.Options(str(folder), size=SIZE, vae=str(world / "vae"), output=output, workers=0)
        )
        return output

    mixed = data(tmp_path / "images", "mixed")
    if cached:
        assert "2.png beside the subfolders, which are the classes, get the label 0" in capsys.readouterr().out
    said = r"has 1 images without a class beside others that have one: 2.png. Wanted each in a subfolder"
    with pytest.raises(SystemExit, match=said):
        train(world, tmp_path / "out", data=mixed)
    assert train(world, tmp_path / "out", data=mixed, classes=1, steps=1) > 0
    flat = data(tmp_path / "images" / "a", "flat")
    with pytest.raises(SystemExit, match="has no labels, or one class alone"):
        train(world, tmp_path / "flat_out", data=flat)
    if cached:  # taken out, and its shard made anew
        (tmp_path / "images" / "2.png").unlink()
        next(mixed.glob("latents_0*")).unlink()
        data(tmp_path / "images", "mixed")
        assert train(world, tmp_path / "again", data=mixed, steps=1) > 0


def test_rows_without_a_label_are_refused(world, tmp_path):
    make_table(tmp_path / "table" / "train-0.parquet", image=[png(row) for row in range(4)], label=[0, None, 1, None])
    table = {"data": tmp_path / "table", "split": "train"}
    with pytest.raises(SystemExit, match=r"has 2 images without a class .* have one: row 1, row 3\. Wanted"):
        train(world, tmp_path / "out", **table)
    assert train(world, tmp_path / "out", **table, classes=1, steps=1) > 0
    asked = cache_latents.Options(
        str(tmp_path / "table"), "train", size=SIZE, vae=str(world / "vae"), output=tmp_path / "cache", workers=0
    )
    with pytest.raises(SystemExit, match=r"table has no label in row 1, row 3; wanted one in each row: see --label"):
        cache_latents.main(asked)
    assert not (tmp_path / "cache").exists()


@torch.no_grad()
def test_one_scalar_of_reals_brings_latents_to_unit_scale(world, tmp_path, capsys):
    """Instead of AutoencoderKL's constant, which would scale them twice."""
    vae = fill_weights(tiny_pixel_vae())
    fit_latent_statistics(vae, [images(8)])
    write_mean_std(vae.latent_spec, tmp_path / "mean_std.json")
    raw = vae.encode(images(8)).latent_dist.mode()
    vae.save_pretrained(tmp_path)
    loaded = sampling.load_measured_vae(str(tmp_path), None, torch.device("cpu"))
    said = f"{tmp_path} has the scale 0.18215: its latents go by the statistics of {tmp_path}/mean_std.json instead\n"
    assert capsys.readouterr().out == said
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
