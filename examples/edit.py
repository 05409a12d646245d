"""Edited pictures with a trained DeepFusionDiT: one picture and instruction, or all of GEdit-Bench.

    python examples/edit.py --model outputs/edit/model --vae outputs/psvae/stage2 \\
        --source dog.png --instruction "make it red"
    accelerate launch examples/edit.py --model ... --vae ... --gedit stepfun-ai/GEdit-Bench --output out/gedit

A picture is resized to about `size`² pixels, whole and in its proportions, up to the rounding of its sides to what VAE
and generator take. `--crop` edits the centre square instead, such as train_generator.py shows.

GEdit-Bench's pictures lie as its evaluator reads them: `output/fullset/<task>/<language>/<key>.png`, and beside each
what was edited, `<key>_SRCIMG.png`. Processes share the work, and a killed run goes on by the same command.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from accelerate import Accelerator
from data import UNREADABLE, center_transform, open_table, read_image
from PIL import Image
from sampling import Sampler, SamplingOptions, claim, save_image, share
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, resize


@dataclass(frozen=True, kw_only=True)
class Options(SamplingOptions):
    """Instruction editing."""

    source: Path | None = None
    """One picture to edit: writes `output/edited.png`, over what is there."""
    instruction: str | None = None
    gedit: str | None = None
    """GEdit-Bench: its Hugging Face id, or a folder of parquet files."""
    image_guidance: float | None = None
    """Towards the source; None guides against no condition, by `--guidance` alone, as the paper does."""
    guidance_form: Literal["nested", "additive"] = "nested"
    """With `--image-guidance`: BAGEL's form or InstructPix2Pix's."""
    crop: bool = False
    """Edit the centre square of `size`, not the whole picture."""
    output: Path = Path("outputs/edited")


@dataclass
class Job:
    """One edit: how to open its picture, and where the edited one goes and, in a benchmark, the picture itself."""

    place: int
    text: str
    open: Callable[[], Image.Image]
    files: list[Path]


def main(options: Options) -> None:
    jobs = read_jobs(options)
    accelerator = Accelerator()
    sampler = Sampler(options, accelerator, image_scale=options.image_guidance, form=options.guidance_form)
    if not options.crop and sampler.vae.latent_spec.grid is not None:
        raise SystemExit("the VAE's statistics are per element of a square, so it takes no other shape: pass --crop")
    if options.gedit is not None:
        claim(options, options.output, accelerator, model=sampler.model, vae=sampler.vae)
    else:
        jobs[0].files[0].unlink(missing_ok=True)
    for job in share(jobs, accelerator):
        source = fit(job.open(), options, sampler.unit)
        edited = sampler([job.text], [(job.place, 0)], source[None])[0]
        for image, file in zip((edited, source), job.files, strict=False):
            save_image(image, file)
    accelerator.wait_for_everyone()


def fit(picture: Image.Image, options: Options, unit: int) -> Tensor:
    """``3 H W`` in [-1, 1]: the whole picture, or its centre square."""
    if options.crop:
        return center_transform(options.size)(picture)
    scale = options.size / math.sqrt(picture.height * picture.width)
    sides = [max(1, round(side * scale / unit)) * unit for side in (picture.height, picture.width)]
    return pil_to_tensor(resize(picture, sides, antialias=True)) / 127.5 - 1


def read_jobs(options: Options) -> list[Job]:
    """The edits, in the order of the benchmark.

    Raises:
        SystemExit: neither or both of a picture with its instruction and a benchmark came, or one cannot be read.
    """
    if options.gedit is not None and options.source is None and options.instruction is None:
        return read_gedit(options.gedit, options.output / "fullset")
    if options.gedit is not None or options.source is None or not (options.instruction or "").strip():
        raise SystemExit("wanted --source with --instruction, or --gedit alone")
    try:
        picture = read_image(options.source)
    except UNREADABLE as error:
        raise SystemExit(f"{options.source} cannot be read as an image: {error}") from error
    return [Job(0, options.instruction.strip(), lambda: picture, [options.output / "edited.png"])]


def read_gedit(name: str, folder: Path) -> list[Job]:
    """GEdit-Bench's rows; a picture is opened when its turn comes."""
    import datasets

    table = open_table(name, "train")
    columns = ["task_type", "instruction_language", "key", "instruction"]
    picture = "input_image_raw" if "input_image_raw" in table.column_names else "input_image"
    lost = [column for column in (*columns, picture) if column not in table.column_names]
    if lost:
        raise SystemExit(f"{name} has no column {', '.join(lost)}; it has {', '.join(table.column_names)}")
    pictures = table.select_columns([picture]).cast_column(picture, datasets.Image(decode=False))
    jobs = []
    for place, row in enumerate(table.select_columns(columns)):
        stem = folder / row["task_type"] / row["instruction_language"] / row["key"]
        files = [stem.with_name(f"{stem.name}{ending}") for ending in (".png", "_SRCIMG.png")]
        jobs.append(Job(place, row["instruction"], lambda place=place: read_image(pictures[place][picture]), files))
    return jobs


if __name__ == "__main__":
    main(tyro.cli(Options))
