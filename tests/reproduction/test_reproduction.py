"""The reproduction in small: it trains what it says, resumes exactly, measures what it names, and its page agrees with
its numbers."""

import io
import itertools
import json
import re
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import ClassVar

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from psvae import PSVAE, SemanticEncoder, SemanticVAEConfig, flow
from tests.examples.generator_world import script

script("checkpoints")  # the examples are importable from here on
from reproduction import (  # noqa: E402
    ablations,
    cifar,
    classifiers,
    generation,
    measures,
    orderings,
    plan,
    report,
    run,
    spaces,
    training,
)  # fmt: skip

DOCS = Path(__file__).parents[2] / "docs"
CPU = training.Machine(torch.device("cpu"), bf16=False)
WIDTH = 32


def split(count, seed=0):
    """Pictures whose class is their brightness."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 10
    noise = torch.randint(0, 20, (count, 3, 32, 32), generator=generator)
    return cifar.Split((labels[:, None, None, None] * 22 + noise).byte(), labels)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    SemanticEncoder(classifiers.encoder_config(WIDTH, 1)).save_pretrained(folder)
    return folder


# Data


def parquet(folder, names, sides=(32, 32)):
    for part in ("train", "test"):
        rows = []
        for number, side in enumerate(sides):
            buffer = io.BytesIO()
            Image.fromarray(np.full((side, side, 3), 10 * number, np.uint8)).save(buffer, "png")
            rows.append({"bytes": buffer.getvalue(), "path": None})
        table = datasets.Dataset.from_dict({names[0]: rows, names[1]: [number % 10 for number in range(len(sides))]})
        table.cast_column(names[0], datasets.Image()).to_parquet(folder / f"{part}-00000-of-00001.parquet")
    return folder


@pytest.mark.parametrize("names", [("img", "label"), ("image", "label")])
def test_reads_both_layouts_and_the_cache(tmp_path, names):
    train, test = cifar.load(parquet(tmp_path, names), tmp_path / "cache")
    assert train.labels.tolist() == test.labels.tolist() == [0, 1]
    assert train.pictures[1].unique().tolist() == [10]
    assert train.images(slice(0, 1)).unique().tolist() == [-1]
    (tmp_path / "cache" / "test.npz").unlink()  # stopped between the two
    again, _ = cifar.load(tmp_path, tmp_path / "cache")
    assert torch.equal(again.pictures, train.pictures)
    before = (tmp_path / "cache" / "train.npz").stat().st_mtime_ns
    parquet(tmp_path, names, (32,) * 3)
    with pytest.raises(SystemExit, match=r"was read from .* take another --output"):
        cifar.load(tmp_path, tmp_path / "cache")
    with pytest.raises(SystemExit, match="no train"):
        cifar.load(tmp_path / "nowhere", tmp_path / "cache")
    assert (tmp_path / "cache" / "train.npz").stat().st_mtime_ns == before


def test_refuses_other_data(tmp_path):
    with pytest.raises(SystemExit, match=r"no train\*.parquet"):
        cifar.load(tmp_path, tmp_path / "cache")
    with pytest.raises(SystemExit, match="columns photo, label; wanted image or img and label"):
        cifar.load(parquet(tmp_path, ("photo", "label")), tmp_path / "cache")
    with pytest.raises(SystemExit, match="picture 1 of train is 28 x 28"):
        cifar.load(parquet(tmp_path, ("img", "label"), (32, 28)), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("crop", [24, 32])
def test_crops_lie_in_the_picture_and_differ(crop):
    torch.manual_seed(0)
    images = torch.arange(32.0).expand(8, 3, 32, 32)
    shown = classifiers.augmented(images, crop)
    assert shown.shape == (8, 3, crop, crop)
    steps = shown.diff(dim=3).abs()
    assert (steps == 1).float().mean() > 0.95  # neighbours stay neighbours, but for the reflected edge
    assert len(shown[:, 0, 0, 0].unique()) > 2


# Training


def test_a_killed_training_ends_as_an_unbroken_one(tmp_path, monkeypatch):
    data = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    recipe = training.Recipe(steps=12, batch=4, lr=0.1, seed=3, ema=0.5)

    def train(folder, stop=None):
        torch.manual_seed(1)
        seen = []

        def loss(model, places, step):
            if step == stop:
                raise KeyboardInterrupt
            return (model(data[places]) - torch.randn(4, 1)).square().mean()

        folder.mkdir(exist_ok=True)
        return training.fit(nn.Linear(4, 1), loss, recipe, 20, folder, CPU, lambda m, step: seen.append(step)), seen

    monkeypatch.setattr(training, "SAVE_EVERY", -1)
    whole, steps = train(tmp_path / "whole")
    assert steps == list(range(1, 13))
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", stop=7)
    resumed, steps = train(tmp_path / "killed")
    assert steps == list(range(8, 13))
    assert torch.equal(whole.weight, resumed.weight)


def test_averages_are_warmed_up():
    average = [torch.zeros(1)]
    update = training.moving_average(0.99)
    update(average, [torch.ones(1)], torch.tensor(2))
    assert average[0].item() == pytest.approx(1 - 3 / 12)
    update(average, [torch.zeros(1)], torch.tensor(10_000))
    assert average[0].item() == pytest.approx(0.99 * 0.75)


def test_stops_at_nan(tmp_path):
    recipe = training.Recipe(2, 1, 0.1, seed=0)
    with pytest.raises(SystemExit, match="loss of step 0 is nan"):
        training.fit(nn.Linear(1, 1), lambda m, p, s: m(torch.tensor([[torch.nan]])).sum(), recipe, 1, tmp_path, CPU)


# Spaces


def gradients(name, encoder, folder, changes=()):
    """Which parts of a phase's model get gradients."""
    phase = replace(spaces.PHASES[name], **dict(changes))
    torch.manual_seed(0)
    model = spaces.build(phase, SemanticEncoder.from_pretrained(encoder)).train()
    model.encoder.requires_grad_(phase.mode != "frozen")
    frozen = SemanticEncoder.from_pretrained(encoder).requires_grad_(False)
    spaces.psvae_loss(model, frozen, split(4).images(slice(None)), phase, share=1.0).backward()
    parts = {"encoder": model.encoder, "decoder": model.decoder}
    if model.vae is not None:
        parts |= {"down": model.vae.encoder, "up": model.vae.decoder}
    return {part for part, module in parts.items() if any(p.grad is not None for p in module.parameters())}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rae", {"decoder"}),
        ("rae-hd", {"encoder", "decoder"}),
        ("s-vae", {"down", "up", "decoder"}),
        (plan.PS_VAE, {"encoder", "down", "up", "decoder"}),
        ("p-vae", {"encoder", "down", "decoder"}),
    ],
)
def test_each_space_trains_its_parts(name, expected, encoder, tmp_path):
    assert gradients(name, encoder, tmp_path) == expected


def test_stage_one_keeps_pixels_from_the_latent(encoder, tmp_path):
    weights = spaces.Weights(semantic=0.0, kl=0.0)
    frozen = gradients("s-vae", encoder, tmp_path, {"weights": weights}.items())
    assert "decoder" in frozen
    model = spaces.build(spaces.PHASES["s-vae"], SemanticEncoder.from_pretrained(encoder)).train()
    model.encoder.requires_grad_(False)
    phase = replace(spaces.PHASES["s-vae"], weights=weights)
    spaces.psvae_loss(model, model.encoder, split(2).images(slice(None)), phase, 1.0).backward()
    assert all(p.grad is None or not p.grad.any() for p in model.vae.parameters())


def test_variants_are_what_their_names_say(encoder):
    made = {
        name: spaces.build(spaces.PHASES[name], SemanticEncoder.from_pretrained(encoder))
        for name in ("rae", "mlp", "on-features", plan.PS_VAE)
    }
    assert made["rae"].vae is None
    assert made["rae"].config.latent_channels == WIDTH
    assert made["mlp"].config.vae.depth == 0
    assert made["on-features"].config.decoder_reads == "features"
    assert made[plan.PS_VAE].config.latent_channels == 16
    decoders = {
        sum(p.numel() for n, p in model.decoder.named_parameters() if not n.startswith("conv_in"))
        for model in made.values()
    }
    assert len(decoders) == 1


def test_blocks_from_the_encoder_are_its_last(tmp_path):
    whole = SemanticEncoder(classifiers.encoder_config(WIDTH, 3))
    model = spaces.build(spaces.PHASES["from-encoder"], whole)
    ours, theirs = model.vae.encoder.state_dict(), whole.vit.state_dict()
    name = "mlp.fc1.weight"
    copied = [tensor for key, tensor in ours.items() if key.endswith(name)]
    assert len(copied) == 3
    assert all(torch.equal(a, theirs[f"blocks.{n}.{name}"]) for n, a in enumerate(copied))


def test_every_phase_comes_after_its_own(encoder):
    for name in spaces.PHASES:
        chain = plan.phases_of(name)
        first = spaces.PHASES[chain[0]]
        assert first.after is None
        for phase in (spaces.PHASES[link] for link in chain):
            assert (phase.channels, phase.depth, phase.reads, phase.weights) == (
                first.channels, first.depth, first.reads, first.weights,
            )  # fmt: skip
        assert sum(spaces.PHASES[link].halves for link in chain) == 2 or name.endswith(("-stage1", "-half"))


def test_trains_on_from_the_phase_before(encoder, tmp_path):
    recipe = training.Recipe(4, 4, 1e-3, seed=0)
    for name in ("rae-half", "rae", "rae-hd"):
        spaces.train_phase(name, encoder, tmp_path, split(20), recipe, CPU)
        assert not (tmp_path / name / "state.pt").exists()
    loaded = {name: PSVAE.from_pretrained(tmp_path / name) for name in ("rae-half", "rae", "rae-hd")}
    before, after = (loaded[name].state_dict() for name in ("rae-half", "rae"))
    assert all(torch.equal(before[key], after[key]) for key in before if key.startswith("encoder."))
    assert not torch.equal(before["decoder.conv_out.weight"], after["decoder.conv_out.weight"])
    tuned = loaded["rae-hd"].encoder.state_dict()
    assert any(not torch.equal(tuned[key], value) for key, value in loaded["rae"].encoder.state_dict().items())
    assert (loaded["rae"].latent_spec.std != 1).any()


class Watched(cifar.Split):
    """Knows which pictures were seen."""

    seen: ClassVar[list[list[int]]] = []

    def images(self, places):
        self.seen.append(places.tolist())
        return super().images(places)


def test_all_spaces_see_the_same_pictures_in_the_same_order(encoder, tmp_path):
    train, orders = Watched(*split(50)), []
    for names in (("p-vae",), ("rae-half", "rae-hd"), ("ps-vae-4-stage1", "ps-vae-4")):
        train.seen.clear()
        for name in names:
            spaces.train_phase(name, encoder, tmp_path, train, training.Recipe(4, 3, 1e-3, seed=0), CPU)
        orders.append([*train.seen])
    train.seen.clear()
    spaces.train_convolutional("plain", encoder, tmp_path, train, training.Recipe(4, 3, 1e-3, seed=0), 4, CPU)
    assert len(orders[0]) == 4
    assert len({tuple(places) for places in orders[0]}) == 4
    assert orders[0] == orders[1] == orders[2] == train.seen


def test_what_is_trained_is_not_trained_again(encoder, tmp_path):
    train, recipe = Watched(*split(20)), training.Recipe(2, 2, 1e-3, seed=0)
    for again in (False, True):
        train.seen.clear()
        spaces.train_phase("rae-half", encoder, tmp_path, train, recipe, CPU)
        spaces.train_convolutional("plain", encoder, tmp_path, train, recipe, 4, CPU)
        assert bool(train.seen) != again


def test_every_posterior_begins_with_little_noise(encoder):
    frozen = SemanticEncoder.from_pretrained(encoder)
    made = spaces.build(spaces.PHASES[plan.PS_VAE], frozen), spaces.Aligned(WIDTH, 4).vae
    for vae in made:
        logvar = vae.eval().encode(split(2).images(slice(None))).latent_dist.logvar
        assert logvar.mean().item() == pytest.approx(SemanticVAEConfig.initial_logvar, abs=0.7)


def test_every_space_is_normalised_by_channel(encoder, tmp_path):
    train, recipe = split(40), training.Recipe(3, 4, 1e-3, seed=0)
    spaces.train_phase("p-vae", encoder, tmp_path, train, recipe, CPU)
    spaces.train_convolutional("plain", encoder, tmp_path, train, recipe, 4, CPU)
    for name in ("p-vae", "plain"):
        moments = generation.encode(spaces.load_space(name, tmp_path, train, CPU), train, 40, CPU)
        latents = moments.draw(torch.arange(40))
        assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.2, name
        assert (latents.std(dim=(0, 2, 3)) - 1).abs().max() < 0.2, name


def test_a_training_killed_while_it_saves_is_not_done(encoder, tmp_path, monkeypatch):
    train, recipe = split(20), training.Recipe(2, 2, 1e-3, seed=0)

    def killed(model, folder):
        (folder / ".saving").mkdir(parents=True)
        (folder / ".saving" / "model.safetensors").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(PSVAE, "save_pretrained", killed)
        with pytest.raises(KeyboardInterrupt):
            spaces.train_phase("rae-half", encoder, tmp_path, train, recipe, CPU)
    spaces.train_phase("rae-half", encoder, tmp_path, train, recipe, CPU)
    assert PSVAE.from_pretrained(tmp_path / "rae-half")


def test_coarse_cells_hold_more_pixels(tmp_path):
    whole = SemanticEncoder(classifiers.encoder_config(WIDTH, 1, 2 * classifiers.PATCH))
    model = spaces.build(spaces.PHASES[spaces.COARSE_PS_VAE], whole).eval()
    images = split(2).images(slice(None))
    assert model.encode(images).latent_dist.mean.shape == (2, 24, 4, 4)
    assert model(images).sample.shape == images.shape


def test_moved_finds_the_channel_that_moved(encoder):
    frozen, tuned = (SemanticEncoder.from_pretrained(encoder) for _ in range(2))
    frozen.vit.norm = tuned.vit.norm = nn.Identity()
    with torch.no_grad():
        tuned.vit.blocks[-1].mlp.fc2.bias[5] += 3.0
    distances = spaces.moved(tuned, frozen, split(6).images(slice(None)), CPU)
    assert distances.argmax() == 5
    assert distances[5] == pytest.approx(9.0, rel=1e-3)
    assert distances.sum() == pytest.approx(9.0, rel=1e-3)


# Measures


class Brightness(nn.Module):
    """A judge that sees the mean colour: what is brighter is of a higher class."""

    def features(self, images):
        return images.mean(dim=(2, 3))

    def forward(self, images):
        return -(images.mean(dim=(1, 2, 3))[:, None] * 127.5 + 127.5 - torch.arange(10) * 22.0 - 10).abs()


class Columns(Brightness):
    """A judge that sees each column's mean."""

    def features(self, images):
        return images.mean(dim=(1, 2))


JUDGES = classifiers.Judges(Brightness(), Columns())


def test_measures_of_a_perfect_and_of_a_grey_reconstruction():
    test = split(40)
    same = measures.reconstruction(lambda images: images, test, JUDGES, CPU)
    assert same["psnr"] > 80
    assert same["ssim"] == same["class_accuracy"] == same["detail"] == 1
    assert same["frechet"] == pytest.approx(0, abs=1e-6)
    grey = measures.reconstruction(torch.zeros_like, test, JUDGES, CPU)
    assert grey["psnr"] < 16
    assert grey["class_accuracy"] < 0.2
    assert grey["detail"] < 1e-6
    assert grey["frechet_turns"] > 2 * grey["frechet"] > 1


def test_the_detail_is_what_is_not_slow():
    places = torch.arange(32) * 2 * torch.pi / 32
    slow, fine = (torch.sin(count * places).expand(1, 3, 32, 32) for count in (5, 6))
    for wave in (slow, slow.mT):
        assert measures.detail(wave) < 1e-6 * measures.detail(fine)
    assert measures.detail(fine + slow) == pytest.approx(measures.detail(fine), rel=1e-3)
    either = torch.stack([torch.sin(6 * places), torch.sin(7 * places)]).sum(0).expand(1, 3, 32, 32) + fine.mT
    assert measures.detail(either) == pytest.approx(measures.detail(either.mT), rel=1e-5)  # no direction counts more


def test_turned_pictures_and_their_answers():
    images = torch.arange(12.0).reshape(1, 3, 2, 2).expand(40, 3, 2, 2)
    shown, quarters = classifiers.turned(images)
    assert len(quarters.unique()) == 4
    back = torch.stack([x.rot90(-int(n), dims=(1, 2)) for x, n in zip(shown, quarters, strict=True)])
    assert torch.equal(back, images)


def test_probes_find_a_planted_class():
    latents, labels = torch.randn(200, 3, 2, 2, generator=torch.Generator().manual_seed(0)), torch.arange(200) % 2
    random = measures.probe(latents[:100], labels[:100], latents[100:], labels[100:])
    latents[:, 1] += 4.0 * labels[:, None, None]
    planted = measures.probe(latents[:100], labels[:100], latents[100:], labels[100:])
    assert min(planted.values()) > 0.95
    assert max(random.values()) < 0.7


def test_cosines_of_an_untouched_encoder(encoder):
    model = spaces.build(spaces.PHASES["s-vae"], SemanticEncoder.from_pretrained(encoder)).eval()
    found = measures.cosines(model, SemanticEncoder.from_pretrained(encoder).eval(), split(4).images(slice(None)), CPU)
    assert found["encoder_cosine"] == pytest.approx(1.0, abs=1e-5)
    assert found["feature_cosine"] < 0.9
    assert 0 <= found["active_channels"] <= 1


# Generation


@pytest.mark.parametrize(("channels", "shift"), [(16, 1.0), (96, 2.449), (768, 6.928)])
def test_the_shift_is_the_papers(channels, shift):
    assert flow.dimension_shift(channels, 1, 64, base=generation.BASE_CHANNELS * 64) == pytest.approx(shift, abs=1e-3)


@pytest.mark.parametrize("bf16", [False, True])
def test_generates_in_a_space(encoder, tmp_path, bf16):
    machine = training.Machine(torch.device("cpu"), bf16)
    train, sizes = split(20), replace(plan.Plan().sizes, width=32, layers=1, head_width=32, samples=10, updates=2)
    spaces.train_phase("rae-half", encoder, tmp_path, train, training.Recipe(2, 4, 1e-3, 0), machine)
    vae = spaces.load_space("rae-half", tmp_path, train, machine)
    moments = generation.encode(vae, train, 20, machine)
    assert moments.mean.shape == (20, WIDTH, 8, 8)
    assert moments.mean.float().std() == pytest.approx(1.0, abs=0.2)
    assert not moments.std.any()  # RAE's latents are points
    looks = []
    recipe = training.Recipe(8, 4, 1e-3, seed=1, ema=0.9)
    arguments = (moments, sizes, recipe, tmp_path / "g", machine, lambda model, step: looks.append(step))
    model, kept = (generation.train_generator(*arguments) for _ in range(2))
    assert looks == [3, 6, 8]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), kept.parameters(), strict=True))
    shape = (10, WIDTH, 8, 8)
    first, again, other = (generation.sample(model, vae, shape, 2, seed, machine) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_measures_of_made_pictures(encoder, tmp_path):
    spaces.train_phase("rae-half", encoder, tmp_path, split(20), training.Recipe(2, 4, 1e-3, 0), CPU)
    vae, test = spaces.load_space("rae-half", tmp_path, split(20), CPU), split(40)
    measure = generation.Measure(vae, test, JUDGES, CPU)
    real = measure(test.images(slice(None)))
    assert real["class_accuracy"] == 1
    assert real["frechet"] == pytest.approx(0, abs=1e-6)
    assert real["frechet_decoded"] > 0.1
    decoded = measure(measures.as_saved(measures.painter(vae)(test.images(slice(None))).detach()))
    assert decoded["frechet_decoded"] == pytest.approx(0, abs=1e-6)
    assert decoded["frechet"] == pytest.approx(real["frechet_decoded"], rel=1e-3)
    assert decoded["frechet_turns"] > 0.1


def test_a_blurred_judge_sees_no_texture():
    judge = generation.Blurred(classifiers.Judge(4, 10).eval())
    grey, board = torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32)
    board[..., ::2, ::2] = board[..., 1::2, 1::2] = -1
    assert torch.equal(judge.features(board), judge.features(grey))
    assert not torch.allclose(judge.judge.features(board), judge.judge.features(grey))


# Orderings and the page


def results(**values):
    """PSNR by seed."""
    named = {name.replace("_", "-"): pair for name, pair in values.items()}
    return {f"space-{seed}-{name}": {"psnr": value} for name, pair in named.items() for seed, value in enumerate(pair)}


def test_verdicts():
    claim = orderings.Ordering("Table 4", ("s-vae", "rae"), "psnr")

    def said(**values):
        return [str(pair) for pair in orderings.pairs(results(**values), claim, "psnr")]

    assert said(s_vae=(1, 1), rae=(2, 3)) == ["appears: 1.500 ± 0.707"]
    assert said(s_vae=(2, 3), rae=(1, 1)) == ["the opposite: -1.500 ± 0.707"]
    assert said(s_vae=(1, 4), rae=(2, 3)) == ["undecided: 0.000 ± 1.414"]
    assert said(s_vae=(1, 1), rae=(2, 3), rae_hd=(0, 9)) == ["undecided: 1.500 ± 0.707"]  # as uncertain as all are
    assert said(s_vae=(1,), rae=(2,)) == ["appears: 1.000"]
    assert said(s_vae=(3, 4)) == ["not measured"]
    assert said(s_vae=(1,), rae=(2,), rae_hd=(3, 4)) == ["undecided: 1.000"]
    assert said(s_vae=(1,), rae=(2,), rae_hd=(3, 3.1)) == ["appears: 1.000"]
    claim = orderings.Ordering("Figure 11", (orderings.LESS, orderings.MORE), "psnr")
    sweep = {"ps_vae_4": (1,), "ps_vae_8": (3,), "ps_vae_32": (4,), "ps_vae_64": (5,)}
    assert said(**sweep) == ["appears: 1.000"]
    assert said(**sweep, rae=(0, 0.3)) == ["appears: 1.000"]  # two errors of 0.42: of a difference of differences
    assert said(**sweep, rae=(0, 0.4)) == ["undecided: 1.000"]


def test_of_generators_less_distance_and_more_accuracy_is_better():
    claim = orderings.Ordering("Table 2", ("reals", "plain"), kind="generator")
    found = {
        f"generator-{name}-0": {"curve": {"9": {"frechet": 0.0}, "10": {"frechet": distance, "class_accuracy": right}}}
        for name, distance, right in (("plain", 8.0, 0.5), ("reals", 6.0, 0.4))
    }
    (pair,) = orderings.pairs(found, claim, "frechet")
    assert (pair.names, pair.gains) == (("ReaLS", "plain VAE"), [2.0])
    (pair,) = orderings.pairs(found, claim, "class_accuracy")
    assert pair.gains == [pytest.approx(-0.1)]


def test_spread():
    assert orderings.spread([1.0, 3.0], 1) == "2.0 ± 1.4"
    assert orderings.spread([1.0], 1) == "1.0"


def test_every_ordering_is_measured_by_some_stage(tmp_path):
    names = {name for name, _ in run.stages(run.Run(plan.WHOLE, tmp_path, split(2), split(2), CPU))}
    for claim in (*orderings.SPACES, *orderings.GENERATORS):
        pattern = {"generator": "generator-{}-0", "space": "space-0-{}"}.get(claim.kind, f"{claim.kind}-{{}}")
        assert {pattern.format(part) for name in claim.names for part in name.split(" - ")} <= names


def test_the_weights_of_the_losses_are_the_examples_own():
    defaults, here = script("train_tokenizer").LossOptions(), spaces.Weights()
    assert (here.semantic, here.pixel) == (defaults.semantic, defaults.pixel)
    assert defaults.kl == spaces.ABLATED["KL weight"]["kl-1e-3"].weights.kl  # what the ablation changed it to
    assert (here.mse, here.cosine) == (defaults.mse, defaults.cosine)
    assert (here.warmup, "mean") == (defaults.kl_warmup, defaults.kl_reduction)


def test_stages_have_names_of_their_own_and_a_quick_plan_has_the_first_seed(tmp_path):
    whole, quick = (
        [name for name, _ in run.stages(run.Run(each, tmp_path, split(2), split(2), CPU))]
        for each in (plan.WHOLE, plan.QUICK)
    )
    assert len(set(whole)) == len(whole)
    later = [name for name in whole if name.startswith(("space-1", "space-2")) or name.endswith(("-1", "-2"))]
    assert quick == [name for name in whole if name not in later or name.startswith("ablation")]


def test_the_page_is_drawn_from_the_numbers(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    numbers = {
        "space-0-rae": {"psnr": 12.345, "probe": 0.8}, "space-1-rae": {"psnr": 14.345, "probe": 0.8},
        f"space-0-{plan.PS_VAE}": {"psnr": 23.456, "probe": 0.7},
        **{
            f"generator-{name}-0": {"parameters_m": 1.25, "curve": {"5": {"frechet": frechet, "class_accuracy": 0.5}}}
            for name, frechet in (("rae", 7.25), ("plain", 8.0), ("reals", 6.0))
        },
    }  # fmt: skip
    for name, content in numbers.items():
        (folder / f"{name}.json").write_text(json.dumps(content | {"minutes": 3, "on": "CPU cores: 2"}))
    (tmp_path / "plan.json").write_text(json.dumps({"precision": "bf16", **asdict(plan.WHOLE)}))
    (tmp_path / "generators" / "rae-0").mkdir(parents=True)
    (tmp_path / "generators" / "rae-0" / "samples.png").write_bytes(b"drawn")
    page = report.write(folder, tmp_path, tmp_path / "docs", 9, "## Remarks\n\nTwo are few.").read_text()
    for shown in (
        "| RAE | 13.35 ± 1.41 |", "23.46", "7.25", "so far 6 of 9 stages, bf16, 0.6 core hours of a CPU",
        "1.25 M parameters",
        "| Tables 2, 4, 6 | PSNR | RAE < PS-VAE | appears: 11.111 |", "not measured", "8.00 | 6.00 | -25 %",
    ):  # fmt: skip
        assert shown in page, shown
    assert json.loads((tmp_path / "docs" / "reproduction.json").read_text())["stages"]["space-0-rae"]["psnr"] == 12.345
    images = tmp_path / "docs" / "images"
    assert (images / "reproduction_generation.png").stat().st_size > 5000
    assert (images / "reproduction_made_rae.png").read_bytes() == b"drawn"
    assert page.endswith("Two are few.\n")
    assert "#remarks" in page
    assert "#remarks" not in report.page({}, json.loads((tmp_path / "plan.json").read_text()), 9)


def test_the_ablations_rule():
    """Better by more than the bound, and nothing worse by as much."""
    bounds, default = {"psnr": 0.2, "frechet": 1.0, "probe": 0.01, "feature_cosine": 0.01}, {"psnr": 20, "frechet": 9.0}
    said = {
        (20.1, 9.5): "stays", (20.3, 9.9): "changes; better: PSNR", (20.3, 7.5): "changes; better: PSNR, Fréchet",
        (20.3, 10.1): "stays; better: PSNR; worse: Fréchet", (19.7, 9.0): "stays; worse: PSNR",
    }  # fmt: skip
    for (psnr, distance), verdict in said.items():
        assert ablations.ruled(default, {"psnr": psnr, "frechet": distance}, bounds) == verdict
    assert ablations.ruled(default, {}, bounds) == "·"


def test_the_committed_page_is_of_the_committed_numbers():
    numbers, shown = json.loads((DOCS / "reproduction.json").read_text()), (DOCS / "reproduction.md").read_text()
    remarks = (DOCS.parent / "reproduction" / "remarks.md").read_text()
    planned = sum(1 for _ in run.stages(run.Run(plan.WHOLE, DOCS, split(2), split(2), CPU)))
    assert report.page(numbers["stages"], numbers["plan"], planned, remarks) == shown
    for image in re.findall(r"\]\((images/\w.*?)\)", shown):
        assert (DOCS / image).exists(), image


@pytest.fixture(scope="module")
def committed():
    """The mean over seeds of any measure, of what docs/reproduction.json holds; of generators at the last step."""
    found = json.loads((DOCS / "reproduction.json").read_text())["stages"]

    def mean(name, metric, kind="space"):
        return statistics.fmean(orderings.over_seeds(found, kind, name, metric))

    mean.stages = found
    return mean


SEMANTIC = ("rae-hd", "rae", plan.PS_VAE)  # in the order of the remark on their generators, turned round


def test_remarks_on_spaces(committed):
    psnr = {name: committed(name, "psnr") for name in plan.spaces()}
    assert psnr[plan.PS_VAE] - psnr["s-vae"] == pytest.approx(5.5, abs=0.1)
    assert committed("s-vae", "probe") - committed(plan.PS_VAE, "probe") == pytest.approx(0.005, abs=0.002)
    assert abs(committed("p-vae", "probe") - committed("plain", "probe")) < 0.02
    gains = [psnr[b] - psnr[a] for a, b in itertools.pairwise(f"ps-vae-{z}" for z in spaces.SWEEP)]
    assert gains == sorted(gains, reverse=True)
    assert committed("reals", "probe") / committed("plain", "probe") == pytest.approx(2, abs=0.1)
    names = [name for name in psnr if name not in {f"ps-vae-{z}" for z in spaces.SWEEP} - {plan.PS_VAE}]
    assert len(names) == 9
    assert sorted(names, key=lambda x: committed(x, "detail")) == sorted(names, key=lambda x: -committed(x, "frechet"))
    assert all(committed(name, "frechet") > committed("rae", "frechet") for name in (plan.PS_VAE, "p-vae", "plain"))
    assert abs(psnr[plan.PS_VAE] - psnr["rae"]) < 0.2
    assert psnr["rae"] == pytest.approx(25, abs=0.5)
    coarse = {name: committed.stages[f"coarse-{name}"]["psnr"] for name in plan.COARSE}
    assert psnr["rae"] - coarse["rae"] == pytest.approx(1.8, abs=0.1)
    assert coarse[spaces.COARSE_PS_VAE] < coarse["rae"]
    assert psnr[plan.PS_VAE] < psnr[plan.WIDEST] < psnr["plain"]
    longer = {name: committed.stages[f"longer-{name}"] for name in plan.LONGER}
    assert longer[plan.PS_VAE]["psnr"] - longer["rae"]["psnr"] == pytest.approx(2.4, abs=0.05)
    assert longer[plan.PS_VAE]["psnr"] - psnr["plain"] > 2
    assert committed(plan.PS_VAE, "detail") == pytest.approx(0.5, abs=0.05)
    assert longer[plan.PS_VAE]["detail"] == pytest.approx(longer["rae"]["detail"], abs=0.03)
    assert max(committed(name, "noise") for name in (plan.PS_VAE, "mlp")) < 0.01
    assert committed("mlp", "active_channels") == 1
    assert abs(committed("mlp", "probe") - committed(plan.PS_VAE, "probe")) < 0.005
    assert psnr["on-features"] > psnr[plan.PS_VAE]
    kept = {name: committed.stages[f"kept-{name}"]["psnr"] for name in ("moved", "still", "frozen")}
    assert kept["moved"] > max(kept["still"], kept["frozen"])
    assert committed.stages["space-0-rae-hd"]["psnr"] - kept["moved"] == pytest.approx(13, abs=0.5)
    squares = sorted(committed.stages["moved"]["squares"], reverse=True)
    assert sum(squares[: plan.WHOLE.kept]) < 0.1 * sum(squares)


def test_remarks_on_generators(committed):
    made = {
        name: {metric: committed(name, metric, "generator") for metric in orderings.MADE}
        for name in (*plan.GENERATED, *plan.ONCE)
    }
    hd, rae, ps = (made[name] for name in SEMANTIC)
    assert all(made["reals"][m] * sign > made["plain"][m] * sign for m, sign in orderings.MADE.items())
    assert all(rae[metric] < ps[metric] for metric in ("frechet", "frechet_turns"))
    assert rae["class_accuracy"] > ps["class_accuracy"]
    assert all(ps[metric] < rae[metric] < hd[metric] for metric in ("frechet_blurred", "frechet_decoded"))
    assert min(made, key=lambda name: made[name]["frechet_decoded"]) == "s-vae"
    assert min(plan.GENERATED, key=lambda name: committed(name, "detail")) == "s-vae"
    (after,) = (claim for claim in orderings.GENERATORS if claim.kind == "longer-generator")
    verdicts = {metric: orderings.pairs(committed.stages, after, metric)[0].verdict for metric in orderings.MADE}
    assert verdicts.pop("frechet") == verdicts["frechet_blurred"] == verdicts["frechet_decoded"] == "appears"
    assert verdicts["frechet_turns"] == "undecided"
    longer = [orderings.last_of(committed.stages[f"longer-generator-{name}"]) for name in (plan.PS_VAE, "rae")]
    assert [round(measured["frechet"], 1) for measured in longer] == [22.3, 29.1]
    assert longer[0]["class_accuracy"] > longer[1]["class_accuracy"]
    assert abs(longer[1]["frechet"] - rae["frechet"]) < 2
    assert made["on-features"]["frechet"] < ps["frechet"]


def test_the_readme_has_the_committed_numbers(committed):
    readme = (DOCS.parent / "README.md").read_text()
    for name in ("rae", "s-vae", plan.PS_VAE, "rae-hd", "p-vae", *spaces.CONVOLUTIONAL):
        numbers = [f"{committed(name, 'psnr'):.1f} dB", f"{100 * committed(name, 'probe'):.1f} %"]
        numbers += [f"{committed(name, metric, 'generator'):.1f}" for metric in ("frechet", "frechet_decoded")]
        assert f"| {' | '.join([plan.LABELS[name], *numbers])} |" in readme, (name, numbers)
    stages = committed.stages
    ps, rae = (stages[f"longer-{name}"]["psnr"] for name in (plan.PS_VAE, "rae"))
    made = [orderings.last_of(stages[f"longer-generator-{name}"])["frechet"] for name in (plan.PS_VAE, "rae")]
    said = f"PS-VAE has {ps:.1f} dB and RAE {rae:.1f}, their generators {made[0]:.1f} and {made[1]:.1f} (one seed)"
    assert said in " ".join(readme.split())


# The command


def test_goes_on_and_refuses_another_plan(tmp_path, monkeypatch, capsys):
    tiny = replace(plan.WHOLE, width=32, depth=1, encoder_small_steps=1, encoder_steps=1, encoder_batch=4)
    data = parquet(tmp_path, ("img", "label"), (32,) * 24)
    monkeypatch.setattr(run, "WHOLE", tiny)
    options = run.Options(data, output=tmp_path / "out", precision="fp32", only=("encoder",))
    run.main(options)
    assert not (tmp_path / "out" / "reproduction.md").exists()  # another process may have other stages
    assert json.loads((tmp_path / "out" / "results" / "encoder.json").read_text())["parameters_m"] > 0
    assert "encoder: probe" in capsys.readouterr().out
    run.main(options)
    assert "encoder: probe" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="another plan \\(precision: 'fp32' before, 'bf16' now\\)"):
        run.main(replace(options, precision="bf16"))
    with monkeypatch.context() as other:
        other.setitem(spaces.DECODER, "base_channels", 48)
        with pytest.raises(SystemExit, match=r"another plan \(phases: '\w+' before"):
            run.main(options)
    with pytest.raises(SystemExit, match="--only spaces: no stage is named so; there are encoder, judge, "):
        run.main(replace(options, only=("encoder", "spaces")))
    with pytest.raises(SystemExit, match="one of the two"):
        run.main(replace(options, data=None))
    with pytest.raises(SystemExit, match="wanted bf16 or fp32"):
        run.main(replace(options, precision="fp16"))


def test_one_failing_stage_stops_no_other(tmp_path, monkeypatch, capsys):
    def broken(_):
        raise ValueError("no luck")

    monkeypatch.setattr(run.cifar, "load", lambda *_: (split(2), split(2)))
    monkeypatch.setattr(run, "stages", lambda _: iter([("first", broken), ("second", lambda _: {"answer": 42})]))
    options = run.Options(tmp_path, output=tmp_path / "out", quick=True)
    with pytest.raises(SystemExit, match="1 stages failed, see above: first; the same command tries them again"):
        run.main(options)
    assert "ValueError: no luck" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "quick" / "results" / "second.json").read_text())["answer"] == 42
    assert (tmp_path / "out" / "quick" / "reproduction.md").exists()
    monkeypatch.setattr(run, "stages", lambda _: iter([("encoder", broken), ("other", broken)]))
    with pytest.raises(SystemExit, match="1 stages failed, see above: encoder;"):  # nothing can go on without
        run.main(options)


@pytest.mark.slow
def test_the_whole_path_in_bf16(tmp_path, monkeypatch):
    sizes = replace(plan.Plan().sizes, width=32, layers=1, head_width=32, samples=20, updates=2, pictures=50)
    tiny = replace(
        plan.WHOLE, width=64, depth=3, encoder_small_steps=2, encoder_steps=2, encoder_batch=8, judge_width=4,
        judge_steps=2, judge_batch=8, space_steps=4, space_batch=4, ablation_steps=4, generator_steps=6,
        generator_batch=4, probe_pictures=100, toy_steps=10, sizes=sizes,
    )  # fmt: skip
    monkeypatch.setattr(run, "QUICK", tiny)
    monkeypatch.setattr(run.cifar, "load", lambda *_: (split(120), split(60, 1)))
    run.main(run.Options(tmp_path, output=tmp_path / "out", quick=True))
    page = (tmp_path / "out" / "quick" / "reproduction.md").read_text()
    assert "not measured" not in page
    assert "| · | · |" not in page.split("## Does each")[1]
    for image in ("channels", "generation", "made_rae"):
        assert (tmp_path / "out" / "quick" / "images" / f"reproduction_{image}.png").exists()
