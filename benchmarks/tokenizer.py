"""How fast PSVAE is and how much memory it takes: ``python benchmarks/tokenizer.py``.

Every timing is a ratio within this run: both sides take turns, so that a busy machine slows both. A row shows
the median and the quartiles over the repetitions; rows with a target say whether it was met. It measures and
never judges: the exit code is 0 either way. Weights are random, since speed and memory do not depend on them.
"""

import copy
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import tyro
from diffusers import AutoencoderKL
from measure import (
    DTYPES,
    Row,
    free_memory,
    in_turns,
    machine,
    matrix_product,
    report,
    resident_memory,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from psvae import PSVAE, PixelDecoder, PSVAEConfig
from psvae.losses import kl_loss, pixel_loss, semantic_loss

HEAVY = ("timm", "diffusers", "transformers", "matplotlib")
Group = Literal["encode", "decode", "import", "tiling", "training"]


@dataclass
class Options:
    """What to measure."""

    json: Path = Path("outputs/benchmarks/tokenizer.json")
    """Where the rows are written."""
    only: tuple[Group, ...] = ("encode", "decode", "import", "tiling", "training")
    """The groups to run."""
    quick: bool = False
    """Batches of 1, few repetitions and a smaller tiled image: numbers to look at, not to report."""
    compile: bool = False
    """Also time the decoders under torch.compile."""
    tiled_size: int = 2048
    """Side of the tiled image in pixels; halved until the untiled decode fits into the free memory."""

    @property
    def batch(self) -> int:
        return 1 if self.quick else 4

    @property
    def repetitions(self) -> int:
        return 3 if self.quick else 7


def main(options: Options) -> None:
    """Run the groups, print the table, write the JSON."""
    torch.manual_seed(0)
    print(f"{machine()['cpu']}, {torch.get_num_threads()} threads, batch {options.batch}, 256 px")
    groups = {
        "encode": encode_rows, "decode": decode_rows, "import": import_rows, "tiling": tiling_rows,
        "training": training_rows,
    }  # fmt: skip
    rows = itertools.chain.from_iterable(groups[name](options) for name in options.only)
    report(rows, options.json, batch=options.batch)


# Timing


def ratio_row(
    name: str,
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    options: Options,
    target: float | None = None,
    note: str = "",
) -> Row:
    """Our time over theirs."""
    mine, other = in_turns([ours, theirs], options.repetitions)
    ratios = [a / b for a, b in zip(mine, other, strict=True)]
    rates = [options.batch / statistics.median(seconds) for seconds in (mine, other)]
    return Row.of(name, ratios, "x", target, f"{rates[0]:.2g} against {rates[1]:.2g} images/s{note}")


# Groups


@torch.inference_mode()
def encode_rows(options: Options) -> Iterator[Row]:
    """`PSVAE.encode` at 256 px against the bare encoder at the 224 px that it sees inside."""
    config = PSVAEConfig.dinov2_base()
    model = PSVAE(config).eval()
    bare = timm.create_model(config.encoder.name, pretrained=False, num_classes=0, dynamic_img_size=True).eval()
    for name, dtype in DTYPES.items():
        model.to(dtype), bare.to(dtype)
        images = (torch.rand(options.batch, 3, 256, 256) * 2 - 1).to(dtype)
        small = torch.randn(options.batch, 3, 224, 224).to(dtype)
        yield ratio_row(
            f"PSVAE.encode / timm forward_features, {name}",
            partial(model.encode, images),
            partial(bare.forward_features, small),
            options,
            1.35,
        )


@torch.inference_mode()
def decode_rows(options: Options) -> Iterator[Row]:
    """`PSVAE.decode` against the decoder of diffusers with the same architecture and weights."""
    model = PSVAE(PSVAEConfig.dinov2_base()).eval()
    channels = model.config.latent_channels
    theirs = diffusers_decoder(model.decoder)
    for name, dtype in DTYPES.items():
        model.to(dtype), theirs.to(dtype)
        latents = torch.randn(options.batch, channels, 16, 16).to(dtype)
        ours, other = partial(model.decode, latents), partial(theirs, latents)
        note = ""
        if name == "fp32":
            note = f"; largest difference {(ours().sample - other()).abs().max():.0e}"
        target = {"fp32": 1.0, "bf16": 0.5}[name]
        yield ratio_row(f"PSVAE.decode / diffusers decoder, {name}", ours, other, options, target, note)
        if options.compile:
            compiled = copy.deepcopy(model)
            compiled.decoder.compile()
            ours_compiled, theirs_compiled = partial(compiled.decode, latents), partial(torch.compile(theirs), latents)
            yield ratio_row(f"PSVAE.decode, compiled / as it comes, {name}", ours_compiled, ours, options)
            what = f"PSVAE.decode / diffusers decoder, both compiled, {name}"
            yield ratio_row(what, ours_compiled, theirs_compiled, options)


def import_rows(options: Options) -> Iterator[Row]:
    """What ``import psvae`` adds to ``import torch``, in fresh processes."""
    script = (
        "import json, sys, time; a = time.perf_counter(); import torch; b = time.perf_counter(); import psvae; "
        "c = time.perf_counter(); loaded = [name for name in sys.argv[1:] if name in sys.modules]; "
        "from psvae import PSVAE; print(json.dumps([b - a, c - b, time.perf_counter() - c, loaded]))"
    )
    runs = []
    for _ in range(options.repetitions + 1):  # the first one warms the disk cache
        output = subprocess.run([sys.executable, "-c", script, *HEAVY], check=True, capture_output=True, text=True)
        runs.append(json.loads(output.stdout))
    of_torch, of_psvae, of_class, loaded = (list(column) for column in zip(*runs[1:], strict=True))
    yield Row.of("import torch", of_torch, "s")
    yield Row.of("import psvae, after torch", of_psvae, "s", 0.2)
    yield Row.of("from psvae import PSVAE, after both", of_class, "s")
    names = sorted({name for names in loaded for name in names})
    note = ", ".join(names) or f"none of {', '.join(HEAVY)}"
    yield Row("heavy libraries loaded by import psvae", len(names), "", target=0, note=note)


def tiling_rows(options: Options) -> Iterator[Row]:
    """Peak memory of a large decode, tiled and untiled, each in its own process."""
    if not Path("/proc/self/status").exists():
        print("  tiling: skipped, the peak memory is read from /proc, which this system lacks")
        return
    size = min(options.tiled_size, 1024) if options.quick else options.tiled_size
    while size > 512 and free_memory() < 6 * 4 * 128 * size**2:  # six full-resolution maps, 128 channels, fp32
        size //= 2
    results = []
    for tiled in (False, True):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            results.append(pool.submit(decode_large, size, tiled).result())
    (peak, seconds, whole), (peak_tiled, seconds_tiled, tiles) = results
    what = f"{size} px, fp32"
    note = f"{peak_tiled / 2**30:.2f} against {peak / 2**30:.2f} GiB above the weights"
    yield Row(f"peak memory, tiled / untiled, {what}", peak_tiled / peak, "x", target=0.25, note=note)
    yield Row(f"time, tiled / untiled, {what}", seconds_tiled / seconds, "x", note=f"{seconds:.0f} s untiled, one run")
    difference = abs(tiles - whole)
    note = f"mean {difference.mean():.2g}, pixels of std {whole.std():.2g}: untrained weights"
    yield Row(f"largest difference of tiled from untiled, {what}", float(difference.max()), "", note=note)


def training_rows(options: Options) -> Iterator[Row]:
    """A training step of each stage, and its share of the rate of plain matrix products.

    Above 1 is possible: PyTorch's convolutions and matrix products come from different libraries.
    """
    images = torch.rand(options.batch, 3, 256, 256) * 2 - 1
    for stage in (1, 2):
        model = PSVAE(PSVAEConfig.dinov2_base()).train()
        frozen = copy.deepcopy(model.encoder).requires_grad_(False)
        model.encoder.requires_grad_(stage == 2)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
        step = partial(training_step, stage, model, frozen, optimizer, images)
        with FlopCounterMode(display=False) as counter:
            step(torch.float32)
        gflop = counter.get_total_flops() / 1e9
        for name, dtype in DTYPES.items():
            product, product_gflop = matrix_product(dtype)
            of_step, of_product = in_turns([partial(step, dtype), product], 3)  # a step is long: three will do
            rate = product_gflop / statistics.median(of_product)
            share = [gflop / a / (product_gflop / b) for a, b in zip(of_step, of_product, strict=True)]
            what = f"stage {stage}, {name}{' autocast' if name == 'bf16' else ''}"
            note = f"{gflop:.0f} GFLOP; L1, no LPIPS, no discriminator"
            yield Row.of(f"training step, {what}", of_step, "s", note=note)
            yield Row.of(f"share of the matrix-product rate, {what}", share, "", note=f"of {rate:.0f} GFLOP/s")
        del model, frozen, optimizer, trained, step  # before the next stage allocates its own


# Parts


def diffusers_decoder(decoder: PixelDecoder) -> nn.Module:
    """The decoder of ``AutoencoderKL`` with the architecture and the weights of ours."""
    config = decoder.config
    levels = len(config.channel_multipliers)
    theirs = AutoencoderKL(
        block_out_channels=[config.base_channels * m for m in config.channel_multipliers],
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * (levels - 1),
        latent_channels=config.latent_channels,
        layers_per_block=config.num_res_blocks,
    ).decoder.eval()
    names = {
        "middle.block1.": "mid_block.resnets.0.", "middle.block2.": "mid_block.resnets.1.",
        "middle.attention.": "mid_block.attentions.0.", "levels.": "up_blocks.", ".blocks.": ".resnets.",
        ".upsample.": ".upsamplers.0.", ".shortcut.": ".conv_shortcut.", ".q.": ".to_q.", ".k.": ".to_k.",
        ".v.": ".to_v.", ".proj.": ".to_out.0.", "norm_out.": "conv_norm_out.",
    }  # fmt: skip
    state = {}
    for key, value in decoder.state_dict().items():
        for ours, other in names.items():
            key = key.replace(ours, other)
        state[key.replace(".norm.", ".group_norm.")] = value
    theirs.load_state_dict(state)
    return theirs


def decode_large(size: int, tiled: bool) -> tuple[int, float, Any]:
    """(peak bytes above what was resident before, seconds, image). Runs in its own process."""
    torch.manual_seed(0)
    model = PSVAE(PSVAEConfig.dinov2_base()).eval()
    if tiled:
        model.enable_tiling()
    latents = torch.randn(1, model.config.latent_channels, size // 16, size // 16)
    with torch.inference_mode():
        model.decoder(latents[..., :1, :1])  # libraries set themselves up at the first call
        before, start = resident_memory("VmRSS"), time.perf_counter()
        image = model.decode(latents).sample
        return resident_memory("VmHWM") - before, time.perf_counter() - start, image.numpy()


def training_step(
    stage: int, model: PSVAE, frozen: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, dtype: torch.dtype
) -> None:
    """One step of the paper's stage 1 or 2, under autocast unless ``dtype`` is fp32."""
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        output = model(images, sample_posterior=True, detach_latents=stage == 1)
        with torch.no_grad():
            target = output.features if stage == 1 else frozen(images)
    semantic = semantic_loss(output.rebuilt_features, target)
    if stage == 2:
        semantic = semantic + semantic_loss(output.features, target)
    loss = semantic + 1e-4 * kl_loss(output.posterior, reduction="mean") + pixel_loss(output.sample, images)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
