"""Train a ReaLS VAE (arXiv 2502.00359): images ↔ latents in which an alignment network finds a teacher's features.

    accelerate launch examples/train_reals.py --data.path /data/imagenet/train --vae stabilityai/sd-vae-ft-mse \\
        --output outputs/reals

The teacher (DINOv2) is frozen; encoder, decoder and both MLPs of the alignment network are trained. The paper's figure
names the terms: MSE, LPIPS, the adversary, KL and alignment. Weights, optimiser and schedule are open: each is an
option here, its default the nearest project's, as its help says.

`--kl 1e-6 1e-4 1e-2 --validation-count 5000` trains one VAE for each KL weight and a small SiT in the latents of each,
and draws how far its pictures are from real ones (the paper's Figure 5).
One program for one CPU, one GPU and DDP: `accelerate config` chooses. `--resume` continues a killed run. `--help` lists
every option; examples/README.md has the full-size command.
"""

import json
import math
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from checkpoints import (
    Ema,
    accelerator_for,
    averaged,
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
from data import Batch, DataOptions, batches, validation_images
from equivariance import Turn
from kl_sweep import measured_sweep
from measures import load_lpips, measure_aligned
from pictures import save_samples
from reals_checks import asks_for_more, check
from reals_losses import LossOptions, Output, aligns, seen_by, targets_of, training_terms
from reals_models import build_alignment, build_teacher, build_vae
from sampling import generator_of, plain_errors
from torch import Tensor, nn
from tqdm import tqdm

from psvae import AlignmentNet, PixelVAE, fit_latent_statistics, losses, save_reals


@dataclass(frozen=True)
class Options:
    """Train a ReaLS VAE. "Open" is what the paper does not say."""

    data: DataOptions
    output: Path = Path("outputs/reals")
    """Everything is written below it: vae/ and alignment/ (what `load_reals` reads), checkpoints, samples, logs."""
    kl: tuple[float, ...] = ()
    """Several KL weights: a run for each below output/kl..., then output/kl_sweep.png. `--resume` continues; finished
    runs are not trained again."""
    sit_steps: int = 10_000
    """Of --kl: training of a small SiT in each VAE's latents, whose pictures' Fréchet distance from the validation
    pictures, in the teacher's features, is drawn; open. Needs one subfolder per class, `psvae[diffusers]`, and more
    --validation-count than the teacher's features are wide, better thousands. 0 trains none and draws the error of
    reconstruction instead."""
    vae: str | None = None
    """Folder or Hub id of any VAE that PixelVAE reads, to start from; None for random weights. Open; as EQ-VAE, an SD
    VAE is the natural start."""
    model: Path | None = None
    """JSON file of PixelVAEConfig for random weights; None is SD's."""
    allow_pickle: bool = False
    """Of `--vae`: the files of VA-VAE and REPA-E are pickles, read with PyTorch's restricted unpickler."""
    teacher: str = "vit_base_patch14_dinov2.lvd142m"
    """A timm name (its published weights), or a folder of psvae, timm or transformers. Without a connection the Hub's
    client tries for about a minute before a name is refused; with HF_HUB_OFFLINE=1 it is in the cache or refused at
    once. The paper says DINOv2, its size is open; REPA's. Open too is the mean and std of the picture that it sees: its
    own, REPA-E's. A folder's config.json may have others in `mean` and `std`: with VA-VAE's, 0.5, the picture stays in
    [-1, 1]."""
    teacher_features: Literal["normed", "pre_norm"] = "normed"
    """What cells and pooled latents are aligned with, before or after the teacher's final norm; open. Segmentation
    heads of DINOv2 read normed patch tokens, its depth heads pre-norm patch and CLS tokens. The final norm of a psvae
    folder is that of its config.json; only `"affine"` is the one that those heads know."""
    merge: Literal[1, 2] = 1
    """Latent cells per teacher token on each axis: 1 shows the teacher one patch per cell (448 px for 32 x 32 latents),
    as the figure is drawn, 2 half of that; open."""
    align_layers: int = 3
    """Of each MLP; open, REPA's."""
    align_hidden: int = 1024
    """Width of the two MLPs; open, SoftVQ-VAE's."""
    align_activation: Literal["silu", "gelu"] = "silu"
    """Open, REPA's."""
    align_pooling: Literal["mean", "max"] = "mean"
    """Of latents for MLP_cls; open."""
    align_reads: Literal["sample", "mean"] = "sample"
    """What both MLPs read while training, of the posterior; open. The figure's arrows leave what the decoder reads, a
    sample; VA-VAE's."""
    losses: LossOptions = field(default_factory=LossOptions)
    steps: int = 200_000
    """Open."""
    batch_size: int = 8
    """Per process and accumulation step; open: VA-VAE's 256 is 32 processes of 8."""
    accumulate: int = 1
    """Batches of each process to one step of the optimiser; open."""
    lr: float = 1e-4
    """Open, VA-VAE's."""
    betas: tuple[float, float] = (0.5, 0.9)
    """Of Adam; open, LDM's."""
    warmup: int = 1000
    """Steps of linear warm-up; open."""
    final_lr: float = 1.0
    """Share of the learning rate that a cosine reaches at the end; 1 keeps it constant, as VA-VAE. Open."""
    clip: float = 1.0
    """Largest gradient norm, of the VAE and of the alignment network each; open. 0 for none."""
    ema: float = 0.999
    """Decay of the averaged weights, which are the ones saved, warmed up as LDM's; open. 0 for none."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "bf16"
    """Of what is trained; open, ours (VA-VAE: fp32). fp16 without the adversary only. The teacher is always in bf16."""
    seed: int = 0
    resume: bool = False
    """Continue from the newest checkpoint below the output; a finished run too, where more --steps are asked for."""
    log_every: int = 50
    sample_every: int = 2000
    """Sample grids, and the validation measures into the log."""
    checkpoint_every: int = 2000
    keep_checkpoints: int = 2
    validation: str | None = None
    """Images of the same kind as the data; without it some of the training data."""
    validation_count: int = 64
    """Spread evenly over a folder, so over its classes."""
    statistics_batches: int = 100
    """Batches of each process from which mean_std.json is measured."""
    tracker: str = "tensorboard"
    """Any of accelerate's trackers, or `none`."""

    @property
    def held_out(self) -> DataOptions:
        """Where the validation images are."""
        return replace(self.data, path=self.validation or self.data.path)


class Aligned(nn.Module):
    """What is trained, behind one forward, so that DDP sees every gradient."""

    def __init__(
        self,
        vae: PixelVAE,
        alignment: AlignmentNet | None,
        reads: Literal["sample", "mean"] = "sample",
        detach: bool = False,
    ) -> None:
        super().__init__()
        self.vae, self.alignment, self.reads, self.detach = vae, alignment, reads, detach

    def forward(self, images: Tensor, noise: list[torch.Generator], turn: Turn | None = None) -> Output:
        """Images ``B 3 H W`` in [-1, 1] → what the losses need."""
        posterior = self.vae.encode(images).latent_dist
        latents = posterior.sample(noise)
        sample = self.vae.decode(latents if turn is None else turn.latents(latents)).sample
        read = latents if self.reads == "sample" else posterior.mode()
        aligned = None if self.alignment is None else self.alignment(read.detach() if self.detach else read)
        return Output(sample, latents, posterior.parameters, aligned)


def main(options: Options) -> dict[str, Any]:
    """Train one VAE, or one for each weight of ``--kl``; returns the validation measures."""
    if options.kl:
        check(options)
        numbers = measured_sweep(options, train)
    else:
        numbers = train(options)
    PartialState().destroy_process_group()
    return numbers


def train(options: Options) -> dict[str, float]:
    """Train one VAE, unless ``--resume`` finds it trained; returns the validation measures."""
    check(options)
    refuse_to_start_over(options.output / "checkpoints", options.resume)
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
    accelerator = accelerator_for(options, options.mixed_precision, kwargs_handlers=[ddp])
    if accelerator.distributed_type == DistributedType.FSDP:
        raise SystemExit("this training weighs losses by whole layers' gradients; wanted one process or DDP")
    numbers = Training(options, accelerator).run()
    for tracker in accelerator.trackers:
        tracker.finish()
    return numbers


class Training:
    """Build, resume, train, save. Its result is ``output``, which `load_reals` reads."""

    def __init__(self, options: Options, accelerator: Accelerator) -> None:
        self.options, self.accelerator = options, accelerator
        self.checkpoints, self.done = options.output / "checkpoints", options.output / "metrics.json"
        self.step = 0
        self.unreadable: set[str] = set()

    def run(self) -> dict[str, float]:
        options, accelerator = self.options, self.accelerator
        if options.resume and self.done.exists() and not asks_for_more(options):
            accelerator.print(f"{options.output} is trained already")
            return json.loads(self.done.read_text(encoding="utf-8"))
        self.build()
        self.step = first_step(accelerator, self.checkpoints, options.steps)
        if accelerator.is_main_process:
            self.done.unlink(missing_ok=True)  # of fewer steps or an earlier run: a later --resume must not take it
        write_options(accelerator, options.output, options)
        if self.step:
            accelerator.print(f"continues from step {self.step}")
            self.unreadable = read_names(options.output / "unreadable.txt")
        stream = batches(
            options.data, options.batch_size, options.seed, accelerator.process_index, accelerator.num_processes,
            start=self.step * options.accumulate,
        )  # fmt: skip
        bar = tqdm(initial=self.step, total=options.steps, disable=not accelerator.is_main_process)
        while self.step < options.steps:
            terms = self.train_step(stream)
            self.step += 1
            bar.update()
            if self.step % options.log_every == 0:
                numbers = mean_of(accelerator, terms)
                bar.set_postfix({name: f"{value:.3f}" for name, value in numbers.items()})
                accelerator.log(numbers, step=self.step)
            if self.step % options.sample_every == 0 and self.step < options.steps:
                self._show(self._averaged(), f"step{self.step:07d}.png")
            if self.step % options.checkpoint_every == 0 and self.step < options.steps:
                self._save_checkpoint()
        bar.close()
        return self._finish(stream)

    def build(self, perceptual: nn.Module | None = None) -> None:
        """Models, optimisers and held-out images.

        Args:
            perceptual: LPIPS, frozen; None loads its published weights, unless the term's weight is 0.
        """
        options, accelerator = self.options, self.accelerator
        self.held_out = validation_images(options.held_out, options.validation_count)
        torch.manual_seed(options.seed)
        self.teacher = self.perceptual = self.discriminator = None
        with plain_errors(), accelerator.main_process_first():  # one process downloads, the others find the files
            vae = build_vae(options.vae, options.model, options.allow_pickle)
            if aligns(options.losses):
                to_cls = options.teacher_features == "pre_norm" and bool(options.losses.cls)
                teacher = build_teacher(options.teacher, vae, options.data.size, options.merge, pre_norm_cls=to_cls)
                self.teacher = teacher.to(accelerator.device)
                norm = teacher.config.final_norm
                if options.teacher_features == "normed" and norm != "affine":
                    accelerator.print(
                        f"final_norm of {options.teacher} is {norm!r}: heads made for the encoder, as DINOv2's, read "
                        "tokens after its own, 'affine'"
                    )
            if options.losses.perceptual:
                self.perceptual = (load_lpips() if perceptual is None else perceptual).to(accelerator.device)
        alignment = None
        if self.teacher is not None:
            alignment = build_alignment(
                vae, self.teacher, options.align_layers, options.align_hidden, options.align_activation, options.merge,
                options.align_pooling,
            )  # fmt: skip
        self.configs = vae.config, alignment and alignment.config
        model = Aligned(vae, alignment, options.align_reads, options.losses.detach).train()
        optimizer = torch.optim.Adam(model.parameters(), options.lr, options.betas)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        if options.losses.adversarial:
            network = losses.PatchDiscriminator()
            adversary = torch.optim.Adam(network.parameters(), options.lr, options.betas)
            self.discriminator, self.adversary = accelerator.prepare(network, adversary)
        self.ema = Ema(self.model, options.ema) if options.ema else None
        if self.ema is not None:
            accelerator.register_for_checkpointing(self.ema)

    def train_step(self, stream: Iterator[Batch]) -> dict[str, Tensor]:
        """One optimiser step of all, then one of the discriminator; the mean of its terms. Rate and noise depend on the
        place in the stream alone: a resumed run repeats them, and so do more processes with smaller batches."""
        options, accelerator = self.options, self.accelerator
        for optimizer in [self.optimizer] if self.discriminator is None else [self.optimizer, self.adversary]:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(options, self.step, options.steps)
        turn = Turn.draw(options.losses.equivariance, options.seed, self.step)
        means: dict[str, Tensor] = {}
        for part in range(options.accumulate):
            batch = next(stream)
            self.unreadable.update(batch.unreadable)
            images = batch.images.to(accelerator.device, non_blocking=True)
            first = (self.step * options.accumulate + part) * options.batch_size
            rank, world = accelerator.process_index, accelerator.num_processes
            noise = [generator_of(options.seed, (first + item) * world + rank) for item in range(len(images))]
            with accelerator.accumulate(*[net for net in (self.model, self.discriminator) if net is not None]):
                output = self.model(images, noise, turn)
                target = images if turn is None else turn.images(images, self._plain().vae.latent_spec.stride)
                terms = self._losses(output, images, target)
                if self._adversary_counts():
                    terms["discriminator"] = self._discriminator_loss(target, output.sample)
                accelerator.backward(terms["total"])
                if "discriminator" in terms:
                    accelerator.backward(terms["discriminator"])
                gradients = self._clip() if accelerator.sync_gradients else {}
                stop_at_nan(
                    accelerator, terms, gradients, self.step, options.output, self.unreadable,
                    "a smaller --lr, or without that term",
                )  # fmt: skip
                self.optimizer.step()
                self.optimizer.zero_grad()
                if "discriminator" in terms:
                    self.adversary.step()
                    self.adversary.zero_grad()
            for name, term in terms.items():
                means[name] = means.get(name, 0.0) + term.detach() / options.accumulate
        if self.ema is not None:
            self.ema.update(self.model)
        return means

    def _losses(self, output: Output, images: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The terms and their ``total``. The teacher sees the images once, without gradient."""
        aim = network = None
        if self.teacher is not None:
            aim = targets_of(self.options.teacher_features, seen_by(self.teacher, images))
        if self._adversary_counts():
            network = self.accelerator.unwrap_model(self.discriminator).requires_grad_(False)  # leave no gradient there
        return training_terms(
            self.options.losses, output, target, self._plain().vae, aim=aim, perceptual=self.perceptual,
            adversary=network,
        )  # fmt: skip

    def _discriminator_loss(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        self.accelerator.unwrap_model(self.discriminator).requires_grad_(True)
        real, fake = self.discriminator(images), self.discriminator(reconstruction.detach().float())
        return losses.discriminator_hinge_loss(real, fake)

    def _adversary_counts(self) -> bool:
        return self.discriminator is not None and self.step + 1 >= self.options.losses.adversarial_start

    def _clip(self) -> dict[str, Tensor]:
        """Each by itself, so that an alignment network that only reads leaves the VAE as it would be without one; the
        norms before. The discriminator's is only taken."""
        self.accelerator.unscale_gradients(self.optimizer)
        clip, most = nn.utils.clip_grad_norm_, self.options.clip or math.inf
        norms = {name: clip(part.parameters(), most) for name, part in self._plain().named_children()}
        if self._adversary_counts():
            norms["discriminator"] = clip(self.discriminator.parameters(), math.inf)
        return norms

    def _save_checkpoint(self) -> None:
        write_names(self.accelerator, self.unreadable, self.options.output / "unreadable.txt")
        save_checkpoint(self.accelerator, self.checkpoints, self.step, self.options.keep_checkpoints)

    def _plain(self) -> Aligned:
        return self.accelerator.unwrap_model(self.model)

    def _averaged(self) -> Any:
        def plain() -> Aligned:
            vae, alignment = self.configs
            return Aligned(PixelVAE(vae), None if alignment is None else AlignmentNet(alignment))

        return averaged(self.accelerator, self.model, self.ema, plain)

    def _show(self, model: Aligned, name: str) -> dict[str, float]:
        """A sample grid, and the validation measures, logged."""
        numbers = measure_aligned(model, self.teacher, self.held_out, self.options, self.accelerator)
        self.accelerator.log({f"val_{name}": value for name, value in numbers.items()}, step=self.step)
        if self.accelerator.is_main_process:
            shown = self.held_out[:8].to(self.accelerator.device)
            save_samples(model.vae, shown, self.options.output / "samples" / name)
        return numbers

    def _finish(self, stream: Iterator[Batch]) -> dict[str, float]:
        """Measure the latents' statistics, validate, save."""
        options, accelerator = self.options, self.accelerator
        model = self._averaged()
        numbers = self._show(model, "final.png")
        seen = (next(stream).images.to(accelerator.device) for _ in range(options.statistics_batches))
        fit_latent_statistics(model.vae, seen)
        if accelerator.is_main_process:
            save_reals(options.output, model.vae, model.alignment)
            write_text(options.output / "command.txt", shlex.join(["python", *sys.argv]) + "\n")
            write_text(self.done, json.dumps(numbers, indent=2))
        accelerator.print(", ".join(f"{name} {value:.4g}" for name, value in numbers.items()))
        parts = "vae/" if model.alignment is None else "vae/ and alignment/"
        of = f"averaged weights (--ema {options.ema:g})" if self.ema is not None else "the last step's weights"
        accelerator.print(f"saved below {options.output}: {parts}, {of}")
        names = write_names(accelerator, self.unreadable, options.output / "unreadable.txt")
        if names and accelerator.is_main_process:
            print(f"{len(names)} images could not be read and were skipped: {', '.join(names[:20])}")
        accelerator.wait_for_everyone()
        return numbers


if __name__ == "__main__":
    main(tyro.cli(Options))
