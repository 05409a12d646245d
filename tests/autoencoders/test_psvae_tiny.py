"""psvae-tiny, the trained model in the package: offline, small, for photographs of any size, and always the same."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import psvae
from psvae import PSVAE, PixelDecoder
from psvae.cli import main
from psvae.errors import CheckpointError
from tests.tiny import tiny_psvae

FOLDER = Path(psvae.__file__).parent / "models" / "psvae-tiny"
ROOT = Path(__file__).parents[2]
PHOTOGRAPH = ROOT / "examples" / "photographs" / "chelsea.jpg"


@pytest.fixture(scope="module")
def model():
    return PSVAE.from_pretrained("psvae-tiny")


@pytest.fixture(scope="module")
def image():
    return torch.from_numpy(np.array(Image.open(PHOTOGRAPH).convert("RGB"))).permute(2, 0, 1)[None] / 127.5 - 1


def test_loads_in_fp32_and_without_the_network(model, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was used"))
    again = PSVAE.from_pretrained("psvae-tiny")
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert PSVAE.from_pretrained("psvae-tiny", dtype=torch.bfloat16).decoder.conv_in.weight.dtype == torch.bfloat16


def test_is_as_small_as_promised(model):
    assert sum(p.numel() for p in model.parameters()) <= 3_000_000
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 8_000_000
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118  (not a dict)
    assert model.config.spatial_compression_ratio == 16


def test_the_card_says_how_it_was_made():
    card = (FOLDER / "README.md").read_text()
    for words in ("reproduction.tiny", "CIFAR-10", "ImageNet", "Seed", "license: apache-2.0", "## Latent"):
        assert words in card, words
    measured = dict(re.findall(r"^\| (.+) \| ([\d.]+) \|$", card, re.MULTILINE))
    assert float(measured["PSNR, dB"]) >= 23
    probe = "linear probe, mean over cells"
    assert float(measured[probe]) > float(measured[f"{probe}, of the encoder's features"]) - 0.02


def test_the_readme_and_the_card_say_what_was_measured():
    numbers = json.loads((ROOT / "docs" / "psvae_tiny.json").read_text())
    tiny, plain, encoder = (numbers[name] for name in ("psvae-tiny", "plain VAE", "psvae-tiny's encoder"))
    readme, card = (file.read_text() for file in (ROOT / "README.md", FOLDER / "README.md"))
    rows = {
        "PSNR, 100 photographs at 256 px": [f"{row['psnr']:.1f} dB" for row in (tiny, plain)],
        "SSIM of the same": [f"{row['ssim']:.3f}" for row in (tiny, plain)],
        "linear probe, all cells": [f"{100 * row['probe_cells']:.1f} %" for row in (tiny, plain)],
        "20 nearest neighbours, mean over the latent's cells": [f"{100 * row['knn']:.1f} %" for row in (tiny, plain)],
        "20 nearest neighbours, all cells": [f"{100 * row['knn_cells']:.1f} %" for row in (tiny, plain)],
        "linear probe on CIFAR-10 at 128 px, mean over the latent's cells": [
            f"{100 * tiny['probe']:.1f} % (its encoder's features: {100 * encoder['probe']:.1f} %)",
            f"{100 * plain['probe']:.1f} %",
        ],
    }
    for name, shown in rows.items():
        assert f"| {' | '.join([name, *shown])} |" in readme, name
    measured = {float(value) for value in re.findall(r"^\| .+ \| ([\d.]+) \|$", card, re.MULTILINE)}
    assert {tiny[name] for name in ("ssim", "probe", "knn", "probe_cells", "knn_cells")} <= measured


def test_statistics_were_fitted(model, image):
    latents = model.encode(image).latent_dist.sample(torch.Generator().manual_seed(0))
    assert (model.latent_spec.std != 1).all()
    assert 0.5 < latents.std() < 2


@pytest.mark.parametrize("size", [(192, 192), (96, 160), (16, 16)])
def test_any_size_of_whole_cells(model, image, size):
    part = image[..., : size[0], : size[1]]
    with torch.no_grad():
        latents = model.encode(part).latent_dist.mode()
        assert latents.shape[2:] == (size[0] // 16, size[1] // 16)
        assert model.decode(latents).sample.shape == part.shape


def test_reconstruction_is_the_golden_one(model, image, stored_json):
    """Twelve by twelve means of the reconstruction, and how close it is."""
    with torch.no_grad():
        painted = model.decode(model.encode(image).latent_dist.mode()).sample.clamp(-1, 1)
    psnr = -10 * torch.log10(((painted - image) / 2).square().mean()).item()
    means = torch.nn.functional.adaptive_avg_pool2d(painted, 12)[0]
    found = {
        "psnr": round(psnr, 3),
        "means": [[[round(x, 4) for x in row] for row in plane] for plane in means.tolist()],
    }
    golden = stored_json("goldens", "psvae_tiny", json.dumps(found) + "\n")
    assert psnr == pytest.approx(golden["psnr"], abs=0.02)
    torch.testing.assert_close(means, torch.tensor(golden["means"]), atol=5e-3, rtol=0)


def test_the_command_line_takes_its_name(tmp_path, capsys):
    main(["inspect", "psvae-tiny"])
    said = capsys.readouterr().out
    assert "apache-2.0" in said
    assert "PSVAE" in said
    main(["reconstruct", str(PHOTOGRAPH), "--model", "psvae-tiny", "--output", str(tmp_path)])
    assert "chelsea" in capsys.readouterr().out
    main(["descriptor", "psvae-tiny", str(tmp_path / "latent_format.py")])
    assert "latent_channels = 64" in (tmp_path / "latent_format.py").read_text()


def test_a_folder_of_the_same_name_comes_first(tmp_path, monkeypatch):
    tiny_psvae().save_pretrained(tmp_path / "psvae-tiny")
    monkeypatch.chdir(tmp_path)
    assert PSVAE.from_pretrained("psvae-tiny").config == tiny_psvae().config


def test_other_names_and_classes_say_what_there_is():
    with pytest.raises(CheckpointError, match=r"'psvae-huge' is not a folder .* model of the package \(psvae-tiny\)"):
        PSVAE.from_pretrained("psvae-huge")
    with pytest.raises(CheckpointError, match="PSVAE"):
        PixelDecoder.from_pretrained("psvae-tiny")
