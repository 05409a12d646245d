"""Train a ReaLS VAE (arXiv 2502.00359): images ↔ latents in which an alignment network finds a teacher's features.

    accelerate launch examples/train_reals.py --data.path /data/imagenet/train --vae stabilityai/sd-vae-ft-mse \\
        --output outputs/reals

The teacher (DINOv2) is frozen; encoder, decoder and both MLPs of the alignment network are trained. Its figure names
the terms: MSE, LPIPS, the adversary, KL and alignment. Weights, optimiser and schedule it does not give: each is an
option here, its default the nearest project's, as its help says.

One file for one CPU, one GPU and DDP: `accelerate config` chooses. `--resume` continues a killed run. `--help` lists
every option; examples/README.md has the full-size command.
"""

import json
import shlex
import sys
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
from measures import active_channels, load_lpips, picture_measures
from pictures import save_samples
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from psvae import (
    AlignmentNet,
    AlignmentNetConfig,
    AlignmentOutput,
    PixelVAE,
    PixelVAEConfig,
    PixelVAEOutput,
    SemanticEncoder,
    fit_latent_statistics,
    losses,
    save_reals,
)


@dataclass(frozen=True)
class LossOptions:
    """Weights of the terms, every one a mean unless it says otherwise."""

    mse: float = 1.0
    """Of the squared error; the figure's "MSE Loss"."""
    perceptual: float = 1.0
    """Of LPIPS (VGG), whose weights torchvision downloads. 0 leaves it out. LDM's."""
    kl: float = 1e-6
    """Of the KL to N(0, 1). Summed over a latent beside mean pixel terms, as in REPA-E, it pulls far harder than in
    LDM, as the released latents' scale suggests of ReaLS. The paper scans it; so does `--kl`."""
    kl_reduction: Literal["sum", "mean"] = "sum"
    """Over channels and cells."""
    patch: float = 1.0
    """Of the alignment of every latent cell. 0, with `--losses.cls 0`, trains a plain VAE."""
    cls: float = 1.0
    """Of the alignment of pooled latents to the CLS token."""
    form: Literal["reals", "margins"] = "reals"
    """`reals`: 0.9 (1 - cos) + 0.1 smooth L1. `margins`: VA-VAE's two terms, of cells alone."""
    adaptive: bool = False
    """Weigh the alignment by VA-VAE's ratio of gradients at the encoder's last layer, times its weights."""
    adversarial: float = 0.5
    """Of the PatchGAN term, times LDM's adaptive weight. 0 leaves the discriminator out."""
    adversarial_start: int = 50_001
    """Step from which it counts (LDM: 50 001)."""
    equivariance: float = 0.0
    """Share of steps on which latents and target are scaled and turned alike (EQ-VAE: 0.5)."""


@dataclass(frozen=True)
class Options:
    """Train a ReaLS VAE."""

    data: DataOptions
    output: Path = Path("outputs/reals")
    """Everything is written below it: vae/ and alignment/ (what `load_reals` reads), checkpoints, samples, logs."""
    vae: str | None = None
    """Folder or Hub id of any VAE that PixelVAE reads, to start from; None for random weights."""
    model: Path | None = None
    """JSON file of PixelVAEConfig for random weights; None is SD's."""
    teacher: str = "vit_base_patch14_reg4_dinov2.lvd142m"
    """A timm name (its published weights), or a folder saved by psvae. The paper says DINOv2."""
    teacher_features: Literal["normed", "pre_norm"] = "normed"
    """What latents are aligned with. Segmentation heads of DINOv2 read normed tokens, its depth heads pre-norm ones."""
    merge: Literal[1, 2] = 1
    """Latent cells per teacher token on each axis: 1 shows the teacher one patch per cell, 2 half of that."""
    align_hidden: int = 1024
    """Width of the two MLPs."""
    losses: LossOptions = field(default_factory=LossOptions)
    steps: int = 200_000
    """Not stated by the paper."""
    batch_size: int = 8
    """Per process and accumulation step; VA-VAE's 256 is 32 processes of 8."""
    accumulate: int = 1
    lr: float = 1e-4
    """VA-VAE's."""
    betas: tuple[float, float] = (0.5, 0.9)
    """LDM's."""
    warmup: int = 1000
    """Steps of linear warm-up."""
    final_lr: float = 1.0
    """Share of the learning rate that a cosine reaches at the end; 1 keeps it constant."""
    clip: float = 1.0
    """Largest gradient norm."""
    ema: float = 0.999
    """Decay of the averaged weights, which are the ones saved; 0 for none."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "bf16"
    seed: int = 0
    resume: bool = False
    """Continue from the newest checkpoint below the output."""
    log_every: int = 50
    sample_every: int = 2000
    checkpoint_every: int = 2000
    keep_checkpoints: int = 2
    validation: str | None = None
    """Images of the same kind as the data; without it the first ones of the training data."""
    validation_count: int = 64
    statistics_batches: int = 100
    """Batches from which mean_std.json is measured."""
    tracker: str = "tensorboard"
    """Any of accelerate's trackers, or `none`."""


class Output(NamedTuple):
    """Of one pass."""

    vae: PixelVAEOutput
    aligned: AlignmentOutput
    turned: Tensor | None
    """Decoded from transformed latents, ``B 3 H' W'``."""


class Aligned(nn.Module):
    """What is trained, behind one forward, so that DDP sees every gradient."""

    def __init__(self, vae: PixelVAE, alignment: AlignmentNet) -> None:
        super().__init__()
        self.vae, self.alignment = vae, alignment

    def forward(self, images: Tensor, noise: torch.Generator, turn: "Turn | None") -> Output:
        """Images ``B 3 H W`` in [-1, 1] → reconstruction, and the features read from the sampled latents."""
        output = self.vae(images, sample_posterior=True, generator=noise)
        turned = None if turn is None else self.vae.decode(turn.latents(output.latents)).sample
        return Output(output, self.alignment(output.latents), turned)


@dataclass(frozen=True)
class Turn:
    """EQ-VAE's transformation: a scale, then quarter turns."""

    scale: float
    quarters: int

    @classmethod
    def draw(cls, noise: torch.Generator) -> "Turn":
        """8/32 to 31/32, and one to three quarters."""
        numbers = torch.randint(8, 32, (1,), generator=noise), torch.randint(1, 4, (1,), generator=noise)
        return cls(numbers[0].item() / 32, int(numbers[1]))

    def latents(self, latents: Tensor) -> Tensor:
        """``B Z h w`` → ``B Z w' h'``, whole cells."""
        return self._turn(latents, [max(1, round(side * self.scale)) for side in latents.shape[-2:]])

    def images(self, images: Tensor, stride: int) -> Tensor:
        """The target of such latents."""
        return self._turn(images, [max(1, round(side // stride * self.scale)) * stride for side in images.shape[-2:]])

    def _turn(self, maps: Tensor, size: list[int]) -> Tensor:
        return torch.rot90(F.interpolate(maps, size, mode="bilinear"), self.quarters, (2, 3))


def main(options: Options) -> dict[str, float]:
    """Train; returns the validation measures."""
    refuse_to_start_over(options.output / "checkpoints", options.resume)
    ddp = DistributedDataParallelKwargs(find_unused_parameters=not aligns(options.losses), broadcast_buffers=False)
    accelerator = accelerator_for(options, options.mixed_precision, kwargs_handlers=[ddp])
    if accelerator.distributed_type == DistributedType.FSDP:
        raise SystemExit("this training weighs losses by whole layers' gradients; wanted one process or DDP")
    numbers = Training(options, accelerator).run()
    accelerator.end_training()
    return numbers


class Training:
    """Build, resume, train, save. Its result is ``output``, which `load_reals` reads."""

    def __init__(self, options: Options, accelerator: Accelerator) -> None:
        self.options, self.accelerator = options, accelerator
        self.checkpoints = options.output / "checkpoints"
        self.unreadable: set[str] = set()
        held_out = replace(options.data, path=options.validation or options.data.path)
        self.held_out = validation_images(held_out, options.validation_count)
        torch.manual_seed(options.seed)
        with accelerator.main_process_first():  # one process downloads, the others find the files
            vae = build_vae(options)
            self.teacher = build_teacher(options, vae).to(accelerator.device)
            self.perceptual = load_lpips().to(accelerator.device) if options.losses.perceptual else None
        alignment = AlignmentNet(
            AlignmentNetConfig(
                vae.config.latent_channels, self.teacher.feature_dim, hidden_dim=options.align_hidden,
                merge=options.merge, stride=vae.latent_spec.stride,
            )
        )  # fmt: skip
        self.configs = vae.config, alignment.config
        model = Aligned(vae, alignment).train()
        optimizer = torch.optim.Adam(model.parameters(), options.lr, options.betas)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.discriminator: Any = None
        if options.losses.adversarial:
            network = losses.PatchDiscriminator()
            adversary = torch.optim.Adam(network.parameters(), options.lr, options.betas)
            self.discriminator, self.adversary = accelerator.prepare(network, adversary)
        self.ema = Ema(self.model, options.ema) if options.ema else None
        if self.ema is not None:
            accelerator.register_for_checkpointing(self.ema)

    def run(self) -> dict[str, float]:
        options, accelerator = self.options, self.accelerator
        self.step = first_step(accelerator, self.checkpoints)
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
            terms = self._train_step(stream)
            self.step += 1
            bar.update()
            if self.step % options.log_every == 0:
                numbers = mean_of(accelerator, terms)
                bar.set_postfix({name: f"{value:.3f}" for name, value in numbers.items()})
                accelerator.log(numbers, step=self.step)
            if self.step % options.sample_every == 0:
                self._sample()
            if self.step % options.checkpoint_every == 0 and self.step < options.steps:
                self._save_checkpoint()
        bar.close()
        return self._finish(stream)

    def _train_step(self, stream: Any) -> dict[str, Tensor]:
        """One optimiser step of all, then one of the discriminator; the mean of its terms. Rate and noise depend on the
        step alone, so a resumed run repeats them."""
        options, accelerator = self.options, self.accelerator
        for optimizer in [self.optimizer] if self.discriminator is None else [self.optimizer, self.adversary]:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(options, self.step, options.steps)
        means: dict[str, Tensor] = {}
        for part in range(options.accumulate):
            batch = next(stream)
            self.unreadable.update(batch.unreadable)
            images = batch.images.to(accelerator.device, non_blocking=True)
            position = (options.seed, self.step, part, accelerator.process_index)
            noise = torch.Generator().manual_seed(zlib.crc32(repr(position).encode()))
            turn = Turn.draw(noise) if torch.rand(1, generator=noise) < options.losses.equivariance else None
            with accelerator.accumulate(*[net for net in (self.model, self.discriminator) if net is not None]):
                output = self.model(images, noise, turn)
                terms = self._losses(output, images, turn)
                self._stop_at_nan(terms)
                accelerator.backward(terms["total"])
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(self.model.parameters(), options.clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
                if self._adversary_counts():
                    terms["discriminator"] = self._train_discriminator(images, output.vae.sample.detach())
            for name, term in terms.items():
                means[name] = means.get(name, 0.0) + term.detach() / options.accumulate
        if self.ema is not None:
            self.ema.update(self.model)
        return means

    def _losses(self, output: Output, images: Tensor, turn: Turn | None) -> dict[str, Tensor]:
        """The figure's terms by name, and their weighted sum as ``total``."""
        weights, model = self.options.losses, self.accelerator.unwrap_model(self.model)
        terms: dict[str, Tensor] = {}
        target = images if turn is None else turn.images(images, model.vae.latent_spec.stride)
        shown = output.vae.sample if output.turned is None else output.turned
        pixel = weights.mse * losses.pixel_loss(
            shown, target, norm="l2", perceptual=self.perceptual, perceptual_weight=weights.perceptual
        )
        terms["pixel"], total = pixel.detach(), pixel
        if weights.kl:
            kl = losses.kl_loss(output.vae.posterior, reduction=weights.kl_reduction)
            terms["kl"], total = kl.detach(), total + weights.kl * kl
        if aligns(weights):
            align = self._alignment(output.aligned, images, terms)
            if weights.adaptive:
                last = model.vae.encoder.conv_out.weight
                gradients = [torch.autograd.grad(loss, last, retain_graph=True)[0] for loss in (pixel, align)]
                terms["ratio"] = losses.gradient_ratio(*gradients)
                align = terms["ratio"] * align
            total = total + align
        if self._adversary_counts():
            network = self.accelerator.unwrap_model(self.discriminator).requires_grad_(False)  # leave no gradient there
            fooled = losses.generator_hinge_loss(network(shown.float()))
            weight = losses.adaptive_weight(pixel, fooled, model.vae.decoder.conv_out.weight)
            terms["adversarial"], total = fooled.detach(), total + weights.adversarial * weight * fooled
        terms["latent_std"] = output.vae.latents.detach().float().std()
        terms["total"] = total
        return terms

    def _alignment(self, aligned: AlignmentOutput, images: Tensor, terms: dict[str, Tensor]) -> Tensor:
        """The teacher sees the images once, without gradient."""
        weights = self.options.losses
        with torch.no_grad(), self.accelerator.autocast():
            seen = self.teacher(images, return_all=True)
        patches = seen.features if self.options.teacher_features == "normed" else seen.pre_norm
        if weights.form == "margins":
            patch = losses.margin_cosine_loss(aligned.patch_features, patches)
            patch = patch + losses.margin_similarity_loss(aligned.patch_features, patches)
        else:
            patch = losses.alignment_loss(aligned.patch_features, patches)
        cls = losses.alignment_loss(aligned.global_feature, seen.global_token)
        terms |= {"align_patch": patch.detach(), "align_cls": cls.detach()}
        return weights.patch * patch + weights.cls * cls

    def _train_discriminator(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        self.accelerator.unwrap_model(self.discriminator).requires_grad_(True)
        loss = losses.discriminator_hinge_loss(self.discriminator(images), self.discriminator(reconstruction.float()))
        self.accelerator.backward(loss)
        self.adversary.step()
        self.adversary.zero_grad()
        return loss.detach()

    def _adversary_counts(self) -> bool:
        return self.discriminator is not None and self.step + 1 >= self.options.losses.adversarial_start

    def _stop_at_nan(self, terms: dict[str, Tensor]) -> None:
        """Before the weights are spoilt: save what there is, name the term."""
        values = torch.stack([term.detach().float() for term in terms.values()])
        spoilt = self.accelerator.reduce((~values.isfinite()).float(), "sum")
        if spoilt.any():
            names = [name for name, bad in zip(terms, spoilt.tolist(), strict=True) if bad]
            self._save_checkpoint()
            raise SystemExit(
                f"step {self.step}: {', '.join(names)} became NaN or infinite; the state before it is saved in "
                f"{self.checkpoints}: go on with --resume and a smaller --lr, or without that term"
            )

    def _save_checkpoint(self) -> None:
        write_names(self.accelerator, self.unreadable, self.options.output / "unreadable.txt")
        save_checkpoint(self.accelerator, self.checkpoints, self.step, self.options.keep_checkpoints)

    def _averaged(self) -> Any:
        def plain() -> Aligned:
            return Aligned(PixelVAE(self.configs[0]), AlignmentNet(self.configs[1]))

        return averaged(self.accelerator, self.model, self.ema, plain)

    def _sample(self) -> None:
        model = self._averaged()
        if self.accelerator.is_main_process:
            path = self.options.output / "samples" / f"step{self.step:07d}.png"
            save_samples(model.vae, self.held_out[:8].to(self.accelerator.device), path)

    def _finish(self, stream: Any) -> dict[str, float]:
        """Measure the latents' statistics, validate, save."""
        options, accelerator = self.options, self.accelerator
        model = self._averaged()
        fit_latent_statistics(
            model.vae, (next(stream).images.to(accelerator.device) for _ in range(options.statistics_batches))
        )
        numbers = validate(model, self.teacher, self.held_out, options, accelerator)
        if accelerator.is_main_process:
            save_samples(model.vae, self.held_out[:8].to(accelerator.device), options.output / "samples" / "final.png")
            save_reals(options.output, model.vae, model.alignment)
            write_text(options.output / "metrics.json", json.dumps(numbers, indent=2))
            write_text(options.output / "command.txt", shlex.join(["python", *sys.argv]) + "\n")
        accelerator.print(", ".join(f"{name} {value:.4g}" for name, value in numbers.items()))
        names = write_names(accelerator, self.unreadable, options.output / "unreadable.txt")
        if names and accelerator.is_main_process:
            print(f"{len(names)} images could not be read and were skipped: {', '.join(names[:20])}")
        accelerator.wait_for_everyone()
        return numbers


def aligns(weights: LossOptions) -> bool:
    """Or trains a plain VAE."""
    return bool(weights.patch or weights.cls)


def build_vae(options: Options) -> PixelVAE:
    """What `--vae` names, or random weights of `--model`."""
    if options.vae is not None:
        return PixelVAE.from_pretrained(options.vae)
    file = options.model
    return PixelVAE(PixelVAEConfig() if file is None else PixelVAEConfig.from_dict(json.loads(file.read_text())))


def build_teacher(options: Options, vae: PixelVAE) -> SemanticEncoder:
    """Frozen, with its own final norm, seeing one patch for each latent cell or each 2 x 2 of them."""
    stride = vae.latent_spec.stride * options.merge
    if Path(options.teacher).is_dir():
        teacher = SemanticEncoder.from_pretrained(options.teacher, stride=stride)
    else:
        teacher = SemanticEncoder.from_timm(options.teacher, stride=stride, final_norm="affine")
    return teacher.eval().requires_grad_(False)


@torch.no_grad()
def validate(
    model: Aligned, teacher: SemanticEncoder, images: Tensor, options: Options, accelerator: Accelerator
) -> dict[str, float]:
    """Of the reconstruction from the posterior's mean: psnr, ssim, lpips. Of the features read from it, with the
    teacher's: patch_cosine, cls_cosine. Of the latents: latent_std, active_channels."""
    rows: list[dict[str, float]] = []
    moments: list[tuple[Tensor, Tensor]] = []
    for part in images.split(options.batch_size):
        part = part.to(accelerator.device)
        with accelerator.autocast():
            output, seen = model.vae(part), teacher(part, return_all=True)
            aligned = model.alignment(output.latents)
        patches = seen.features if options.teacher_features == "normed" else seen.pre_norm
        row = picture_measures(output.sample, part) | {
            "patch_cosine": losses.cosine_similarity_map(aligned.patch_features, patches).mean(),
            "cls_cosine": F.cosine_similarity(aligned.global_feature.float(), seen.global_token.float()).mean(),
        }
        rows.append({name: float(value) * len(part) for name, value in row.items()})
        moments.append((output.posterior.mean.float(), output.posterior.var.float()))
    means, variances = (torch.cat(parts) for parts in zip(*moments, strict=True))
    numbers = {name: sum(row[name] for row in rows) / len(images) for name in rows[0]}
    spread = (means.var() + variances.mean()).sqrt()
    return numbers | {"latent_std": float(spread), "active_channels": active_channels(means, variances)}


if __name__ == "__main__":
    main(tyro.cli(Options))
