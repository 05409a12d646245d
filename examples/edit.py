"""Edited pictures with a trained DeepFusionDiT: one picture and instruction, or all of GEdit-Bench.

    python examples/edit.py --model outputs/edit/model --vae outputs/psvae/stage2 \\
        --source dog.png --instruction "make it red"
    accelerate launch examples/edit.py --model ... --vae ... --gedit stepfun-ai/GEdit-Bench --output out/gedit

GEdit-Bench's pictures lie as its evaluator reads them: `output/fullset/<task>/<language>/<key>.png`, the source beside
it as `<key>_SRCIMG.png`. Processes share the work, and a killed run goes on.
"""

import glob
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from accelerate import Accelerator
from data import center_transform
from PIL import Image
from sampling import Sampler, SamplingOptions, save_image
from tqdm import tqdm


@dataclass(frozen=True)
class Options(SamplingOptions):
    """Instruction editing."""

    source: Path | None = None
    """One picture to edit: writes `output/edited.png`."""
    instruction: str | None = None
    gedit: str | None = None
    """GEdit-Bench as a Hugging Face dataset id or a folder of parquet files."""
    image_guidance: float | None = None
    """Towards the source; None guides against no condition, by `--guidance` alone, as the paper does."""


@dataclass
class Job:
    """One edit."""

    place: int
    text: str
    picture: Any
    file: Path
    source_file: Path | None = None


def main(options: Options) -> None:
    accelerator = Accelerator()
    jobs = read_jobs(options)
    waiting = [job for job in jobs if not job.file.exists()]
    accelerator.print(f"{len(jobs)} edits, {len(jobs) - len(waiting)} of them done before")
    sampler = Sampler(options, accelerator.device, options.image_guidance)
    crop = center_transform(options.size)
    for job in tqdm(
        waiting[accelerator.process_index :: accelerator.num_processes], disable=not accelerator.is_main_process
    ):
        picture = Image.open(job.picture) if isinstance(job.picture, Path) else job.picture
        source = crop(picture.convert("RGB"))
        edited = sampler([job.text], [(job.place, 0)], source[None])
        if job.source_file is not None:
            save_image(source, job.source_file)
        save_image(edited[0], job.file)
    accelerator.wait_for_everyone()


def read_jobs(options: Options) -> list[Job]:
    """The edits, in the order of the benchmark.

    Raises:
        SystemExit: neither or both of a picture with its instruction and a benchmark came.
    """
    if options.gedit is None and options.source is not None and options.instruction is not None:
        return [Job(0, options.instruction, options.source, options.output / "edited.png")]
    if options.gedit is None or options.source is not None or options.instruction is not None:
        raise SystemExit("wanted --source with --instruction, or --gedit alone")
    import datasets

    local = sorted(glob.glob(f"{options.gedit}/**/*.parquet", recursive=True))
    if local:
        table: Any = datasets.load_dataset("parquet", data_files={"train": local}, split="train")
    else:
        table = datasets.load_dataset(options.gedit, split="train")
    jobs = []
    for place, row in enumerate(table):
        folder = options.output / "fullset" / row["task_type"] / row["instruction_language"]
        key = row["key"]
        picture = row.get("input_image_raw") or row["input_image"]
        jobs.append(Job(place, row["instruction"], picture, folder / f"{key}.png", folder / f"{key}_SRCIMG.png"))
    return jobs


if __name__ == "__main__":
    with torch.no_grad():
        main(tyro.cli(Options))
