"""generate.py and edit.py: what the official evaluators find, each picture once, whatever stops the run."""

import glob
import io
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from psvae import DeepFusionDiT
from tests.examples.generator_world import (
    SIZE,
    command,
    environment,
    fresh_accelerator,
    make_release,
    make_table,
    make_tokenizer,
    make_vae,
    png,
    run,
    script,
    tiny_generator,
)
from tests.tiny import fill_weights, tiny_psvae

generate, edit, sampling = script("generate"), script("edit"), script("sampling")
PROMPTS = ["a red dog", "a green cat", "a blue tree", "a red tree", "a blue dog"]
TASKS = [("subject-add", "en"), ("subject-add", "cn"), ("color_alter", "en"), ("color_alter", "cn")]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("sampling")
    make_vae(root / "vae")
    tiny_generator().save_pretrained(root / "model")
    make_tokenizer(root / "model" / "tokenizer")
    lines = [json.dumps({"tag": "colors", "include": [{"class": "x", "count": 1}], "prompt": text}) for text in PROMPTS]
    (root / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    (root / "prompts").mkdir()
    for number, text in enumerate(PROMPTS[:2]):
        (root / "prompts" / f"partiprompts{number}.txt").write_text(text + "\n")
    make_table(
        root / "gedit" / "train-0.parquet",
        task_type=[task for task, _ in TASKS],
        instruction_language=[language for _, language in TASKS],
        key=[f"{number:032x}" for number in range(len(TASKS))],
        instruction=[f"make it {colour}" for colour in ("red", "green", "blue", "red")],
        input_image_raw=[png(number, SIZE + 4, SIZE + 20) for number in range(len(TASKS))],
        input_image=[png(50 + number) for number in range(len(TASKS))],
    )
    return root


def arguments(world, output, **more):
    return {
        "model": str(world / "model"),
        "vae": str(world / "vae"),
        "size": SIZE,
        "steps": 3,
        "output": output,
        **more,
    }


def make(module, world, output, **more):
    fresh_accelerator()
    module.main(module.Options(**arguments(world, output, **more)))
    return output


def command_line(name, world, output, processes=1, **more):
    """`make`, as a user types it."""
    named = arguments(world, output, **more).items()
    return command(name, *(part for key, value in named for part in (f"--{key}", value)), processes=processes)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def pixels(path):
    with Image.open(path) as picture:
        return pil_to_tensor(picture)


# One at a time


def test_one_prompt(world, tmp_path):
    first = contents(make(generate, world, tmp_path, prompt="a red dog"))
    assert [path.name for path in first] == ["0000.png", "0001.png", "0002.png", "0003.png"]
    assert len(set(first.values())) == 4
    assert pixels(tmp_path / "0000.png").shape == (3, SIZE, SIZE)
    assert contents(make(generate, world, tmp_path / "again", prompt="a red dog")) == first
    other = contents(make(generate, world, tmp_path, prompt="a blue tree"))  # over what is there
    assert [path for path in first if other[path] == first[path]] == []
    assert contents(make(generate, world, tmp_path / "seed", prompt="a red dog", seed=1)) != first
    assert len(contents(make(generate, world, tmp_path / "two", prompt="a red dog", images=2))) == 2
    make(generate, world, tmp_path, prompt="a red dog", images=1)
    assert [path.name for path in tmp_path.glob("*.png")] == ["0000.png"]  # none of another prompt stays


def test_a_prompt_is_read_once_for_all_its_pictures(world, tmp_path, monkeypatch):
    read, encode = [], DeepFusionDiT.encode_prefix
    monkeypatch.setattr(
        DeepFusionDiT, "encode_prefix", lambda model, ids, *more, **named: (
            read.append(len(ids)), encode(model, ids, *more, **named)
        )[1],
    )  # fmt: skip
    make(generate, world, tmp_path, prompt="a red dog")
    assert read == [1]


@pytest.mark.parametrize(
    "how",
    [{"guidance": 1.0}, {"shift": 1.0}, {"solver": "heun"}, {"renorm": "global"}, {"guidance_interval": (0.7, 1.0)}],
    ids=lambda how: next(iter(how)),
)
def test_every_option_of_sampling_counts(world, tmp_path, how):
    plain = contents(make(generate, world, tmp_path / "plain", prompt="a red dog", images=1))
    assert contents(make(generate, world, tmp_path / "other", prompt="a red dog", images=1, **how)) != plain


def test_a_release_of_reals_goes_by_its_statistics(world, tmp_path):
    make_release(tmp_path / "release", tmp_path / "measured")
    (tmp_path / "dog.png").write_bytes(png(3, 50, 40))
    asked = {generate: {"prompt": "a red dog"}, edit: {"source": tmp_path / "dog.png", "instruction": "make it red"}}
    for module, how in asked.items():
        made = [
            contents(make(module, world, tmp_path / f"{module.__name__}_{name}", vae=str(tmp_path / name), **how))
            for name in ("release", "measured")
        ]
        assert made[0] == made[1]


def test_half_precision_is_nearly_the_same(world, tmp_path):
    folders = [
        make(generate, world, tmp_path / dtype, prompt="a red dog", guidance=1.0, dtype=dtype)
        for dtype in ("float32", "bfloat16")
    ]
    full, half = (pixels(folder / "0000.png").float() for folder in folders)
    assert (full - half).abs().mean() < 3


def test_one_edit(world, tmp_path):
    (tmp_path / "dog.png").write_bytes(png(3, 50, 40))
    asked = {"source": tmp_path / "dog.png", "instruction": "make it red"}
    forms = {
        "plain": {}, "nested": {"image_guidance": 1.5},
        "additive": {"image_guidance": 1.5, "guidance_form": "additive"},
    }  # fmt: skip
    made = {name: contents(make(edit, world, tmp_path / name, **asked, **form)) for name, form in forms.items()}
    assert all([str(path) for path in files] == ["edited.png"] for files in made.values())
    assert len({next(iter(files.values())) for files in made.values()}) == 3
    first = made["plain"]
    (tmp_path / "dog.png").write_bytes(png(4, 50, 40))
    assert contents(make(edit, world, tmp_path / "plain", **asked)) != first  # over what is there, of another source


# GenEval


@pytest.fixture(scope="module")
def geneval(world):
    return make(generate, world, world / "geneval", geneval=world / "metadata.jsonl")


def test_geneval_s_evaluator_finds_all(world, geneval):
    found = {}
    for folder in geneval.iterdir():  # as evaluation/evaluate_images.py does
        assert folder.name.isdigit()
        names = os.listdir(folder / "samples")
        assert all(re.match(r"\d+\.png", name) for name in names)
        found[folder.name] = (json.loads((folder / "metadata.jsonl").read_text())["prompt"], len(names))
    assert found == {f"{number:05d}": (text, 4) for number, text in enumerate(PROMPTS)}


def test_a_killed_run_goes_on_to_the_same_pictures(world, geneval):
    output = world / "killed"
    process = subprocess.Popen(
        command_line("generate", world, output, geneval=world / "metadata.jsonl"), env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.time() + 300
    while not list(output.glob("00001/samples/*.png")):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.time() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (output / "00002" / "samples" / "0003.png").unlink(missing_ok=True)  # in case that the kill came late
    before = {path: path.stat().st_mtime_ns for path in output.glob("0000[01]/samples/*.png")}
    missing = sum(len(list(output.glob(f"{number:05d}/samples/*.png"))) < 4 for number in range(len(PROMPTS)))
    assert missing >= 1
    make(generate, world, output, geneval=world / "metadata.jsonl")
    assert contents(output) == contents(geneval)
    untouched = [path for path, made in before.items() if path.stat().st_mtime_ns == made]
    assert len(untouched) >= 4


def test_pictures_of_other_options_are_not_mixed(world, geneval):
    said = r"geneval holds pictures of another run, see .*/geneval.json \(guidance: 6.5 before, 2.0 now\)"
    with pytest.raises(SystemExit, match=said):
        make(generate, world, geneval, geneval=world / "metadata.jsonl", guidance=2.0)
    assert set(json.loads(geneval.with_name("geneval.json").read_text())["weights"]) == {"model", "vae"}


@pytest.fixture
def claim(world, tmp_path, monkeypatch):
    """`sampling.claim` for a folder with one picture, by the models and options that change."""
    monkeypatch.chdir(world)
    accelerator = generate.Accelerator()
    models = {"model": torch.nn.Linear(2, 2), "vae": torch.nn.Linear(3, 3)}
    (tmp_path / "og").mkdir()
    (tmp_path / "og" / "0000.png").write_bytes(png(0))

    def call(**changes):
        used = {name: changes.pop(f"{name}_weights", models[name]) for name in models}
        fields = arguments(world, tmp_path / "og", geneval=world / "metadata.jsonl") | changes
        chosen = generate.Options(**fields)
        sampling.claim(chosen, chosen.output, accelerator, **used)

    return call


def test_an_emptied_folder_takes_other_options(tmp_path, claim):
    claim()
    (tmp_path / "og" / "0000.png").unlink()
    claim(seed=1)  # of which the file beside it speaks now
    (tmp_path / "og" / "0000.png").write_bytes(png(0))
    with pytest.raises(SystemExit, match=r"og.json \(seed: 1 before, 0 now\)"):
        claim()


def test_paths_are_the_same_however_they_are_written(tmp_path, world, claim):
    claim()
    claim(model="model", vae="./vae", geneval=Path("metadata.jsonl"), output=Path(os.path.relpath(tmp_path / "og")))
    with pytest.raises(SystemExit, match=r"vae: '/.*/vae' before, '/.*/model' now"):
        claim(vae="model")


def test_pictures_of_other_weights_are_not_mixed(tmp_path, world, claim):
    """As of a model that was trained further, in the same folder."""
    claim()
    claim()
    with pytest.raises(SystemExit, match=r"pictures of other weights than those that are in --vae /\S+/vae now, see"):
        claim(vae_weights=torch.nn.Linear(3, 3))
    told = json.loads((tmp_path / "og.json").read_text())
    del told["weights"]  # as an earlier psvae wrote it
    (tmp_path / "og.json").write_text(json.dumps(told))
    with pytest.raises(SystemExit, match=r"in --model \S+ and --vae \S+ now, or of ones that were not noted, see"):
        claim()
    (tmp_path / "og" / "0000.png").unlink()
    claim()


def test_a_half_written_claim_is_one_clear_line(tmp_path, claim):
    (tmp_path / "og.json").write_text('{"model": ')
    with pytest.raises(SystemExit, match=r"og.json, which says of what options .* cannot be read .*another --output$"):
        claim()
    assert (tmp_path / "og.json").read_text() == '{"model": '


# DPG-Bench


def test_dpg_bench_s_evaluator_finds_grids_of_four(world, tmp_path):
    output = make(generate, world, tmp_path / "dpg", dpg=world / "prompts")
    assert sorted(os.listdir(output)) == ["partiprompts0.png", "partiprompts1.png"]
    alone = make(generate, world, tmp_path / "alone", prompt=PROMPTS[0])
    grid = pixels(output / "partiprompts0.png")
    assert grid.shape == (3, 2 * SIZE, 2 * SIZE)
    corners = [(0, 0), (0, SIZE), (SIZE, 0), (SIZE, SIZE)]  # row by row, as compute_dpg_bench.py crops
    for number, (top, left) in enumerate(corners):
        tile = grid[:, top : top + SIZE, left : left + SIZE]
        assert torch.equal(tile, pixels(alone / f"000{number}.png"))


# GEdit-Bench


@pytest.fixture(scope="module")
def gedit(world):
    return make(edit, world, world / "edited", gedit=str(world / "gedit"))


def test_gedit_bench_s_evaluator_finds_all(world, gedit):
    for number, (task, language) in enumerate(TASKS):
        key = f"{number:032x}"
        folder = gedit / "fullset" / task / language
        [found] = glob.glob(str(folder / f"{key}.*"))  # as run_gedit_score.py does
        source = pixels(folder / f"{key}_SRCIMG.png")
        assert source.shape == pixels(found).shape == (3, 24, 40)  # 36 x 52, of 32² pixels, in multiples of the stride
        with Image.open(io.BytesIO(png(number, SIZE + 4, SIZE + 20))) as raw:
            assert torch.equal(source, pil_to_tensor(raw.resize((40, 24), Image.Resampling.BILINEAR)))
    assert len(list(gedit.rglob("*.png"))) == 2 * len(TASKS)


def test_the_centre_square_is_edited_where_asked_for(world, tmp_path):
    raw = png(3, 60, 40)
    (tmp_path / "dog.png").write_bytes(raw)
    asked = {"source": tmp_path / "dog.png", "instruction": "make it red"}
    assert pixels(make(edit, world, tmp_path / "whole", **asked) / "edited.png").shape == (3, 40, 24)
    assert pixels(make(edit, world, tmp_path / "square", **asked, crop=True) / "edited.png").shape == (3, SIZE, SIZE)
    with Image.open(io.BytesIO(raw)) as picture:
        options = edit.Options(**arguments(world, tmp_path, crop=True))
        assert torch.equal(edit.fit(picture, options, 8), script("data").center_transform(SIZE)(picture))


@pytest.mark.parametrize(("height", "width"), [(1000, 1000), (300, 1200), (1, 1000), (37, 36)])
def test_sides_are_multiples_near_the_picture_s_own(tmp_path, height, width):
    options = edit.Options(model="", vae="", size=256)
    with Image.new("RGB", (width, height)) as picture:
        _, *sides = edit.fit(picture, options, 16).shape
    scale = 256 / (height * width) ** 0.5
    assert all(side >= 16 and side % 16 == 0 for side in sides)
    assert all(abs(side - max(16, own * scale)) <= 8 for side, own in zip(sides, (height, width), strict=True))


def test_only_what_is_missing_is_made_again(world, gedit):
    expected = contents(gedit)
    files = sorted(gedit.rglob("*.png"))
    lost, kept = files[2], {path: path.stat().st_mtime_ns for path in files if path.parent != files[2].parent}
    lost.unlink()
    make(edit, world, gedit, gedit=str(world / "gedit"))
    assert contents(gedit) == expected
    assert all(path.stat().st_mtime_ns == made for path, made in kept.items())


@pytest.mark.parametrize("name", ["generate", "edit"])
def test_two_processes_share_the_work(world, geneval, gedit, name):
    asked = {"generate": {"geneval": world / "metadata.jsonl"}, "edit": {"gedit": world / "gedit"}}[name]
    run(command_line(name, world, world / f"two_{name}", processes=2, **asked))
    assert contents(world / f"two_{name}") == contents({"generate": geneval, "edit": gedit}[name])


# Bad options

REFUSED = {
    "nothing": (generate, {}, "0 of --prompt, --geneval and --dpg came"),
    "two things": (generate, {"prompt": "a dog", "dpg": "prompts"}, "2 of --prompt, --geneval and --dpg came"),
    "no images": (generate, {"prompt": "a dog", "images": 0}, "for 0 images"),
    "no words": (generate, {"prompt": " "}, "no prompt in"),
    "no file": (generate, {"geneval": "absent.jsonl"}, "absent.jsonl cannot be read"),
    "no prompt": (generate, {"geneval": "promptless.jsonl"}, "line 2 has no GenEval prompt (KeyError('prompt'))"),
    "no texts": (generate, {"dpg": "vae"}, "no prompt in"),
    "an empty text": (generate, {"dpg": "empty"}, "out/x.png"),
    "size": (generate, {"prompt": "a dog", "size": 33}, "an image side is 33; wanted a multiple of the stride 8"),
    "steps": (generate, {"prompt": "a dog", "steps": 0}, "num_steps is 0; wanted "),
    "interval": (generate, {"prompt": "a dog", "guidance_interval": (0.6, 0.4)}, "interval"),
    "no model": (generate, {"prompt": "a dog", "model": "vae"}, "holds a PSVAE; wanted a DeepFusionDiT"),
    "no vae": (generate, {"prompt": "a dog", "vae": "model"}, "holds a DeepFusionDiT; wanted a PSVAE"),
    "channels": (generate, {"prompt": "a dog", "model": "five"}, "latents have 8 channels, the generator's 5"),
    "prefix": (generate, {"prompt": "a dog", "model": "prefix"}, "fusion 'prefix' reads no texts"),
    "patches": (
        generate,
        {"prompt": "a dog", "model": "patches", "size": 40},
        "latents of this size are 5 x 5, which patches of 2 do not fill",
    ),
    "six in a grid": (generate, {"dpg": "prompts", "images": 6}, "--images 6 with --dpg; wanted at most 4"),
    "statistics per element": (
        edit,
        {"gedit": "gedit", "vae": "per_element"},
        "takes no other shape: pass --crop",
    ),
    "no tokenizer": (generate, {"prompt": "a dog", "model": "mute"}, "no tokenizer in"),
    "no edit": (edit, {}, "wanted --source with --instruction, or --gedit alone"),
    "half an edit": (edit, {"source": "gedit"}, "wanted --source with --instruction, or --gedit alone"),
    "both": (edit, {"instruction": "x", "gedit": "gedit"}, "wanted --source with --instruction, or --gedit alone"),
    "no picture": (edit, {"source": "metadata.jsonl", "instruction": "x"}, "metadata.jsonl cannot be read as an image"),
    "no benchmark": (edit, {"gedit": "other"}, "other has no column task_type, instruction_language, key, instruction"),
}
PATHS = {"geneval": Path, "dpg": Path, "source": Path, "gedit": str, "model": str, "vae": str}


@pytest.fixture(scope="module")
def bad(world):
    (world / "promptless.jsonl").write_text('{"prompt": "a dog"}\n{"tag": "counting"}\n')
    (world / "empty").mkdir()
    (world / "empty" / "x.txt").write_text("\n")
    tiny_generator(in_channels=5).save_pretrained(world / "five")
    make_tokenizer(world / "five" / "tokenizer")
    tiny_generator().save_pretrained(world / "mute")
    tiny_generator(patch_size=2).save_pretrained(world / "patches")
    make_tokenizer(world / "patches" / "tokenizer")
    tiny_generator(fusion="prefix", vocab_size=None).save_pretrained(world / "prefix")
    make_tokenizer(world / "prefix" / "tokenizer")
    fill_weights(tiny_psvae(statistics_grid=(4, 4))).save_pretrained(world / "per_element")
    make_table(world / "other" / "train-0.parquet", text=["a dog"], input_image=[png(0)])
    return world


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_option_is_one_clear_line(bad, tmp_path, case):
    module, options, said = REFUSED[case]
    options = {key: PATHS[key](bad / value) if key in PATHS else value for key, value in options.items()}
    with pytest.raises(SystemExit) as refusal:
        make(module, bad, tmp_path / "out", **options)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_a_text_that_is_too_long_is_cut(tmp_path):
    make_tokenizer(tmp_path / "words")
    ids, mask = sampling.Tokenizer(str(tmp_path / "words"), None, length=5)(["a red dog " * 9, "a"])
    assert ids.shape == mask.shape == (2, 5)
    assert mask.sum(1).tolist() == [5, 1]
