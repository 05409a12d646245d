"""Numbers that are named for what they are: FID and its kin where Inception is, else a distance in a named encoder."""

import dataclasses
import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from tests.examples.generator_world import script
from tests.examples.sit_world import SIZE, make_pictures
from tests.tiny import fill_weights, tiny_encoder

frechet = script("frechet")


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


def test_the_distance_is_named_for_its_encoder_and_never_fid(tmp_path, capsys):
    make_pictures(tmp_path / "images")
    fill_weights(tiny_encoder()).save_pretrained(tmp_path / "teacher")
    files = sorted((tmp_path / "images").rglob("*.png"))
    np.savez(tmp_path / "samples.npz", arr_0=np.stack([np.array(Image.open(file)) for file in files]))
    asked = frechet.Options(
        samples=str(tmp_path / "samples.npz"), reference=str(tmp_path / "images"), features=str(tmp_path / "teacher"),
        inception=tmp_path / "none.pth", workers=0, output=tmp_path / "numbers.json",
    )  # fmt: skip
    numbers = frechet.main(asked)
    assert numbers["frechet_distance"] == pytest.approx(0, abs=1e-6)  # the same pictures
    assert numbers["features"].startswith(str(tmp_path / "teacher"))
    assert set(numbers) == {"samples", "reference", "frechet_distance", "features"}
    assert json.loads((tmp_path / "numbers.json").read_text()) == numbers
    assert "no FID, sFID, Inception score, precision and recall:" in capsys.readouterr().out
    halved = dataclasses.replace(asked, samples=str(tmp_path / "images" / "class0"), size=SIZE)
    assert frechet.main(halved)["frechet_distance"] > 0.01
    with pytest.raises(SystemExit, match="nothing to measure with: pass --features"):
        frechet.main(dataclasses.replace(asked, features=None))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-200]), "cannot be read as an .npz: File is not a zip file"),
        (lambda file: file.write_bytes(b""), "cannot be read as an .npz: No data left in file"),
        (lambda file: spoil(file, b"zipped" * 9), "cannot be read as an .npz: "),
        (lambda file: file.write_bytes(npy(pixels(2, 0))), "cannot be read as an .npz: it is an .npy, of one array"),
        (lambda file: np.savez(file, pictures=pixels(2, 0)), "holds pictures; wanted arr_0, uint8 N H W 3"),
        (
            lambda file: np.savez(file, arr_0=np.zeros((2, 3, 8, 8), np.float32)),
            r"holds float32 of shape \(2, 3, 8, 8\); wanted uint8, N H W 3",
        ),
        (lambda file: file.unlink(), "cannot be read as an .npz: .*No such file"),
    ],
    ids=["cut-off", "empty", "spoilt", "npy", "other-name", "other-kind", "absent"],
)
def test_what_holds_no_pictures_is_said(tmp_path, damage, said):
    file = tmp_path / "samples.npz"
    np.savez_compressed(file, arr_0=pixels(2, 0))
    damage(file)
    with pytest.raises(SystemExit, match=f"samples.npz {said}"):
        frechet.PictureSet(str(file), SIZE)


def npy(array):
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def spoil(file, with_what):
    """In the midst of what is compressed."""
    content = bytearray(file.read_bytes())
    content[200 : 200 + len(with_what)] = with_what
    file.write_bytes(content)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_pictures_are_all_named(tmp_path, workers):
    make_pictures(tmp_path / "images")
    fill_weights(tiny_encoder()).save_pretrained(tmp_path / "teacher")
    files = sorted((tmp_path / "images").rglob("*.png"))
    for file in (files[0], files[7]):
        file.write_bytes(file.read_bytes()[:60])
    asked = frechet.Options(
        samples=str(tmp_path / "images"), reference=str(tmp_path / "images"), features=str(tmp_path / "teacher"),
        inception=tmp_path / "none.pth", workers=workers, batch_size=3, size=SIZE,
    )  # fmt: skip
    with pytest.raises(SystemExit, match=r"2 pictures cannot be read: .*mend or remove them") as refused:
        frechet.main(asked)
    assert all(str(file) in str(refused.value) for file in (files[0], files[7]))
