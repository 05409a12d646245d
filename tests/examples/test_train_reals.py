"""The ReaLS training: what it leaves, exact resumption, processes in step, and the four silent faults of its peers."""

import copy
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

from psvae import PixelVAE, SemanticEncoder, SemanticEncoderConfig, load_reals, losses
from psvae.errors import CheckpointError
from tests.base import assert_close, assert_equal
from tests.examples.generator_world import SIZE, command, environment, fresh_accelerator, make_table, png, run, script
from tests.processes import in_processes
from tests.tiny import fill_weights, images, latents, tiny_encoder, tiny_pixel_vae, tiny_pixel_vae_config

train_reals, reals_models, data, measures = map(script, ("train_reals", "reals_models", "data", "measures"))
STEPS = 6


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("reals")
    (root / "pictures").mkdir()
    for number in range(8):
        (root / "pictures" / f"{number}.png").write_bytes(png(number))
    (root / "vae.json").write_text(json.dumps(tiny_pixel_vae_config().to_dict()))
    for number in range(6):
        (root / "labelled" / f"class{number % 2}").mkdir(parents=True, exist_ok=True)
        (root / "labelled" / f"class{number % 2}" / f"{number}.png").write_bytes(png(number))
    fill_weights(tiny_encoder()).save_pretrained(root / "teacher")
    narrow = {**tiny_encoder().config.model_args, "embed_dim": 4, "num_heads": 1}  # fewer features than pictures
    fill_weights(tiny_encoder(model_args=narrow)).save_pretrained(root / "narrow")
    return root


def options(world, output, **changes):
    """Fields of LossOptions and DataOptions among those of Options."""
    weights = {"perceptual": 0.0, "adversarial_start": 3}
    where = {"path": str(world / "pictures"), "size": SIZE, "workers": 0}
    default = {
        "model": world / "vae.json", "teacher": str(world / "teacher"), "output": output, "steps": STEPS,
        "batch_size": 2, "warmup": 2, "mixed_precision": "no", "tracker": "none", "log_every": 2, "sample_every": 3,
        "checkpoint_every": 1, "validation_count": 4, "statistics_batches": 2, "align_hidden": 32, "ema": 0.9,
    }  # fmt: skip
    for kind, fields in ((train_reals.LossOptions, weights), (train_reals.DataOptions, where)):
        names = {field.name for field in dataclasses.fields(kind)} - {"kl"}
        fields |= {name: changes.pop(name) for name in list(changes) if name in names}
    if "kl_weight" in changes:
        weights["kl"] = changes.pop("kl_weight")
    chosen = {"data": train_reals.DataOptions(**where), "losses": train_reals.LossOptions(**weights)}
    return train_reals.Options(**{**default, **chosen, **changes})


def train(world, output, **changes):
    fresh_accelerator()
    return train_reals.main(options(world, output, **changes))


def trainer(world, output, **changes):
    """Built, and nothing trained yet."""
    fresh_accelerator()
    chosen = options(world, output, **changes)
    train_reals.check(chosen)
    made = train_reals.Training(chosen, train_reals.accelerator_for(chosen, chosen.mixed_precision))
    made.build()
    return made


def stream(made, start=0):
    chosen, accelerator = made.options, made.accelerator
    rank, world = accelerator.process_index, accelerator.num_processes
    return data.batches(chosen.data, chosen.batch_size, chosen.seed, rank, world, start)


def steps(made, count=1):
    """Train; the terms of the last step."""
    pictures = stream(made)
    for _ in range(count):
        terms = made.train_step(pictures)
        made.step += 1
    return terms


def weights(output):
    files = (output / "vae" / "diffusion_pytorch_model.safetensors", output / "alignment" / "model.safetensors")
    return [tensor for file in files for tensor in load_file(file).values()]


def state(module):
    return {key: tensor.clone() for key, tensor in module.state_dict().items()}


def moved(module, before):
    return {key for key, tensor in module.state_dict().items() if not torch.equal(tensor, before[key])}


# From end to end


@pytest.fixture(scope="module")
def unbroken(world):
    return world / "unbroken", train(world, world / "unbroken")


def test_it_leaves_what_load_reals_and_diffusers_read(world, unbroken):
    output, numbers = unbroken
    vae, alignment = load_reals(output)
    with torch.no_grad():
        posterior = vae.encode(images()).latent_dist
        theirs = AutoencoderKL.from_pretrained(output / "vae")
        assert_close([theirs.encode(images()).latent_dist.mean], [posterior.mean], 1e-4)
        assert_close([theirs.decode(latents()).sample], [vae.decode(latents()).sample], 1e-4)
        found = alignment(vae.latent_spec.normalize(posterior.sample()), normalized=True)
    assert found.patch_features.shape == (2, 48, 4, 4)
    assert found.global_feature.shape == (2, 48)
    assert vae.latent_spec.std[0].item() == pytest.approx(
        json.loads((output / "vae" / "mean_std.json").read_text())["std"]
    )
    wanted = {"psnr", "ssim", "patch_cosine", "cls_cosine", "latent_std", "active_channels"}
    assert wanted <= numbers.keys()
    assert json.loads((output / "metrics.json").read_text()) == numbers
    assert (output / "command.txt").exists()
    pictures = sorted(path.name for path in (output / "samples").iterdir())
    assert pictures == ["final.png", "step0000003.png"]
    assert [path.name for path in sorted((output / "checkpoints").iterdir())] == ["step0000004", "step0000005"]


def test_all_parts_are_trained_and_the_teacher_is_not(world, tmp_path):
    made = trainer(world, tmp_path)
    before, teacher = state(made.model), state(made.teacher)
    steps(made)
    assert before.keys() - moved(made.model, before) == {
        f"{part}.latent_spec.{name}" for part in ("vae", "alignment") for name in ("mean", "std")
    }
    assert not moved(made.teacher, teacher)


def test_a_killed_run_continues_bit_exactly(world, unbroken):
    output = world / "killed"
    arguments = command(
        "train_reals", "--data.path", world / "pictures", "--data.size", SIZE, "--data.workers", 0, "--model",
        world / "vae.json", "--teacher", world / "teacher", "--output", output, "--steps", STEPS, "--batch-size", 2,
        "--warmup", 2, "--mixed-precision", "no", "--tracker", "none", "--log-every", 2, "--sample-every", 3,
        "--checkpoint-every", 1, "--validation-count", 4, "--statistics-batches", 2, "--align-hidden", 32, "--ema", 0.9,
        "--losses.perceptual", 0, "--losses.adversarial-start", 3,
    )  # fmt: skip
    process = subprocess.Popen(arguments, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 300
    while not (output / "checkpoints" / "step0000003").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.time() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "metrics.json").exists()
    said = run([*arguments, "--resume"])
    assert "continues from step" in said
    assert "goes on with other options" not in said
    assert f"saved below {output}: vae/ and alignment/, averaged weights (--ema 0.9)" in said
    assert_equal(weights(output), weights(unbroken[0]))
    assert "is trained already" in run([*arguments, "--resume"])


def test_starting_over_checkpoints_is_refused(world, unbroken):
    with pytest.raises(SystemExit, match="pass --resume, or another --output"):
        train(world, unbroken[0], lr=1.0)


def test_a_finished_run_is_not_taken_for_one_of_other_options(world, unbroken, tmp_path):
    """In a sweep before the first is trained. What trains nothing may be another, and so may what it did not know."""
    output, numbers = unbroken
    said = r"holds a finished run of other options \(losses.mse: 1.0 before, 0.5 now; steps: 6 before, 8 now\)"
    with pytest.raises(SystemExit, match=f"unbroken {said}"):
        train(world, output, resume=True, steps=8, mse=0.5)
    assert train(world, output, resume=True, validation_count=2, log_every=7, checkpoint_every=5, workers=1) == numbers
    one = tmp_path / "kl1e-06"
    shutil.copytree(output, one)
    with pytest.raises(SystemExit, match=r"kl1e-06 holds a finished run of other options \(steps: 6 before, 8 now\)"):
        train(world, tmp_path, resume=True, kl=(1.0, 1e-6), sit_steps=0, steps=8)
    assert [path.name for path in tmp_path.iterdir()] == ["kl1e-06"]
    before = json.loads((one / "options.json").read_text())
    del before["steps"], before["losses"]["mse"]
    (one / "options.json").write_text(json.dumps(before))
    assert train(world, one, resume=True, steps=8, mse=0.5) == numbers


def test_a_finished_run_goes_on_for_more_steps(world, unbroken, tmp_path, capsys, monkeypatch):
    """From its newest checkpoint: to the bit what so many steps would have been, and no finished run until then."""
    whole, longer = tmp_path / "whole", tmp_path / "longer"
    wanted = train(world, whole, steps=8)
    shutil.copytree(unbroken[0], longer)
    capsys.readouterr()

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(train_reals.Training, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(world, longer, resume=True, steps=8)
    assert not (longer / "metrics.json").exists()
    assert train(world, longer, resume=True, steps=8) == wanted
    said = capsys.readouterr().out
    assert "goes on with other options: " in said
    assert "steps: 6 before, 8 now" in said
    assert "continues from step 5" in said
    assert_equal(weights(longer), weights(whole))
    assert json.loads((longer / "metrics.json").read_text()) == wanted
    load_reals(longer)
    assert train(world, longer, resume=True, steps=8) == wanted
    assert "is trained already" in capsys.readouterr().out


def test_a_finished_run_that_cannot_go_on_says_why(world, unbroken, tmp_path):
    """With its weights left as they are."""
    shutil.copytree(unbroken[0], tmp_path / "out")
    before = weights(tmp_path / "out")

    def refused(said, **changes):
        with pytest.raises(SystemExit, match=said):
            train(world, tmp_path / "out", resume=True, **changes)

    refused(r"of other options \(steps: 6 before, 4 now\); wanted the same, or more --steps alone: or pass", steps=4)
    (tmp_path / "out" / "sit1-32px-seed0").mkdir()
    refused(r"run of 6 steps, and 8 were asked for, but sit1-32px-seed0/ there was trained in its latents", steps=8)
    (tmp_path / "out" / "sit1-32px-seed0").rmdir()
    shutil.rmtree(tmp_path / "out" / "checkpoints")
    refused(r"8 were asked for, but it left no checkpoint .*: wanted another --output, and --vae /\S+/vae to", steps=8)
    assert (tmp_path / "out" / "metrics.json").exists()
    assert_equal(weights(tmp_path / "out"), before)


def test_another_vae_to_start_from(world, unbroken, tmp_path):
    """Here as diffusers writes SD's, whose scaling factor goes."""
    fill_weights(tiny_pixel_vae()).export_diffusers(tmp_path / "sd")
    assert PixelVAE.from_pretrained(tmp_path / "sd").config.scaling_factor == 0.18215
    train(world, tmp_path / "tuned", vae=str(tmp_path / "sd"), model=None, steps=0)
    vae = load_reals(tmp_path / "tuned").vae
    assert vae.config.scaling_factor == 1.0
    with torch.no_grad():
        assert_equal([vae(images()).sample], [PixelVAE.from_pretrained(tmp_path / "sd")(images()).sample])
    train(world, tmp_path / "again", vae=str(unbroken[0] / "vae"), model=None, steps=1)


def test_a_pickled_vae_by_permission(world, tmp_path):
    """As VA-VAE and REPA-E publish theirs."""
    vae = fill_weights(tiny_pixel_vae())
    vae.export_diffusers(tmp_path / "sd")
    file = tmp_path / "sd" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    chosen = {"vae": str(tmp_path / "sd"), "model": None, "adversarial": 0.0}
    with pytest.raises(SystemExit, match="allow_pickle"):
        trainer(world, tmp_path / "out", **chosen)
    made = trainer(world, tmp_path / "out", **chosen, allow_pickle=True)
    assert_equal([made.model.vae.encoder.conv_in.weight.detach()], [vae.encoder.conv_in.weight.detach()])


@pytest.mark.parametrize("how", [{"mixed_precision": "bf16"}, {"ema": 0.0, "accumulate": 2, "merge": 2}])
def test_other_ways_to_train(world, tmp_path, how):
    train(world, tmp_path, steps=3, checkpoint_every=9, **how)
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path))


# Several processes


def in_step(rank, world, output, count, changes):
    """Trained by one of ``count`` processes: its weights, and its discriminator's."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "ACCELERATE_USE_CPU": "1",
    }  # fmt: skip
    made = trainer(world, output, **changes)
    assert made.accelerator.num_processes == count
    steps(made, 4)
    plain = made.accelerator.unwrap_model
    found = {"model": state(plain(made.model))}
    if made.discriminator is not None:
        found["discriminator"] = dict(plain(made.discriminator).named_parameters())
    return {name: {key: x.detach() for key, x in tensors.items()} for name, tensors in found.items()}


def test_two_processes_are_one_with_the_whole_batch(world, tmp_path):
    """Each image's noise included. Through an unwrapped module each would follow its own half."""
    changes = {"adversarial": 0.0, "equivariance": 0.5}
    (tmp_path / "meeting").mkdir()
    ranks = in_processes(in_step, tmp_path / "meeting", world, tmp_path / "two", 2, {**changes, "batch_size": 2})
    made = trainer(world, tmp_path / "one", **changes, batch_size=4)
    steps(made, 4)
    assert_equal(ranks[0]["model"].values(), ranks[1]["model"].values())
    assert_close(ranks[0]["model"].values(), state(made.model).values(), 1e-4)


def test_two_processes_stay_in_step_with_an_adversary(world, tmp_path):
    (tmp_path / "meeting").mkdir()
    changes = {"adversarial_start": 1, "adaptive": True, "batch_size": 2}
    ranks = in_processes(in_step, tmp_path / "meeting", world, tmp_path / "two", 2, changes)
    for part in ("model", "discriminator"):
        assert_equal(ranks[0][part].values(), ranks[1][part].values())
    before = trainer(world, tmp_path / "one", **changes)
    assert not torch.equal(ranks[0]["model"]["vae.encoder.conv_in.weight"], before.model.vae.encoder.conv_in.weight)


def test_two_processes_from_the_command_line(world):
    text = run(
        command(
            "train_reals", "--data.path", world / "labelled", "--data.size", SIZE, "--data.workers", 0, "--model",
            world / "vae.json", "--teacher", world / "narrow", "--output", world / "two", "--steps", 1, "--kl", 1e-6,
            1e-2, "--mixed-precision", "no", "--tracker", "none", "--validation-count", 6, "--statistics-batches", 1,
            "--batch-size", 2, "--losses.perceptual", 0, "--sit-steps", 1, processes=2,
        )
    )  # fmt: skip
    assert "2 process(es), MULTI_CPU" in text
    for name in ("kl1e-06", "kl0.01"):
        assert load_reals(world / "two" / name).vae.latent_spec.channels == 8
        assert (world / "two" / name / "sit1-32px-seed0" / "frechet.json").exists()
    assert (world / "two" / "kl_sweep.png").stat().st_size > 1000


# The silent faults of its peers


@pytest.fixture
def random_lpips(monkeypatch):
    """LPIPS itself, on a VGG whose weights are drawn instead of downloaded."""
    import lpips

    def load():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
        return network.eval().requires_grad_(False)

    monkeypatch.setattr(train_reals, "load_lpips", load)


@pytest.mark.filterwarnings("ignore:.*pretrained.*:UserWarning", "ignore:.*weight enum.*:UserWarning")
def test_lpips_has_a_gradient(world, tmp_path, random_lpips):
    """By itself it moves decoder and encoder."""
    alone = {"mse": 0.0, "kl_weight": 0.0, "patch": 0.0, "cls": 0.0, "adversarial": 0.0, "perceptual": 1.0}
    made = trainer(world, tmp_path, **alone)
    assert not any(parameter.requires_grad for parameter in made.perceptual.parameters())
    before = state(made.model)
    terms = steps(made)
    assert terms["total"].item() == pytest.approx(terms["lpips"].item())
    assert {"vae.encoder.conv_in.weight", "vae.decoder.conv_out.weight"} <= moved(made.model, before)


def watch(optimizer, module):
    """The gradients that ``module`` has whenever ``optimizer`` steps, in a list that fills as it trains."""
    seen = []
    optimizer.optimizer.register_step_pre_hook(
        lambda *_: seen.append({name: copy.deepcopy(p.grad) for name, p in module.named_parameters()})
    )
    return seen


def test_the_generator_s_loss_leaves_nothing_in_the_discriminator(world, tmp_path):
    """It has the gradient of its own loss and no other, whoever steps."""
    made = trainer(world, tmp_path, adversarial_start=1)
    network = made.discriminator
    at_generator, at_own = watch(made.optimizer, network), watch(made.adversary, network)
    twin, model = copy.deepcopy(network), copy.deepcopy(made.model)
    steps(made)
    pictures = next(stream(made)).images
    noise = [train_reals.generator_of(made.options.seed, place) for place in range(2)]
    with torch.no_grad():
        painted = model(pictures, noise).sample
    losses.discriminator_hinge_loss(twin(pictures), twin(painted)).backward()
    for name, parameter in twin.named_parameters():
        for seen in (at_own, at_generator):
            torch.testing.assert_close(seen[0][name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_discriminator_s_loss_leaves_nothing_in_the_vae(world, tmp_path, accumulate):
    """Neither in gradients that wait for the next step nor in the next step."""
    made = trainer(world, tmp_path, adversarial_start=1, accumulate=accumulate)
    waiting = watch(made.adversary, made.model)
    steps(made, 2)
    assert len(waiting) >= 2
    assert all(gradient is None for gradients in waiting for gradient in gradients.values())
    leaf = images().requires_grad_()
    made._discriminator_loss(images(seed=1), leaf).backward()
    assert leaf.grad is None


# The teacher


def test_the_teacher_sees_each_image_once_without_gradient(world, tmp_path):
    made = trainer(world, tmp_path, accumulate=2)
    seen = []
    made.teacher.register_forward_hook(lambda _, inputs, output: seen.append((len(inputs[0]), output)))
    steps(made)
    assert [count for count, _ in seen] == [2, 2]
    assert not any(tensor.requires_grad for _, output in seen for tensor in output)
    assert not made.teacher.training
    assert all(parameter.grad is None for parameter in made.teacher.parameters())


def test_the_teacher_is_in_bf16_whatever_the_vae_is_in(world, tmp_path):
    made = trainer(world, tmp_path, mixed_precision="no", adversarial=0.0)
    seen = {}
    for name, layer in (("teacher", made.teacher.vit.blocks[0].attn.qkv), ("vae", made.model.vae.encoder.conv_in)):
        layer.register_forward_hook(lambda _, inputs, output, name=name: seen.setdefault(name, []).append(output.dtype))
    steps(made)
    measures.measure_aligned(made.model, made.teacher, made.held_out, made.options, made.accelerator)
    assert seen["teacher"] == [torch.bfloat16] * 3
    assert seen["vae"] == [torch.float32] * 3


@pytest.mark.parametrize("reads", ["sample", "mean"])
def test_the_alignment_reads_what_is_asked_for(world, tmp_path, reads):
    made = trainer(world, tmp_path, align_reads=reads, adversarial=0.0)
    model = copy.deepcopy(made.model)
    seen = []
    model.alignment.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        output = model(images(), [train_reals.generator_of(0, place) for place in range(2)])
        mean = model.vae.encode(images()).latent_dist.mean
    assert_close(seen, [mean if reads == "mean" else output.latents])
    assert not torch.allclose(output.latents, mean)


@pytest.mark.parametrize("kind", ["normed", "pre_norm"])
def test_cells_are_aligned_with_the_features_that_are_asked_for(world, tmp_path, kind):
    made = trainer(world, tmp_path, teacher_features=kind, adversarial=0.0)
    model = copy.deepcopy(made.model)
    terms = steps(made)
    pictures = next(stream(made)).images
    with torch.no_grad():
        aligned = model(pictures, [train_reals.generator_of(0, place) for place in range(2)]).aligned
        seen = train_reals.seen_by(SemanticEncoder.from_pretrained(world / "teacher"), pictures)
        found = measures.measure_aligned(model, made.teacher, pictures, made.options, made.accelerator)
        mean = model.alignment(model.vae(pictures).latents)
    patches, cls = (seen.features, seen.global_token) if kind == "normed" else (seen.pre_norm, seen.pre_norm_cls)
    assert terms["align_patch"].item() == pytest.approx(losses.alignment_loss(aligned.patch_features, patches).item())
    assert terms["align_cls"].item() == pytest.approx(losses.alignment_loss(aligned.global_feature, cls).item())
    assert found["patch_cosine"] == pytest.approx(
        F.cosine_similarity(mean.patch_features, patches).mean().item(), rel=1e-4
    )
    assert found["cls_cosine"] == pytest.approx(F.cosine_similarity(mean.global_feature, cls).mean().item(), rel=1e-4)


def test_a_teacher_without_cls_has_none_before_its_norm(world, tmp_path):
    """SigLIP: the normed patch tokens' mean, or nothing for pooled latents."""
    shape = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3}
    siglip = SemanticEncoder(SemanticEncoderConfig("vit_base_patch16_siglip_224.webli", shape, stride=8))
    fill_weights(siglip).save_pretrained(tmp_path / "siglip")
    chosen = {"teacher": str(tmp_path / "siglip"), "adversarial": 0.0}
    with pytest.raises(SystemExit, match=r"siglip has no CLS token, .*: pass --losses.cls 0, or --teacher-features no"):
        trainer(world, tmp_path / "a", **chosen, teacher_features="pre_norm")
    for more in ({"teacher_features": "pre_norm", "cls": 0.0}, {}):
        made = trainer(world, tmp_path / "b", **chosen, **more)
        before = state(made.model.alignment)
        steps(made)
        learned = {name.partition(".")[0] for name in moved(made.model.alignment, before)}
        assert learned == ({"patch"} if more else {"patch", "cls"})


def test_a_folder_of_another_library_keeps_its_final_norm(tmp_path):
    encoder = fill_weights(tiny_encoder(final_norm="affine"))
    encoder.export_timm(tmp_path / "timm")
    teacher = reals_models.build_teacher(str(tmp_path / "timm"), tiny_pixel_vae(), SIZE, merge=1)
    assert teacher.config.final_norm == "affine"
    assert_equal([teacher.vit.norm.weight], [encoder.vit.norm.weight])


def test_a_teacher_with_another_norm_than_its_own_is_named(world, tmp_path, capsys):
    """A psvae folder's config.json says which: the world's is plain."""
    fill_weights(tiny_encoder(final_norm="affine")).save_pretrained(tmp_path / "affine")
    said = "teacher is 'plain': heads made for the encoder, as DINOv2's, read tokens after its own, 'affine'"
    trainer(world, tmp_path / "a")
    assert said in capsys.readouterr().out
    for more in ({"teacher": str(tmp_path / "affine")}, {"teacher_features": "pre_norm"}):
        trainer(world, tmp_path / "b", **more)
        assert "final_norm" not in capsys.readouterr().out


def test_a_folder_says_how_the_teacher_s_picture_is_normalised(tmp_path):
    """As VA-VAE's, which stays in [-1, 1]."""
    half = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    fill_weights(tiny_encoder(**half)).save_pretrained(tmp_path / "half")
    teacher = reals_models.build_teacher(str(tmp_path / "half"), tiny_pixel_vae(), SIZE, merge=1)
    assert_close([teacher._preprocess(images(), (32, 32))], [images()])


@pytest.mark.parametrize("merge", [1, 2])
def test_a_grid_that_the_teacher_cannot_meet(world, tmp_path, merge):
    size = {1: 36, 2: 40}[merge]
    with pytest.raises(SystemExit, match=rf"{size} px give .*stride 8 times --merge {merge}"):
        trainer(world, tmp_path, size=size, merge=merge)


# The terms


def test_without_alignment_it_is_a_plain_vae(world, tmp_path):
    """No teacher is read; an alignment network that only reads along changes nothing in the VAE."""
    train(world, tmp_path / "plain", patch=0.0, cls=0.0, teacher="none/at/all", adversarial=0.0)
    assert not (tmp_path / "plain" / "alignment").exists()
    with pytest.raises(CheckpointError, match="wanted vae/ and alignment/"):
        load_reals(tmp_path / "plain")
    numbers = train(world, tmp_path / "read", detach=True, adversarial=0.0)
    assert "patch_cosine" in numbers
    kind = "vae/diffusion_pytorch_model.safetensors"
    plain, read = (load_file(tmp_path / name / kind) for name in ("plain", "read"))
    assert_equal(read.values(), plain.values())
    train(world, tmp_path / "taught", adversarial=0.0)
    taught = load_file(tmp_path / "taught" / kind)
    assert not torch.equal(taught["encoder.conv_in.weight"], plain["encoder.conv_in.weight"])


def test_a_plain_vae_where_another_s_alignment_is_is_refused_before_it_is_trained(world, unbroken, tmp_path):
    """In a sweep before the first of all."""
    for name in ("one", "many/kl0.1"):
        shutil.copytree(unbroken[0] / "alignment", tmp_path / name / "alignment")
    plain = {"patch": 0.0, "cls": 0.0, "adversarial": 0.0}
    said = r"holds alignment/ of an earlier run, and --losses.* none to replace it; wanted .*: pass another --output"
    with pytest.raises(SystemExit, match=f"one {said}"):
        train(world, tmp_path / "one", **plain)
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["alignment"]
    with pytest.raises(SystemExit, match=f"kl0.1 {said}"):
        train(world, tmp_path / "many", kl=(1e-6, 1e-1), sit_steps=0, **plain)
    assert [path.name for path in (tmp_path / "many").iterdir()] == ["kl0.1"]


def test_the_total_is_the_weighted_sum(world, tmp_path):
    factors = {"mse": 0.5, "kl_weight": 0.01, "patch": 0.3, "cls": 0.2}
    terms = steps(trainer(world, tmp_path, **factors, adversarial=0.0))
    names = {"mse": 0.5, "kl": 0.01, "align_patch": 0.3, "align_cls": 0.2}
    assert terms["total"].item() == pytest.approx(sum(factor * terms[name].item() for name, factor in names.items()))
    summed, mean = (
        steps(trainer(world, tmp_path, kl_reduction=reduction, adversarial=0.0))["kl"] for reduction in ("sum", "mean")
    )
    assert summed.item() == pytest.approx(mean.item() * 8 * 4 * 4, rel=1e-5)


def test_the_adversary_s_weight_may_be_fixed(world, tmp_path):
    factors = {"mse": 0.5, "kl_weight": 0.0, "patch": 0.0, "cls": 0.0, "adversarial": 0.1, "adversarial_start": 1}
    found = {}
    for adaptive in (False, True):
        terms = steps(trainer(world, tmp_path, **factors, adversarial_adaptive=adaptive))
        found[adaptive] = (terms["total"] - 0.5 * terms["mse"]).item() / terms["adversarial"].item()
    assert found[False] == pytest.approx(0.1, rel=1e-3)
    assert found[True] != pytest.approx(0.1, rel=0.1)


def test_gradients_may_be_left_as_they_are(world, tmp_path):
    """--clip 0: as with a bound that none of them reaches."""
    free, wide, tight = (trainer(world, tmp_path, clip=clip, adversarial=0.0) for clip in (0.0, 1e9, 1e-9))
    for made in (free, wide, tight):
        steps(made, 2)
    assert_equal(state(free.model).values(), state(wide.model).values())
    assert moved(free.model, state(tight.model))


def test_the_adaptive_weight_is_the_ratio_of_gradients_at_the_encoder_s_last_layer(world, tmp_path):
    """Of the term before its weight, or the weight would cancel. VA-VAE: w · L, w = weight · ‖∇ pixel‖ / ‖∇ L‖."""
    totals = {}
    for patch in (0.1, 0.2):
        weights = {"patch": patch, "cls": 0.3, "kl_weight": 0.0, "adversarial": 0.0}
        made = trainer(world, tmp_path, adaptive=True, **weights)
        model = copy.deepcopy(made.model)
        terms = steps(made)
        pictures = next(stream(made)).images
        output = model(pictures, [train_reals.generator_of(0, place) for place in range(2)])
        aim = train_reals.targets_of("normed", train_reals.seen_by(made.teacher, pictures))
        last, wanted = model.vae.encoder.conv_out.weight, terms["mse"]
        pull = torch.autograd.grad(F.mse_loss(output.sample, pictures), last, retain_graph=True)[0].norm()
        for name, found, feature in zip(("patch", "cls"), output.aligned, aim, strict=True):
            loss = losses.alignment_loss(found, feature)
            ratio = (pull / (torch.autograd.grad(loss, last, retain_graph=True)[0].norm() + 1e-4)).item()
            assert terms[f"ratio_{name}"].item() == pytest.approx(ratio, rel=1e-3)
            wanted = wanted + weights[name] * ratio * loss.detach()
        totals[patch] = terms["total"].item() - terms["mse"].item()
        assert terms["total"].item() == pytest.approx(wanted.item(), rel=1e-4)
    of_cls = 0.3 * (terms["ratio_cls"] * terms["align_cls"]).item()
    assert totals[0.2] - of_cls == pytest.approx(2 * (totals[0.1] - of_cls), rel=1e-3)


def test_a_term_of_weight_0_takes_no_part_in_the_adaptive_weight(world, tmp_path):
    terms = steps(trainer(world, tmp_path, adaptive=True, patch=0.1, cls=0.0, kl_weight=0.0, adversarial=0.0))
    assert "ratio_cls" not in terms
    wanted = terms["mse"] + 0.1 * terms["ratio_patch"] * terms["align_patch"]
    assert terms["total"].item() == pytest.approx(wanted.item(), rel=1e-5)


def test_the_cls_term_may_be_cosine_alone(world, tmp_path):
    made = trainer(world, tmp_path, cls_form="cosine", adversarial=0.0)
    model = copy.deepcopy(made.model)
    terms = steps(made)
    pictures = next(stream(made)).images
    with torch.no_grad():
        found = model(pictures, [train_reals.generator_of(0, place) for place in range(2)]).aligned
    seen = train_reals.seen_by(made.teacher, pictures)
    cosine = F.cosine_similarity(found.global_feature.float(), seen.global_token.float())
    assert terms["align_cls"].item() == pytest.approx(1 - cosine.mean().item(), rel=1e-5)
    both = losses.alignment_loss(found.patch_features, seen.features)
    assert terms["align_patch"].item() == pytest.approx(both.item(), rel=1e-5)


def test_margins(world, tmp_path):
    made = trainer(world, tmp_path, form="margins", cls=0.0, adversarial=0.0, margins=(0.1, 0.05))
    model = copy.deepcopy(made.model)
    terms = steps(made)
    pictures = next(stream(made)).images
    with torch.no_grad():
        ours = model(pictures, [train_reals.generator_of(0, place) for place in range(2)]).aligned.patch_features
        theirs = train_reals.seen_by(made.teacher, pictures).features
    wanted = losses.margin_cosine_loss(ours, theirs, margin=0.1)
    wanted = wanted + losses.margin_similarity_loss(ours, theirs, margin=0.05)
    assert terms["align_patch"].item() == pytest.approx(wanted.item(), rel=1e-4)


def test_equivariance_turns_latents_and_target_alike(world, tmp_path):
    turn = train_reals.Turn(0.5, 1)
    x, z = images(2, 32, 64), latents(2, 4, 8)
    assert turn.images(x, 8).shape == (2, 3, 32, 16)
    assert turn.latents(z).shape == (2, 8, 4, 2)
    assert_close([turn.images(x, 8)], [F.interpolate(x, (16, 32), mode="bilinear").rot90(1, (2, 3))])
    for scale in range(8, 32):
        one = train_reals.Turn(scale / 32, 3)
        assert [8 * side for side in one.latents(z).shape[-2:]] == list(one.images(x, 8).shape[-2:])
    drawn = [train_reals.Turn.draw(0.5, 0, step) for step in range(400)]
    assert drawn[:20] == [train_reals.Turn.draw(0.5, 0, step) for step in range(20)]
    assert 160 < sum(one is not None for one in drawn) < 240
    assert {one.quarters for one in drawn if one} == {1, 2, 3}
    made = trainer(world, tmp_path, equivariance=1.0, adversarial=0.0)
    decoded = []
    made.model.vae.decoder.register_forward_hook(lambda _, inputs, output: decoded.append(tuple(output.shape[-2:])))
    steps(made)
    turn = train_reals.Turn.draw(1.0, 0, 0)
    assert decoded == [tuple(turn.images(images(), 8).shape[-2:])]  # once, of the turned latents


# Bad input


@pytest.mark.parametrize(("part", "term"), [("alignment.cls.layers.0.weight", "align_cls"), ("vae.decoder", "mse")])
def test_nan_stops_with_the_term_s_name_and_the_state_before_it(world, tmp_path, part, term):
    made = trainer(world, tmp_path, adversarial=0.0)
    steps(made, 2)
    broken = {name: p for name, p in made.model.named_parameters() if name.startswith(part)}
    for parameter in list(broken.values())[-1:]:
        parameter.data.fill_(float("nan"))
    before = state(made.model)
    for _ in range(2):  # a second time there is a checkpoint of that step already
        with pytest.raises(SystemExit, match=rf"step 2: (\w+, )*{term}.* became NaN .*--resume"):
            made.train_step(stream(made, 2))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step0000002"]
    assert_equal(
        [x.nan_to_num(7.0) for x in made.model.state_dict().values()], [x.nan_to_num(7.0) for x in before.values()]
    )


def spoil(parameter):
    """Its gradient is NaN from now on, though the loss is finite; returns what ends that."""
    return parameter.register_hook(lambda gradient: gradient * float("nan"))


@pytest.mark.parametrize("part", ["vae", "alignment", "discriminator"])
def test_a_nan_gradient_of_a_finite_loss_spoils_nothing(world, tmp_path, part):
    """Older checkpoints stay too, and --resume goes on as if nothing had been."""
    wanted = trainer(world, tmp_path / "unbroken", adversarial_start=1)
    steps(wanted, 4)
    made = trainer(world, tmp_path, adversarial_start=1, keep_checkpoints=1)
    steps(made, 1)
    made._save_checkpoint()
    pictures = stream(made, 1)
    made.train_step(pictures)
    made.step += 1
    networks = {"vae": made.model.vae, "alignment": made.model.alignment, "discriminator": made.discriminator}
    broken = spoil(next(networks[part].parameters()))
    before = {name: state(network) for name, network in networks.items()}
    with pytest.raises(SystemExit, match=rf"step 2: gradient of {part} became NaN .*--resume and a smaller --lr"):
        made.train_step(pictures)
    for name, network in networks.items():  # but for the discriminator's running means, by which nothing is trained
        assert not moved(network, before[name]) & dict(network.named_parameters()).keys()
    found = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert found == ["step0000001", "step0000002"]
    for _ in range(2):  # a second NaN of the same step
        with pytest.raises(SystemExit, match=r"step 2: gradient of"):
            made.train_step(stream(made, 2))
    broken.remove()
    again = trainer(world, tmp_path, adversarial_start=1, resume=True)
    again.step = script("checkpoints").first_step(again.accelerator, again.checkpoints, STEPS)
    assert again.step == 2
    pictures = stream(again, 2)
    for _ in range(2):
        again.train_step(pictures)
        again.step += 1
    assert_equal(state(again.model).values(), state(wanted.model).values())


def test_nan_of_the_discriminator_stops_too(world, tmp_path):
    made = trainer(world, tmp_path, adversarial_start=2)
    steps(made)
    made.discriminator.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(SystemExit, match=r"step 1: .*adversarial, total, discriminator became NaN"):
        made.train_step(stream(made, 1))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"adaptive": True, "detach": True}, "--losses.adaptive weighs gradients"),
        ({"adaptive": True, "patch": 0.0, "cls": 0.0}, "--losses.adaptive weighs gradients"),
        ({"equivariance": 0.5}, r"shrinks images of 32 px to 8 px, and the discriminator needs 24"),
        ({"equivariance": 0.5, "perceptual": 1.0, "adversarial": 0.0}, r"of 32 px to 8 px, and LPIPS needs 16"),
        (
            {"size": 16},
            r"images are of 16 px, and the discriminator needs 24: pass --losses.adversarial 0, or a larger",
        ),
        (
            {"size": 8, "perceptual": 1.0, "adversarial": 0.0},
            r"of 8 px, and LPIPS needs 16: pass --losses.perceptual 0",
        ),
        ({"mixed_precision": "fp16"}, r"fp16 has one loss scale, .*; wanted bf16 or no, or --losses.adversarial 0"),
        ({"clip": -1.0}, r"--clip is -1.0; wanted at least 0"),
        ({"statistics_batches": 0}, r"--statistics-batches is 0; wanted at least 1"),
        ({"batch_size": 0}, r"--batch-size is 0; wanted at least 1"),
        ({"log_every": 0}, r"--log-every is 0; wanted at least 1"),
        ({"keep_checkpoints": 0}, r"--keep-checkpoints is 0; wanted at least 1"),
        ({"sit_steps": -1}, r"--sit-steps is -1; wanted at least 0"),
        ({"size": 0}, r"--data.size is 0; wanted at least 1"),
        ({"kl": (1e-6, 1e-4, 1e-6)}, r"--kl has 1e-06 more than once; wanted each weight once"),
        ({"model": Path("none.json")}, r"--model none.json is no file; wanted JSON of a PixelVAEConfig"),
        ({"teacher": "bare"}, r"bare has no config.json that can be read .*; wanted a folder of psvae, timm"),
        ({"teacher": "bare", "kl": (1e-6, 1.0), "patch": 0.0, "cls": 0.0}, r"bare has no config.json"),
        ({"teacher": "no/where"}, r"there is no folder no/where for a teacher; wanted a folder of psvae, .* timm name"),
        ({"vae": "nowhere", "model": None}, r"nowhere"),
        ({"teacher": "vit_base_patch14_dinov2.none"}, r"timm publishes no weights named 'vit_base_patch14_dinov2.none"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else None,
)
def test_options_that_do_not_go_together(world, tmp_path, monkeypatch, changes, said):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "bare").mkdir()
    changes = {name: str(tmp_path / "bare") if value == "bare" else value for name, value in changes.items()}
    with pytest.raises(SystemExit, match=said):
        train(world, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_the_width_of_a_folder_that_is_not_there():
    with pytest.raises(SystemExit, match=r"there is no folder /no/where for a teacher"):
        reals_models.width_of("/no/where")
    with pytest.raises(SystemExit, match=r"has no model 'nowhere'"):
        reals_models.width_of("nowhere")


@pytest.mark.filterwarnings("ignore:.*pretrained.*:UserWarning", "ignore:.*weight enum.*:UserWarning")
@pytest.mark.parametrize(
    ("term", "error"), [("adversarial", "Kernel size"), ("perceptual", "Output size is too small")]
)
def test_a_term_takes_as_small_a_picture_as_is_said(random_lpips, term, error):
    whose, side = script("reals_checks").SMALLEST[term]
    lpips = train_reals.load_lpips()
    network = losses.PatchDiscriminator() if whose == "the discriminator" else lambda shown: lpips(shown, -shown)
    assert network(images(2, side, side)).numel() > 0
    with pytest.raises(RuntimeError, match=error):
        network(images(2, side - 1, side - 1))


# The KL sweep


def test_a_sweep_trains_each_weight_once_and_draws_them(world, tmp_path):
    sweeping, trained = script("kl_sweep"), []

    def counted(one):
        trained.append(one.losses.kl)
        return train_reals.train(one)

    quick = partial(options, world, tmp_path, kl=(1e-6, 1e-1), steps=2, adversarial=0.0, checkpoint_every=9)
    fresh_accelerator()
    found = sweeping.sweep(quick(), counted)
    assert trained == [1e-6, 1e-1]
    assert [run["kl"] for run in found.values()] == trained
    first = (tmp_path / "kl1e-06" / "vae" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    assert (tmp_path / "kl_sweep.png").stat().st_size > 1000
    with pytest.raises(SystemExit, match="kl1e-06 holds a finished run: pass --resume"):
        sweeping.sweep(quick(), counted)
    (tmp_path / "kl0.1" / "metrics.json").unlink()
    (tmp_path / "kl1e-06" / "metrics.json").rename(tmp_path / "aside.json")
    (tmp_path / "kl0.1" / "checkpoints" / "step0000001").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"kl0.1/checkpoints holds checkpoints of an earlier run: pass --resume"):
        sweeping.sweep(quick(), counted)
    assert len(trained) == 2  # not even the first
    (tmp_path / "kl0.1" / "checkpoints" / "step0000001").rmdir()
    (tmp_path / "aside.json").rename(tmp_path / "kl1e-06" / "metrics.json")
    spaces = []

    def distance(one):
        spaces.append(load_reals(one.output).vae.config.latent_channels)
        return 3.0 + len(spaces)

    again = sweeping.sweep(dataclasses.replace(quick(), resume=True), counted, distance, "the mean of all pixels")
    assert (tmp_path / "kl1e-06" / "vae" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns == first
    assert [run["frechet"] for run in again.values()] == [4.0, 5.0]
    assert json.loads((tmp_path / "kl_sweep.json").read_text()) == again


def test_a_sweep_measures_pictures_of_a_sit_in_each_space(world, tmp_path):
    """In the frozen teacher's features; what is finished is not made again."""
    quick = partial(
        train, world, tmp_path, path=str(world / "labelled"), kl=(1e-6, 1.0), sit_steps=3, steps=4, adversarial=0.0,
        lr=1e-2, validation_count=6, teacher=str(world / "narrow"),
    )  # fmt: skip
    found = quick()
    assert list(found) == ["kl1e-06", "kl1"]
    teacher = SemanticEncoder.from_pretrained(world / "narrow")
    real = data.validation_images(data.DataOptions(str(world / "labelled"), size=SIZE), 6)
    for name, numbers in found.items():
        made = tmp_path / name / "sit3-32px-seed0"
        with np.load(made / "samples.npz") as content:
            pictures = torch.from_numpy(content["arr_0"]).permute(0, 3, 1, 2) / 127.5 - 1
        assert len(pictures) == 6
        with torch.no_grad():
            features = [teacher(part).mean((2, 3)) for part in (real, pictures)]
        assert numbers["frechet"] == pytest.approx(script("frechet").frechet_distance(*features), rel=1e-3)
        kept = json.loads((made / "frechet.json").read_text())
        assert kept == {
            "frechet": numbers["frechet"], "features": str(world / "narrow"), "merge": 1, "pictures": 6, "size": SIZE,
            "validation": str(world / "labelled"), "seed": 0,
        }  # fmt: skip
        assert (made / "sit" / "model" / "config.json").exists()
    assert found["kl1e-06"]["frechet"] != found["kl1"]["frechet"]
    assert json.loads((tmp_path / "kl_sweep.json").read_text()) == found

    def times():
        files = [file for file in tmp_path.rglob("*") if file.is_file() and "kl_sweep" not in file.name]
        return {file.relative_to(tmp_path): file.stat().st_mtime_ns for file in files}

    before = times()
    assert quick(resume=True) == found
    assert times() == before
    (tmp_path / "kl1" / "sit3-32px-seed0" / "frechet.json").unlink()  # as a kill would leave it
    again = quick(resume=True)
    assert again["kl1"]["frechet"] == pytest.approx(found["kl1"]["frechet"])
    for name in ("sit/model/diffusion_pytorch_model.safetensors", "samples/0000000.npy"):
        file = Path("kl1", "sit3-32px-seed0", name)
        assert times()[file] == before[file]
    for number in range(6):  # of other pictures the distance is another
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / f"{number}.png").write_bytes(png(number + 50))
    other = quick(validation=str(tmp_path / "other"), resume=True)
    assert other["kl1"]["frechet"] != pytest.approx(found["kl1"]["frechet"], rel=1e-3)
    assert times()[file] == before[file]
    quick(kl=(1.0,), sit_steps=2, resume=True)  # the VAE is trained, its generator is not
    assert (tmp_path / "kl1" / "sit2-32px-seed0" / "frechet.json").exists()
    assert times()[file] == before[file]
    assert list(found) == list(quick(sit_steps=0, resume=True))
    assert "frechet" not in json.loads((tmp_path / "kl_sweep.json").read_text())["kl1"]


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ({"path": "pictures"}, r"pictures has 0 subfolders with pictures and 8 pictures beside them; .*--sit-steps 0"),
        ({"path": "labelled/class0"}, r"has 0 subfolders with pictures and 3 .*: wanted one subfolder per class"),
        ({"path": "one"}, r"has 1 subfolders with pictures and 0 pictures beside them"),
        ({"path": "beside"}, r"has 2 subfolders with pictures and 1 pictures beside them"),
        (
            {"path": "nowhere"},
            r"no folder \S+/nowhere; wanted .*; a SiT learns classes, from one subfolder each; or --sit-steps 0",
        ),
        (
            {"path": "labelled", "kind": "webdataset"},
            r"--data.kind is webdataset: pass such a folder, or --sit-steps 0",
        ),
    ],
)
def test_a_sweep_without_labels_is_refused_before_anything_is_trained(world, tmp_path, where, said):
    for name in ("one/a", "beside/a", "beside/b", "beside"):
        (world / name).mkdir(parents=True, exist_ok=True)
        (world / name / "0.png").write_bytes(png(0))
    chosen = {**where, "path": str(world / where["path"])}
    with pytest.raises(SystemExit, match=said):
        train(world, tmp_path, kl=(1e-6, 1e-2), **chosen)
    assert not list(tmp_path.iterdir())


def test_a_sweep_of_too_few_pictures_is_refused_before_anything_is_trained(world, tmp_path):
    chosen = {"path": str(world / "labelled"), "kl": (1e-6, 1e-2)}
    with pytest.raises(SystemExit, match=r"--validation-count 48 pictures say nothing .* wanted more than 48, better"):
        train(world, tmp_path, **chosen, validation_count=48)
    with pytest.raises(SystemExit, match=r"in the 768 features of vit_base_patch14_dinov2.lvd142m"):
        train(world, tmp_path, **chosen, validation_count=768, teacher=train_reals.Options.teacher)
    with pytest.raises(SystemExit, match=r"the 6 readable pictures of .*labelled say nothing .* wanted more than 48"):
        train(world, tmp_path, **chosen, validation_count=49)
    with pytest.raises(SystemExit, match=r"the 8 readable pictures of .*/pictures say nothing"):
        train(world, tmp_path, **chosen, validation_count=49, validation=str(world / "pictures"))
    assert not list(tmp_path.iterdir())


def test_the_plot_says_what_it_shows(tmp_path):
    plot = script("kl_sweep").plot
    runs = [{"kl": 1e-6, "psnr": 20.0, "latent_std": 5.0}, {"kl": 1e-2, "psnr": 18.0, "latent_std": 1.0}]
    assert plot(runs, tmp_path / "a.png").startswith("RMSE of reconstructions")
    said = plot([run | {"frechet": 3.0} for run in runs], tmp_path / "b.png", "the features of X")
    assert said == "Fréchet distance of generated pictures\nin the features of X"
    assert plot([runs[0] | {"frechet": 3.0}, runs[1]], tmp_path / "c.png").startswith("RMSE")
    assert plot([runs[0] | {"kl": 0.0}], tmp_path / "d.png")


# Validation images


def test_a_folder_without_images_is_said(world, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "0.png").write_bytes(png(0))
    cases = {
        "nowhere": r"there is no folder \S+/nowhere; wanted a folder of images; for data of another kind see --data.k",
        "0.png": r"\S+/0.png is a file; wanted a folder of images; for data",
        "empty": r"\S+/empty holds no images \(.bmp, .*\); for data",
    }
    for name, said in cases.items():
        with pytest.raises(SystemExit, match=said):
            train(world, tmp_path / "out", path=str(tmp_path / name))
    assert not (tmp_path / "out").exists()


def test_validation_images_are_of_all_classes(tmp_path):
    """Spread over the folders; others stand in for what cannot be read."""
    for number in range(12):
        file = tmp_path / f"class{number // 4}" / f"{number:02d}.png"
        file.parent.mkdir(exist_ok=True)
        Image.new("RGB", (SIZE, SIZE), (20 * number,) * 3).save(file)
    (tmp_path / "class1" / "04.png").write_bytes(b"no picture")

    def chosen(count):
        found = data.validation_images(data.DataOptions(str(tmp_path), size=SIZE), count)
        return [round((image.mean().item() * 0.5 + 0.5) * 255 / 20) for image in found]

    assert chosen(6) == [0, 2, 6, 8, 10, 1]
    assert sorted(chosen(99)) == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11]
    make_table(tmp_path / "table" / "train.parquet", image=[png(row) for row in range(8)])
    table = data.DataOptions(str(tmp_path / "table"), "huggingface", size=SIZE)
    whole = data.validation_images(table, 8)
    assert_equal([data.validation_images(table, 2)], [whole[[0, 4]]])
    streamed = dataclasses.replace(table, streaming=True)
    assert_equal([data.validation_images(streamed, 2)], [whole[:2]])
