"""Train a PS-VAE in the paper's two stages (section 3.3, Figure 5).

Stage 1 (S-VAE): the encoder is frozen; SemanticVAE learns L_S + L_KL; the pixel decoder learns L_P on the
detached latent. Stage 2 (PS-VAE): everything is trained by everything, and both semantic terms hold the
features near a frozen copy of the pretrained encoder.

    accelerate launch examples/train_tokenizer.py --data.path /data/imagenet/train --output outputs/psvae

One file for one CPU, one GPU, DDP and FSDP: `accelerate config` chooses. `--resume` continues a killed run.
`--help` lists every option; examples/README.md has the full-size command.
"""

import copy
import json
import shlex
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from accelerate import Accelerator
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
    write_names,
    write_options,
    write_text,
)
from data import DataOptions, batches, validation_images
from measures import fast_precision, load_lpips, measure
from pictures import save_samples
from sampling import generator_of
from torch import Tensor
from tqdm import tqdm

from psvae import PSVAE, PSVAEConfig, SemanticEncoder, fit_latent_statistics, losses


@dataclass(frozen=True)
class LossOptions:
    """Weights of the terms. Stated by the paper: which terms there are. Its weights contradict each other (1 : 0.1
    in section 4.1, 0.1 : 1 in 4.4); the second reading is the default, with every term a mean."""

    semantic: float = 0.1
    """Of L_S, once in stage 1 and twice in stage 2. Section 4.4 halves it for SigLIP2. 0 gives P-VAE."""
    mse: float = 1.0
    """Of the squared error inside L_S."""
    cosine: float = 1.0
    """Of 1 - cosine inside L_S."""
    pixel: float = 1.0
    """Of L_P."""
    pixel_norm: Literal["l1", "l2"] = "l1"
    """LDM: l1."""
    perceptual: float = 1.0
    """Of LPIPS (VGG) inside L_P; its weights are downloaded by torchvision. 0 leaves it out."""
    kl: float = 1e-3
    """Of L_KL; not stated by the paper. By the ablation in docs/reproduction.md; published re-implementations have 1e-4
    of the semantic weight."""
    kl_reduction: Literal["mean", "sum"] = "mean"
    """Over channels and cells. LDM: `sum` with weight 1e-6."""
    kl_warmup: float = 0.2
    """Share of a stage over which the KL weight rises from 0."""
    adversarial: float = 0.5
    """Of the PatchGAN term, times the adaptive weight (LDM). 0 leaves the discriminator out."""
    adversarial_start: int = 50_001
    """Step of stage 2 from which it counts (LDM: 50 001)."""


@dataclass(frozen=True)
class Options:
    """Train a PS-VAE in two stages."""

    data: DataOptions
    output: Path = Path("outputs/tokenizer")
    """Everything is written below it: stage1/ and stage2/ (loadable), checkpoints, samples, logs."""
    model: str = "dinov2_base"
    """`dinov2_base`, `siglip2_so400m`, or a JSON file of PSVAEConfig."""
    latent_channels: int = 96
    """Z of the two named models; the paper reports 96 and 32."""
    encoder_weights: str = "timm"
    """`timm` (its published weights), `random`, a weights file that timm reads, or a folder saved by psvae."""
    init: Path | None = None
    """A saved PSVAE that the first stage starts from instead of `--model` and `--encoder-weights`; its encoder becomes
    the frozen target of L_S. `--stage 2` alone defaults to stage1/ of the output."""
    stage: Literal["1", "2", "both"] = "both"
    steps1: int = 50_000
    """Optimiser steps of stage 1; the paper: until semantic reconstruction converges."""
    steps2: int = 200_000
    """Optimiser steps of stage 2; not stated by the paper."""
    losses: LossOptions = field(default_factory=LossOptions)
    batch_size: int = 12
    """Per process and accumulation step; the paper's 96 is 8 processes of 12."""
    accumulate: int = 1
    lr: float = 1e-4
    """The paper's, for all parts."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    warmup: int = 1000
    """Steps of linear warm-up in each stage."""
    final_lr: float = 1.0
    """Share of the learning rate that a cosine reaches at the end; 1 keeps it constant."""
    clip: float = 1.0
    """Largest gradient norm."""
    ema: float = 0.999
    """Decay of the averaged weights, which are the ones saved, warmed up as LDM's; 0 for none."""
    mixed_precision: Literal["no", "bf16", "fp16", "auto"] = "bf16"
    """`auto` times one step in fp32 and in bf16 and takes the faster."""
    gradient_checkpointing: bool = False
    seed: int = 0
    resume: bool = False
    """Continue from the newest checkpoint below the output."""
    log_every: int = 50
    sample_every: int = 2000
    checkpoint_every: int = 2000
    keep_checkpoints: int = 2
    validate_every: int = 2000
    validation: str | None = None
    """Images of the same kind as the data to validate on; without it and `validation_split`, some of the
    training data, and every number is marked so."""
    validation_split: str | None = None
    """Split of a Hugging Face dataset to validate on."""
    validation_count: int = 64
    statistics_batches: int = 100
    """Batches from which the latent's mean and std are fitted after each stage."""
    tracker: str = "tensorboard"
    """Any of accelerate's trackers, or `none`."""


def main(options: Options) -> dict[str, dict[str, float]]:
    """Run the stages asked for; returns the validation measures of each."""
    stages = {"1": [1], "2": [2], "both": [1, 2]}[options.stage]
    for stage in stages:
        refuse_to_start_over(options.output / f"stage{stage}" / "checkpoints", options.resume)
    precision = options.mixed_precision
    if precision == "auto":
        precision = fast_precision(build_model(options, stages[0]), options.batch_size, options.data.size)
    # P-VAE leaves the semantic decoder without a gradient
    ddp = DistributedDataParallelKwargs(find_unused_parameters=not options.losses.semantic, broadcast_buffers=False)
    accelerator = accelerator_for(options, precision, kwargs_handlers=[ddp])
    if options.losses.adversarial and accelerator.distributed_type == DistributedType.FSDP:
        raise SystemExit("LDM's adaptive weight needs the whole last layer: pass --losses.adversarial 0 under FSDP")
    measures = {f"stage{stage}": Stage(options, stage, accelerator).run() for stage in stages}
    accelerator.end_training()
    return measures


class Stage:
    """One stage: build, resume, train, save. Its result is ``output/stage<n>``, a loadable PSVAE."""

    def __init__(self, options: Options, stage: int, accelerator: Accelerator) -> None:
        self.options, self.stage, self.accelerator = options, stage, accelerator
        self.steps = options.steps1 if stage == 1 else options.steps2
        self.folder = options.output / f"stage{stage}"
        self.step = 0
        self.unreadable: set[str] = set()

    def run(self) -> dict[str, float]:
        options, accelerator = self.options, self.accelerator
        done = self.folder / "metrics.json"
        if options.resume and done.exists():
            accelerator.print(f"stage {self.stage} is already in {self.folder}")
            return json.loads(done.read_text())
        self._build()
        checkpoints = self.folder / "checkpoints"
        self.step = first_step(accelerator, checkpoints, self.steps)
        write_options(accelerator, options.output, options)
        if self.step:
            accelerator.print(f"stage {self.stage} continues from step {self.step}")
            self.unreadable = read_names(self.folder / "unreadable.txt")
        elif not options.resume and accelerator.is_main_process:
            done.unlink(missing_ok=True)  # of an earlier run: a later --resume must not take it for this one's
        bar = tqdm(
            initial=self.step, total=self.steps, desc=f"stage {self.stage}", disable=not accelerator.is_main_process
        )
        stream = batches(
            options.data, options.batch_size, options.seed + self.stage, accelerator.process_index,
            accelerator.num_processes, start=self.step * options.accumulate,
        )  # fmt: skip
        while self.step < self.steps:
            terms = self._train_step(stream)
            self.step += 1
            bar.update()
            if self.step % options.log_every == 0:
                numbers = mean_of(accelerator, terms)
                bar.set_postfix({name: f"{value:.3f}" for name, value in numbers.items()})
                accelerator.log({f"stage{self.stage}/{name}": value for name, value in numbers.items()}, step=self.step)
            if self.step % options.sample_every == 0:
                self._sample()
            if self.step % options.validate_every == 0:
                self._validate()
            if self.step % options.checkpoint_every == 0 and self.step < self.steps:
                write_names(accelerator, self.unreadable, self.folder / "unreadable.txt")
                save_checkpoint(accelerator, checkpoints, self.step, options.keep_checkpoints)
        bar.close()
        self.stream = stream
        return self._finish()

    def _build(self) -> None:
        options, accelerator = self.options, self.accelerator
        held_out = replace(
            options.data,
            path=options.validation or options.data.path,
            split=options.validation_split or options.data.split,
        )
        self.held_out = validation_images(held_out, options.validation_count)
        torch.manual_seed(options.seed + self.stage)
        model = build_model(options, self.stage)
        self.config = model.config
        self.frozen = copy.deepcopy(model.encoder).eval().requires_grad_(False).to(accelerator.device)
        model.encoder.requires_grad_(self.stage == 2)
        if options.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, options.lr, options.betas, weight_decay=options.weight_decay)
        self.model, self.optimizer = accelerator.prepare(model.train(), optimizer)
        with accelerator.local_main_process_first():  # one process downloads, the others find the file
            self.perceptual = load_lpips().to(accelerator.device) if options.losses.perceptual else None
        self.discriminator: Any = None
        if options.losses.adversarial and self.stage == 2:
            network = losses.PatchDiscriminator()
            adversary = torch.optim.AdamW(network.parameters(), options.lr, options.betas)
            self.discriminator, self.adversary = accelerator.prepare(network, adversary)
        self.ema = Ema(self.model, options.ema) if options.ema else None
        if self.ema is not None:
            accelerator.register_for_checkpointing(self.ema)

    def _train_step(self, stream: Any) -> dict[str, Tensor]:
        """One optimiser step, and the mean of its terms. Rate, KL weight and noise depend on the step alone, so a
        resumed run repeats them."""
        options, accelerator = self.options, self.accelerator
        for optimizer in [self.optimizer] if self.discriminator is None else [self.optimizer, self.adversary]:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(options, self.step, self.steps)
        means: dict[str, Tensor] = {}
        for part in range(options.accumulate):
            batch = next(stream)
            self.unreadable.update(batch.unreadable)
            images = batch.images.to(accelerator.device, non_blocking=True)
            noise = generator_of(options.seed, self.stage, self.step, part, accelerator.process_index)
            with accelerator.accumulate(*self._networks()):
                output = self.model(images, sample_posterior=True, generator=noise, detach_latents=self.stage == 1)
                terms = self._losses(output, images)
                accelerator.backward(terms["total"])
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(self.model.parameters(), options.clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
                if self._adversary_counts():
                    terms["discriminator"] = self._train_discriminator(images, output.sample.detach())
            for name, term in terms.items():
                means[name] = means.get(name, 0.0) + term.detach() / options.accumulate
        if self.ema is not None:
            self.ema.update(self.model)
        return means

    def _losses(self, output: Any, images: Tensor) -> dict[str, Tensor]:
        """The paper's terms (section 3.3) by name, and their weighted sum as ``total``."""
        weights = self.options.losses
        terms: dict[str, Tensor] = {}
        total = torch.zeros((), device=images.device)
        if weights.semantic:
            with torch.no_grad(), self.accelerator.autocast():
                target = self.frozen(images)  # f_h
            pairs = [("rebuilt", output.rebuilt_features), ("encoder", output.features)][: self.stage]
            for name, features in pairs if self.config.vae is not None else pairs[1:]:
                term = losses.semantic_loss(features, target, mse_weight=weights.mse, cosine_weight=weights.cosine)
                terms[f"semantic_{name}"] = term.detach()
                total = total + weights.semantic * term
        if self.config.vae is not None and weights.kl:
            term = losses.kl_loss(output.posterior, reduction=weights.kl_reduction)
            terms["kl"] = term.detach()
            total = total + weights.kl * min(1.0, (self.step + 1) / (weights.kl_warmup * self.steps + 1)) * term
        reconstruction = losses.pixel_loss(
            output.sample,
            images,
            norm=weights.pixel_norm,
            perceptual=self.perceptual,
            perceptual_weight=weights.perceptual,
        )
        terms["pixel"] = reconstruction.detach()
        total = total + weights.pixel * reconstruction
        if self._adversary_counts():
            network = self.accelerator.unwrap_model(self.discriminator).requires_grad_(False)  # leave no gradient there
            fooled = losses.generator_hinge_loss(network(output.sample.float()))
            last = self.accelerator.unwrap_model(self.model).decoder.conv_out.weight
            weight = losses.adaptive_weight(reconstruction, fooled, last)
            terms["adversarial"] = fooled.detach()
            total = total + weights.pixel * weights.adversarial * weight * fooled
        terms["total"] = total
        return terms

    def _train_discriminator(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        self.accelerator.unwrap_model(self.discriminator).requires_grad_(True)
        loss = losses.discriminator_hinge_loss(self.discriminator(images), self.discriminator(reconstruction.float()))
        self.accelerator.backward(loss)
        self.adversary.step()
        self.adversary.zero_grad()
        return loss.detach()

    def _networks(self) -> list[Any]:
        return [self.model] if self.discriminator is None else [self.model, self.discriminator]

    def _adversary_counts(self) -> bool:
        return self.discriminator is not None and self.step + 1 >= self.options.losses.adversarial_start

    def _averaged(self) -> Any:
        return averaged(self.accelerator, self.model, self.ema, lambda: PSVAE(self.config))

    def _sample(self) -> None:
        model = self._averaged()
        if self.accelerator.is_main_process:
            path = self.folder / "samples" / f"step{self.step:07d}.png"
            save_samples(model, self.held_out[:8].to(self.accelerator.device), path)

    def _validate(self) -> dict[str, float]:
        numbers = measure(self._averaged(), self.frozen, self.held_out, self.options.batch_size, self.accelerator)
        self.accelerator.log(
            {f"stage{self.stage}/val_{name}": value for name, value in numbers.items()}, step=self.step
        )
        return numbers

    def _finish(self) -> dict[str, float]:
        """Fit the latent statistics, validate, save."""
        options, accelerator = self.options, self.accelerator
        model = self._averaged()
        stream = (next(self.stream).images.to(accelerator.device) for _ in range(options.statistics_batches))
        fit_latent_statistics(model, stream)
        numbers = measure(model, self.frozen, self.held_out, options.batch_size, accelerator)
        if accelerator.is_main_process:
            save_samples(model, self.held_out[:8].to(accelerator.device), self.folder / "samples" / "final.png")
            where = "" if options.validation or options.validation_split else ", on training images"
            card = {f"{name}{where}": value for name, value in numbers.items()}
            model.save_pretrained(self.folder, training_command=shlex.join(["python", *sys.argv]), metrics=card)
            write_text(self.folder / "metrics.json", json.dumps(numbers, indent=2))
        accelerator.print(f"stage {self.stage}: " + ", ".join(f"{k} {v:.4g}" for k, v in numbers.items()))
        names = write_names(accelerator, self.unreadable, self.folder / "unreadable.txt")
        if names and accelerator.is_main_process:
            print(f"{len(names)} images could not be read and were skipped: {', '.join(names[:20])}")
            print(f"all their names are in {self.folder / 'unreadable.txt'}")
        accelerator.free_memory()
        accelerator._custom_objects.clear()
        accelerator.wait_for_everyone()
        return numbers


def build_model(options: Options, stage: int) -> PSVAE:
    """Stage 1: a fresh PSVAE around a pretrained encoder. Stage 2: what stage 1 saved, with its own encoder."""
    first = stage == 1 or options.stage == "2"
    init = options.init if first and options.init is not None else options.output / "stage1" if stage == 2 else None
    if init is not None:
        return PSVAE.from_pretrained(init)
    presets = {"dinov2_base": PSVAEConfig.dinov2_base, "siglip2_so400m": PSVAEConfig.siglip2_so400m}
    if options.model in presets:
        config = presets[options.model](options.latent_channels)
    elif not Path(options.model).is_file():
        raise SystemExit(f"--model {options.model!r} is neither a JSON file nor one of {', '.join(presets)}")
    else:
        config = PSVAEConfig.from_dict(json.loads(Path(options.model).read_text()))
    chosen = config.encoder
    if options.encoder_weights == "random":
        return PSVAE(config)
    if Path(options.encoder_weights).is_dir():
        return PSVAE.from_encoder(SemanticEncoder.from_pretrained(options.encoder_weights), config)
    file = None if options.encoder_weights == "timm" else options.encoder_weights
    encoder = SemanticEncoder.from_timm(**{**chosen.to_dict(), "file": file})
    return PSVAE.from_encoder(encoder, config)


if __name__ == "__main__":
    main(tyro.cli(Options))
