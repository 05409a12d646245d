"""Every number beside its protocol: checked by hand on tiny codecs, and what a killed run and bad input come to."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from scipy.ndimage import gaussian_filter
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from psvae import PSVAE, PixelVAE, fit_latent_statistics, save_reals
from tests.alignment.test_alignment_net import tiny_net
from tests.examples.generator_world import command, fresh_accelerator, make_table, run, script
from tests.tiny import fill_weights, images, tiny_encoder, tiny_pixel_vae, tiny_psvae

SIZE, EACH, CLASSES = 32, 14, ("dark", "light")

evaluate, reconstruction, probes = script("evaluate"), script("reconstruction"), script("probes")


def png(pixels):
    content = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(content, format="PNG")
    return content.getvalue()


def make_folder(folder, each=EACH, classes=CLASSES, seed=0):
    """Noise, that of the second class brighter."""
    generator = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for place in range(each):
            pixels = generator.integers(0, 90, (SIZE, SIZE, 3)) + 160 * (name == "light")
            (folder / name / f"{place:02d}.png").write_bytes(png(pixels))


def gray_codec():
    """Paints everything in the one gray that rounds to 128."""
    vae = fill_weights(tiny_pixel_vae())
    torch.nn.init.zeros_(vae.decoder.conv_out.weight)
    torch.nn.init.zeros_(vae.decoder.conv_out.bias)
    return vae


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluate")
    make_folder(root / "pictures")
    for kind in ("psvae", "rae"):
        fill_weights(tiny_psvae(kind)).save_pretrained(root / kind)
    vae = fill_weights(tiny_pixel_vae())
    vae.save_pretrained(root / "pixel")
    vae.export_diffusers(root / "diffusers")
    fit_latent_statistics(vae, [images(4)])
    save_reals(root / "reals", vae, tiny_net())
    gray_codec().save_pretrained(root / "gray")
    fill_weights(tiny_encoder()).save_pretrained(root / "teacher")
    return root


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """No weights of LPIPS and Inception, whatever this machine has."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    script("measures").local_lpips.cache_clear()
    fresh_accelerator()


def asked(world, tmp_path, *vaes, **more):
    default = {"data": str(world / "pictures"), "size": SIZE, "workers": 0, "output": tmp_path / "out.json"}
    return evaluate.Options(vae=tuple(str(world / vae) for vae in vaes), **{**default, **more})


def values(result):
    return {name: number["value"] for name, number in result["numbers"].items()}


def pixels_of(folder):
    """``N 3 H W``, uint8."""
    files = sorted(folder.rglob("*.png"))
    return torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files])


def rebuilt(vae, pixels):
    """By encode and decode, in one batch, as a PNG would hold it."""
    with torch.no_grad():
        latents = vae.encode(pixels.float() / 127.5 - 1).latent_dist.mode()
        sample = vae.decode(latents).sample
    return np.round(np.clip(sample.numpy(), -1, 1) * 127.5 + 127.5).astype(np.uint8), latents


def ssim_by_hand(one, two):
    """Of one channel in [0, 1]."""

    def blurred(x):
        return gaussian_filter(x, 1.5, mode="mirror", truncate=3.5)  # eleven pixels

    means = blurred(one), blurred(two)
    spreads = [blurred(x * x) - mean**2 for x, mean in zip((one, two), means, strict=True)]
    both = blurred(one * two) - means[0] * means[1]
    over = (2 * means[0] * means[1] + 1e-4) * (2 * both + 9e-4)
    return (over / ((means[0] ** 2 + means[1] ** 2 + 1e-4) * (sum(spreads) + 9e-4))).mean()


def distance_by_hand(one, two):
    one, two = one.double().numpy(), two.double().numpy()
    first, second = np.cov(one.T), np.cov(two.T)
    between = np.trace(sqrtm(first @ second).real)
    return ((one.mean(0) - two.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * between


def test_numbers_are_those_by_hand(world, tmp_path, capsys):
    options = asked(world, tmp_path, "psvae", features=str(world / "teacher"), batch_size=5, part=7)
    table = evaluate.main(options)
    assert json.loads(options.output.read_text()) == table
    [result] = table["results"]
    found = values(result)
    assert set(found) == {"psnr", "ssim", "frechet_distance", "feature_cosine", "active_channels"}

    vae, pixels = PSVAE.from_pretrained(world / "psvae"), pixels_of(world / "pictures")
    made, latents = rebuilt(vae, pixels)
    real = pixels.numpy()
    errors = ((made.astype(float) - real) ** 2).mean(axis=(1, 2, 3))
    assert found["psnr"] == pytest.approx((10 * np.log10(255**2 / errors)).mean(), rel=1e-4)
    channels = [
        ssim_by_hand(*pair) for both in zip(made / 255, real / 255, strict=True) for pair in zip(*both, strict=True)
    ]
    assert found["ssim"] == pytest.approx(np.mean(channels), abs=1e-4)
    teacher = evaluate.open_encoder(str(world / "teacher"), torch.device("cpu"))
    with torch.no_grad():
        ours = pixels.float() / 127.5 - 1
        seen = [teacher(x).mean((2, 3)) for x in (ours, torch.from_numpy(made).float() / 127.5 - 1)]
        cosine = F.cosine_similarity(vae.decode_features(latents), vae.features(ours), dim=1).mean()
        posterior = vae.encode(ours).latent_dist
    assert found["frechet_distance"] == pytest.approx(distance_by_hand(*seen), rel=1e-2)
    assert found["feature_cosine"] == pytest.approx(float(cosine), abs=1e-5)
    signal = posterior.mean.movedim(1, 0).flatten(1).var(dim=1) / posterior.var.mean(dim=(0, 2, 3))
    assert found["active_channels"] == pytest.approx(float((0.5 * torch.log1p(signal) > 0.01).float().mean()))

    printed = capsys.readouterr()
    assert "no rFID: there are no Inception weights at" in printed.out
    assert "no LPIPS:" in printed.out
    assert f"{found['psnr']:.4f}" in printed.out
    assert "28 pictures for 48 features: their covariance has not full rank" in printed.err


def test_each_number_has_its_protocol(world, tmp_path):
    Image.new("RGB", (20, 50)).save(tmp_path / "small.png")
    shutil.copytree(world / "pictures", tmp_path / "pictures")
    shutil.move(tmp_path / "small.png", tmp_path / "pictures" / "dark" / "00.png")
    options = asked(
        world, tmp_path, "psvae", "rae", data=str(tmp_path / "pictures"), count=26, features=str(world / "teacher"),
        frozen=str(world / "teacher"), probe=True, precision="bf16",
    )  # fmt: skip
    ours, rae = evaluate.main(options)["results"]
    assert not {"feature_cosine", "active_channels"} & set(rae["numbers"])  # it has no SemanticVAE
    for number in (*ours["numbers"].values(), *rae["numbers"].values()):
        said = number["protocol"]
        assert said["pictures"] == f"26 of the 28 of {tmp_path / 'pictures'}, spread evenly over them"
        resized = "short side to 32 pixels, bilinear with antialiasing (Pillow); 1 were smaller and are enlarged"
        assert said["resize"] == resized
        assert said["crop"] == "centre, 32 x 32"
        assert said["precision"] == "bfloat16 autocast, on cpu"
        assert said["reconstruction"] == "clamped to [-1, 1] and rounded to 8 bits"
        assert said["measure"]
    assert ours["numbers"]["psnr"]["protocol"]["latent"] == "the posterior's mean"
    assert rae["numbers"]["psnr"]["protocol"]["latent"] == "the encoder's features, no posterior"
    said = ours["numbers"]["frechet_distance"]["protocol"]
    assert "no FID" in said["measure"]
    assert said["extractor"] == f"{world / 'teacher'}, mean over its grid, 48 features"
    assert said["reference"] == "the same 26 pictures, cut and in 8 bits as the codec got them"
    assert "26 pictures for 48 features" in said["warning"]
    assert str(world / "teacher") in ours["numbers"]["feature_cosine"]["protocol"]["reference"]
    said = ours["numbers"]["linear_probe_pooled"]["protocol"]
    assert said["latent"] == "the posterior's mean; mean over the cells of the latent, 8 numbers"
    assert "learned from 20 of the pictures, tested on 6 others: 0.2 of each class" in said["labels"]
    assert ours["numbers"]["knn_flat"]["protocol"]["latent"].endswith("all numbers of the latent, 128 numbers")
    assert rae["numbers"]["knn_flat"]["protocol"]["latent"].startswith("the encoder's features, no posterior; all")
    assert ours["latent"] == {"channels": 8, "stride": 8}


@pytest.mark.parametrize("frozen", [False, True])
def test_the_table_says_what_frozen_would_do(world, tmp_path, capsys, frozen):
    more = {"frozen": str(world / "teacher")} if frozen else {}
    evaluate.main(asked(world, tmp_path, "psvae", "rae", "pixel", count=4, **more))
    printed = capsys.readouterr().out
    assert ("feature_cosine is with the codec's own encoder" in printed) != frozen
    assert f"no feature_cosine of {world / 'rae'}: no SemanticVAE" in printed
    assert f"no feature_cosine of {world / 'pixel'}" not in printed


def test_the_frozen_encoder_is_not_in_the_codecs_precision(world, tmp_path):
    teacher = str(world / "teacher")
    options = asked(world, tmp_path, "psvae", frozen=teacher, precision="bf16", batch_size=28)
    [result] = evaluate.main(options)["results"]
    vae = PSVAE.from_pretrained(world / "psvae")
    ours = pixels_of(world / "pictures").float() / 127.5 - 1
    with torch.no_grad():
        wanted = evaluate.open_encoder(teacher, torch.device("cpu"))(ours)
        with torch.autocast("cpu", torch.bfloat16):
            found = vae(ours, sample_posterior=False).rebuilt_features
    cosine = F.cosine_similarity(found.float(), wanted, dim=1).mean()
    assert values(result)["feature_cosine"] == pytest.approx(float(cosine), abs=1e-6)


def test_a_codec_that_rebuilds_exactly(world, tmp_path):
    (tmp_path / "gray").mkdir()
    for place in range(3):
        Image.new("RGB", (SIZE, SIZE), (128, 128, 128)).save(tmp_path / "gray" / f"{place}.png")
    more = {"features": str(world / "teacher"), "data": str(tmp_path / "gray")}
    [exact] = evaluate.main(asked(world, tmp_path, "gray", **more))["results"]
    assert values(exact)["psnr"] is None
    assert exact["numbers"]["psnr"]["protocol"]["rebuilt_exactly"].startswith("3 pictures")
    assert values(exact)["ssim"] == pytest.approx(1)
    assert values(exact)["frechet_distance"] == pytest.approx(0, abs=1e-9)

    Image.new("RGB", (SIZE, SIZE), (118, 128, 138)).save(tmp_path / "gray" / "3.png")  # the one in the mean
    [nearly] = evaluate.main(asked(world, tmp_path, "gray", output=tmp_path / "two.json", **more))["results"]
    assert values(nearly)["psnr"] == pytest.approx(10 * np.log10(255**2 / (200 / 3)))
    assert nearly["numbers"]["psnr"]["protocol"]["rebuilt_exactly"].startswith("3 pictures")
    assert values(nearly)["frechet_distance"] > 1e-6


def test_every_format_of_a_codec(world, tmp_path):
    """A PixelVAE's own folder, diffusers', and a ReaLS folder hold the same weights."""
    table = evaluate.main(asked(world, tmp_path, "pixel", "diffusers", "reals", probe=True, count=26))
    first, *others = (values(result) for result in table["results"])
    assert {result["class"] for result in table["results"]} == {"PixelVAE"}
    for other in others:
        assert other == pytest.approx(first, abs=1e-4)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers' use of transformers
def test_diffusers_rae_rebuilds_as_diffusers_does(world, tmp_path):
    from tests.hub.test_rae import autoencoder_rae

    generator = torch.Generator().manual_seed(0)
    spread = {
        "latents_mean": torch.randn(64, 8, 8, generator=generator).tolist(),
        "latents_std": [[[2.0] * 8] * 8] * 64,
    }
    reference = autoencoder_rae("dinov2", 8, **spread)
    reference.save_pretrained(tmp_path / "rae")
    data = tmp_path / "pictures"
    data.mkdir()
    for place, picture in enumerate(images(2, 128, 128)):
        (data / f"{place}.png").write_bytes(png((picture * 127.5 + 127.5).permute(1, 2, 0).numpy()))
    options = asked(world, tmp_path, tmp_path / "rae", data=str(data), size=128)
    [result] = evaluate.main(options)["results"]
    real = pixels_of(data).float()
    made = (reference.decode(reference.encode(real / 255).latent).sample.clamp(0, 1) * 255).round()
    errors = (made - real).square().mean(dim=(1, 2, 3))
    assert values(result)["psnr"] == pytest.approx(float((10 * torch.log10(255**2 / errors)).mean()), abs=1e-3)
    with pytest.raises(SystemExit, match=r"--size 256 does not fit .*rae: "):
        evaluate.main(replace(options, size=256))


def test_a_draw_depends_on_seed_and_picture_alone(world, tmp_path):
    runs = {}
    for name, more in {
        "mean": {}, "first": {"sample": True}, "again": {"sample": True, "batch_size": 3, "part": 5},
        "other": {"sample": True, "seed": 1},
    }.items():  # fmt: skip
        fresh_accelerator()
        more = {"data": str(world / "pictures" / "dark"), **more}
        table = evaluate.main(asked(world, tmp_path, "psvae", output=tmp_path / f"{name}.json", **more))
        [runs[name]] = table["results"]
    psnr = {name: values(result)["psnr"] for name, result in runs.items()}
    assert psnr["first"] == pytest.approx(psnr["again"], rel=1e-6)
    assert len({round(value, 5) for value in psnr.values()}) == 3
    assert runs["other"]["numbers"]["ssim"]["protocol"]["latent"] == "a draw of the posterior, seed 1"


def test_probes_find_a_planted_class(world, tmp_path):
    """And none where the labels say nothing."""
    make_folder(tmp_path / "planted", each=30)
    for number, file in enumerate(sorted((tmp_path / "planted").rglob("*.png"))):
        place = tmp_path / "shuffled" / str(number % 2)
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place / f"{number}.png")
    found = {}
    for name in ("planted", "shuffled"):
        more = {"data": str(tmp_path / name), "output": tmp_path / f"{name}.json", "probe_share": 0.3}
        [result] = evaluate.main(asked(world, tmp_path, "pixel", probe=True, **more))["results"]
        found[name] = {name: value for name, value in values(result).items() if "probe" in name or "knn" in name}
    assert len(found["planted"]) == 4
    assert min(found["planted"].values()) > 0.9
    assert max(found["shuffled"].values()) < 0.8


def test_probes_learn_from_other_pictures_by_the_classes_names(world, tmp_path):
    """The classes' numbers differ, because the others have one more. The accuracy is that by hand."""
    make_folder(tmp_path / "train", each=30, classes=("afternoon", *CLASSES), seed=1)
    [result] = evaluate.main(
        asked(world, tmp_path, "psvae", probe_train=str(tmp_path / "train"), probe_on=("flat",), batch_size=4)
    )["results"]
    assert {name for name in values(result) if "probe" in name or "knn" in name} == {"linear_probe_flat", "knn_flat"}
    said = result["numbers"]["knn_flat"]["protocol"]["labels"]
    assert said == f"learned from 90 pictures of {tmp_path / 'train'}, tested on all 28; 3 classes"

    vae = PSVAE.from_pretrained(world / "psvae")
    folders = tmp_path / "train", world / "pictures"
    known, unknown = (rebuilt(vae, pixels_of(folder))[1].flatten(1) for folder in folders)
    std = known.std(dim=0, correction=0)
    known, unknown = ((x - known.mean(dim=0)) / std for x in (known, unknown))
    answers = np.repeat([1, 2], EACH)
    machine = LogisticRegression(C=0.01, max_iter=2000).fit(known.numpy(), np.repeat([0, 1, 2], 30))
    assert values(result)["linear_probe_flat"] == pytest.approx(machine.score(unknown.numpy(), answers), abs=1e-4)
    near = (F.normalize(unknown) @ F.normalize(known).T).topk(20).indices // 30
    votes = torch.stack([torch.bincount(row, minlength=3) for row in near]).argmax(dim=1)
    assert values(result)["knn_flat"] == pytest.approx((votes.numpy() == answers).mean(), abs=0.04)  # ties


def test_a_table_gives_the_numbers_of_its_pictures(world, tmp_path):
    files = sorted((world / "pictures").rglob("*.png"))
    labels = [CLASSES.index(file.parent.name) for file in files]
    make_table(tmp_path / "table" / "test-0.parquet", image=[file.read_bytes() for file in files], label=labels)
    options = asked(world, tmp_path, "pixel", probe=True)
    table = replace(options, data=str(tmp_path / "table"), split="test", output=tmp_path / "table.json")
    first, second = (evaluate.main(one)["results"][0] for one in (table, options))
    same = {name for name in values(first) if "probe" not in name and "knn" not in name}  # classes have other names
    assert {name: values(first)[name] for name in same} == {name: values(second)[name] for name in same}
    assert values(first)["linear_probe_flat"] == 1.0
    assert first["numbers"]["psnr"]["protocol"]["pictures"].endswith("table, split test")
    with pytest.raises(SystemExit, match=r"28 pictures of --data are in --probe-train too: row 0 of"):
        evaluate.main(replace(table, probe_train_split="test"))
    make_table(tmp_path / "table" / "train-0.parquet", image=[file.read_bytes() for file in files], label=[-1] * 28)
    with pytest.raises(SystemExit, match=r"28 pictures of .* have no class: row 0, row 1"):
        evaluate.main(replace(table, split="train"))


@pytest.mark.filterwarnings("ignore:.*pretrained.*:UserWarning", "ignore:.*weight enum.*:UserWarning")
def test_lpips_where_its_weights_are(world, tmp_path, monkeypatch):
    import lpips

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False).eval()
    monkeypatch.setattr(evaluate, "local_lpips", lambda: network)
    data = world / "pictures" / "dark"
    [result] = evaluate.main(asked(world, tmp_path, "gray", data=str(data), count=4))["results"]
    pixels = pixels_of(data)[[0, 3, 7, 10]]  # spread evenly
    with torch.no_grad():
        wanted = network(torch.full((4, 3, SIZE, SIZE), 128 / 127.5 - 1), pixels.float() / 127.5 - 1).mean()
    assert values(result)["lpips"] == pytest.approx(float(wanted), rel=1e-4)
    assert "VGG-16" in result["numbers"]["lpips"]["protocol"]["measure"]


def test_rfid_is_torch_fidelity_s(world, tmp_path):
    from tests.examples.test_frechet import random_inception

    network = random_inception(tmp_path / "inception.pth")
    metric = pytest.importorskip("torch_fidelity.metric_fid")
    data = world / "pictures" / "dark"
    [result] = evaluate.main(
        asked(world, tmp_path, "pixel", data=str(data), count=4, inception=tmp_path / "inception.pth")
    )["results"]
    number = result["numbers"]["rfid"]
    pixels = pixels_of(data)[[0, 3, 7, 10]]
    made, _ = rebuilt(PixelVAE.from_pretrained(world / "pixel"), pixels)
    features = [network(x)[0].double() for x in (pixels, torch.from_numpy(made))]
    basis = torch.linalg.qr(torch.cat(features).T).Q  # their span, where the distance is the same
    statistics = [metric.fid_features_to_statistics(rows @ basis) for rows in features]
    wanted = metric.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert number["value"] == pytest.approx(wanted, rel=1e-2)
    assert number["protocol"]["measure"] == "Fréchet distance of the Gaussians of features"
    assert "Inception v3" in number["protocol"]["extractor"]
    assert "4 pictures for 2048 features" in number["protocol"]["warning"]
    (tmp_path / "inception.pth").write_bytes(b"no weights")
    with pytest.raises(SystemExit, match=r"inception.pth cannot be read as torch-fidelity's Inception"):
        evaluate.main(asked(world, tmp_path, "pixel", inception=tmp_path / "inception.pth"))


# Runs that were killed, and those that go on


def counted(monkeypatch, stop_after=None):
    """Pictures that codecs saw; after so many batches, as if the process were killed."""
    plain, seen = reconstruction.Meters.of_codec, []

    def of_codec(self, vae, pictures, pixels, places):
        if len(seen) == stop_after:
            raise KeyboardInterrupt
        seen.append(len(places))
        return plain(self, vae, pictures, pixels, places)

    monkeypatch.setattr(reconstruction.Meters, "of_codec", of_codec)
    return seen


def test_a_killed_run_goes_on(world, tmp_path, monkeypatch):
    options = asked(
        world, tmp_path, "psvae", "pixel", features=str(world / "teacher"), probe=True, batch_size=4, part=8
    )
    whole = evaluate.main(replace(options, output=tmp_path / "whole.json"))
    with monkeypatch.context() as patch:
        counted(patch, stop_after=7 + 5)  # in the second codec's third part
        with pytest.raises(KeyboardInterrupt):
            evaluate.main(options)
    parts = tmp_path / "out-parts"
    assert [result["vae"] for result in json.loads(options.output.read_text())["results"]] == [options.vae[0]]
    assert len(list(parts.glob("*.safetensors"))) == 4 + 2  # of the reference, and of the second codec
    with monkeypatch.context() as patch:
        seen = counted(patch)
        assert evaluate.main(options) == whole
    assert sum(seen) == 28 - 16
    assert not parts.exists()

    with monkeypatch.context() as patch:
        seen = counted(patch)
        assert evaluate.main(options) == whole  # nothing is left to do
        more = evaluate.main(replace(options, vae=(*options.vae, str(world / "gray"))))
    assert sum(seen) == 28
    assert more["results"][:2] == whole["results"]
    assert len(json.loads(options.output.read_text())["results"]) == 3


def test_a_file_takes_no_numbers_of_another_protocol(world, tmp_path):
    shutil.copytree(world / "pictures", tmp_path / "pictures")
    shutil.copytree(world / "pixel", tmp_path / "pixel")
    options = asked(tmp_path, tmp_path, "pixel")
    evaluate.main(options)
    with pytest.raises(
        SystemExit, match=r"another protocol \(sample: False before, True now\); choose another --output"
    ):
        evaluate.main(replace(options, sample=True))
    gray_codec().save_pretrained(tmp_path / "pixel")
    with pytest.raises(SystemExit, match=r"holds numbers of other weights than those that are in .*pixel now"):
        evaluate.main(options)
    (tmp_path / "pictures" / "dark" / "00.png").write_bytes(png(np.zeros((SIZE, SIZE, 3))))
    with pytest.raises(SystemExit, match=r"another protocol \(pictures: "):
        evaluate.main(options)
    options.output.write_text("[]")
    with pytest.raises(SystemExit, match=r"out.json is there and no file of evaluate.py"):
        evaluate.main(options)


def test_two_processes_give_the_numbers_of_one(world, tmp_path):
    evaluate.main(asked(world, tmp_path, "psvae", probe=True, part=8))
    words = [
        "--vae", world / "psvae", "--data", world / "pictures", "--size", SIZE, "--probe", "--part", 8, "--workers", 1,
        "--output", tmp_path / "two.json",
    ]  # fmt: skip
    run(command("evaluate", *words, processes=2))
    one, two = (json.loads((tmp_path / f"{name}.json").read_text())["results"][0] for name in ("out", "two"))
    assert values(two) == pytest.approx(values(one), rel=1e-5)
    assert two["numbers"]["psnr"]["protocol"] == one["numbers"]["psnr"]["protocol"]


# Bad input


def test_unreadable_pictures_are_named_and_left_out_on_request(world, tmp_path, capsys):
    shutil.copytree(world / "pictures", tmp_path / "pictures")
    bad = [tmp_path / "pictures" / "dark" / "03.png", tmp_path / "pictures" / "light" / "09.png"]
    for file in bad:
        file.write_bytes(file.read_bytes()[:70])
    options = asked(world, tmp_path, "pixel", data=str(tmp_path / "pictures"), part=6, probe=True)
    with pytest.raises(SystemExit, match=r"2 of 28 pictures cannot be read: .*--skip-unreadable") as refused:
        evaluate.main(options)
    assert all(str(file) in str(refused.value) for file in bad)
    assert not options.output.exists()
    [result] = evaluate.main(replace(options, skip_unreadable=True, workers=1))["results"]
    said = result["numbers"]["ssim"]["protocol"]
    assert said["pictures"].startswith("26 of the 28 of")
    assert said["left_out"] == f"2 that cannot be read: {bad[0]}, {bad[1]}"
    assert str(bad[0]) in capsys.readouterr().err
    for file in (tmp_path / "pictures").rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(SystemExit, match=r"none of the 28 pictures of .* can be read"):
        evaluate.main(replace(options, skip_unreadable=True, output=tmp_path / "none.json"))


def test_a_reconstruction_that_is_no_number(world, tmp_path):
    vae = gray_codec()
    torch.nn.init.constant_(vae.decoder.conv_out.bias, float("nan"))
    vae.save_pretrained(tmp_path / "nan")
    with pytest.raises(SystemExit, match=r"the reconstruction of .*dark/00.png.* holds NaN or infinity"):
        evaluate.main(asked(world, tmp_path, tmp_path / "nan"))
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("vaes", "more", "said"),
    [
        ((), {}, "no codec came; wanted --vae"),
        (("pixel", "pixel"), {}, "a --vae came twice"),
        (("pictures",), {}, "pictures has no model.safetensors"),
        (("nowhere",), {}, "nowhere' is not a folder or file here"),
        (("pixel",), {"data": "nowhere"}, "there is no folder nowhere; for a Hugging Face dataset name its split"),
        (("pixel",), {"size": 36}, "--size 36 does not fit .*pixel: .*36"),
        (("pixel",), {"size": 8}, "--size is 8; wanted at least 16"),
        (("pixel",), {"count": 1}, "--count is 1; wanted at least 2"),
        (("pixel",), {"part": 0}, "--part is 0; wanted at least 1"),
        (("pixel",), {"precision": "fp16"}, "--precision fp16 came without a GPU"),
        (("pixel",), {"inception": Path("nowhere.pth")}, "no rFID: there are no Inception weights at nowhere.pth"),
        (("pixel",), {"features": "vit_of_no_kind"}, "vit_of_no_kind"),
        (("pixel",), {"probe": True, "probe_share": 1.0}, "--probe-share is 1.0; wanted a number between 0 and 1"),
        (("pixel",), {"probe": True, "probe_on": ()}, "--probe-on is empty"),
        (("pixel",), {"probe": True, "count": 20}, "16 pictures to learn from came; the 20 nearest neighbours want"),
        (("psvae",), {"frozen": "rae"}, "--frozen has features of"),
    ],
)
def test_bad_input_is_said(world, tmp_path, vaes, more, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if "frozen" in more:
        config = tiny_encoder(model_args={"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3})
        config.save_pretrained(tmp_path / "narrow")
        more = {"frozen": str(tmp_path / "narrow")}
    with pytest.raises(SystemExit, match=said):
        evaluate.main(asked(world, tmp_path, *vaes, **more))
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("change", "more", "said"),
    [
        (lambda root: None, {}, "nothing.* holds no images"),
        (lambda root: make_folder(root, classes=("dark",), each=30), {}, "are of the class dark; a probe wants two"),
        (lambda root: make_folder(root / "val", each=30), {}, "are of the class val; a probe wants two"),
        (
            lambda root: (make_folder(root), (root / "beside.png").write_bytes(png(np.zeros((8, 8, 3))))), {},
            r"1 pictures of .* have no class: .*beside.png; --probe wants one subfolder per class",
        ),
        (
            lambda root: (make_folder(root), make_folder(root, 1, ("alone",))), {},
            "nothing has one picture of the class alone; to learn and to test takes two",
        ),
        (lambda root: make_folder(root), {"probe_train": "self"}, "28 pictures of --data are in --probe-train too"),
        (
            lambda root: make_folder(root, classes=("dark", "bright")), {"probe_train": "pictures"},
            "--probe-train has no pictures of the classes bright, which --data has",
        ),
    ],
    ids=["empty", "one-class", "one-subfolder", "beside", "alone", "itself", "other-classes"],
)  # fmt: skip
def test_labels_that_no_probe_can_learn(world, tmp_path, change, more, said):
    data = tmp_path / "nothing"
    data.mkdir()
    change(data)
    places = {"self": str(data), "pictures": str(world / "pictures")}
    more = {name: places[value] for name, value in more.items()}
    with pytest.raises(SystemExit, match=said):
        evaluate.main(asked(world, tmp_path, "pixel", data=str(data), probe=True, **more))


def test_latents_that_memory_cannot_hold(world, tmp_path, monkeypatch):
    monkeypatch.setattr(probes.os, "sysconf", lambda name: 100)
    with pytest.raises(
        SystemExit, match=r"28 latents of .*pixel takes some .* pass --probe-on pooled, or fewer pictures"
    ):
        evaluate.main(asked(world, tmp_path, "pixel", probe=True))
    [result] = evaluate.main(asked(world, tmp_path, "pixel", probe=True, probe_on=("pooled",)))["results"]
    assert {"linear_probe_pooled", "knn_pooled"} < set(values(result))
