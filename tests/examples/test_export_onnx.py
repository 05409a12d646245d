"""Exported files compute what the models do, at sizes that the export never saw; those that do not are not kept."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from psvae import PSVAE, PrefixCache, SemanticEncoderConfig, ViTPixelDecoderConfig, fit_latent_statistics, flow
from tests.base import assert_close
from tests.generators.test_deep_fusion import FUSIONS, text_of
from tests.generators.test_deep_fusion import tiny_model as tiny_generator
from tests.tiny import fill_weights, images, latents, tiny_decoder_config, tiny_pixel_vae, tiny_psvae

onnxruntime = pytest.importorskip("onnxruntime", reason="comes with psvae[onnx]")
onnx = pytest.importorskip("onnx", reason="comes with psvae[onnx]")

EXAMPLES = Path(__file__).parents[2] / "examples"
GRIDS = ((4, 4), (2, 6), (7, 2))  # the first is the position table's own
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def example():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module("export_onnx")


def export(example, model, folder, **options):
    """The folder of the exported files."""
    model.save_pretrained(folder / "model")
    example.main(example.Options(str(folder / "model"), folder / "out", **options))
    return folder / "out"


def run(file, **inputs):
    """The outputs of an ONNX file, by name."""
    quiet = onnxruntime.SessionOptions()
    quiet.log_severity_level = 4
    session = onnxruntime.InferenceSession(file, quiet)
    found = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    return {value.name: torch.from_numpy(x) for value, x in zip(session.get_outputs(), found, strict=True)}


def axes(file):
    session = onnxruntime.InferenceSession(file)
    return {value.name: value.shape for value in (*session.get_inputs(), *session.get_outputs())}


def metadata(file):
    session = onnxruntime.InferenceSession(file)
    return json.loads(session.get_modelmeta().custom_metadata_map["psvae"])


def measured(vae):
    fit_latent_statistics(vae, [images(4, seed=1)])
    return vae


VAES = {
    "psvae": lambda: measured(fill_weights(tiny_psvae())),
    "rae": lambda: fill_weights(tiny_psvae("rae")),
    "features": lambda: fill_weights(tiny_psvae("features")),
    "pixel": lambda: measured(fill_weights(tiny_pixel_vae())),
}


def first_by_default(cases):
    """The others are marked, an export takes seconds."""
    first, *others = cases
    return [first, *(pytest.param(case, marks=pytest.mark.compile) for case in others)]


@pytest.fixture(scope="module", params=first_by_default(VAES))
def exported(request, example, tmp_path_factory):
    """(name, a VAE, the folder of its files in both formats)."""
    vae = VAES[request.param]()
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, vae, export(example, vae, folder, format=("onnx", "pt2"), grid=(4, 4))


def test_vaes_at_sizes_that_the_export_never_saw(exported):
    """Latents as the class has them: a PSVAE's normalised, a PixelVAE's raw."""
    _, vae, folder = exported
    programs = {name: torch.export.load(folder / f"{name}.pt2").module() for name in ("encoder", "decoder")}
    for batch, grid in enumerate(GRIDS, start=1):
        pictures = images(batch, *(8 * side for side in grid))
        noisy = latents(batch, *grid, channels=vae.config.latent_channels)
        with torch.no_grad():
            found = vae.encode(pictures).latent_dist
            painted = vae.decode(noisy).sample
            assert_close(programs["encoder"](pictures), [found.mean, found.std])
            assert_close([programs["decoder"](noisy)], [painted])
        posterior = run(folder / "encoder.onnx", images=pictures)
        assert_close(posterior.values(), [found.mean, found.std], TOLERANCE)
        assert_close(run(folder / "decoder.onnx", latents=noisy).values(), [painted], TOLERANCE)


def test_free_axes_have_names(exported):
    _, vae, folder = exported
    Z = vae.config.latent_channels
    cells, pixels = ["B", Z, "h", "w"], ["B", 3, "8*h", "8*w"]
    assert axes(folder / "encoder.onnx") == {"images": pixels, "mean": cells, "std": cells}
    assert axes(folder / "decoder.onnx") == {"latents": cells, "images": pixels}


def test_a_file_says_whose_its_latents_are(exported):
    name, vae, folder = exported
    said = metadata(folder / "encoder.onnx")
    raw = name == "pixel"
    assert said["latents"] == ("raw" if raw else "normalised")
    assert said["scaling_factor"] == (0.18215 if raw else 1.0)
    assert (said["channels"], said["stride"]) == (vae.config.latent_channels, 8)
    if raw:
        assert torch.tensor(said["left_to_callers"]["mean"]).equal(vae.latent_spec.mean)
    extra = {"psvae.json": ""}
    torch.export.load(folder / "encoder.pt2", extra_files=extra)
    assert json.loads(extra["psvae.json"]) == said


def test_sizes_that_are_no_multiple_are_refused(exported):
    """Without psvae's words; a convolution alone would floor them."""
    _, _, folder = exported
    program = torch.export.load(folder / "encoder.pt2").module()
    for size in ((33, 32), (32, 36)):
        with pytest.raises(Exception, match="Reshape"):
            run(folder / "encoder.onnx", images=images(1, *size))
        with pytest.raises((AssertionError, RuntimeError)):
            program(images(1, *size))


def test_a_pt2_holds_the_weights_of_its_part_alone(exported):
    name, vae, folder = exported
    encoder = {key.split(".")[1] for key in torch.export.load(folder / "encoder.pt2").state_dict}
    decoder = {key.split(".")[1] for key in torch.export.load(folder / "decoder.pt2").state_dict}
    assert "decoder" not in encoder
    assert "encoder" not in decoder
    assert ("vae" in decoder) == (name == "features")
    assert isinstance(vae, PSVAE) is (name != "pixel")
    assert vae.decoder is not None  # the model itself is left whole


# The generator's step

STEPS = {
    **FUSIONS,
    "patches": {"head": "linear", "patch_size": 2, "image_rope": "2d", "prediction": "sample"},
    "mot": {**FUSIONS["mot"], "image_rope": "mrope", "head_final_modulation": True},
}


@pytest.fixture(scope="module", params=first_by_default(STEPS))
def step(request, example, tmp_path_factory):
    """(a generator, the folder of its files in both formats)."""
    model = tiny_generator(**STEPS[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    return model, export(example, model, folder, format=("onnx", "pt2"), grid=(4, 4), prefix=6)


def prefixes(model):
    """One with a source and padded text, one of another length, and none."""
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    with torch.no_grad():
        yield model.encode_prefix(**text_of(model), attention_mask=mask, source_latents=latents(2, 2, 4, seed=4))
        yield model.encode_prefix(source_latents=latents(1, 2, 2, seed=5))
        yield PrefixCache.empty(model.config, 3)


def test_a_step_with_prefixes_of_the_model(example, step):
    model, folder = step
    program = torch.export.load(folder / "step.pt2").module()
    for prefix, grid in zip(prefixes(model), ((4, 4), (4, 6), (8, 4)), strict=True):
        batch = prefix.batch_size
        noisy, sigma = latents(batch, *grid), torch.linspace(0.1, 0.9, batch)
        with torch.no_grad():
            wanted = model(noisy, sigma, prefix).sample
        inputs = {"latents": noisy, "timestep": sigma, **example.prefix_inputs(prefix)}
        assert_close([program(*inputs.values())], [wanted])
        assert_close(run(folder / "step.onnx", **inputs).values(), [wanted], TOLERANCE)


def test_a_sampler_on_the_file_s_step(example, step):
    model, folder = step
    prefix = next(prefixes(model))
    noise, sigmas = latents(2, 4, 2), flow.sigma_schedule(3)

    def velocity(x, sigma):
        return run(folder / "step.onnx", latents=x, timestep=sigma, **example.prefix_inputs(prefix))["velocity"]

    with torch.no_grad():
        wanted = flow.sample(lambda x, sigma: model(x, sigma, prefix).sample, noise, sigmas)
    assert (wanted - noise).abs().max() > 0.1
    assert_close([flow.sample(velocity, noise, sigmas)], [wanted], TOLERANCE)


def test_a_step_s_axes_and_weights(step):
    model, folder = step
    config, p = model.config, model.config.patch_size
    past = [2, "B", config.num_key_value_heads, "P", config.attention_head_dim]
    cells = ["B", 8, "h", "w"] if p == 1 else ["B", 8, "2*h", "2*w"]
    assert axes(folder / "step.onnx") == {
        "latents": cells, "timestep": ["B"], "keys": past, "values": past, "key_mask": ["B", "P"],
        "next_position": ["B"], "velocity": cells,
    }  # fmt: skip
    kept = {key.split(".")[1] for key in torch.export.load(folder / "step.pt2").state_dict}
    assert not kept & {"embed_tokens", "text_projections"}
    assert ("layers" in kept) == (config.fusion != "mot")
    assert metadata(folder / "step.onnx")["config"]["patch_size"] == p
    if p > 1:
        with pytest.raises(Exception, match=r"Reshape|reshape"):
            run(folder / "step.onnx", **odd_step(model))


def odd_step(model):
    prefix = PrefixCache.empty(model.config, 1)
    return {
        "latents": latents(1, 3, 4), "timestep": torch.ones(1), "keys": prefix.keys, "values": prefix.values,
        "key_mask": prefix.all_keys(), "next_position": prefix.next_position,
    }  # fmt: skip


# What cannot be free

FIXED = {
    "grid": ({"statistics_grid": (4, 4)}, {"encoder", "decoder"}, "4 x 4"),
    "vit": (
        {"decoder": ViTPixelDecoderConfig(8, width=32, depth=1, num_heads=2, mlp_dim=32, patch_size=8, grid=(4, 4))},
        {"decoder"}, "4 x 4",
    ),
    "dinov3": (
        {
            "encoder": SemanticEncoderConfig("vit_small_patch16_dinov3", {"embed_dim": 48, "depth": 1, "num_heads": 3}),
            "decoder": tiny_decoder_config(channel_multipliers=(1, 1, 1, 1, 1)),
        },
        {"encoder"}, "2 x 3",
    ),
}  # fmt: skip


@pytest.mark.compile
@pytest.mark.parametrize("case", FIXED)
def test_what_has_one_grid_keeps_it_and_says_so(example, tmp_path, capsys, case):
    fields, fixed, cells = FIXED[case]
    vae = fill_weights(tiny_psvae(**fields))
    folder = export(example, vae, tmp_path, grid=(2, 3))
    for line, part in zip(capsys.readouterr().out.splitlines(), ("encoder", "decoder"), strict=True):
        assert f"{part}.onnx" in line
        assert (f"free: batch (fixed: {cells} cells)" if part in fixed else "free: batch, height, width;") in line
    side = [int(word) for word in cells.split(" x ")]
    stride = vae.config.spatial_compression_ratio
    feeds = {
        "encoder": {"images": images(3, *(stride * x for x in side))},
        "decoder": {"latents": latents(3, *side)},
    }
    other = {"encoder": {"images": images(1, 6 * stride, stride)}, "decoder": {"latents": latents(1, 6, 1)}}
    with torch.no_grad():
        assert_close(
            [run(folder / "encoder.onnx", **feeds["encoder"])["mean"]],
            [vae.encode(feeds["encoder"]["images"]).latent_dist.mean],
            TOLERANCE,
        )
        assert_close(
            run(folder / "decoder.onnx", **feeds["decoder"]).values(),
            [vae.decode(feeds["decoder"]["latents"]).sample],
            TOLERANCE,
        )
    for part in fixed:
        with pytest.raises(Exception, match="invalid dimensions"):
            run(folder / f"{part}.onnx", **other[part])


def test_no_dynamic_frees_nothing(example, tmp_path, capsys):
    folder = export(example, VAES["psvae"](), tmp_path, dynamic=False, grid=(2, 3), part=("encoder",))
    assert "free: nothing (fixed: 2 x 3 cells); " in capsys.readouterr().out
    assert axes(folder / "encoder.onnx")["images"] == [1, 3, 16, 24]
    assert not (folder / "decoder.onnx").exists()


@pytest.mark.compile
@torch.no_grad()
def test_a_grid_like_the_position_table_s_is_not_what_is_traced(example):
    """Or the resize would be left out for all sizes."""
    for native in ((3, 5), (5, 5), (3, 7)):
        args = {"img_size": tuple(8 * x for x in native), "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}
        vae = tiny_psvae(encoder=SemanticEncoderConfig("vit_tiny_patch16_224", args, stride=8))
        _, free, sizes = example.trace(example.Encoder(vae).eval(), example.Options("", Path(), grid=native))
        assert set(free) == set("Bhw")
        assert not set(sizes[0].grid) & set(native)
        assert sizes[1].grid == native


# What is not kept


def test_weights_beside_a_file_are_its_own(example, tmp_path):
    """Large files keep them there; smaller ones that come later do not."""
    staging = tmp_path / "staging"
    staging.mkdir()

    def exported(*names):
        for name in names:
            (staging / name).write_text(f"{name} of {names}")
        example.place(sorted(staging.iterdir(), reverse=True), tmp_path / "step.onnx")
        return {file.name: file.read_text() for file in tmp_path.iterdir() if file.is_file()}

    both = ("step.onnx", "step.onnx.data")
    assert exported(*both) == {name: f"{name} of {both}" for name in both}
    assert exported("step.onnx") == {"step.onnx": "step.onnx of ('step.onnx',)"}
    assert exported(*both) == {name: f"{name} of {both}" for name in both}


def test_a_file_beyond_the_tolerance_is_not_kept(example, tmp_path):
    """And an earlier one stays."""
    vae = VAES["psvae"]()
    folder = export(example, vae, tmp_path, part=("decoder",))
    before = (folder / "decoder.onnx").read_bytes()
    with pytest.raises(
        SystemExit, match=r"decoder.onnx differs from PyTorch at batch 2, .*images by .*\(--tolerance\)"
    ):
        export(example, vae, tmp_path, part=("decoder",), tolerance=1e-12, grid=(2, 3))
    assert (folder / "decoder.onnx").read_bytes() == before
    assert [path.name for path in folder.iterdir()] == ["decoder.onnx"]


@pytest.mark.parametrize("damage", first_by_default(["weight", "nan", "broken"]))
def test_a_corrupt_file_is_not_kept(example, tmp_path, monkeypatch, damage):
    save = example.save_onnx

    def corrupt(program, part, name, file):
        save(program, part, name, file)
        made = onnx.load(file)
        weight = max(made.graph.initializer, key=lambda x: len(x.raw_data))
        values = np.frombuffer(weight.raw_data, dtype=np.float32).copy()
        values[: len(values) // 2] = np.nan if damage == "nan" else values[: len(values) // 2] + 0.1
        weight.raw_data = values.tobytes()
        onnx.save(made, file)
        if damage == "broken":
            file.write_bytes(file.read_bytes()[:1000])

    monkeypatch.setattr(example, "save_onnx", corrupt)
    wanted = r"decoder.onnx (differs from PyTorch|does not run) at batch .*it is not kept; pass --no-dynamic"
    with pytest.raises(SystemExit, match=wanted):
        export(example, VAES["pixel"](), tmp_path, part=("decoder",), grid=(2, 3))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"part": ("step",)}, "has no step; it has encoder and decoder: see --part"),
        ({"grid": (0, 4)}, "wanted a --grid of two numbers from 1"),
        ({"format": ()}, "and a --format"),
        ({"model": "absent"}, "'absent' is not a folder or file here"),
    ],
)
def test_mistakes(example, tmp_path, changes, message):
    tiny_psvae().save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit, match=message):
        example.main(replace(example.Options(str(tmp_path / "model"), tmp_path / "out"), **changes))
    assert not (tmp_path / "out").exists()
