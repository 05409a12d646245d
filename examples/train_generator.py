"""Train DeepFusionDiT: text-to-image, then editing from that checkpoint (PS-VAE sections 3.4 and 4.1).

    accelerate launch examples/train_generator.py --data.path pairs/ --vae outputs/psvae/stage2 --output outputs/t2i
    accelerate launch examples/train_generator.py --data.path triples/ --data.source source --data.image target \\
        --init outputs/t2i/model --vae outputs/psvae/stage2 --output outputs/edit

One file for one CPU, one GPU, DDP and FSDP: `accelerate config` chooses. `--resume` continues a killed run.
`--help` lists every option; examples/README.md has the paper's full-size commands.
"""

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from accelerate import Accelerator
from cache_latents import CachedLatents
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
)
from pairs import Batches, PairOptions, Pairs, pair_batches
from sampling import (
    Tokenizer,
    branches,
    check_generator,
    decode,
    generator_of,
    load_measured_vae,
    plain_errors,
    scale_latents,
)
from torch import Tensor
from torchvision.utils import save_image
from tqdm import tqdm

from psvae import PSVAE, DeepFusionDiT, DeepFusionDiTConfig, DiagonalGaussian, PixelVAE, flow
from psvae.adapt import latent_shape

Tokenise = Callable[[list[str]], tuple[Tensor, Tensor]]  # texts → ids and mask, both B T
SHOWN = 8  # pictures of a sample grid


@dataclass(frozen=True)
class TrainingOptions:
    """How to train, whatever the data."""

    output: Path = Path("outputs/generator")
    """Everything is written below it: model/ (loadable), checkpoints, samples, logs."""
    steps: int = 200_000
    """The paper: 200 000 for text-to-image, 50 000 for editing."""
    batch_size: int = 91
    """Per process and accumulation step; the paper's "about 730" is 8 processes of 91."""
    accumulate: int = 1
    lr: float = 1e-4
    """The paper's."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    warmup: int = 1000
    """Steps of linear warm-up."""
    final_lr: float = 1.0
    """Share of the learning rate that a cosine reaches at the end; 1 keeps it constant."""
    clip: float = 1.0
    """Largest gradient norm."""
    ema: float = 0.9999
    """Decay of the averaged weights, which are the ones saved, warmed up as LDM's; the paper's. 0 for none."""
    drop_text: float = 0.1
    """Share of items trained without their text, for guidance; not stated by the paper, BAGEL's."""
    drop_source: float = 0.3
    """Share of items trained without their source picture; not stated by the paper, BAGEL's."""
    shift: float | None = None
    """Of the noise levels; None is the paper's sqrt(C p² N / 4096), 2.449 for 96 channels at 256 px."""
    sigma_mean: float = 0.0
    """Of the logit-normal noise levels, before the shift."""
    sigma_std: float = 1.0
    mixed_precision: Literal["no", "bf16", "fp16"] = "bf16"
    gradient_checkpointing: bool = False
    compile: bool = False
    """`torch.compile` the model: a minute or more at first, then up to twice as fast where shapes repeat."""
    seed: int = 0
    resume: bool = False
    """Continue from the newest checkpoint below the output."""
    log_every: int = 50
    sample_every: int = 5000
    checkpoint_every: int = 5000
    keep_checkpoints: int = 2
    sampling_steps: int = 50
    """Euler updates of a sample; the paper's."""
    sampling_shift: float = 3.0
    """The paper's."""
    guidance: float = 6.5
    """The paper's, for editing too."""
    tracker: str = "tensorboard"
    """Any of accelerate's trackers, or `none`."""


@dataclass(frozen=True, kw_only=True)
class Options(TrainingOptions):
    """Train a DeepFusionDiT."""

    data: PairOptions
    vae: str
    """Folder or Hub id of the PSVAE or PixelVAE whose latents are generated; frozen. Its latents go by mean_std.json
    beside its weights (ReaLS), by its own statistics or by its constants."""
    llm: str | None = "Qwen/Qwen2.5-0.5B"
    """Folder or Hub id of the language model whose blocks are trained on; None for random weights."""
    model: Path | None = None
    """JSON file with fields of DeepFusionDiTConfig, over those of `--llm` and the VAE."""
    init: Path | None = None
    """A saved DeepFusionDiT to start from instead of `--llm` and `--model`: editing starts from text-to-image."""
    tokenizer: str | None = None
    """Folder or Hub id; None takes that of `--init` or `--llm`."""
    text_length: int = 256
    """Longer texts are cut."""


def main(options: Options) -> None:
    accelerator = make_accelerator(options)
    with plain_errors(), accelerator.main_process_first():  # one process downloads, the others find the files
        llm = options.llm if options.init is None else None
        tokenizer = Tokenizer(options.tokenizer or llm, options.init, options.text_length)
        batches = pair_batches(options.data)
        vae = load_measured_vae(options.vae, None, accelerator.device, required=False)
        model = build_model(options, vae)
    Training(options, accelerator, model, vae, tokenizer, batches).run()
    if accelerator.is_main_process:
        tokenizer.save(options.output / "model")
    accelerator.end_training()


class Training:
    """Build, resume, train, save. Its result is ``output/model``, a loadable DeepFusionDiT.

    Args:
        vae: its latents are generated; where `batches` brings cached ones, it paints the samples alone.
        batches: (batch size, seed, rank, world, start) → an endless stream, the same after every restart.
    """

    def __init__(
        self,
        options: TrainingOptions,
        accelerator: Accelerator,
        model: DeepFusionDiT,
        vae: PSVAE | PixelVAE,
        tokenise: Tokenise,
        batches: Batches,
    ) -> None:
        self.options, self.accelerator, self.tokenise, self.batches = options, accelerator, tokenise, batches
        self.config = model.config
        self.vae = vae.to(accelerator.device).eval().requires_grad_(False)
        self.checkpoints = options.output / "checkpoints"
        self.step = 0
        self.unreadable: set[str] = set()
        if options.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        if options.compile:
            model.compile()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, options.lr, options.betas, weight_decay=options.weight_decay)
        self.model, self.optimizer = accelerator.prepare(model.train(), optimizer)
        self.ema = Ema(self.model, options.ema) if options.ema else None
        if self.ema is not None:
            accelerator.register_for_checkpointing(self.ema)

    def run(self) -> None:
        options, accelerator = self.options, self.accelerator
        rank, world = accelerator.process_index, accelerator.num_processes
        self.step = first_step(accelerator, self.checkpoints, options.steps)
        write_options(accelerator, options.output, options)
        if self.step:
            accelerator.print(f"continues from step {self.step}")
            self.unreadable = read_names(options.output / "unreadable.txt")
        stream = self.batches(options.batch_size, options.seed, rank, world, self.step * options.accumulate)
        shown = next(self.batches(SHOWN, options.seed, rank, world, 0))  # the same at every step and after a restart
        bar = tqdm(initial=self.step, total=options.steps, disable=not accelerator.is_main_process)
        while self.step < options.steps:
            loss = self._train_step(stream)
            self.step += 1
            bar.update()
            if self.step % options.log_every == 0:
                numbers = mean_of(accelerator, {"loss": loss})
                bar.set_postfix(loss=f"{numbers['loss']:.4f}")
                accelerator.log(numbers | {"lr": learning_rate(options, self.step, options.steps)}, step=self.step)
            if self.step % options.sample_every == 0 and self.step < options.steps:
                self._sample(shown, self._averaged())
            if self.step % options.checkpoint_every == 0 and self.step < options.steps:
                write_names(accelerator, self.unreadable, options.output / "unreadable.txt")
                save_checkpoint(accelerator, self.checkpoints, self.step, options.keep_checkpoints)
        bar.close()
        self._finish(shown)

    def _train_step(self, stream: Iterator[Pairs]) -> Tensor:
        """One optimiser step, and its mean loss. Rate, noise and what is dropped depend on the step alone: a resumed
        run repeats them."""
        options, accelerator = self.options, self.accelerator
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(options, self.step, options.steps)
        total = torch.zeros((), device=accelerator.device)
        for part in range(options.accumulate):
            pairs = next(stream)
            self.unreadable.update(pairs.unreadable)
            draw = generator_of(options.seed, self.step, part, accelerator.process_index)
            with accelerator.accumulate(self.model):
                loss = self._loss(pairs, draw)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(self.model.parameters(), options.clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
            total += loss.detach() / options.accumulate
        if self.ema is not None:
            self.ema.update(self.model)
        return total

    def _loss(self, pairs: Pairs, draw: torch.Generator) -> Tensor:
        """‖v − (ε − x)‖² at logit-normal noise levels, shifted by the latent's dimension (section 3.4)."""
        options, device = self.options, self.accelerator.device
        latents = self._latents(pairs.images, pairs.latents, draw)
        sources = self._latents(pairs.sources, pairs.source_latents, None) if pairs.has_source else None
        noise = torch.randn(latents.shape, generator=draw).to(device)
        sigmas = flow.sample_sigmas(
            len(latents), mean=options.sigma_mean, std=options.sigma_std, shift=self._shift(latents), generator=draw,
            device=device,
        )  # fmt: skip
        ids, mask = (x.to(device) for x in self.tokenise(pairs.texts))
        without = [
            (torch.rand(len(latents), generator=draw) < rate).to(device)
            for rate in (options.drop_text, options.drop_source)
        ]
        output = self.model(
            flow.add_noise(latents, noise, sigmas),
            sigmas,
            input_ids=ids,
            attention_mask=mask,
            source_latents=sources,
            drop_text=without[0],
            drop_source=None if sources is None else without[1],
        )
        return flow.flow_loss(output.sample, latents, noise)

    @torch.no_grad()
    def _latents(
        self, images: Tensor | None, latents: Tensor | DiagonalGaussian | None, draw: torch.Generator | None
    ) -> Tensor:
        """What the generator sees, of pictures or of cached latents: with ``draw`` a sample, else the mean. A cache
        without moments has one draw to give."""
        device = self.accelerator.device
        if latents is None:
            with self.accelerator.autocast():
                latents = self.vae.encode(images.to(device)).latent_dist
        if not isinstance(latents, Tensor):
            latents = latents.mode() if draw is None else latents.sample(draw)
        return scale_latents(self.vae, latents.to(device, torch.float32))

    def _shift(self, latents: Tensor) -> float:
        if self.options.shift is not None:
            return self.options.shift
        patch = self.config.patch_size
        tokens = latents.shape[2] * latents.shape[3] // patch**2
        return flow.dimension_shift(self.config.in_channels, patch, tokens)

    def _averaged(self) -> DeepFusionDiT:
        return averaged(self.accelerator, self.model, self.ema, lambda: DeepFusionDiT(self.config))

    @torch.no_grad()
    def _sample(self, pairs: Pairs, model: DeepFusionDiT) -> None:
        """A picture of rows: the sources, if any, what the texts give, and the true pictures."""
        if not self.accelerator.is_main_process:
            return
        options, device = self.options, self.accelerator.device
        truth = self._latents(pairs.images, pairs.latents, None)
        sources = self._latents(pairs.sources, pairs.source_latents, None) if pairs.has_source else None
        noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(options.seed)).to(device)
        guidance = flow.Guidance(options.guidance)
        ids, mask = (x.to(device) for x in self.tokenise(pairs.texts))
        with self.accelerator.autocast():
            velocity = flow.guided(model, branches(model, guidance, ids, mask, sources), guidance)
            made = flow.sample(velocity, noise, flow.sigma_schedule(options.sampling_steps, options.sampling_shift))
            rows = [decode(self.vae, latents) for latents in (sources, made, truth) if latents is not None]
        path = options.output / "samples" / f"step{self.step:07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_image(torch.cat(rows).cpu() / 2 + 0.5, path, nrow=len(truth))
        path.with_suffix(".txt").write_text("\n".join(pairs.texts) + "\n", encoding="utf-8")

    def _finish(self, shown: Pairs) -> None:
        model, output = self._averaged(), self.options.output
        self._sample(shown, model)
        names = write_names(self.accelerator, self.unreadable, output / "unreadable.txt")
        if self.accelerator.is_main_process:
            model.save_pretrained(output / "model", training_command=shlex.join(["python", *sys.argv]))
            if names:
                print(f"{len(names)} rows could not be read and were skipped: {output / 'unreadable.txt'}")
        self.accelerator.wait_for_everyone()


def make_accelerator(options: TrainingOptions) -> Accelerator:
    refuse_to_start_over(options.output / "checkpoints", options.resume)
    return accelerator_for(options, options.mixed_precision)


def build_model(options: Options, vae: PSVAE | PixelVAE) -> DeepFusionDiT:
    """From a checkpoint, or around the weights of a language model, or from random ones."""
    channels = vae.config.latent_channels
    if options.init is not None:
        model = DeepFusionDiT.from_pretrained(options.init)
    else:
        fields = {"in_channels": channels, **read_fields(options.model)}
        torch.manual_seed(options.seed)
        if options.llm is None:
            model = DeepFusionDiT(DeepFusionDiTConfig.from_dict(fields))
        else:
            model = DeepFusionDiT.from_llm(options.llm, **fields)
    check_generator(model.config, seen_shape(options.data, vae))
    if options.data.source is not None and not model.config.max_source_images:
        raise SystemExit("the data has source pictures; the model's max_source_images is 0")
    return model


def seen_shape(data: PairOptions, vae: PSVAE | PixelVAE) -> tuple[int, int, int]:
    """Z h w of what is generated: of the cached latents, or of pictures of that size."""
    if data.latents is None:
        return latent_shape(vae, data.size)
    channels, height, width = CachedLatents(data.latents)[0][0].shape
    return channels, height, width


def read_fields(file: Path | None) -> dict[str, Any]:
    try:
        return {} if file is None else json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise SystemExit(f"--model {file} is no JSON file: {error}") from error


if __name__ == "__main__":
    main(tyro.cli(Options))
