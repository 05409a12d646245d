"""Train DeepFusionDiT: text-to-image, then editing from that checkpoint (PS-VAE sections 3.4 and 4.1).

    accelerate launch examples/train_generator.py --data.path pairs/ --vae outputs/psvae/stage2 --output outputs/t2i
    accelerate launch examples/train_generator.py --data.path triples/ --data.source source --data.image target \\
        --init outputs/t2i/model --vae outputs/psvae/stage2 --output outputs/edit

One file for one CPU, one GPU, DDP and FSDP: `accelerate config` chooses. `--resume` continues a killed run.
`--help` lists every option; examples/README.md has the paper's full-size commands.
"""

import json
import math
import shlex
import sys
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration, gather_object
from checkpoints import load_checkpoint, save_checkpoint
from measures import Ema
from pairs import Batches, PairOptions, Pairs, pair_batches
from PIL import Image
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torchvision.utils import make_grid
from tqdm import tqdm

from psvae import PSVAE, DeepFusionDiT, DeepFusionDiTConfig, PixelVAE, PrefixCache, flow

Tokenise = Callable[[list[str]], tuple[Tensor, Tensor]]  # texts → ids and mask, both B T


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
    """Decay of the averaged weights, which are the ones saved; the paper's. 0 for none."""
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


@dataclass(frozen=True)
class Options(TrainingOptions):
    """Train a DeepFusionDiT."""

    data: PairOptions = field(default_factory=lambda: PairOptions(""))
    vae: str = ""
    """Folder or Hub id of the PSVAE or PixelVAE whose latents are generated; frozen."""
    model: str = "qwen2_5_0_5b"
    """`qwen2_5_0_5b`, `qwen2_5_1_5b`, `qwen2_5_3b`, or a JSON file of DeepFusionDiTConfig."""
    llm: str | None = "Qwen/Qwen2.5-0.5B"
    """Folder or Hub id of the language model whose weights the blocks start from; None for random ones."""
    tokenizer: str = "Qwen/Qwen2.5-0.5B"
    """Folder or Hub id of the tokenizer."""
    text_length: int = 256
    """Longer texts are cut, and counted."""
    init: Path | None = None
    """A saved DeepFusionDiT to start from instead of `--model` and `--llm`: editing starts from text-to-image."""


def main(options: Options) -> None:
    if not options.data.path or not options.vae:
        raise SystemExit("--data.path and --vae are needed")
    accelerator = make_accelerator(options)
    vae = load_vae(options.vae)
    with accelerator.main_process_first():  # one process downloads, the others find the files
        tokenise = load_tokenizer(options.tokenizer, options.text_length)
        model = build_model(options, vae)
    Training(options, accelerator, model, vae, tokenise, pair_batches(options.data)).run()
    accelerator.end_training()


class Training:
    """Build, resume, train, save. Its result is ``output/model``, a loadable DeepFusionDiT.

    Args:
        vae: its latents are generated; unused where `batches` brings cached ones, but for the samples.
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
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, options.lr, options.betas, weight_decay=options.weight_decay)
        self.model, self.optimizer = accelerator.prepare(model.train(), optimizer)
        self.ema = Ema(self.model, options.ema) if options.ema else None
        if self.ema is not None:
            accelerator.register_for_checkpointing(self.ema)

    def run(self) -> None:
        options, accelerator = self.options, self.accelerator
        if options.resume:
            self.step = load_checkpoint(accelerator, self.checkpoints)
        elif list(self.checkpoints.glob("step*")):
            raise SystemExit(f"{options.output} holds checkpoints of an earlier run: --resume, or another --output")
        stream = self.batches(
            options.batch_size, options.seed, accelerator.process_index, accelerator.num_processes,
            self.step * options.accumulate,
        )  # fmt: skip
        bar = tqdm(initial=self.step, total=options.steps, disable=not accelerator.is_main_process)
        while self.step < options.steps:
            loss = self._train_step(stream)
            self.step += 1
            bar.update()
            if self.step % options.log_every == 0:
                bar.set_postfix(loss=f"{float(loss):.4f}")
                accelerator.log({"loss": float(loss)}, step=self.step)
            if self.step % options.sample_every == 0:
                self._sample(next(stream))
            if self.step % options.checkpoint_every == 0 and self.step < options.steps:
                save_checkpoint(accelerator, self.checkpoints, self.step, options.keep_checkpoints)
        bar.close()
        self._finish(next(stream))

    def _train_step(self, stream: Any) -> Tensor:
        """One optimiser step. Rate, noise and what is dropped depend on the step alone: a resumed run repeats them."""
        options, accelerator = self.options, self.accelerator
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr()
        loss = torch.zeros(())
        for part in range(options.accumulate):
            pairs = next(stream)
            self.unreadable.update(pairs.unreadable)
            position = (options.seed, self.step, part, accelerator.process_index)
            draw = torch.Generator().manual_seed(zlib.crc32(repr(position).encode()))
            with accelerator.accumulate(self.model):
                loss = self._loss(pairs, draw)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(self.model.parameters(), options.clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.model)
        return loss.detach()

    def _loss(self, pairs: Pairs, draw: torch.Generator) -> Tensor:
        """‖v − (ε − x)‖² at logit-normal noise levels, shifted by the latent's dimension (section 3.4)."""
        options, device = self.options, self.accelerator.device
        latents = self._latents(pairs.images, pairs.latents, draw)
        sources = self._latents(pairs.sources, pairs.source_latents, None) if pairs.has_source else None
        count = len(latents)
        noise = torch.randn(latents.shape, generator=draw).to(device)
        sigmas = flow.sample_sigmas(
            count, mean=options.sigma_mean, std=options.sigma_std, shift=self._shift(latents), generator=draw,
            device=device,
        )  # fmt: skip
        ids, mask = (x.to(device) for x in self.tokenise(pairs.texts))
        output = self.model(
            flow.add_noise(latents, noise, sigmas),
            sigmas,
            input_ids=ids,
            attention_mask=mask,
            source_latents=sources,
            drop_text=(torch.rand(count, generator=draw) < options.drop_text).to(device),
            drop_source=None if sources is None
            else (torch.rand(count, generator=draw) < options.drop_source).to(device),
        )  # fmt: skip
        return flow.flow_loss(output.sample, latents, noise)

    @torch.no_grad()
    def _latents(self, images: Tensor | None, cached: Tensor | None, draw: torch.Generator | None) -> Tensor:
        """What the generator sees: a sample of the posterior for targets, its mean for sources."""
        if cached is not None:
            return cached.to(self.accelerator.device, torch.float32)
        if images is None:
            raise ValueError("the batch has neither pictures nor latents")
        with self.accelerator.autocast():
            posterior = self.vae.encode(images.to(self.accelerator.device)).latent_dist
        latents = posterior.mode() if draw is None else posterior.sample(draw)
        return scale_latents(self.vae, latents.float())

    def _shift(self, latents: Tensor) -> float:
        if self.options.shift is not None:
            return self.options.shift
        patch = self.config.patch_size
        tokens = latents.shape[2] * latents.shape[3] // patch**2
        return flow.dimension_shift(self.config.in_channels, patch, tokens)

    def _lr(self) -> float:
        options, progress = self.options, self.step / max(1, self.options.steps)
        cosine = options.final_lr + (1.0 - options.final_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
        return options.lr * cosine * min(1.0, (self.step + 1) / max(1, options.warmup))

    def averaged(self) -> DeepFusionDiT:
        """The plain model with the averaged weights (all weights, gathered where they are sharded)."""
        state = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True))
        if self.ema is not None:
            state = {**state, **self.ema.named(self.accelerator.unwrap_model(self.model))}
        with torch.device("meta"):
            plain = DeepFusionDiT(self.config)
        plain.load_state_dict(state, assign=True)
        return plain.to(self.accelerator.device).eval()

    def _sample(self, pairs: Pairs) -> None:
        """A grid: the sources, if any, what the texts give, and the true pictures."""
        model, options = self.averaged(), self.options
        if not self.accelerator.is_main_process:
            return
        texts = pairs.texts[:8]
        truth = self._latents(pairs.images, pairs.latents, None)[:8]
        sources = self._latents(pairs.sources, pairs.source_latents, None)[:8] if pairs.has_source else None
        ids, mask = (x.to(self.accelerator.device) for x in self.tokenise(texts))
        generator = torch.Generator().manual_seed(options.seed)
        with torch.no_grad(), self.accelerator.autocast():
            full = model.encode_prefix(ids, mask, source_latents=sources)
            empty = PrefixCache.empty(model.config, len(texts), device=ids.device)
            velocity = flow.guided(model, {"full": full, "empty": empty}, flow.Guidance(options.guidance))
            noise = torch.randn(truth.shape, generator=generator).to(ids.device)
            made = flow.sample(velocity, noise, flow.sigma_schedule(options.sampling_steps, options.sampling_shift))
            shown = [x for x in (sources, made, truth) if x is not None]
            rows = [self.vae.decode(unscale_latents(self.vae, x)).sample for x in shown]
        path = options.output / "samples" / f"step{self.step:07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        grid = make_grid(torch.cat(rows).float().cpu().clamp(-1, 1) / 2 + 0.5, nrow=len(texts))
        Image.fromarray((grid * 255).round().byte().permute(1, 2, 0).numpy()).save(path)
        path.with_suffix(".txt").write_text("\n".join(texts) + "\n")

    def _finish(self, pairs: Pairs) -> None:
        self._sample(pairs)
        model = self.averaged()
        if self.accelerator.is_main_process:
            model.save_pretrained(self.options.output / "model", training_command=shlex.join(["python", *sys.argv]))
        names = sorted(set(gather_object(sorted(self.unreadable))))
        if names and self.accelerator.is_main_process:
            (self.options.output / "unreadable.txt").write_text("\n".join(names) + "\n")
            print(f"{len(names)} rows could not be read and were skipped: {self.options.output / 'unreadable.txt'}")
        self.accelerator.wait_for_everyone()


def make_accelerator(options: TrainingOptions) -> Accelerator:
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision,
        gradient_accumulation_steps=options.accumulate,
        log_with=None if options.tracker == "none" else options.tracker,
        project_config=ProjectConfiguration(str(options.output), logging_dir=str(options.output / "logs")),
    )
    if options.ema and accelerator.distributed_type == DistributedType.FSDP:
        raise SystemExit("averaged weights are not sharded: pass --ema 0 under FSDP")
    if accelerator.is_main_process:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "options.json").write_text(json.dumps(asdict(options), indent=2, default=str))
    kind, precision = accelerator.distributed_type.value, options.mixed_precision
    accelerator.print(f"{accelerator.num_processes} process(es), {kind}, {accelerator.device}, precision {precision}")
    if options.tracker != "none":
        accelerator.init_trackers("psvae")
    return accelerator


def build_model(options: Options, vae: PSVAE | PixelVAE) -> DeepFusionDiT:
    """From a checkpoint, or fresh around a language model's weights."""
    channels = vae.latent_spec.channels
    if options.init is not None:
        model = DeepFusionDiT.from_pretrained(options.init)
    else:
        presets = {name: getattr(DeepFusionDiTConfig, name) for name in ("qwen2_5_0_5b", "qwen2_5_1_5b", "qwen2_5_3b")}
        if options.model in presets:
            config = presets[options.model](channels)
        elif Path(options.model).is_file():
            config = DeepFusionDiTConfig.from_dict(json.loads(Path(options.model).read_text()))
        else:
            raise SystemExit(f"--model {options.model!r} is neither a JSON file nor one of {', '.join(presets)}")
        torch.manual_seed(options.seed)
        model = (
            DeepFusionDiT(config) if options.llm is None else DeepFusionDiT.from_llm(options.llm, **config.to_dict())
        )
    if model.config.in_channels != channels:
        raise SystemExit(f"the VAE's latents have {channels} channels, the generator's {model.config.in_channels}")
    if (options.data.source or options.data.source_latents) and not model.config.max_source_images:
        raise SystemExit("the data has source pictures; the model's max_source_images is 0")
    return model


def load_vae(name: str) -> PSVAE | PixelVAE:
    """A PSVAE, or else whatever `PixelVAE` reads."""
    folder = Path(name)
    if (folder / "config.json").is_file():
        kind = json.loads((folder / "config.json").read_text()).get("_class")
        return PSVAE.from_pretrained(name) if kind == "PSVAE" else PixelVAE.from_pretrained(name)
    return PSVAE.from_pretrained(name)


def scale_latents(vae: PSVAE | PixelVAE, latents: Tensor) -> Tensor:
    """(z − shift) · scale: nothing for a PSVAE, whose latents come normalised."""
    if isinstance(vae, PSVAE):
        return latents
    return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def unscale_latents(vae: PSVAE | PixelVAE, latents: Tensor) -> Tensor:
    """`scale_latents` undone."""
    if isinstance(vae, PSVAE):
        return latents
    return latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)


def load_tokenizer(name: str, length: int) -> Tokenise:
    """transformers' tokenizer; texts are padded on the right to the longest of a batch."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    def tokenise(texts: list[str]) -> tuple[Tensor, Tensor]:
        encoded = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        return encoded["input_ids"], encoded["attention_mask"]

    return tokenise


if __name__ == "__main__":
    main(tyro.cli(Options))
