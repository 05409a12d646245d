"""What ReaLS costs: its training step against a plain VAE's, AlignmentNet against the decoder.

    python benchmarks/reals.py

SD's f8 VAE at 256 px, a teacher of DINOv2-B's architecture, random weights. A step is that of examples/train_reals.py,
all of it but reading images; the plain one is the same under `--losses.patch 0 --losses.cls 0`. Of either there are
two: with "all terms" of the paper's figure (MSE, LPIPS, adversary, KL), which the target of 1.25 is about, and with
"MSE and KL" alone, which is harder: the teacher costs the same and the step around it less.
Timings are ratios within this run, all sides in turns; below the target is in our favour.
"""

import copy
import gc
import itertools
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from measure import DTYPES, Row, in_turns, machine, report
from PIL import Image
from torch import Tensor, nn

from psvae import (
    AlignmentNet,
    AlignmentNetConfig,
    PixelDecoderConfig,
    PixelVAE,
    PixelVAEConfig,
    SemanticEncoder,
    SemanticEncoderConfig,
)
from psvae.encoders import PixelEncoderConfig

sys.path.append(str(Path(__file__).parents[1] / "examples"))  # whose modules import each other by their bare names
import train_reals
from data import Batch, DataOptions

Group = Literal["step", "teacher", "alignment"]
Terms = Literal["all", "mse_kl"]
PRECISIONS = {"fp32": "no", "bf16": "bf16"}
TERMS = {
    "all": ("all terms", train_reals.LossOptions(adversarial_start=1)),
    "mse_kl": ("MSE and KL", train_reals.LossOptions(perceptual=0.0, adversarial=0.0)),
}
SEED = 0


@dataclass(frozen=True)
class Preset:
    vae: PixelVAEConfig
    teacher: SemanticEncoderConfig
    size: int
    """Of an image's side, in pixels."""


SMALL = {"base_channels": 16, "channel_multipliers": (1, 1, 2, 2), "num_res_blocks": 1, "norm_groups": 8}
SMALL_VIT = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
PRESETS = {
    "sd": Preset(PixelVAEConfig(), SemanticEncoderConfig(train_reals.Options.teacher, final_norm="affine"), 256),
    "tiny": Preset(
        PixelVAEConfig(
            PixelEncoderConfig(latent_channels=4, attention_levels=0, **SMALL),
            PixelDecoderConfig(latent_channels=4, attention_levels=0, **SMALL),
        ),
        SemanticEncoderConfig("vit_tiny_patch16_224", SMALL_VIT, final_norm="affine"),
        64,
    ),
}


@dataclass
class Options:
    """What to measure."""

    json: Path = Path("outputs/benchmarks/reals.json")
    """Where the rows are written."""
    only: tuple[Group, ...] = ("step", "teacher", "alignment")
    """The groups to run."""
    preset: Literal["sd", "tiny"] = "sd"
    """``tiny`` only shows that the benchmark runs; the targets are the other's."""
    dtypes: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    """Of a step: without and with bf16 autocast, which is the training's default."""
    terms: tuple[Terms, ...] = ("all", "mse_kl")
    """Of a step."""
    merges: tuple[Literal[1, 2], ...] = (1, 2)
    """Latent cells per teacher token on each axis: the teacher at 448 and at 224 px."""
    batch: int = 1
    """Images of a step."""
    latents: tuple[int, ...] = (1, 4)
    """Batches of the group ``alignment``."""
    repetitions: int = 5

    @property
    def built(self) -> Preset:
        return PRESETS[self.preset]

    def teacher(self, merge: int) -> SemanticEncoderConfig:
        return self.built.teacher.replace(stride=self.built.vae.encoder.stride * merge)

    def images(self, device: torch.device) -> Tensor:
        return torch.rand(self.batch, 3, self.built.size, self.built.size, device=device) * 2 - 1


def main(options: Options) -> None:
    torch.manual_seed(SEED)
    size, where = options.built.size, device()
    print(f"{machine()['cpu']}, {torch.get_num_threads()} threads, {where}, {options.preset}, {size} px")
    groups = {"step": step_rows, "teacher": teacher_rows, "alignment": alignment_rows}
    rows = itertools.chain.from_iterable(groups[name](options) for name in options.only)
    report(rows, options.json, preset=options.preset, batch=options.batch, device=str(where))


# Groups


def step_rows(options: Options) -> Iterator[Row]:
    """The ReaLS step against the plain one, and how much of it the teacher is."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(options, folder)
        for terms, dtype in itertools.product(options.terms, options.dtypes):
            yield from steps_compared(options, folder, terms, dtype)
            gc.collect()  # its models, which hooks tie into cycles


@torch.no_grad()
def teacher_rows(options: Options) -> Iterator[Row]:
    """The teacher alone, in the ways to run it: a step under autocast takes the second."""
    images = options.images(device())
    for merge in options.merges:
        teacher = SemanticEncoder(options.teacher(merge)).eval().to(device())
        halved = copy.deepcopy(teacher).to(torch.bfloat16)
        calls = [
            partial(teacher, images, return_all=True),
            partial(under_autocast, teacher, images, return_all=True),
            partial(halved, images.bfloat16(), return_all=True),
        ]
        fp32, autocast, weights = in_turns([finished(call) for call in calls], options.repetitions)
        what = f"batch {options.batch}, teacher at {pixels(options, teacher)} px"
        yield ratio(f"teacher under bf16 autocast / in fp32, {what}", autocast, fp32)
        yield ratio(f"teacher with bf16 weights / under bf16 autocast, {what}", weights, autocast)


@torch.no_grad()
def alignment_rows(options: Options) -> Iterator[Row]:
    """AlignmentNet as it comes against decoding the same latents."""
    preset = options.built
    channels, stride = preset.vae.latent_channels, preset.vae.encoder.stride
    vae = PixelVAE(preset.vae).eval().to(device())
    network = AlignmentNet(AlignmentNetConfig(channels, stride=stride)).eval().to(device())
    side = preset.size // stride
    for (name, dtype), batch in itertools.product(((name, DTYPES[name]) for name in options.dtypes), options.latents):
        vae.to(dtype), network.to(dtype)
        latents = torch.randn(batch, channels, side, side, device=device(), dtype=dtype)
        calls = [finished(partial(call, latents)) for call in (network, vae.decode)]
        ours, decode = in_turns(calls, options.repetitions)
        yield ratio(f"AlignmentNet / PixelVAE.decode, {side} x {side}, {name}, batch {batch}", ours, decode, 0.05)


# Parts


def steps_compared(options: Options, folder: Path, terms: Terms, dtype: str) -> list[Row]:
    """Of one kind of step: a list, so that its models are gone before the next ones are built."""
    AcceleratorState._reset_state(True)  # or the process keeps the precision of the kind before
    chosen = training_options(options, folder, terms, dtype)
    accelerator = train_reals.accelerator_for(chosen, chosen.mixed_precision)
    images = options.images(accelerator.device)
    plain = Step(replace(chosen, losses=replace(chosen.losses, patch=0.0, cls=0.0)), accelerator, images)
    ours = [Step(replace(chosen, merge=merge), accelerator, images) for merge in options.merges]
    of_plain, *of_ours = in_turns([plain, *ours], options.repetitions)
    rows = []
    for step, seconds in zip(ours, of_ours, strict=True):
        what = f"{TERMS[terms][0]}, teacher at {pixels(options, step.training.teacher)} px, {dtype}"
        passes = step.of_teacher[-options.repetitions :]  # not the one that warms up
        of_teacher = [sum(each) for each in passes]
        rest = [a - b - c for a, b, c in zip(seconds, of_teacher, of_plain, strict=True)]
        target = 1.25 if terms == "all" else None
        rows.append(ratio(f"ReaLS step / plain step, {what}", seconds, of_plain, target))
        share = ratio(f"teacher / ReaLS step, {what}", of_teacher, seconds)
        counts = "/".join(sorted({str(len(each)) for each in passes}))
        share.note += f"; passes in a step: {counts}; the MLPs and their losses add {statistics.median(rest):.2g} s"
        rows.append(share)
    return rows


class Step:
    """A training step of examples/train_reals.py on the same images every time.

    Attributes:
        of_teacher: of each call, the seconds of each pass of the teacher.
    """

    def __init__(self, chosen: train_reals.Options, accelerator: Accelerator, images: Tensor) -> None:
        self.training = build(chosen, accelerator)
        self.stream = itertools.repeat(Batch(images, []))
        self.of_teacher: list[list[float]] = []
        if self.training.teacher is not None:
            self.training.teacher.register_forward_pre_hook(self._teacher_starts)
            self.training.teacher.register_forward_hook(self._teacher_ends)

    def __call__(self) -> None:
        self.of_teacher.append([])
        self.training.train_step(self.stream)
        wait()

    def _teacher_starts(self, *_: Any) -> None:
        wait()
        self.of_teacher[-1].append(-time.perf_counter())

    def _teacher_ends(self, *_: Any) -> None:
        wait()
        self.of_teacher[-1][-1] += time.perf_counter()


def write_inputs(options: Options, folder: Path) -> None:
    """What a training reads: an image, the VAE's configuration, a teacher."""
    preset = options.built
    (folder / "images").mkdir()
    Image.new("RGB", (preset.size, preset.size)).save(folder / "images" / "grey.png")
    (folder / "vae.json").write_text(json.dumps(preset.vae.to_dict()), encoding="utf-8")
    SemanticEncoder(options.teacher(1)).save_pretrained(folder / "teacher")


def training_options(options: Options, folder: Path, terms: Terms, dtype: str) -> train_reals.Options:
    return train_reals.Options(
        DataOptions(str(folder / "images"), size=options.built.size, workers=0), output=folder / "output",
        model=folder / "vae.json", teacher=str(folder / "teacher"), losses=TERMS[terms][1], batch_size=options.batch,
        mixed_precision=PRECISIONS[dtype], validation_count=1, tracker="none", seed=SEED,
    )  # fmt: skip


def build(chosen: train_reals.Options, accelerator: Accelerator) -> train_reals.Training:
    """As the example does, but with random weights in LPIPS, whose own would be downloaded."""
    train_reals.check(chosen)
    made = train_reals.Training(chosen, accelerator)
    made.build(random_lpips() if chosen.losses.perceptual else None)
    return made


@cache
def random_lpips() -> nn.Module:
    """One for all steps: it is frozen."""
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls torchvision in a way of old
        return lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval().requires_grad_(False)


def under_autocast(call: Callable, images: Tensor, **more: Any) -> Any:
    with torch.autocast(images.device.type, torch.bfloat16):
        return call(images, **more)


def pixels(options: Options, teacher: SemanticEncoder) -> int:
    """Of the side of what the teacher sees."""
    return options.built.size // teacher.config.stride * teacher.patch


def ratio(name: str, ours: list[float], theirs: list[float], target: float | None = None) -> Row:
    """Our time over theirs."""
    note = f"{statistics.median(ours):.3g} against {statistics.median(theirs):.3g} s"
    return Row.of(name, [a / b for a, b in zip(ours, theirs, strict=True)], "x", target, note)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def finished(call: Callable[[], Any]) -> Callable[[], None]:
    """``call`` that returns when the device has done what it asked for."""

    def whole() -> None:
        call()
        wait()

    return whole


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
