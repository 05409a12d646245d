"""Pictures from prompts with a trained DeepFusionDiT: one prompt, or a benchmark's whole prompt file.

    python examples/generate.py --model outputs/t2i/model --vae outputs/psvae/stage2 --prompt "a red bench"
    accelerate launch examples/generate.py --model ... --vae ... --geneval metadata.jsonl --output out/geneval
    accelerate launch examples/generate.py --model ... --vae ... --dpg prompts/ --output out/dpg

A benchmark's files lie as its official evaluator reads them. The noise of a picture is a function of the seed, the
prompt's place and the picture's number, so processes share the work, and a killed run goes on by the same command:
what is there is not made again.
"""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import tyro
from accelerate import Accelerator
from sampling import Sampler, SamplingOptions, claim, save_image, share
from torch import Tensor
from torchvision.utils import make_grid

GRID = 4  # pictures in one of DPG-Bench's


@dataclass(frozen=True, kw_only=True)
class Options(SamplingOptions):
    """Text to image."""

    prompt: str | None = None
    """One prompt: writes `output/0000.png`, ..., over those of an earlier prompt, of which none stay."""
    geneval: Path | None = None
    """GenEval's `evaluation_metadata.jsonl`: writes `output/00000/metadata.jsonl` and `samples/0000.png`, ..."""
    dpg: Path | None = None
    """DPG-Bench's folder of text files: writes `output/<name>.png`, a grid of two by two."""
    images: int = 4
    """Per prompt; both benchmarks take four."""
    output: Path = Path("outputs/generated")


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
    sampler = Sampler(options, accelerator)
    if options.prompt is None:
        claim(options, options.output, accelerator, model=sampler.model, vae=sampler.vae)
    else:
        remove_earlier(options.output, options.images)
    for job in share(jobs, accelerator):
        write(job, sampler([job.text], [(job.place, number) for number in range(options.images)]))
    accelerator.wait_for_everyone()


def remove_earlier(output: Path, images: int) -> None:
    """The pictures of an earlier prompt: as many as now, and those that follow without a gap."""
    for number in itertools.count():
        file = output / f"{number:04d}.png"
        if number >= images and not file.exists():
            return
        file.unlink(missing_ok=True)


def read_jobs(options: Options) -> list[Job]:
    """The prompts, in the order of their file.

    Raises:
        SystemExit: none or several of the three came, or there is no prompt where one should be.
    """
    given = [x for x in (options.prompt, options.geneval, options.dpg) if x is not None]
    if len(given) != 1 or options.images < 1:
        raise SystemExit(f"{len(given)} of --prompt, --geneval and --dpg came for {options.images} images; wanted one")
    if options.dpg is not None and options.images > GRID:
        raise SystemExit(f"--images {options.images} with --dpg; wanted at most {GRID}, as many as its evaluator reads")
    out, names = options.output, [f"{number:04d}.png" for number in range(options.images)]
    if options.prompt is not None:
        jobs = [Job(0, options.prompt.strip(), [out / name for name in names])]
    elif options.geneval is not None:
        jobs = [
            Job(place, prompt_of(line, place + 1), [out / f"{place:05d}" / "samples" / name for name in names], line)
            for place, line in enumerate(read_text(options.geneval).split("\n"))
            if line.strip()
        ]
    else:
        files = sorted(options.dpg.glob("*.txt"))
        jobs = [Job(place, read_text(file).strip(), [out / f"{file.stem}.png"]) for place, file in enumerate(files)]
    empty = [job.files[0] for job in jobs if not job.text]
    if empty or not jobs:
        raise SystemExit(f"no prompt in {given[0]!s}" + (f" for {empty[0]}" if empty else ""))
    return jobs


def read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"{file} cannot be read: {error}") from error


def prompt_of(line: str, number: int) -> str:
    """Of one line of GenEval's metadata."""
    try:
        return json.loads(line)["prompt"].strip()
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise SystemExit(f"line {number} has no GenEval prompt ({error!r}): {line[:80]}") from error


def write(job: Job, images: Tensor) -> None:
    """The pictures ``B 3 H W`` in [-1, 1]; the metadata first, as the pictures tell that all is done."""
    if job.metadata is not None:
        folder = job.files[0].parent.parent
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metadata.jsonl").write_text(job.metadata + "\n", encoding="utf-8")
    if len(job.files) < len(images):
        images = make_grid(images, nrow=2, padding=0)[None]
    for file, image in zip(job.files, images, strict=True):
        save_image(image, file)


if __name__ == "__main__":
    main(tyro.cli(Options))
