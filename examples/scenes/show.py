"""Contact sheets of the world: scenes with their captions, and edits with their instructions.

python -m examples.scenes.show --output outputs/scenes
"""

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from .compose import TASKS, example
from .edits import EDITS, edit_example, region
from .world import SIZE, draw

ZOOM, TEXT, GAP = 3, 46, 8  # pixels per pixel; height of the words; space between pictures


def sheet(cells: list[tuple[list[Tensor], str]], columns: int) -> Image.Image:
    """Cells of equally many pictures (``3 64 64`` in [-1, 1]) side by side, words below, ``columns`` in a row."""
    side = SIZE * ZOOM
    width, height = len(cells[0][0]) * (side + 2) + GAP, side + TEXT + GAP
    page = Image.new("RGB", (columns * width + GAP, -(-len(cells) // columns) * height + GAP), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=12)
    for number, (images, words) in enumerate(cells):
        left, top = GAP + number % columns * width, GAP + number // columns * height
        for place, image in enumerate(images):
            page.paste(picture(image), (left + place * (side + 2), top))
        pen.multiline_text((left, top + side + 2), fold(words, width // 7), "black", font, spacing=1)
    return page


def picture(image: Tensor) -> Image.Image:
    """``3 64 64`` in [-1, 1], enlarged without smoothing."""
    large = F.interpolate(image[None], scale_factor=ZOOM, mode="nearest")[0]
    return Image.fromarray((large.clamp(-1, 1) * 127.5 + 127.5).round().byte().permute(1, 2, 0).numpy())


def fold(words: str, width: int) -> str:
    """Break a line that is too long at a space."""
    lines = [""]
    for word in words.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def scene_sheet(seed: int) -> Image.Image:
    """Training examples, then one row for each task, its right half on held out combinations."""
    drawn = [example(seed + number) for number in range(40)]
    for task in TASKS:
        drawn += [example(seed + number, task, held_out=half) for half in (False, True) for number in range(4)]
    return sheet([([draw(scene)], prompt.text) for scene, prompt in drawn], columns=8)


def edit_sheet(seed: int) -> Image.Image:
    """One row for each kind: source, target, and the target with the region that may change shown dark."""
    cells = []
    for kind in EDITS:
        for number in range(3):
            edit = edit_example(seed + number, kind)
            target = draw(edit.target)
            shown = torch.where(region(edit), target * 0.3 - 0.7, target)
            cells.append(([draw(edit.source), target, shown], edit.instruction))
    return sheet(cells, columns=3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/scenes"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for name, page in (("scenes", scene_sheet(options.seed)), ("edits", edit_sheet(options.seed))):
        page.save(options.output / f"{name}.png")
        print(options.output / f"{name}.png")


if __name__ == "__main__":
    main()
