"""Train a class-conditional SiT in the latents of any PSVAE or PixelVAE: SD's, ReaLS', VA-VAE's, PS-VAE's, RAE's.

    python examples/cache_latents.py --moments --vae outputs/reals/vae --data /data/imagenet/train --output latents
    accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 examples/train_sit.py \
        --data.path latents --vae outputs/reals/vae --model B/2 --output outputs/sit
    accelerate launch examples/sample_sit.py --model outputs/sit/model --vae outputs/reals/vae --output outputs/sit-50k

    python examples/train_sit.py --data.path /data/pictures ...       # one subfolder per class, encoded at each step

Which image comes when, its mirroring, noise and dropped labels are functions of the seed and the step alone, so
`--resume` goes on after a kill as if nothing had been: to the bit on one CPU in fp32.
"""

import math
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import DistributedType
from checkpoints import (
    Ema,
    accelerator_for,
    first_step,
    learning_rate,
    mean_of,
    read_names,
    refuse_to_start_over,
    save_checkpoint,
    stop_at_nan,
    write_names,
    write_options,
    write_text,
)
from data import Order
from diffusers import DiTTransformer2DModel
from labelled import Batch, Cached, LabelledOptions, collate, count_classes, open_data
from sample_sit import generate_latents, schedule
from sampling import decode, generator_of, load_measured_vae, plain_errors, refuse_smaller, scale_latents
from sit import build_sit, check_latents, note_latents, save_sit, velocity
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.utils import save_image
from tqdm import tqdm

from psvae import DiagonalGaussian, flow

SHOWN = 8  # classes of a sample grid
LEAST = {
    0: ("data.workers", "steps", "warmup", "clip"),
    1: (
        "data.size", "data.classes", "patch_size", "batch_size", "accumulate", "log_every", "sample_every",
        "checkpoint_every", "keep_checkpoints",
    ),
}  # fmt: skip
FAR = 3.0  # times as far from their mean, or as near, as the statistics say: AlignmentNet's bound


@dataclass(frozen=True, kw_only=True)
class Options:
    """Defaults are those of SiT's train.py unless said otherwise; ReaLS changes none of them."""

    data: LabelledOptions
    vae: str
    """Folder or Hub id of the PSVAE or PixelVAE: its constants or statistics bring cached latents to N(0, 1) too."""
    statistics: Path | None = None
    """`(z − mean) / std` of the raw latents instead of the VAE's own: ReaLS' mean_std.json, which is also looked for
    beside the VAE, or a file of LightningDiT's, REPA-E's or RAE's layout."""
    output: Path = Path("outputs/sit")
    """Everything is written below it: model/ (diffusers opens it), checkpoints, samples, logs."""
    model: Literal["tiny/2", "B/2", "L/2", "XL/2"] = "B/2"
    patch_size: int = 2
    """1 for latents of stride 16, as LightningDiT's XL/1 in VA-VAE's."""
    steps: int = 400_000
    """80 epochs of ImageNet: the columns that SiT, REPA and ReaLS compare."""
    batch_size: int = 256
    """Of all processes and accumulation steps together."""
    accumulate: int = 1
    lr: float = 1e-4
    warmup: int = 0
    """Steps of linear warm-up. SiT: none."""
    final_lr: float = 1.0
    """Share of the learning rate that a cosine reaches at the end; 1 keeps it constant, as SiT does."""
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float | None = None
    """Largest gradient norm; 0 or None: not clipped, as SiT. REPA and LightningDiT: 1."""
    ema: float = 0.9999
    """Decay of the averaged weights, which are the ones saved, warmed up as LDM's. 0 for none."""
    drop_label: float = 0.1
    """Share of items trained without their class, for guidance."""
    noise: Literal["uniform", "logit-normal"] = "uniform"
    """Of the noise levels σ. LightningDiT: logit-normal."""
    shift: float = 1.0
    """Of the noise levels towards noise. SiT: none; RAE and PS-VAE, of many channels: flow.dimension_shift."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "bf16"
    """SiT trains in TF32."""
    gradient_checkpointing: bool = False
    compile: bool = False
    seed: int = 0
    resume: bool = False
    """Continue from the newest checkpoint below the output."""
    log_every: int = 100
    sample_every: int = 10_000
    checkpoint_every: int = 10_000
    keep_checkpoints: int = 2
    guidance: float = 4.0
    """Of the second row of the sample grids; the first has none."""
    tracker: str = "tensorboard"
    """Any of accelerate's trackers, or `none`."""
    allow_pickle: bool = False


class Training:
    """Build, resume, train, save. Its result is ``output/model``, which sample_sit.py and diffusers open."""

    def __init__(self, options: Options, accelerator: Accelerator) -> None:
        refuse_smaller(options, LEAST)
        self.options, self.accelerator = options, accelerator
        self.checkpoints = options.output / "checkpoints"
        self.step = 0
        self.scale_seen = False
        self.unreadable: set[str] = set()
        parts = accelerator.num_processes * options.accumulate
        self.share, rest = divmod(options.batch_size, parts)
        if rest or not self.share:
            raise SystemExit(f"--batch-size {options.batch_size} is not shared by {parts} processes times --accumulate")
        with accelerator.main_process_first():  # one process downloads, the others find the files
            self.vae = load_measured_vae(options.vae, options.statistics, accelerator.device, options.allow_pickle)
            if any(self.checkpoints.glob("step*")):
                told = "wanted the --vae and --statistics in options.json there, or another --output"
                check_latents(self.vae, options.vae, options.output, told)
            self.data = open_data(options.data, options.seed, self.vae)
        self.vae.eval()
        self.classes = count_classes(self.data.labels(), options.data)
        torch.manual_seed(options.seed)
        model = self._build()
        if options.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        if options.compile:
            model.compile()
        optimizer = torch.optim.AdamW(model.parameters(), options.lr, options.betas, weight_decay=options.weight_decay)
        self.model, self.optimizer = accelerator.prepare(model.train(), optimizer)
        self.ema = Ema(self.model, options.ema) if options.ema else None
        if self.ema is not None:
            accelerator.register_for_checkpointing(self.ema)

    def _build(self) -> DiTTransformer2DModel:
        channels, side, _ = self.data.shape
        return build_sit(self.options.model, channels, side, self.classes, self.options.patch_size)

    def run(self) -> dict[str, float]:
        options, accelerator = self.options, self.accelerator
        self.step = self._first_step()
        write_options(accelerator, options.output, options)
        if accelerator.is_main_process:
            note_latents(self.vae, options.output)
        if self.step:
            accelerator.print(f"continues from step {self.step}")
            self.unreadable = read_names(options.output / "unreadable.txt")
        stream, numbers = self._stream(), {}
        bar = tqdm(initial=self.step, total=options.steps, disable=not accelerator.is_main_process)
        while self.step < options.steps:
            loss = self._train_step(stream)
            self.step += 1
            bar.update()
            if self.step % options.log_every == 0 or self.step == options.steps:
                numbers = mean_of(accelerator, {"loss": loss})
                bar.set_postfix(loss=f"{numbers['loss']:.4f}")
                accelerator.log(numbers | {"lr": learning_rate(options, self.step, options.steps)}, step=self.step)
            if self.step % options.sample_every == 0 and self.step < options.steps:
                self._sample(self._averaged())
            if self.step % options.checkpoint_every == 0 and self.step < options.steps:
                self._save_checkpoint()
        bar.close()
        self._finish()
        return numbers

    def _first_step(self) -> int:
        try:
            return first_step(self.accelerator, self.checkpoints, self.options.steps)
        except RuntimeError as error:
            if "loading state_dict" not in str(error):
                raise
            first = str(error).splitlines()[1].strip()
            raise SystemExit(
                f"{self.checkpoints} holds checkpoints of another network ({first}): wanted the --model, --patch-size, "
                "--vae and --data in options.json beside them, or another --output"
            ) from error

    def _stream(self) -> Iterator[Batch]:
        options, accelerator = self.options, self.accelerator
        given = self.step * options.accumulate * self.share
        order = Order(len(self.data), options.seed, accelerator.process_index, accelerator.num_processes, given)
        return iter(
            DataLoader(
                self.data, self.share, sampler=order, num_workers=options.data.workers, collate_fn=collate,
                generator=torch.Generator(), persistent_workers=options.data.workers > 0,
            )
        )  # fmt: skip

    def _train_step(self, stream: Iterator[Batch]) -> Tensor:
        """One optimiser step, and its mean loss. Rate, noise and what is dropped depend on the step alone."""
        options, accelerator = self.options, self.accelerator
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(options, self.step, options.steps)
        total = torch.zeros((), device=accelerator.device)
        for part in range(options.accumulate):
            batch = next(stream)
            self.unreadable.update(batch.unreadable)
            draw = generator_of(options.seed, self.step, part, accelerator.process_index)
            with accelerator.accumulate(self.model):
                loss, latents = self._loss(batch, draw)
                accelerator.backward(loss)
                gradients = {}
                if accelerator.sync_gradients:
                    bound = options.clip or math.inf  # the norm is taken either way
                    gradients["the velocity loss"] = accelerator.clip_grad_norm_(self.model.parameters(), bound)
                stop_at_nan(
                    accelerator, {"the latents": latents.abs().max(), "the velocity loss": loss}, gradients, self.step,
                    options.output, self.unreadable, "a smaller --lr or --clip 1, or mend the data",
                )  # fmt: skip
                self.optimizer.step()
                self.optimizer.zero_grad()
            total += loss.detach() / options.accumulate
        if self.ema is not None:
            self.ema.update(self.model)
        return total

    def _loss(self, batch: Batch, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """‖v − (ε − x)‖² on the linear path, and x; SiT's code predicts x − ε, which is the same."""
        options, device = self.options, self.accelerator.device
        latents = self._latents(batch.content, draw)
        noise = torch.randn(latents.shape, generator=draw).to(device)
        if options.noise == "uniform":
            sigmas = flow.shift_sigmas(torch.rand(len(latents), generator=draw), options.shift).to(device)
        else:
            sigmas = flow.sample_sigmas(len(latents), shift=options.shift, generator=draw, device=device)
        dropped = torch.rand(len(latents), generator=draw) < options.drop_label
        labels = batch.labels.masked_fill(dropped, self.classes).to(device)
        loss = flow.flow_loss(
            velocity(self.model, flow.add_noise(latents, noise, sigmas), sigmas, labels), latents, noise
        )
        return loss, latents

    @torch.no_grad()
    def _latents(self, content: Tensor, draw: torch.Generator) -> Tensor:
        """A draw of the posterior, as the generator sees it."""
        content = content.to(self.accelerator.device)
        if isinstance(self.data, Cached):
            posterior = DiagonalGaussian(content)
        else:
            with plain_errors(), self.accelerator.autocast():
                posterior = self.vae.encode(content).latent_dist
        latents = scale_latents(self.vae, posterior.sample(draw).float())
        if not self.scale_seen and self.accelerator.is_main_process:  # whenever a run begins, resumed or not
            warn_of_scale(latents, self.options.vae)
        self.scale_seen = True
        return latents

    def _save_checkpoint(self) -> None:
        write_names(self.accelerator, self.unreadable, self.options.output / "unreadable.txt")
        save_checkpoint(self.accelerator, self.checkpoints, self.step, self.options.keep_checkpoints)

    @torch.no_grad()
    def _averaged(self) -> DiTTransformer2DModel:
        """The plain model with the averaged weights."""
        with torch.random.fork_rng(devices=[]):
            made = self._build()
        found = self.model.parameters() if self.ema is None else self.ema.parameters
        for mine, theirs in zip(made.parameters(), found, strict=True):
            mine.copy_(theirs)
        return made.to(self.accelerator.device).eval().requires_grad_(False)

    def _sample(self, model: DiTTransformer2DModel) -> None:
        """A row without guidance and one with, from the same noise."""
        if not self.accelerator.is_main_process:
            return
        count = min(SHOWN, self.classes)
        shown = torch.arange(count) * self.classes // count  # spread over all classes
        rows = []
        for scale in (1.0, self.options.guidance):
            noise = [generator_of(self.options.seed, number) for number in range(count)]
            sigmas = schedule("euler", 50, shift=self.options.shift)
            latents = generate_latents(model, shown, sigmas, flow.Guidance(scale), "euler", 0.0, noise)
            with torch.no_grad(), plain_errors():
                rows.append(decode(self.vae, latents))
        path = self.options.output / "samples" / f"step{self.step:07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_image(torch.cat(rows).cpu() / 2 + 0.5, path, nrow=count)

    def _finish(self) -> None:
        model, output = self._averaged(), self.options.output
        self._sample(model)
        names = write_names(self.accelerator, self.unreadable, output / "unreadable.txt")
        if self.accelerator.is_main_process:
            save_sit(model, self.vae.latent_spec, output / "model")
            note_latents(self.vae, output / "model")
            write_text(output / "model" / "command.txt", shlex.join(["python", *sys.argv]) + "\n")
            if names:
                print(f"{len(names)} images could not be read and were skipped: {output / 'unreadable.txt'}")
            weights = "weights" if self.ema is None else "averaged weights"
            print(f"{self.step} steps done; the {weights} are saved, for sample_sit.py's --model: {output / 'model'}")
        self.accelerator.wait_for_everyone()


def warn_of_scale(latents: Tensor, vae: str) -> None:
    """Where statistics are another model's, or were applied twice."""
    found = float(latents.square().mean().sqrt())
    if found < 1 / FAR or found > FAR:
        print(
            f"latents of {vae} lie {found:.3g} standard deviations from their mean, on average; wanted about 1: the "
            "statistics are another model's or data's, or were applied twice; see --statistics",
            file=sys.stderr,
        )


def main(options: Options) -> dict[str, float]:
    """Train; returns the last loss."""
    refuse_smaller(options, LEAST)  # before the accelerator, which divides by one of them
    refuse_to_start_over(options.output / "checkpoints", options.resume)
    accelerator = accelerator_for(options, options.mixed_precision)
    if accelerator.distributed_type == DistributedType.FSDP:
        raise SystemExit("this training shards no weights; wanted one process or DDP")
    numbers = Training(options, accelerator).run()
    accelerator.end_training()
    return numbers


if __name__ == "__main__":
    main(tyro.cli(Options))
