"""DINOv2's heads read as published, and applied to latents; a head fitted on the teacher's features, left unchanged."""

import importlib
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from psvae import AlignmentNet, AlignmentNetConfig, SemanticEncoder, fit_latent_statistics, load_reals, save_reals
from psvae.errors import CheckpointError, RangeWarning
from psvae.losses import alignment_loss
from tests.examples.generator_world import fresh_accelerator
from tests.tiny import FEATURE_DIM, features, fill_weights, images, tiny_encoder, tiny_pixel_vae

EXAMPLES = Path(__file__).parents[2] / "examples"
D, SIZE, COUNT = FEATURE_DIM, 32, 12


@pytest.fixture(scope="module", autouse=True)
def examples_on_the_path():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield


@pytest.fixture(scope="module")
def heads(examples_on_the_path):
    return importlib.import_module("heads")


@pytest.fixture(scope="module")
def downstream(examples_on_the_path):
    return importlib.import_module("downstream")


@pytest.fixture(scope="module")
def fitting(examples_on_the_path):
    return importlib.import_module("fitting")


def segmentation_weights(width=D, classes=5):
    draw = torch.Generator().manual_seed(1)
    return {
        "decode_head.conv_seg.weight": torch.randn(classes, width, 1, 1, generator=draw),
        "decode_head.conv_seg.bias": torch.randn(classes, generator=draw),
        "decode_head.bn.weight": torch.randn(width, generator=draw),
        "decode_head.bn.bias": torch.randn(width, generator=draw),
        "decode_head.bn.running_mean": torch.randn(width, generator=draw),
        "decode_head.bn.running_var": torch.rand(width, generator=draw) + 0.5,
        "decode_head.bn.num_batches_tracked": torch.tensor(40_000),
    }


def depth_weights(width=D, bins=256):
    draw = torch.Generator().manual_seed(2)
    weight = torch.randn(bins, 2 * width, 1, 1, generator=draw)
    return {"decode_head.conv_depth.weight": weight, "decode_head.conv_depth.bias": torch.randn(bins, generator=draw)}


def publish(weights, file):
    """As mmcv writes them: the weights beside notes on the run."""
    torch.save({"meta": {"env_info": "mmseg", "PALETTE": [[1, 2, 3]]}, "state_dict": weights}, file)
    return file


# The heads


def test_segmentation_is_batch_norm_a_classifier_and_a_resize(heads, tmp_path):
    weights = segmentation_weights()
    head = heads.read_head(publish(weights, tmp_path / "dinov2_ade20k_linear_head.pth"), D, allow_pickle=True)
    x, [w, b, gain, shift, mean, var, _] = features(2, 4, 5), weights.values()
    normal = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt() * gain[:, None, None] + shift[:, None, None]
    scores = torch.einsum("kd,bdhw->bkhw", w[:, :, 0, 0], normal) + b[:, None, None]
    expected = F.interpolate(scores, (32, 40), mode="bilinear", align_corners=False)
    torch.testing.assert_close(head(x, (32, 40)), expected, rtol=1e-4, atol=1e-4)
    assert head.tokens == "normed"


@pytest.mark.parametrize(("name", "deepest"), [("nyu", 10.0), ("kitti", 80.0)])
def test_depth_is_the_mean_of_256_bins(heads, tmp_path, name, deepest):
    """In DINOv2's order: tokens side by side, resized, classified, and each bin given its share."""
    weights = depth_weights()
    file = publish(weights, tmp_path / f"dinov2_vits14_{name}_linear_head.pth")
    head, x, cls = heads.read_head(file, D, allow_pickle=True), features(2, 3, 4), features(2, 1, 1, seed=1)[:, :, 0, 0]
    both = torch.cat([x, cls[:, :, None, None].expand(2, D, 3, 4)], dim=1)
    both = F.interpolate(both, (12, 16), mode="bilinear", align_corners=False)
    scores = torch.einsum("kd,bdhw->bkhw", weights["decode_head.conv_depth.weight"][:, :, 0, 0], both)
    scores = (scores + weights["decode_head.conv_depth.bias"][:, None, None]).clamp(min=0) + 0.1
    share = scores / scores.sum(1, keepdim=True)
    depth = sum(share[:, k] * (0.001 + (deepest - 0.001) * k / 255) for k in range(256))
    expected = F.interpolate(depth[:, None], (24, 32), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(head(x, cls, (24, 32)), expected, rtol=1e-4, atol=1e-4)
    assert head.tokens == "pre_norm"


def rename_in_pickle(file, before, after):
    """numpy 2 writes its new module's name, the published files have the old one."""
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    assert any(before in content for content in parts.values())
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content.replace(before, after))


def test_a_number_of_numpy_in_the_notes_is_read(heads, tmp_path):
    """DINOv2's depth files hold one, and PyTorch's restricted unpickler refuses it by itself."""
    file = tmp_path / "dinov2_vits14_nyu_linear_head.pth"
    torch.save({"meta": {"best": np.float64(0.4)}, "state_dict": depth_weights()}, file)
    rename_in_pickle(file, b"numpy._core.multiarray", b"numpy.core.multiarray")
    with pytest.raises(Exception, match="numpy"):
        torch.load(file, weights_only=True)
    assert isinstance(heads.read_head(file, D, allow_pickle=True), heads.DepthHead)
    with pytest.raises(Exception, match="numpy"):
        torch.load(file, weights_only=True)  # allowed for that one file


def test_a_saved_head_comes_back(heads, tmp_path):
    head = heads.read_head(publish(segmentation_weights(), tmp_path / "head.pth"), D, allow_pickle=True)
    heads.save_head(head, tmp_path / "head.safetensors")
    again = heads.read_head(tmp_path / "head.safetensors", D)
    assert again(features(), (8, 8)).equal(head(features(), (8, 8)))


def refused(heads, file, **more):
    with pytest.raises(CheckpointError) as error:
        heads.read_head(file, D, **{"allow_pickle": True, **more})
    return str(error.value)


def test_files_that_are_no_such_head(heads, tmp_path):
    file = tmp_path / "head.pth"
    assert "there is no head file" in refused(heads, file)
    assert "is a pickle" in refused(heads, publish(segmentation_weights(), file), allow_pickle=False)
    text = refused(heads, publish(segmentation_weights(4 * D), file))
    assert f"segmentation head that reads {4 * D} channels; the features have width {D}" in text
    text = refused(heads, publish(depth_weights(4 * D), file))
    assert f"depth head that reads {8 * D} channels" in text
    assert "linear4" in text
    dpt = {"decode_head.conv_depth.head.0.weight": torch.zeros(2, 2, 3, 3)}
    assert "is a DPT depth head" in refused(heads, publish(dpt, file))
    assert "it holds weight; the features" in refused(heads, publish({"weight": torch.zeros(2)}, file))
    assert "how deep its last bin is" in refused(heads, publish(depth_weights(), file))
    assert heads.read_head(file, D, allow_pickle=True, max_depth=3.0).bins[-1] == 3.0


def test_strict_on_names_and_shapes(heads, tmp_path):
    weights, file = segmentation_weights(), tmp_path / "head.pth"
    lacking = {name: tensor for name, tensor in weights.items() if not name.endswith("running_var")}
    assert "1 missing: decode_head.bn.running_var" in refused(heads, publish(lacking, file))
    more = weights | {"auxiliary_head.bias": torch.zeros(1)}
    assert "1 unexpected: auxiliary_head.bias" in refused(heads, publish(more, file))
    narrow = weights | {"decode_head.bn.bias": torch.zeros(D - 1)}
    assert f"decode_head.bn.bias is ({D - 1},), wanted ({D},)" in refused(heads, publish(narrow, file))


def test_code_in_a_pickle_is_not_run(heads, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    torch.save({"meta": Bomb(), "state_dict": segmentation_weights()}, tmp_path / "head.pth")
    assert "restricted unpickler" in refused(heads, tmp_path / "head.pth")
    assert not (tmp_path / "exploded").exists()


# The program


def draw(number):
    """A dark and a bright half, upright or lying, and which pixel is in which."""
    mask = np.zeros((SIZE, SIZE), dtype=np.uint8)
    edge = 8 * (1 + number % 3)
    mask[edge:] = 1
    mask = mask if number % 2 else mask.T
    noise = np.random.default_rng(number).integers(0, 30, (SIZE, SIZE, 3))
    return (mask[:, :, None] * 200 + noise).astype(np.uint8), mask


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Labelled pictures, a teacher, and a ReaLS folder whose network was aligned with it for a few steps."""
    root = tmp_path_factory.mktemp("downstream")
    for number in range(COUNT):
        for part, pixels in zip(("images", "masks"), draw(number), strict=True):
            (root / "labelled" / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / "labelled" / part / f"{number:02d}.png")
    pixels = torch.stack([torch.from_numpy(draw(number)[0]).movedim(-1, 0) for number in range(COUNT)]) / 127.5 - 1
    teacher, vae = fill_weights(tiny_encoder(final_norm="affine")), fill_weights(tiny_pixel_vae())
    config = AlignmentNetConfig(vae.config.latent_channels, D, hidden_dim=64, stride=8)
    alignment = fill_weights(AlignmentNet(config).eval())
    with torch.no_grad():
        seen, latents = teacher(pixels, return_all=True), vae.encode(pixels).latent_dist.mode()
    optimizer = torch.optim.Adam(alignment.parameters(), 3e-3)
    for _ in range(200):
        output = alignment(latents)
        loss = alignment_loss(output.patch_features, seen.features)
        loss = loss + alignment_loss(output.global_feature, seen.global_token)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    fit_latent_statistics(vae, [pixels])
    save_reals(root / "reals", vae, alignment)
    teacher.save_pretrained(root / "teacher")
    options = {"teacher": str(root / "teacher"), "teacher_features": "normed"}
    (root / "reals" / "options.json").write_text(json.dumps(options))
    measured = {"running_mean": seen.features.mean((0, 2, 3)), "running_var": seen.features.var((0, 2, 3))}
    measured = {f"decode_head.bn.{name}": values for name, values in (measured | {"bias": torch.zeros(D)}).items()}
    measured["decode_head.conv_seg.bias"] = torch.zeros(5)  # so that the features decide
    save_file(segmentation_weights() | measured, root / "seg.safetensors")
    save_file(depth_weights(), root / "nyu.safetensors")
    save_file({"latents": latents.contiguous()}, root / "raw.safetensors")
    normal = load_reals(root / "reals").vae.latent_spec.normalize(latents)
    np.savez(root / "generated.npz", normal.numpy())
    return root


def run(downstream, world, output, **more):
    """By the words of a command line, without its program."""
    options = {"reals": world / "reals", "output": output, "size": SIZE, "workers": 0, "batch-size": 5, **more}
    words = []
    for name, value in options.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return downstream.main(tyro.cli(downstream.Options, args=words))


def both(world):
    return {"segmentation": world / "seg.safetensors", "depth": world / "nyu.safetensors"}


def load_teacher(world):
    return SemanticEncoder.from_pretrained(world / "teacher").requires_grad_(False)


def read_maps(folder):
    masks = [np.asarray(Image.open(file)) for file in sorted(folder.glob("masks/**/*.png"))]
    return np.stack(masks), np.stack([np.load(file) for file in sorted(folder.glob("depth/**/*.npy"))])


def test_pictures_to_masks_and_depths(downstream, heads, world, tmp_path, capsys):
    run(downstream, world, tmp_path, input=world / "labelled" / "images", shown=3, **both(world))
    masks, depths = read_maps(tmp_path)
    assert masks.shape == depths.shape == (COUNT, SIZE, SIZE)
    assert np.unique(masks).size > 1
    assert np.ptp(depths) > 0.01
    alignment = load_reals(world / "reals").alignment.requires_grad_(False)
    raw = load_file(world / "raw.safetensors")["latents"]
    patches, pooled = alignment(raw)
    for file, maps in both(world).items():
        head = heads.read_head(maps, D)
        if file == "segmentation":
            assert (masks == head(patches, (SIZE, SIZE)).argmax(1).numpy()).mean() > 0.99
        else:
            np.testing.assert_allclose(depths, head(patches, pooled, (SIZE, SIZE)).numpy(), rtol=1e-3, atol=1e-3)
    with Image.open(tmp_path / "downstream.png") as picture:
        assert picture.width > 500
        assert np.asarray(picture.convert("L")).std() > 10
    said = capsys.readouterr().out
    assert "DepthHead reads pre_norm tokens, the latents were aligned with normed ones: the norm cannot" in said
    assert "SegmentationHead" not in said


def test_generated_latents_say_the_same_as_raw_ones(downstream, world, tmp_path):
    run(downstream, world, tmp_path / "raw", input=world / "raw.safetensors", **both(world))
    run(downstream, world, tmp_path / "made", input=world / "generated.npz", normalized=True, **both(world))
    for one, other in zip(*(read_maps(tmp_path / name) for name in ("raw", "made")), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)
    names = [file.name for file in sorted((tmp_path / "raw" / "masks").iterdir())]
    assert names[:2] == ["raw_000000.png", "raw_000001.png"]


def test_latents_of_a_sit_are_read_as_sample_sit_leaves_them(downstream, heads, world, tmp_path):
    sit, sample_sit = map(importlib.import_module, ("sit", "sample_sit"))
    vae, alignment = load_reals(world / "reals")
    model = sit.build_sit("tiny/2", 8, 4, 2)
    torch.nn.init.normal_(model.proj_out_2.weight, std=0.02)  # a fresh one returns zero
    sit.save_sit(model, vae.latent_spec, tmp_path / "sit")
    fresh_accelerator()
    sample_sit.main(
        sample_sit.Options(
            model=str(tmp_path / "sit"), vae=str(world / "reals" / "vae"), output=tmp_path / "made", count=5,
            batch_size=3, solver="euler", steps=2, save_latents=True,
        )
    )  # fmt: skip
    made = tmp_path / "made-latents.npz"
    run(downstream, world, tmp_path / "seen", input=made, normalized=True, **both(world))
    masks, depths = read_maps(tmp_path / "seen")
    with np.load(made) as content:
        raw = vae.latent_spec.denormalize(torch.from_numpy(content["latents"]))
    patches, cls = alignment.requires_grad_(False)(raw)
    segmentation, depth = (heads.read_head(file, D) for file in both(world).values())
    assert (masks == segmentation(patches, (SIZE, SIZE)).argmax(1).numpy()).mean() > 0.99
    np.testing.assert_allclose(depths, depth(patches, cls, (SIZE, SIZE)).numpy(), rtol=1e-3, atol=1e-3)
    with np.load(tmp_path / "made.npz") as content:  # and the pictures are theirs
        shown = content["arr_0"].transpose(0, 3, 1, 2) / 127.5 - 1
    np.testing.assert_allclose(shown, vae.decode(raw).sample.detach().clamp(-1, 1).numpy(), atol=0.01)


def test_statistics_applied_twice_are_warned_of(downstream, world, tmp_path):
    """Here those of latents ten times as wide."""
    shutil.copytree(world / "reals", tmp_path / "reals")
    file = tmp_path / "reals" / "vae" / "mean_std.json"
    told = json.loads(file.read_text())
    file.write_text(json.dumps({"mean": told["mean"], "std": 10 * told["std"]}))
    twice = {"reals": tmp_path / "reals", "segmentation": world / "seg.safetensors"}
    with pytest.warns(RangeWarning, match="standard deviations from their mean.*twice, or not at all"):
        run(downstream, world, tmp_path / "out", input=world / "raw.safetensors", **twice)
    del twice["segmentation"]  # a warning would be an error here: of pictures it is the tool that reads the means
    run(
        downstream,
        world,
        tmp_path / "fit",
        **twice,
        teacher=world / "teacher",
        **{"fit-head": world / "labelled"},
        steps=1,
    )


def test_a_head_of_the_teacher_is_applied_unchanged(downstream, fitting, heads, world, tmp_path):
    scores = run(downstream, world, tmp_path, **{"fit-head": world / "labelled", "steps": 60, "held-out": 4})
    assert json.loads((tmp_path / "metrics.json").read_text()) == scores
    assert (scores["classes"], scores["fitted"], scores["held_out"]) == (2, 9, 3)
    assert scores["miou_teacher"] > 0.8
    assert scores["miou_latents"] > 0.7
    head = heads.read_head(tmp_path / "head.safetensors", D)
    vae, alignment = load_reals(world / "reals")
    places = fitting.split(COUNT, one_in=4, seed=0)[1]
    held_out = [draw(number) for number in places]
    pixels = torch.stack([torch.from_numpy(picture).movedim(-1, 0) for picture, _ in held_out]) / 127.5 - 1
    said = head(alignment(vae.encode(pixels).latent_dist.mode()).patch_features, (SIZE, SIZE)).argmax(1).numpy()
    truth = np.stack([mask for _, mask in held_out])
    shares = [((said == k) & (truth == k)).sum() / ((said == k) | (truth == k)).sum() for k in (0, 1)]
    assert scores["miou_latents"] == pytest.approx(np.mean(shares), abs=1e-3)
    shown = np.stack([np.asarray(Image.open(tmp_path / "masks" / f"{number:02d}.png")) for number in places])
    assert (shown == said).mean() > 0.99


def test_what_is_held_out_is_of_all_classes(fitting, world, tmp_path):
    """Where they come in turn, one in so many would be of one class alone, and no head would have seen it."""
    for number in range(40):
        for part, value in (("images", 60 * (number % 4)), ("masks", number % 4)):
            (tmp_path / part).mkdir(exist_ok=True)
            Image.fromarray(np.full((SIZE, SIZE), value, dtype=np.uint8)).save(tmp_path / part / f"{number:02d}.png")
    labelled, teacher = fitting.Labelled(tmp_path, SIZE), load_teacher(world)

    def held_out(seed):
        how = {"one_in": 4, "steps": 1, "lr": 1e-3, "batch_size": 16, "workers": 0}
        _, found, scores = fitting.fit(labelled, teacher, teacher, **how, seed=seed)
        assert (scores["fitted"], scores["held_out"]) == (30, 10)
        return [int(path.stem) for path in found]

    chosen = held_out(0)
    assert {number % 4 for number in chosen} == {0, 1, 2, 3}
    assert held_out(0) == chosen
    assert held_out(1) != chosen


def test_pre_norm_features_are_normed_by_the_teacher(downstream, world, tmp_path, capsys):
    alignment, teacher = load_reals(world / "reals").alignment, fill_weights(tiny_encoder(final_norm="affine"))
    seen = teacher(images(), return_all=True)
    raw = load_file(world / "raw.safetensors")["latents"]
    found = downstream.Reader(alignment, "pre_norm", teacher.vit.norm)(raw, "normed")[0]
    cells = alignment(raw).patch_features.permute(0, 2, 3, 1)
    norm = teacher.vit.norm
    expected = F.layer_norm(cells, (D,), norm.weight, norm.bias, norm.eps).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(norm(seen.pre_norm.movedim(1, -1)).movedim(-1, 1), seen.features)
    reader = downstream.Reader(alignment, "pre_norm", norm)
    torch.testing.assert_close(reader(raw, "normed")[1], norm(alignment(raw).global_feature))
    torch.testing.assert_close(norm(seen.pre_norm_cls), seen.global_token)
    for ours, theirs in zip(reader(raw, "pre_norm"), alignment(raw), strict=True):
        assert ours.equal(theirs)

    options = {"input": world / "raw.safetensors", "segmentation": world / "seg.safetensors"}
    run(downstream, world, tmp_path, **options, **{"teacher-features": "pre_norm"})
    assert "reads normed tokens, the latents were aligned with pre_norm ones: the teacher's" in capsys.readouterr().out
    depth = {"input": world / "raw.safetensors", "depth": world / "nyu.safetensors"}
    run(downstream, world, tmp_path / "depth", **depth, **{"teacher-features": "pre_norm"})
    assert "DepthHead" not in capsys.readouterr().out  # its tokens, patch and CLS alike
    shutil.copytree(world / "reals", tmp_path / "unknown", ignore=shutil.ignore_patterns("options.json"))
    run(downstream, world, tmp_path, **options, **{"reals": tmp_path / "unknown", "teacher-features": "pre_norm"})
    assert "name the --teacher" in capsys.readouterr().out
    run(downstream, world, tmp_path, **options, **{"reals": tmp_path / "unknown"})
    assert "does not say what its latents were aligned with; taken: normed" in capsys.readouterr().out


@pytest.mark.parametrize("final_norm", ["plain", "none", "affine"])
def test_dinov2_s_head_on_tokens_of_another_norm_is_told(downstream, world, tmp_path, capsys, final_norm):
    """One that was fitted on such tokens is at home there."""
    shutil.copytree(world / "reals", tmp_path / "reals")
    fill_weights(tiny_encoder(final_norm=final_norm)).save_pretrained(tmp_path / "teacher")
    options = {"teacher": str(tmp_path / "teacher"), "teacher_features": "normed"}
    (tmp_path / "reals" / "options.json").write_text(json.dumps(options))
    publish(load_file(world / "seg.safetensors"), tmp_path / "dinov2_ade20k_linear_head.pth")
    asked = {"reals": tmp_path / "reals", "input": world / "raw.safetensors"}
    head = {"segmentation": tmp_path / "dinov2_ade20k_linear_head.pth", "allow-pickle": True}
    run(downstream, world, tmp_path / "out", **asked, **head)
    said = f"reads DINOv2's normed tokens, and the teacher's final norm is '{final_norm}'"
    assert (said in capsys.readouterr().out) == (final_norm != "affine")
    run(downstream, world, tmp_path / "out", **asked, segmentation=world / "seg.safetensors")
    assert "SegmentationHead" not in capsys.readouterr().out


def test_labels_that_are_no_class(fitting, world, tmp_path):
    """Any number but the one that means none."""
    folder = shutil.copytree(world / "labelled", tmp_path / "labelled")
    pixels = np.asarray(Image.open(folder / "masks" / "05.png")).copy()
    pixels[0, 0] = 255
    Image.fromarray(pixels).save(folder / "masks" / "05.png")
    assert fitting.Labelled(folder, SIZE).classes == 2
    with pytest.raises(SystemExit, match=r"05\.png has the label 255; wanted 0 to 1, or 9 for no class"):
        fitting.Labelled(folder, SIZE, classes=2, ignore=9)
    with pytest.raises(SystemExit, match=r"has the label 1; wanted 0 to 0"):
        fitting.Labelled(folder, SIZE, classes=1)


def test_masks_are_cut_as_their_pictures_are(fitting, tmp_path):
    """Nearest neighbours, the same window."""
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    mask = np.random.default_rng(0).choice([0, 9], (64, 96)).astype(np.uint8)
    Image.fromarray(mask).save(tmp_path / "masks" / "a.png")
    Image.fromarray((mask * 20)[:, :, None].repeat(3, axis=2)).save(tmp_path / "images" / "a.png")
    image, numbers = fitting.Labelled(tmp_path, 64)[0]
    assert numbers.shape == (64, 64)
    torch.testing.assert_close((image[0] + 1) * 127.5, numbers * 20.0, atol=0.01, rtol=0)
    half = fitting.Labelled(tmp_path, 32)[0][1]
    assert half.equal(numbers[1::2, 1::2])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, "no head came"),
        ({"segmentation": "seg.safetensors"}, "nothing to look at came"),
        ({"segmentation": "seg.safetensors", "input": "absent"}, "there is no --input"),
        ({"segmentation": "nyu.safetensors", "input": "raw.safetensors"}, "holds a DepthHead; wanted a Segmentation"),
        ({"segmentation": "seg.safetensors", "input": "teacher"}, "holds .*wanted an array named latents"),
        ({"segmentation": "seg.safetensors", "input": "other.safetensors"}, "have 3 channels.*wanted 8"),
        ({"segmentation": "seg.safetensors", "input": "pictures.npz"}, r"uint8 of shape \(2, 32, 32, 3\), no latents"),
        ({"segmentation": "seg.safetensors", "input": "narrow.npz"}, r"shape \(2, 8, 4\); wanted 4 axes"),
        ({"segmentation": "seg.safetensors", "fit-head": "labelled"}, "wanted one of them"),
        ({"segmentation": "seg.safetensors", "input": "broken_images/images/00.png"}, r"none of .*00\.png can be read"),
        (
            {"fit-head": "labelled/images"},
            r"there is no folder /\S+/labelled/images/images; wanted .* and masks/ of the",
        ),
        ({"fit-head": "no_masks"}, r"there is no folder /\S+/no_masks/masks; wanted a folder of images; labelled pic"),
        ({"fit-head": "texts"}, r"/\S+/texts/images holds no images \(.bmp, .*\); labelled pictures are a folder of"),
        ({"fit-head": "odd"}, r"has 1 pictures in images/ and 1 in masks/; without a partner: 00, 01; wanted both, of"),
        ({"fit-head": "coloured"}, "has colours .mode RGB.; wanted an index PNG"),
        ({"fit-head": "broken_images"}, r"images/00\.png cannot be read: "),
        ({"fit-head": "broken_masks"}, r"masks/00\.png cannot be read: "),
        ({"segmentation": "seg.safetensors", "input": "cut_off.npz"}, r"cut_off\.npz cannot be read as an \.npz: File"),
        ({"segmentation": "seg.safetensors", "input": "empty.npz"}, r"empty\.npz cannot be read as an \.npz: No data"),
        ({"segmentation": "seg.safetensors", "reals": "unsaid"}, r"options\.json, which says .* cannot be read .*--"),
        ({"segmentation": "seg.safetensors", "reals": "listed"}, r"options\.json, which says .* cannot be read .*--"),
        ({"fit-head": "labelled", "held-out": 99}, "too few to hold out one in 99"),
        ({"fit-head": "labelled", "teacher": "wide"}, "width 24 and the alignment network of 48"),
        (
            {"segmentation": "seg.safetensors", "input": "labelled/images", "size": 20},
            "20 x 20; wanted multiples of the",
        ),
        (
            {"segmentation": "seg.safetensors", "input": "raw.safetensors", "reals": "bare"},
            "has no mean_std.json, .*fit",
        ),
    ],
)
def test_bad_input(downstream, world, tmp_path, more, said):
    if not (world / "other.safetensors").exists():
        save_file({"latents": torch.zeros(2, 3, 4, 4)}, world / "other.safetensors")
        np.savez(world / "pictures.npz", np.zeros((2, 32, 32, 3), dtype=np.uint8))
        np.savez(world / "narrow.npz", np.zeros((2, 8, 4), dtype=np.float32))
        for folder, masks in (("no_masks", None), ("coloured", "images")):
            (world / folder / "images").mkdir(parents=True)
            shutil.copy(world / "labelled" / "images" / "00.png", world / folder / "images")
            if masks:
                shutil.copytree(world / folder / "images", world / folder / "masks")
        (world / "texts" / "images").mkdir(parents=True)
        (world / "texts" / "images" / "00.txt").touch()
        for part, name in (("images", "00.png"), ("masks", "01.png")):
            (world / "odd" / part).mkdir(parents=True)
            shutil.copy(world / "labelled" / part / name, world / "odd" / part)
            shutil.copytree(world / "labelled", world / f"broken_{part}")
            file = world / f"broken_{part}" / part / "00.png"
            file.write_bytes(file.read_bytes()[:-60])  # its size can still be read
        for name, content in (("cut_off", (world / "generated.npz").read_bytes()[:-100]), ("empty", b"")):
            (world / f"{name}.npz").write_bytes(content)
        for name, content in (("unsaid", '{"teacher": '), ("listed", "[1]")):
            (world / name).mkdir()
            (world / name / "options.json").write_text(content)
        shutil.copytree(world / "reals", world / "bare", ignore=shutil.ignore_patterns("mean_std.json"))
        model = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
        tiny_encoder(model_args=model).save_pretrained(world / "wide")
    more = {name: world / value if isinstance(value, str) else value for name, value in more.items()}
    if "reals" in more:
        more.setdefault("input", world / "raw.safetensors")
    with pytest.raises(SystemExit) as error:
        run(downstream, world, tmp_path, **more)
    assert error.match(f"(?s){said}")
    assert not (tmp_path / "downstream.png").exists()
