"""The generator's training example: every kind of data, exact resumption after SIGKILL, dropped conditions."""

import copy
import dataclasses
import io
import json
import re
import shlex
import signal
import subprocess
import time
import zlib
from collections import Counter
from functools import partialmethod
from itertools import islice

import pytest
import torch
import transformers
import tyro
from PIL import Image
from safetensors.torch import load_file

from psvae import PSVAE, DeepFusionDiT
from tests.base import assert_close, assert_equal
from tests.examples.generator_world import (
    CAPTIONS,
    EXAMPLES,
    HEAD,
    SIZE,
    VOCABULARY,
    command,
    environment,
    fresh_accelerator,
    make_language_model,
    make_picture_folder,
    make_release,
    make_shards,
    make_table,
    make_triples,
    make_vae,
    png,
    run,
    script,
    tiny_generator,
)
from tests.tiny import images, latents, tiny_pixel_vae, tiny_psvae

train_generator, pairs = script("train_generator"), script("pairs")
STEPS = 6

# webdataset leaves shards that are not read to their end to the garbage collector
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("generator")
    make_vae(root / "vae")
    make_language_model(root / "llm")
    make_triples(root / "triples" / "train-0.parquet")
    make_picture_folder(root / "pictures" / "train")
    for shards in (1, 2, 4):
        make_shards(root / f"shards{shards}", shards)
    (root / "fields.json").write_text(json.dumps(HEAD))
    return root


def data_options(world, name="triples", **changes):
    return pairs.PairOptions(str(world / name), **{"size": SIZE, "workers": 0, **changes})


def options(world, output, **changes):
    default = {
        "data": data_options(world), "vae": str(world / "vae"), "llm": str(world / "llm"),
        "model": world / "fields.json", "output": output, "steps": STEPS, "batch_size": 2, "lr": 1e-2, "warmup": 2,
        "mixed_precision": "no", "tracker": "none", "sample_every": 3, "checkpoint_every": 1, "sampling_steps": 2,
        "log_every": 2,
    }  # fmt: skip
    return train_generator.Options(**{**default, **changes})


def train(world, output, **changes):
    fresh_accelerator()
    train_generator.main(options(world, output, **changes))
    return DeepFusionDiT.from_pretrained(output / "model")


def command_line(world, output, *more, processes=1):
    """`options`, as a user types them."""
    return command(
        "train_generator", "--data.path", world / "triples", "--data.size", SIZE, "--data.workers", 0,
        "--vae", world / "vae", "--llm", world / "llm", "--model", world / "fields.json", "--output", output,
        "--steps", STEPS, "--batch-size", 2, "--lr", 1e-2, "--warmup", 2, "--mixed-precision", "no",
        "--tracker", "none", "--sample-every", 3, "--checkpoint-every", 1, "--sampling-steps", 2, "--log-every", 2,
        *more, processes=processes,
    )  # fmt: skip


def picture_size(path):
    with Image.open(path) as picture:
        return picture.size


def weights(output):
    return load_file(output / "model" / "model.safetensors")


# From end to end


@pytest.fixture(scope="module")
def unbroken(world):
    train(world, world / "unbroken")
    return world / "unbroken"


def test_text_to_image_leaves_a_model_its_tokenizer_and_pictures(world, unbroken):
    before = DeepFusionDiT.from_llm(world / "llm", in_channels=8, **HEAD).state_dict()
    after = DeepFusionDiT.from_pretrained(unbroken / "model").state_dict()
    assert all(not torch.equal(before[key], after[key]) for key in ("head.out.weight", "layers.0.qkv.weight"))
    ids, mask = script("sampling").Tokenizer(None, unbroken / "model")(["a red dog", "tree"])
    assert ids.shape == (2, 3)
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert json.loads((unbroken / "options.json").read_text())["steps"] == STEPS
    samples = unbroken / "samples"
    assert [path.name for path in sorted(samples.glob("*.png"))] == ["step0000003.png", "step0000006.png"]
    assert picture_size(samples / "step0000006.png") == (8 * (SIZE + 2) + 2, 2 * (SIZE + 2) + 2)
    assert set((samples / "step0000006.txt").read_text().splitlines()) == set(CAPTIONS[:7])
    assert [path.name for path in sorted((unbroken / "checkpoints").iterdir())] == ["step0000004", "step0000005"]


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


def test_starting_over_checkpoints_is_refused_and_changes_nothing(world, unbroken):
    before = (unbroken / "options.json").read_bytes()
    with pytest.raises(SystemExit, match=r"unbroken/checkpoints holds checkpoints .*: pass --resume, or another"):
        train(world, unbroken, steps=9)
    (world / "headless.json").write_text(json.dumps({"head_widht": 64}))
    with pytest.raises(SystemExit, match="did you mean 'head_width'"):
        train(world, unbroken, resume=True, model=world / "headless.json")
    assert (unbroken / "options.json").read_bytes() == before


def test_two_processes_train_together(world):
    text = run(command_line(world, world / "two", "--data.source", "source", "--steps", 3, processes=2))
    assert "2 process(es), MULTI_CPU" in text
    assert DeepFusionDiT.from_pretrained(world / "two" / "model").config.in_channels == 8
    assert len(list((world / "two" / "checkpoints").glob("step*/random_states_*.pkl"))) == 4  # two of two processes


def test_editing_starts_from_text_to_image(world, unbroken, tmp_path):
    data = data_options(world, source="source", text="captions")
    model = train(world, tmp_path, data=data, init=unbroken / "model", llm=None, model=None)
    started = DeepFusionDiT.from_pretrained(unbroken / "model")
    assert model.config == started.config
    assert not torch.equal(model.layers[0].qkv.weight, started.layers[0].qkv.weight)
    untrained = train(world, tmp_path / "none", data=data, init=unbroken / "model", llm=None, model=None, steps=0)
    assert same(untrained.state_dict(), started.state_dict())
    assert picture_size(tmp_path / "samples" / "step0000006.png")[1] == 3 * (SIZE + 2) + 2
    script("sampling").Tokenizer(None, tmp_path / "model")  # went along from model to model


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("pictures", {}),
        ("shards2/{0..1}.tar", {"kind": "webdataset", "image": "jpg", "text": "txt"}),
        ("shards1/*.tar", {"kind": "webdataset", "image": "jpg", "text": "json:caption", "source": "source.jpg"}),
    ],
    ids=["picture folder", "webdataset pairs", "webdataset triples"],
)
def test_other_kinds_of_data(world, tmp_path, name, fields):
    train(world, tmp_path, data=data_options(world, name, **fields), steps=2)
    assert picture_size(tmp_path / "samples" / "step0000002.png")[1] == (3 if "source" in fields else 2) * 34 + 2


@pytest.mark.parametrize("how", [{"mixed_precision": "bf16", "accumulate": 2}, {"gradient_checkpointing": True}])
def test_ways_to_fit_and_to_hurry(world, tmp_path, how):
    model = train(world, tmp_path, data=data_options(world, source="source"), steps=2, **how)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_gradient_checkpointing_changes_nothing(world, unbroken, tmp_path):
    train(world, tmp_path, gradient_checkpointing=True)
    assert_close([weights(tmp_path)], [weights(unbroken)])


@pytest.fixture
def compiler(monkeypatch):
    """Traces forward and backward as the default back-end does, without its minute of C++. The compiler's counters."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(DeepFusionDiT, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    yield torch._dynamo.utils.counters
    torch.compiler.reset()


@pytest.mark.compile
def test_compiling_changes_nothing(world, unbroken, tmp_path, compiler):
    train(world, tmp_path, compile=True)
    assert compiler["stats"]["unique_graphs"] > 0
    assert_close([weights(tmp_path)], [weights(unbroken)])


@pytest.mark.compile
@pytest.mark.parametrize("first", [True, False], ids=["compiled first", "compiled then"])
def test_a_run_is_resumed_compiled_or_not(world, unbroken, tmp_path, compiler, first):
    train(world, tmp_path, steps=3, compile=first)
    train(world, tmp_path, resume=True, compile=not first)
    assert_close([weights(tmp_path)], [weights(unbroken)])


def test_the_blocks_are_the_language_model_s(world, tmp_path):
    model = train(world, tmp_path, steps=0)
    theirs = transformers.AutoModel.from_pretrained(world / "llm").eval()
    ids = torch.tensor([[0, 2, 5, 7]])
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(ids), theirs(ids).last_hidden_state, rtol=1e-4, atol=1e-4)


# Cached latents


def cached_triples(world, root, contents, **more):
    """A table with columns text, image and source, and the options that read it, and read it from caches."""
    cache = script("cache_latents")
    make_table(root / "triples" / "train-0.parquet", text=CAPTIONS[: len(contents["image"])], **contents)
    for side in contents:
        fresh_accelerator()
        where = {"vae": str(world / "vae"), "data": str(root / "triples"), "output": root / f"{side}_latents"}
        chosen = {"split": "train", "image_column": side, "label_column": None, "shard_size": 3, "workers": 0}
        cache.main(cache.Options(**where, size=SIZE, **chosen, **more))
    data = data_options(root, source="source")
    return data, dataclasses.replace(data, latents=root / "image_latents", source_latents=root / "source_latents")


@pytest.fixture(scope="module")
def triples(world, tmp_path_factory):
    contents = {  # no squares: what is cached is resampled and cropped as what is not
        side: [png(first + row, SIZE + 40 + row, SIZE + 49) for row in range(7)]
        for side, first in (("image", 0), ("source", 100))
    }
    return cached_triples(world, tmp_path_factory.mktemp("cached"), contents, moments=True)


def test_cached_moments_train_as_pictures_do(world, tmp_path, triples):
    for name, data in zip(("seen", "stored"), triples, strict=True):
        train(world, tmp_path / name, data=data, steps=2)
    assert picture_size(tmp_path / "stored" / "samples" / "step0000002.png")[1] == 3 * (SIZE + 2) + 2
    assert_close([weights(tmp_path / "stored")], [weights(tmp_path / "seen")])
    seen, stored = (next(pairs.pair_batches(of)(7, 0, 0, 1, 0)) for of in triples)
    assert seen.texts == stored.texts
    assert stored.images is stored.sources is None
    with torch.no_grad():
        vae = PSVAE.from_pretrained(world / "vae")
        posterior, source = (vae.encode(side).latent_dist for side in (seen.images, seen.sources))
    assert_close([stored.latents.mean, stored.latents.std], [posterior.mean, posterior.std])
    assert_close([stored.source_latents], [source.mean])  # as edit.py takes it


def test_a_cache_without_moments_gives_one_draw_and_no_source(world, tmp_path):
    contents = {"image": [png(row) for row in range(7)], "source": [png(100 + row) for row in range(7)]}
    data, cached = cached_triples(world, tmp_path, contents)
    with pytest.raises(SystemExit, match="source_latents holds draws of the posterior, and a source is its mean, whi"):
        pairs.pair_batches(cached)
    drawn = dataclasses.replace(cached, source=None, source_latents=None)
    seen, stored, again = (next(pairs.pair_batches(of)(7, 0, 0, 1, 0)) for of in (data, drawn, drawn))
    assert_equal([stored.latents], [again.latents])
    with torch.no_grad():
        posterior = PSVAE.from_pretrained(world / "vae").encode(seen.images).latent_dist
    spread = (stored.latents - posterior.mean) / posterior.std
    assert 0.8 < spread.std() < 1.2
    assert spread.abs().max() < 6


def test_rows_that_could_not_be_cached_are_passed_over_and_named(world, tmp_path):
    contents = {"image": [png(row) for row in range(7)], "source": [png(100 + row) for row in range(7)]}
    contents["image"][4], contents["source"][1] = b"no picture", None
    _, cached = cached_triples(world, tmp_path, contents, moments=True)
    train(world, tmp_path / "trained", data=cached)
    assert (tmp_path / "trained" / "unreadable.txt").read_text() == "row 1: NotCached\nrow 4: NotCached\n"
    vae = PSVAE.from_pretrained(world / "vae")
    transform = script("data").center_transform(SIZE)
    for batch in islice(pairs.pair_batches(cached)(1, 5, 0, 1, 0), 7):
        row = CAPTIONS.index(batch.texts[0])
        assert row not in (1, 4)
        for side, found in (("image", batch.latents.mean), ("source", batch.source_latents)):
            with torch.no_grad(), Image.open(io.BytesIO(contents[side][row])) as picture:
                assert_close([found], [vae.encode(transform(picture)[None]).latent_dist.mean])


def test_a_cache_of_other_pictures_is_refused(world, tmp_path, triples):
    make_table(tmp_path / "short" / "train-0.parquet", text=CAPTIONS[:5], image=[png(row) for row in range(5)])
    _, cached = triples
    said = r"image_latents holds latents of other pictures than the data's \(count: 7 before, 5 now\)"
    with pytest.raises(SystemExit, match=said):
        pairs.pair_batches(data_options(tmp_path, "short", latents=cached.latents))
    swapped = {"latents": cached.source_latents, "source_latents": cached.latents}
    with pytest.raises(SystemExit, match=r"source_latents .* \(image_column: 'source' before, 'image' now\)"):
        pairs.pair_batches(dataclasses.replace(cached, **swapped))
    with pytest.raises(SystemExit, match=r"source_latents .* \(image_column: 'source' before, None now\)"):
        pairs.pair_batches(dataclasses.replace(cached, source=None))


def test_a_cache_of_files_is_refused(world, tmp_path):
    """Their order need not be the table's."""
    cache = script("cache_latents")
    fresh_accelerator()
    cache.main(cache.Options(str(world / "pictures"), vae=str(world / "vae"), output=tmp_path, size=SIZE, workers=0))
    with pytest.raises(SystemExit, match=r"\(split: None before, 'train' now\)"):
        pairs.pair_batches(data_options(world, "pictures", latents=tmp_path))


def test_a_pixel_vae_s_latents_are_scaled_cached_or_not(tmp_path):
    sampling = script("sampling")
    vae = tiny_pixel_vae(scaling_factor=0.3, shift_factor=0.1)
    vae.latent_spec.std.fill_(2.0)
    trainer = training(tmp_path, tiny_generator(), [], vae=vae)
    with torch.no_grad():
        raw = vae.encode(images()).latent_dist.mode()
    made = trainer._latents(images(), None, None)
    assert_close([made], [(raw - 0.1) * 0.3 / 2.0])
    assert_equal([trainer._latents(None, raw, None)], [made])
    assert_close([sampling.unscale_latents(vae, made)], [raw])


def test_a_release_of_reals_goes_by_its_statistics(world, tmp_path):
    make_release(tmp_path / "release", tmp_path / "measured")
    for name in ("release", "measured"):
        train(world, tmp_path / f"on_{name}", vae=str(tmp_path / name), steps=1)
    assert_equal([weights(tmp_path / "on_release")], [weights(tmp_path / "on_measured")])


# What the steps do


def training(output, model, batches, vae=None, **changes):
    """`Training` by itself, on batches that are given."""
    fresh_accelerator()
    default = {
        "output": output, "batch_size": 2, "lr": 1e-2, "warmup": 1, "mixed_precision": "no", "tracker": "none",
        "sample_every": 99, "checkpoint_every": 99, "sampling_steps": 1, "steps": 2,
    }  # fmt: skip
    chosen = train_generator.TrainingOptions(**{**default, **changes})
    accelerator = train_generator.make_accelerator(chosen)

    def stream(batch_size, seed, rank, world, start):
        return islice(batches, start, None)

    return train_generator.Training(chosen, accelerator, model, vae or tiny_psvae(), tokenise, stream)


def tokenise(texts):
    ids = torch.tensor([[zlib.crc32(word.encode()) % VOCABULARY for word in text.split()] for text in texts])
    return ids, torch.ones_like(ids)


def batch(texts, seed=0, source_seed=None):
    """As from a cache."""
    sources = None if source_seed is None else latents(len(texts), seed=source_seed)
    return pairs.Pairs(list(texts), None, latents(len(texts), seed=seed), None, sources, [])


def trained(output, batches, **changes):
    model = tiny_generator()
    training(output, model, batches, **changes).run()
    return weights(output)


def same(one, other):
    return all(torch.equal(one[key], other[key]) for key in one)


def test_dropped_text_is_not_seen(tmp_path):
    said = [[batch(["a red dog", text])] * 4 for text in ("the blue cat", "a green tree")]
    for drop, expected in ((1.0, True), (0.0, False)):
        one, other = (trained(tmp_path / f"{drop}{n}", said[n], drop_text=drop) for n in (0, 1))
        assert same(one, other) is expected


def test_dropped_sources_are_not_seen(tmp_path):
    shown = [[batch(["a red dog", "the cat left"], source_seed=seed)] * 4 for seed in (1, 2)]
    for drop, expected in ((1.0, True), (0.0, False)):
        one, other = (trained(tmp_path / f"{drop}{n}", shown[n], drop_source=drop) for n in (0, 1))
        assert same(one, other) is expected


def test_as_much_is_dropped_as_asked_for(tmp_path):
    dropped = []
    model = tiny_generator()
    model.register_forward_pre_hook(
        lambda module, arguments, named: dropped.append(torch.stack([named["drop_text"], named["drop_source"]])),
        with_kwargs=True,
    )
    batches = [batch(["a red dog"] * 64, source_seed=1)] * 12
    training(tmp_path, model, batches, steps=10, drop_text=0.1, drop_source=0.3).run()
    text, source = torch.cat(dropped, dim=1).float()
    assert len(text) >= 640
    assert abs(text.mean() - 0.1) < 0.04
    assert abs(source.mean() - 0.3) < 0.06
    assert abs((text * source).mean() - 0.03) < 0.025  # one does not hang on the other


def average_of(state=None, decay=0.9):
    """Of a model of one weight, 1 to begin with; what it is after an update at ``value``."""
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    average = script("checkpoints").Ema(model, decay)
    if state is not None:
        average.load_state_dict(state)

    def update(value):
        model.weight.data.fill_(value)
        average.update(model)
        return average.named(model)["weight"].item()

    return average, update


def test_the_average_is_what_a_hand_computes():
    """LDM's warm-up: 2/11 · 1 + 9/11 · 2, then 3/12 of it + 9/12 · 4; from the 80th on the decay itself."""
    average, update = average_of()
    assert update(2.0) == pytest.approx(20 / 11)
    assert update(4.0) == pytest.approx(5 / 11 + 3)
    assert [average_of(decay=decay)[1](2.0) for decay in (0.1, 0.0)] == pytest.approx([1.9, 2.0])
    for _ in range(78):
        before = update(4.0)
    assert average.updates == 80
    assert update(8.0) == pytest.approx(0.9 * before + 0.8)


def test_the_average_goes_on_with_its_warm_up(tmp_path):
    """A state of before there was one is past it."""
    average, update = average_of()
    update(2.0)
    torch.save(average.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = average_of(copy.deepcopy(state))[1](4.0)
    assert resumed == update(4.0)
    assert average_of({"parameters": state["parameters"]})[1](4.0) == pytest.approx(0.9 * 20 / 11 + 0.4)


def test_the_averaged_weights_are_saved(tmp_path):
    averaged, plain = (
        training(tmp_path / str(ema), tiny_generator(), [batch(["a red dog"])] * 9, ema=ema, steps=3)
        for ema in (0.9, 0.0)
    )
    averaged.run()
    assert_equal([weights(tmp_path / "0.9")], [averaged.ema.named(averaged.model)])
    plain.run()
    assert plain.ema is None
    assert_equal([weights(tmp_path / "0.0")], [plain.model.state_dict()])
    assert not same(weights(tmp_path / "0.0"), weights(tmp_path / "0.9"))


def test_the_loss_is_the_mean_of_what_is_accumulated(tmp_path):
    trainer = training(tmp_path, tiny_generator(), [], accumulate=4)
    values = iter([1.0, 2.0, 3.0, 6.0])
    trainer._loss = lambda pairs, draw: 0 * trainer.model.head.out.weight.sum() + next(values)
    assert trainer._train_step(iter([batch(["a red dog"])] * 4)).item() == pytest.approx(3.0)


def test_noise_levels_are_shifted_by_the_latent_s_dimension(tmp_path):
    assert training(tmp_path, tiny_generator(), [])._shift(latents()) == (8 * 16 / 4096) ** 0.5
    assert training(tmp_path, tiny_generator(), [], shift=3.0)._shift(latents()) == 3.0


# Which rows come when


def numbered(world, name, **fields):
    """A stream whose batches are rows, found by their captions."""
    stream = pairs.pair_batches(data_options(world, name, **fields))
    return lambda *place, count: [
        [CAPTIONS.index(text) for text in made.texts] for made in islice(stream(*place), count)
    ]


SHARDS = {"kind": "webdataset", "image": "jpg", "text": "txt"}
SOURCES = {
    "table": ("triples", {}),
    **{f"{count} shards": (f"shards{count}/*.tar", SHARDS) for count in (1, 2, 4)},
}


def test_two_processes_lose_and_double_no_row_of_a_table(world):
    rows, length = numbered(world, "triples"), 7
    ranks = [[row for [row] in rows(1, 5, rank, 2, 0, count=2 * length)] for rank in (0, 1)]
    taken = [row for both in zip(*ranks, strict=True) for row in both]
    epochs = [taken[at : at + length] for at in range(0, 4 * length, length)]
    assert all(Counter(epoch) == Counter(range(length)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4  # each in another order


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_two_processes_lose_and_double_no_sample_of_shards(world, monkeypatch, shards, workers):
    monkeypatch.setenv("WORLD_SIZE", "2")  # by which webdataset knows of other processes
    rows = numbered(world, f"shards{shards}/*.tar", **SHARDS, workers=workers)
    taken = []
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        taken += [row for [row] in rows(1, 5, rank, 2, 0, count=4)]
    assert Counter(taken) == Counter(range(8))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("source", SOURCES)
def test_a_later_start_gives_the_same_rows(world, source, workers):
    name, fields = SOURCES[source]
    rows = numbered(world, name, **fields, workers=workers)
    whole = rows(2, 5, 0, 1, 0, count=9)
    assert rows(2, 5, 0, 1, 4, count=5) == whole[4:]


def test_rows_that_cannot_be_read_are_passed_over_and_named(world, tmp_path):
    contents = [b"no picture", png(1), None, *(png(row) for row in range(3, 8))]
    texts = [json.dumps({"caption": text}) for text in ["a red dog", " ", *CAPTIONS[2:]]]
    texts[3:5] = "null", "[1]"
    make_table(tmp_path / "broken" / "train-0.parquet", image=contents, text=texts)
    train(world, tmp_path / "trained", data=data_options(tmp_path, "broken", text="text:caption"))
    lines = (tmp_path / "trained" / "unreadable.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in lines] == [f"row {row}" for row in range(5)]


def test_a_resumed_run_names_what_was_unreadable_before(tmp_path):
    batches = [batch(["a red dog"]) for _ in range(4)]
    batches[0].unreadable.append("row 9: OSError")
    with pytest.raises(StopIteration):  # in the place of a kill
        training(tmp_path, tiny_generator(), batches[:3], steps=4, checkpoint_every=2).run()
    batches[0].unreadable.clear()
    batches[3].unreadable.append("row 2: OSError")
    training(tmp_path, tiny_generator(), batches, steps=4, checkpoint_every=2, resume=True).run()
    assert (tmp_path / "unreadable.txt").read_text() == "row 2: OSError\nrow 9: OSError\n"


# Bad options


def refusals(world):
    """What is asked for, and what the one line says."""
    (world / "misspelt.json").write_text(json.dumps({"head_widht": 64}))
    (world / "no.json").write_text("{")
    (world / "empty").mkdir(exist_ok=True)
    tiny_generator().save_pretrained(world / "without_tokenizer")
    tiny_generator(in_channels=5).save_pretrained(world / "five_channels")
    (world / "prefix.json").write_text(json.dumps({"fusion": "prefix", "vocab_size": None, **HEAD}))
    (world / "prefix_alone.json").write_text(json.dumps({"fusion": "prefix", **HEAD}))
    tiny_generator(fusion="prefix", vocab_size=None).save_pretrained(world / "prefix_saved")
    (world / "patches.json").write_text(json.dumps({"patch_size": 2, **HEAD}))
    shards, words = "shards2/{0..1}.tar", {"tokenizer": str(world / "llm")}
    return {
        "no vae": ({"vae": str(world / "empty")}, "empty has no model.safetensors"),
        "no language model": ({"llm": str(world / "vae"), **words}, "wanted a qwen2, qwen3 or llama folder"),
        "no tokenizer": ({"init": world / "without_tokenizer"}, "pass --tokenizer"),
        "random weights": ({"llm": None}, "random weights came without a tokenizer: pass --tokenizer"),
        "misspelt": ({"model": world / "misspelt.json"}, "did you mean 'head_width'"),
        "no json": ({"model": world / "no.json"}, "no.json is no JSON file"),
        "no model": ({"model": world / "absent.json"}, "absent.json is no JSON file"),
        "channels": ({"init": world / "five_channels", **words}, "latents have 8 channels, the generator's 5"),
        "prefix": ({"model": world / "prefix_alone.json"}, "prefix"),
        "random prefix": ({"model": world / "prefix.json", "llm": None, **words}, "fusion 'prefix' reads no texts"),
        "saved prefix": ({"init": world / "prefix_saved", **words}, "fusion 'prefix' reads no texts"),
        "patches": (
            {"model": world / "patches.json", "data": data_options(world, size=SIZE + 8)},
            "latents of this size are 5 x 5, which patches of 2 do not fill",
        ),
        "stride": ({"data": data_options(world, size=SIZE + 1)}, "an image side is 33; wanted a multiple of"),
        "no data": ({"data": data_options(world, "empty")}, "has no split 'train' that can be read"),
        "no split": ({"data": data_options(world, "pictures", split="test")}, "has no split 'test' that can be read"),
        "no column": ({"data": data_options(world, text="words")}, "no column words; it has image, source, text"),
        "no ending": ({"data": data_options(world, shards, **SHARDS | {"image": "png"})}, "no png; it has jpg, "),
        "no shards": ({"data": data_options(world, "no/*.tar", **SHARDS)}, "no sample in"),
        "shards and cache": (
            {"data": data_options(world, shards, **SHARDS, latents=world)},
            "cached latents go by row",
        ),
        "no cache": ({"data": data_options(world, latents=world)}, "holds no latents of cache_latents.py"),
    }


CASES = [
    "no vae", "no language model", "no tokenizer", "random weights", "misspelt", "no json", "no model", "channels",
    "prefix", "random prefix", "saved prefix", "patches", "stride",
    "no data", "no split", "no column", "no ending", "no shards", "shards and cache", "no cache",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:FileNotFoundError:UserWarning")  # webdataset's, of the case "no shards"
def test_a_bad_option_is_one_clear_line(world, tmp_path, case):
    changes, said = refusals(world)[case]
    with pytest.raises(SystemExit) as refusal:
        train(world, tmp_path, **changes)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "model").exists()


def test_sources_for_a_model_that_takes_none(world, tmp_path):
    (world / "sourceless.json").write_text(json.dumps({**HEAD, "max_source_images": 0}))
    with pytest.raises(SystemExit, match="max_source_images is 0"):
        train(world, tmp_path, data=data_options(world, source="source"), model=world / "sourceless.json")


# The commands of examples/README.md

TEXT = (EXAMPLES / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
COMMANDS = re.findall(r"examples/(train_generator|generate|edit)\.py( .*)", TEXT)


def test_the_documented_commands_are_understood():
    assert {name for name, _ in COMMANDS} == {"train_generator", "generate", "edit"}
    for name, arguments in COMMANDS:
        chosen = tyro.cli(script(name).Options, args=shlex.split(arguments, comments=True))
        assert chosen.vae


def test_the_documented_training_is_the_paper_s():
    first, then = (
        tyro.cli(train_generator.Options, args=shlex.split(arguments))
        for name, arguments in COMMANDS[:2]
        if name == "train_generator"
    )
    for chosen in (first, then):
        assert 725 < 8 * chosen.batch_size * chosen.accumulate < 735
        assert (chosen.lr, chosen.ema, chosen.data.size) == (1e-4, 0.9999, 256)
        assert (chosen.sampling_steps, chosen.sampling_shift, chosen.guidance) == (50, 3.0, 6.5)
    assert (first.steps, then.steps) == (200_000, 50_000)
    assert first.llm == "Qwen/Qwen2.5-0.5B"
    assert then.init == first.output / "model"
    assert (then.data.source, first.data.source) == ("src_img", None)
