"""Pictures by class of a trained SiT: the .npz that ADM's evaluator reads, or a few to look at.

    accelerate launch --num_processes 8 examples/sample_sit.py --model outputs/sit/model --vae outputs/reals/vae \
        --output outputs/sit-50k                                         # SiT's SDE in 250 steps, 50 000 pictures
    python examples/sample_sit.py ... --solver heun --steps 50 --guidance 1.8 --guidance-interval 0 0.75
    python examples/sample_sit.py ... --classes 207 360 --guidance 4 --count 8 --output outputs/look
    python examples/sample_sit.py ... --save-latents --output outputs/made     # for downstream.py --normalized

Noise and class of a picture depend on the seed and its number alone, and pictures are made in the same batches by
however many processes. A killed run goes on by the same command; with other options or weights it is refused.
`output.npz` holds all (arr_0, uint8 N H W 3), `output.png` the first to look at, and `output-latents.npz` what they are
decoded from; the folder `output` holds the batches that all are made of, and may be removed afterwards.
"""

import math
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from checkpoints import write_whole
from diffusers import DiTTransformer2DModel
from pictures import save_grid
from sampling import claim, decode, generator_of, load_vae, measured, plain_errors, refuse_smaller
from sit import STATISTICS, check_classes, check_latents, guided_velocity, load_sit
from torch import Tensor
from tqdm import tqdm

from psvae import flow

Solver = Literal["sde", "euler", "heun"]
SHOWN = 32  # pictures of the grid
LEAST = {0: ("diffusion",), 1: ("count", "batch_size", "steps")}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Defaults are SiT's (sample_ddp.py SDE, train_utils.py), with which its FIDs without guidance were measured."""

    model: str
    """Folder of the SiT."""
    vae: str
    """Folder or Hub id of the PSVAE or PixelVAE that it was trained on, or of one with the same encoder and another
    decoder."""
    output: Path = Path("outputs/sit-samples")
    """Writes `output.npz`, and beside it `output.png`, a grid of the first pictures, and `output.json` with these
    options; batches go into the folder `output`."""
    count: int = 50_000
    classes: tuple[int, ...] | None = None
    """These, in turn. None: drawn from all, as in sample_ddp.py."""
    balanced: bool = False
    """All classes in turn, so each as often."""
    solver: Solver = "sde"
    """`sde` is Euler-Maruyama; `euler` and `heun` go along the probability flow."""
    steps: int = 250
    diffusion: float = 1.0
    """Of the SDE: its coefficient is `diffusion` times σ (SiT: sigma, norm 1); 0 is the probability flow."""
    last_step: float = 0.04
    """Of the SDE: where σ falls below it, in one step without noise (SiT: Mean, 0.04)."""
    shift: float = 1.0
    """Of the noise levels; as in training, for latents of many channels."""
    guidance: float = 1.0
    """ReaLS: 1.5, or 1.8 in an interval that it writes [0, 0.75]."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Guided where low < σ ≤ high; σ = 1 is noise. Which end of ReaLS' interval is noise is open; REPA's reading is
    this, and SiT counts time the other way."""
    batch_size: int = 64
    """Of one process."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the SiT; the VAE stays in float32."""
    seed: int = 0
    save_latents: bool = False
    """Also write `output-latents.npz`: `latents`, float32 N Z h w, as the SiT made them: normalised."""
    allow_pickle: bool = False


class Sampler:
    """The models, loaded once."""

    def __init__(self, options: Options, device: torch.device) -> None:
        self.options, self.dtype = options, getattr(torch, options.dtype)
        self.model = load_sit(options.model, self.dtype).to(device)
        vae, known = load_vae(options.vae, device, options.allow_pickle), self.model.config
        channels = vae.config.latent_channels
        if channels != known.in_channels:
            raise SystemExit(
                f"the latents of {options.vae} have {channels} channels and the SiT {options.model} makes "
                f"{known.in_channels}; wanted the --vae that it was trained on"
            )
        kept = Path(options.model) / STATISTICS  # those that it was trained with
        self.vae = measured(vae, options.vae, kept if kept.is_file() else None, options.allow_pickle)
        told = "wanted the --vae that it was trained on, see command.txt there"
        check_latents(self.vae, options.vae, Path(options.model), told)
        check_classes(options.classes or (), known.num_embeds_ada_norm, "--classes")
        with plain_errors():
            self.guidance = flow.Guidance(options.guidance, interval=options.guidance_interval)
            self.sigmas = schedule(options.solver, options.steps, options.last_step, options.shift)

    def __call__(self, numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The pictures of those numbers, uint8 N H W 3, and the latents that they are decoded from, float32 N Z h w."""
        latents = generate_latents(
            self.model, torch.tensor([self.class_of(number) for number in numbers]), self.sigmas, self.guidance,
            self.options.solver, self.options.diffusion,
            [generator_of(self.options.seed, number) for number in numbers],
        )  # fmt: skip
        with torch.no_grad(), plain_errors():
            pictures = decode(self.vae, latents)
        pixels = (pictures * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1)
        return pixels.cpu().numpy(), latents.cpu().numpy()

    def class_of(self, number: int) -> int:
        options, classes = self.options, self.model.config.num_embeds_ada_norm
        if options.classes:
            return options.classes[number % len(options.classes)]
        if options.balanced:
            return number % classes
        return int(torch.randint(classes, (), generator=generator_of(options.seed, number, "class")))


@torch.no_grad()
def generate_latents(
    model: DiTTransformer2DModel,
    classes: Tensor,
    sigmas: Tensor,
    guidance: flow.Guidance,
    solver: Solver,
    diffusion: float,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """``B Z h w`` in fp32, normalised, one of each class.

    Args:
        sigmas: of `schedule`.
        generators: one for each latent.
    """
    like, side = next(model.parameters()), model.config.sample_size
    shape = (model.config.in_channels, side, side)

    def draw() -> Tensor:
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(like)

    velocity = guided_velocity(model, classes.to(like.device), guidance)
    with plain_errors():
        if solver == "sde":
            latents = euler_maruyama(velocity, draw, sigmas, diffusion)
        else:
            latents = flow.sample(velocity, draw(), sigmas, solver=solver)
    return latents.float()


def schedule(solver: Solver, steps: int, last_step: float = 0.04, shift: float = 1.0) -> Tensor:
    """σ from 1 to 0, in ``steps`` updates; an SDE's are even from 1 to ``last_step``, and the last of them is from
    there."""
    if solver != "sde":
        return flow.sigma_schedule(steps, shift)
    if steps < 2 or not 0 < last_step < 1:
        raise SystemExit(f"an SDE of {steps} steps, the last from σ = {last_step}; wanted 2 or more, and σ in 0 to 1")
    return flow.shift_sigmas(torch.cat([torch.linspace(1, last_step, steps), torch.zeros(1)]), shift)


@torch.no_grad()
def euler_maruyama(
    velocity: flow.Velocity, draw: Callable[[], Tensor], sigmas: Tensor, diffusion: float = 1.0
) -> Tensor:
    """The reverse SDE with the marginals of the flow (SiT, arXiv 2401.08740, section 2; its code's transport/) in
    Euler-Maruyama steps, from noise to latents::

        dx = (v − w s) dσ + √(2 w) dW        w = diffusion · σ        s = −(x + (1 − σ) v) / σ

    The score s follows from the velocity: of x = (1 − σ) x₀ + σ ε and v = ε − x₀ comes ε = x + (1 − σ) v, and
    s = −E[ε | x] / σ. With w of that form nothing is divided by σ. The last update has no noise.

    Args:
        draw: gives a fresh ``B Z h w`` from N(0, 1) at each call; the first is the start.
        sigmas: descending to 0, of `schedule`.
        diffusion: 0 makes it flow.sample's Euler.
    """
    first = draw()
    state = first.float()
    steps = sigmas.tolist()
    for now, then in pairwise(steps):
        slope = velocity(state.to(first.dtype), torch.full((len(state),), now, device=state.device)).float()
        noise = state + (1 - now) * slope  # the network's idea of ε
        state = state + (then - now) * (slope + diffusion * noise)
        if then > 0:
            state = state + math.sqrt(2 * diffusion * now * (now - then)) * draw().float()
    if not state.isfinite().all():
        raise SystemExit("the samples hold NaN or infinity; the model may be damaged, or try --dtype float32")
    return state.to(first.dtype)


def write_npz(parts: list[Path], file: Path, name: str) -> None:
    """All parts as one array of that name, without holding them all at once."""
    first, shapes = np.load(parts[0], mmap_mode="r"), [np.load(part, mmap_mode="r").shape for part in parts]
    kind = np.lib.format.dtype_to_descr(first.dtype)
    header = {"descr": kind, "fortran_order": False, "shape": (sum(shape[0] for shape in shapes), *first.shape[1:])}

    def write(partial: Path) -> None:
        with zipfile.ZipFile(partial, "w") as archive, archive.open(f"{name}.npy", "w", force_zip64=True) as array:
            np.lib.format.write_array_header_1_0(array, header)
            for part in parts:
                array.write(np.load(part).tobytes())

    write_whole(file, write)


def main(options: Options) -> None:
    refuse_smaller(options, LEAST)
    accelerator = Accelerator()
    sampler = Sampler(options, accelerator.device)
    claim(options, options.output, accelerator, model=sampler.model, vae=sampler.vae)
    batches = [
        range(first, min(first + options.batch_size, options.count))
        for first in range(0, options.count, options.batch_size)
    ]
    files = [options.output / f"{batch.start:07d}.npy" for batch in batches]
    beside = [options.output / f"{batch.start:07d}-latents.npy" for batch in batches]
    waiting = [job for job in zip(batches, files, beside, strict=True) if not job[1].exists()]
    accelerator.wait_for_everyone()  # all have looked before one writes, so that all share the same list
    mine = waiting[accelerator.process_index :: accelerator.num_processes]
    for batch, file, latents_file in tqdm(mine, disable=not accelerator.is_main_process):
        pictures, latents = sampler(batch)
        if options.save_latents:  # first: where the pictures are, the batch is done
            write_whole(latents_file, lambda partial, latents=latents: save_array(latents, partial))
        write_whole(file, lambda partial, pictures=pictures: save_array(pictures, partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        whole = options.output.with_name(f"{options.output.name}.npz")
        write_npz(files, whole, "arr_0")
        if options.save_latents:
            write_npz(beside, options.output.with_name(f"{options.output.name}-latents.npz"), "latents")
        grid = options.output.with_name(f"{options.output.name}.png")
        shown = np.concatenate([np.load(file) for file in files[: math.ceil(SHOWN / options.batch_size)]])[:SHOWN]
        write_whole(grid, lambda partial: save_grid(shown, partial))
        print(
            f"{options.count} pictures, {len(waiting)} of {len(files)} batches made now: {whole}; the first "
            f"{len(shown)} to look at: {grid}"
        )


def save_array(array: np.ndarray, file: Path) -> None:
    with file.open("wb") as opened:  # np.save would change the ending
        np.save(opened, array)


if __name__ == "__main__":
    main(tyro.cli(Options))
