"""Pictures from prompts with a trained DeepFusionDiT: one prompt, or a benchmark's whole prompt file.

    python examples/generate.py --model outputs/t2i/model --vae outputs/psvae/stage2 --prompt "a red bench"
    accelerate launch examples/generate.py --model ... --vae ... --output out/geneval --geneval metadata.jsonl
    accelerate launch examples/generate.py --model ... --vae ... --output out/dpg --dpg prompts/

Files lie as the official evaluators read them. Every picture's noise is a function of the seed, the prompt's place
and the picture's number, so processes share the work and a killed run goes on: what is there is not made again.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from accelerate import Accelerator
from sampling import Sampler, SamplingOptions, save_image
from torch import Tensor
from torchvision.utils import make_grid
from tqdm import tqdm


@dataclass(frozen=True)
class Options(SamplingOptions):
    """Text to image."""

    prompt: str | None = None
    """One prompt: writes `output/0000.png`, ..."""
    geneval: Path | None = None
    """GenEval's `evaluation_metadata.jsonl`: writes `output/00000/metadata.jsonl` and `samples/0000.png`, ..."""
    dpg: Path | None = None
    """DPG-Bench's folder of text files: writes `output/<name>.png`, a grid of two by two."""
    images: int = 4
    """Per prompt; both benchmarks take four."""


@dataclass
class Job:
    """One prompt, and the files its pictures go to: one each, or one for a grid of all."""

    place: int
    text: str
    files: list[Path]
    metadata: str | None = None


def main(options: Options) -> None:
    jobs = read_jobs(options)
    accelerator = Accelerator()
    waiting = [job for job in jobs if not all(file.exists() for file in job.files)]
    accelerator.print(f"{len(jobs)} prompts, {len(jobs) - len(waiting)} of them done before")
    sampler = Sampler(options, accelerator.device)
    mine = waiting[accelerator.process_index :: accelerator.num_processes]
    for job in tqdm(mine, disable=not accelerator.is_main_process):
        images = sampler([job.text] * options.images, [(job.place, number) for number in range(options.images)])
        write(job, images)
    accelerator.wait_for_everyone()


def read_jobs(options: Options) -> list[Job]:
    """The prompts, in the order of their file.

    Raises:
        SystemExit: none or several of the three came, or a file holds no prompts.
    """
    given = [x for x in (options.prompt, options.geneval, options.dpg) if x is not None]
    if len(given) != 1:
        raise SystemExit(f"{len(given)} of --prompt, --geneval and --dpg came; wanted one")
    out, numbers = options.output, range(options.images)
    if options.prompt is not None:
        return [Job(0, options.prompt, [out / f"{number:04d}.png" for number in numbers])]
    if options.geneval is not None:
        lines = [line for line in options.geneval.read_text(encoding="utf-8").splitlines() if line.strip()]
        folders = [out / f"{place:05d}" / "samples" for place in range(len(lines))]
        jobs = [
            Job(place, read_prompt(line, place), [folder / f"{number:04d}.png" for number in numbers], line)
            for place, (line, folder) in enumerate(zip(lines, folders, strict=True))
        ]
    else:
        files = sorted(Path(given[0]).glob("*.txt"))
        jobs = [Job(n, f.read_text(encoding="utf-8").strip(), [out / f"{f.stem}.png"]) for n, f in enumerate(files)]
    if not jobs:
        raise SystemExit(f"no prompt in {given[0]}")
    return jobs


def read_prompt(line: str, place: int) -> str:
    try:
        content: Any = json.loads(line)
        return content["prompt"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise SystemExit(f"line {place + 1} is no GenEval prompt ({error!r}): {line[:80]}") from error


def write(job: Job, images: Tensor) -> None:
    """The pictures ``B 3 H W`` in [-1, 1], each whole or not at all."""
    if len(job.files) == 1 and len(images) > 1:
        images = make_grid(images, nrow=2, padding=0)[None]
    for file, image in zip(job.files, images, strict=True):
        save_image(image, file)
    if job.metadata is not None:
        (job.files[0].parent.parent / "metadata.jsonl").write_text(job.metadata + "\n", encoding="utf-8")


if __name__ == "__main__":
    with torch.no_grad():
        main(tyro.cli(Options))
