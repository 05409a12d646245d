"""The world of shapes: what is drawn is what is said, and the detector sees it, sharp, blurred and noisy."""

import random

import pytest
import torch
from torchvision.transforms.functional import gaussian_blur

from examples.scenes import (
    BACKGROUNDS,
    COLOURS,
    EDIT_LENGTH,
    EDITS,
    HELD_OUT,
    HELD_OUT_PAIRS,
    LENGTH,
    SHAPES,
    TASKS,
    WORDS,
    Background,
    Detection,
    Found,
    Prompt,
    Scene,
    Thing,
    Wanted,
    class_map,
    decode,
    depth_map,
    detect,
    draw,
    draw_many,
    edit_example,
    encode,
    encode_many,
    evaluation_prompts,
    example,
    masks,
    region,
    save_tokenizer,
    scatter,
    score_edit,
    score_edits,
    score_prompt,
    score_prompts,
)
from examples.scenes.score import _shows
from tests.base import assert_equal
from tests.examples.generator_world import script

Tokenizer = script("sampling").Tokenizer

COUNT = 40  # scenes of each task
SPLITS = [(task, held_out) for task in TASKS for held_out in (False, True)]


def degraded(images):
    """22 to 27 dB away: blur, then noise."""
    noise = 0.09 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (gaussian_blur(images, 9, 1.5) + noise).clamp(-1, 1)


def psnr(a, b):
    return (10 * torch.log10(4 / (a - b).square().mean(dim=(1, 2, 3)))).mean().item()


def told(scene):
    """What a perfect detector would find."""
    found = [Found(thing.shape, thing.colour, thing.x, thing.y, thing.size, 1.0) for thing in scene.things]
    return Detection(tuple(found), scene.background.name)


def share(truths):
    truths = list(truths)
    return sum(truths) / len(truths)


@pytest.mark.parametrize(("task", "held_out"), SPLITS)
def test_the_right_picture_scores(task, held_out):
    scenes, prompts = zip(*(example(seed, task, held_out) for seed in range(COUNT)), strict=True)
    images = draw_many(scenes)
    assert share(score_prompts(images, prompts)) >= 0.99
    assert share(score_prompts(images, prompts, exact=True)) >= 0.99
    worse = degraded(images)
    assert 22 < psnr(worse, images) < 27
    assert share(score_prompts(worse, prompts)) >= 0.95


def test_training_captions_are_true():
    scenes, prompts = zip(*(example(seed) for seed in range(150)), strict=True)
    images = draw_many(scenes)
    assert share(score_prompts(images, prompts, exact=True)) >= 0.99
    assert share(score_prompts(gaussian_blur(images, 13, 2.5), prompts)) >= 0.95


def test_the_wrong_picture_does_not_score():
    """Each picture against another's prompt, judged as the scene's data judge it; most are wrong, and score 0."""
    scenes, prompts = zip(*(example(seed, task) for task in TASKS for seed in range(30)), strict=True)
    order = random.Random(0).sample(range(len(scenes)), len(scenes))
    others = [prompts[place] for place in order]
    expected = [_shows(told(scene), prompt, exact=False) for scene, prompt in zip(scenes, others, strict=True)]
    scored = score_prompts(draw_many(scenes), others)
    wrong = [score for score, right in zip(scored, expected, strict=True) if not right]
    assert len(wrong) > 100
    assert not any(wrong)
    assert share(score == right for score, right in zip(scored, expected, strict=True)) >= 0.99
    assert not score_prompt(torch.zeros(3, 64, 64), prompts[0])


def test_each_word_of_a_prompt_matters():
    scene = Scene((Thing("circle", "red", 16, 16, 22), Thing("square", "blue", 48, 16, 28)), Background("grey"))
    image, red, blue = draw(scene), Wanted("circle", "red"), Wanted("square", "blue")
    right = Prompt("position", (red, blue), "left of", "grey")
    assert right.text == "a red circle left of a blue square on a grey background"
    assert score_prompt(image, right)
    wrong = [
        Prompt("position", (red, blue), "right of"), Prompt("position", (red, blue), "above"),
        Prompt("position", (blue, red), "left of"), Prompt("colour", (Wanted("circle", "blue"),)),
        Prompt("colour", (red,), background="white"), Prompt("single_object", (Wanted("star"),)),
        Prompt("counting", (Wanted("circle", None, 2),)), Prompt("two_objects", (red, Wanted("cross"))),
    ]  # fmt: skip
    assert not any(score_prompt(image, prompt) for prompt in wrong)
    assert score_prompt(image, Prompt("colour", (red,)))  # as in GenEval, more than was asked for does no harm
    assert not score_prompt(image, Prompt("colour", (red,)), exact=True)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_every_kind_is_detected_on_every_background(background):
    things = [Thing(shape, colour, 30, 33, size) for shape in SHAPES for colour in COLOURS for size in (20, 24, 28)]
    scenes = [Scene((thing,), Background(background, 0.03, (0.05, -0.05))) for thing in things]
    for scene, found in zip(scenes, detect(degraded(draw_many(scenes))), strict=True):
        assert found.background == background
        assert [thing.kind for thing in found.things] == [scene.things[0].kind]
        thing = found.things[0]
        assert max(abs(thing.x - 30), abs(thing.y - 33)) <= 1
        assert abs(thing.size - scene.things[0].size) <= 2


def test_nothing_is_detected_where_nothing_is():
    assert all(not found.things for found in detect(draw_many([Scene((), Background(name)) for name in BACKGROUNDS])))
    noise = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert all(not found.things for found in detect(noise))
    assert detect(torch.full((1, 3, 64, 64), torch.nan))[0].things == ()
    with pytest.raises(ValueError, match="wanted B 3 64 64"):
        detect(torch.zeros(3, 64, 64))


def test_a_partly_hidden_thing_is_still_itself():
    scene = Scene((Thing("square", "blue", 24, 24, 24), Thing("circle", "yellow", 40, 36, 24)), Background("white"))
    assert {thing.kind for thing in detect(draw(scene)[None])[0].things} == {("blue", "square"), ("yellow", "circle")}
    depth = depth_map(scene)
    assert depth[32, 32] == 2  # both cover it; the later one is in front
    assert_equal(masks(scene).sum(dim=0), (depth > 0).long())
    assert set(class_map(scene).unique().tolist()) == {0, 1, 2}


def test_overlap_is_limited():
    least = 1.0
    for seed in range(200):
        kinds = [("red", "circle"), ("blue", "square"), ("cyan", "star"), ("pink", "square"), ("green", "cross")]
        scene = scatter(random.Random(seed), kinds, overlap=True)
        for thing, mask in zip(scene.things, masks(scene), strict=True):
            whole = masks(Scene((thing,), scene.background))[0].sum()
            least = min(least, (mask.sum() / whole).item())
    assert 0.75 <= least < 1  # something is hidden, nothing much


def test_training_never_sees_what_is_held_out():
    kinds, words = set(), set()
    for seed in range(2500):
        scene, prompt = example(seed)
        edit = edit_example(seed)
        for there in (scene, edit.source, edit.target):
            colours = {thing.kind for thing in there.things}
            assert not colours & HELD_OUT
            assert not any(pair <= colours for pair in HELD_OUT_PAIRS)
            kinds |= colours
        words |= {*prompt.text.split(), *edit.instruction.split()}
        for colour, shape in HELD_OUT:
            assert f"{colour} {shape}" not in f"{prompt.text} {edit.instruction}"
    assert len(kinds) == len(SHAPES) * len(COLOURS) - len(HELD_OUT)
    assert words == set(WORDS) - {"<pad>"}


@pytest.mark.parametrize("task", TASKS)
def test_held_out_prompts_are_held_out(task):
    for prompt in evaluation_prompts(task, 50, held_out=True):
        kinds = {(wanted.colour, wanted.shape) for wanted in prompt.wanted}
        assert kinds & HELD_OUT or kinds in HELD_OUT_PAIRS
    for prompt in evaluation_prompts(task, 50):
        kinds = {(wanted.colour, wanted.shape) for wanted in prompt.wanted}
        assert not kinds & HELD_OUT
        assert kinds not in HELD_OUT_PAIRS


def test_no_word_loses_much_to_the_held_out_pairs():
    for place, words in ((0, COLOURS), (1, SHAPES)):
        for word in words:
            held = sum(word in {kind[place] for kind in pair} for pair in HELD_OUT_PAIRS)
            assert held < 0.6 * len(HELD_OUT_PAIRS)
    assert 0.05 < len(HELD_OUT_PAIRS) / 435 < 0.15


def test_the_seed_decides():
    for make in (lambda seed: example(seed), lambda seed: example(seed, "position", True), edit_example):
        assert make(7) == make(7)
        assert len({str(make(seed)) for seed in range(20)}) == 20
    assert_equal(draw(example(3)[0]), draw(example(3)[0]))
    # The very scene, so that a change of the world shows: tables of different versions do not compare.
    assert [prompt.text for prompt in evaluation_prompts("colour_attribution", 2)] == PINNED


PINNED = ["a red square and a yellow star", "a cyan triangle and a pink square"]


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("kind", EDITS)
def test_edits(kind, held_out):
    """The target follows and keeps the rest, the source does not follow, and nothing changes outside the region."""
    edits = [edit_example(seed, kind, held_out) for seed in range(20)]
    sources, targets = draw_many([e.source for e in edits]), draw_many([e.target for e in edits])
    followed, kept = zip(*score_edits(sources, targets, edits), strict=True)
    assert share(followed) >= 0.99
    assert min(kept) == 99
    assert not any(done for done, _ in score_edits(sources, sources, edits))
    assert share(done for done, _ in score_edits(sources, degraded(targets), edits)) >= 0.95
    for source, target, edit in zip(sources, targets, edits, strict=True):
        may = region(edit)
        assert not ((source != target).any(dim=0) & ~may).any()
        assert 0.005 < (~may).float().mean() < 0.99


def test_an_edit_that_spoils_the_rest_shows_it():
    edit = edit_example(0, "recolour")
    source, target = draw(edit.source), draw(edit.target)
    followed, kept = score_edit(source, (target + 0.2).clamp(-1, 1), edit)
    assert followed
    assert kept < 22
    assert score_edit(source, draw(Scene((), edit.target.background)), edit)[0] is False
    followed, kept = score_edit(source, torch.full_like(source, torch.nan), edit)
    assert not followed
    assert kept < 12


def test_the_tokenizer_gives_the_words_back():
    longest = {LENGTH: 0, EDIT_LENGTH: 0}
    for seed in range(500):
        for text, length in ((example(seed)[1].text, LENGTH), (edit_example(seed).instruction, EDIT_LENGTH)):
            ids, mask = encode(text, length)
            assert ids.shape == mask.shape == (length,)
            assert decode(ids) == text
            assert (ids[~mask] == 0).all()
            longest[length] = max(longest[length], int(mask.sum()))
    assert all(length == seen for length, seen in longest.items())
    with pytest.raises(ValueError, match="did you mean 'circle'"):
        encode("a red cirle")
    with pytest.raises(ValueError, match="more than length"):
        encode("a red circle", length=2)


def test_the_saved_tokenizer_gives_the_same_ids(tmp_path):
    save_tokenizer(tmp_path)
    texts = [example(seed)[1].text for seed in range(50)]
    ids, mask = Tokenizer(str(tmp_path), None)(texts)
    wanted, known = encode_many(texts)
    assert_equal(ids, wanted[:, : ids.shape[1]])
    assert_equal(mask.bool(), known[:, : ids.shape[1]])
    with pytest.raises(SystemExit, match=r"'a red sta'.* cannot be tokenised"):
        Tokenizer(str(tmp_path), None)(["a red sta"])


def test_a_misspelt_task_is_named():
    with pytest.raises(ValueError, match="the tasks are single_object"):
        example(0, "single")
    with pytest.raises(ValueError, match="the edits are recolour"):
        edit_example(0, "recolor")
    with pytest.raises(ValueError, match="needs a task"):
        example(0, held_out=True)
