"""examples/quickstart.py as a newcomer runs it: on the packaged model, on a folder, with options that do not fit."""

import numpy as np
import pytest
from PIL import Image

from tests.examples.generator_world import script

quickstart = script("quickstart")
Quickstart, run = quickstart.Quickstart, quickstart.run


def folder_of(path, *sizes):
    path.mkdir()
    for number, (height, width) in enumerate(sizes):
        pixels = np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"{number}.png")
    return path


def test_it_reconstructs_at_once_and_trains_nothing(tmp_path, capsys):
    assert run(Quickstart(output=tmp_path / "out")) == 0
    said = capsys.readouterr().out
    assert "chelsea: (288, 448) pixels, latents (64, 18, 28), PSNR 2" in said
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["look.png"]
    with Image.open(tmp_path / "out" / "look.png") as picture:
        assert min(picture.size) > 500
        assert np.asarray(picture.convert("L")).std() > 10


def test_a_folder_of_mine_is_cut_to_whole_cells(tmp_path, capsys):
    photographs = folder_of(tmp_path / "photos", (50, 40), (16, 300))
    assert run(Quickstart(data=photographs, output=tmp_path / "out")) == 0
    said = capsys.readouterr().out
    assert "0.png: (48, 32) pixels, latents (64, 3, 2)" in said
    with pytest.raises(SystemExit, match="holds 0 images; wanted one or more"):
        run(Quickstart(data=folder_of(tmp_path / "none"), output=tmp_path / "out"))
    with pytest.raises(SystemExit, match=r"there is no folder .*nowhere"):
        run(Quickstart(data=tmp_path / "nowhere", output=tmp_path / "out"))
    with pytest.raises(SystemExit, match=r"0.png has 15 x 40 pixels, shown at 512 at most; wanted 16 a side or more"):
        run(Quickstart(data=folder_of(tmp_path / "small", (40, 15)), output=tmp_path / "out"))


@pytest.mark.parametrize("training", [False, True])
def test_a_broken_picture_is_named(tmp_path, training):
    photographs = folder_of(tmp_path / "photos", (50, 40), (50, 40))
    (photographs / "0.png").write_bytes(b"no picture")
    (tmp_path / "out" / "photographs").mkdir(parents=True)
    (tmp_path / "out" / "photographs" / "mine.png").write_bytes(b"mine")
    with pytest.raises(SystemExit, match=r"0.png cannot be read as a picture \(cannot identify .*move it out of"):
        run(Quickstart(data=photographs, train=training, output=tmp_path / "out"))
    assert (tmp_path / "out" / "photographs" / "mine.png").read_bytes() == b"mine"


def test_options_that_would_change_nothing_are_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"--steps1 came without --train"):
        run(Quickstart(steps1=10, output=tmp_path))
    with pytest.raises(SystemExit, match=r"--model is what is looked at"):
        run(Quickstart(train=True, model="outputs/mine", output=tmp_path))
    with pytest.raises(SystemExit, match=r"'nowhere' is not a folder"):
        run(Quickstart(model="nowhere", output=tmp_path))
