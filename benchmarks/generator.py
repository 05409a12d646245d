"""How fast DeepFusionDiT is and how much memory it takes: ``python benchmarks/generator.py``.

The paper's smaller generator (0.5B, its wide head included) on latents 96 x 16 x 16, random weights. Timings are
ratios within this run, both sides in turns; "x" counts how many times as fast ours is, so above 1 is in its favour.
An image is 50 steps: unless ``--images`` runs them, its time is that of the prefix plus 50 times that of a step.
Without guidance, which has a group of its own: its unconditional branch has no prefix, so nothing to save.
"""

import itertools
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import torch
import tyro
from diffusers import OmniGenTransformer2DModel
from measure import DTYPES, Row, in_turns, machine, matrix_product, report, resident_memory, seconds_of
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from psvae import DeepFusionDiT, DeepFusionDiTConfig, PrefixCache, flow
from psvae.nn.attention import attention

Group = Literal["cache", "peer", "attention", "guidance", "compile", "training"]
GRID, STEPS = 16, 50
PREFIX_LENGTHS = (48, 64, 77, 128, 256)
SEED = 0


@dataclass
class Options:
    """What to measure."""

    json: Path = Path("outputs/benchmarks/generator.json")
    """Where the rows are written."""
    only: tuple[Group, ...] = ("cache", "peer", "attention", "guidance", "compile", "training")
    """The groups to run."""
    preset: Literal["qwen2_5_0_5b", "tiny"] = "qwen2_5_0_5b"
    """``tiny`` only shows that the benchmark runs; the targets are the other's."""
    dtypes: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    batches: tuple[int, ...] = (1, 4)
    cases: tuple[Literal["short", "long", "edit"], ...] = ("short", "long", "edit")
    """What conditions, in the groups ``cache`` and ``attention``: 64 words, 256 words, a source and 64 words."""
    repetitions: int = 5
    images: bool = False
    """Also sample whole images, step by step."""
    inductor: bool = False
    """Also time the compiled step, which takes minutes to build."""

    @property
    def config(self) -> DeepFusionDiTConfig:
        return getattr(DeepFusionDiTConfig, self.preset)(in_channels=96)

    @property
    def kinds(self) -> Iterator[tuple[str, torch.dtype, int]]:
        for name, batch in itertools.product(self.dtypes, self.batches):
            yield f"{name}, batch {batch}", DTYPES[name], batch


@dataclass(frozen=True)
class Case:
    """What conditions an image."""

    name: str
    words: int
    target: float
    """At least how many times as fast its cached step is."""
    source: bool = False

    def inputs(self, model: DeepFusionDiT, batch: int, dtype: torch.dtype) -> dict[str, Tensor]:
        config = model.config
        inputs = {"input_ids": torch.randint(config.vocab_size or 1, (batch, self.words))}
        return inputs | ({"source_latents": noise(config, batch, dtype)} if self.source else {})


CASES = {
    "short": Case("64 words", 64, 1.15),
    "long": Case("256 words", 256, 1.6),
    "edit": Case("edit, 256 source tokens, 64 words", 64, 1.8, source=True),
}
SHORT, LONG, EDIT = CASES.values()


def main(options: Options) -> None:
    torch.manual_seed(SEED)
    print(f"{machine()['cpu']}, {torch.get_num_threads()} threads, {options.preset}, 96 x {GRID} x {GRID} latents")
    groups = {
        "cache": cache_rows, "peer": peer_rows, "attention": attention_rows, "guidance": guidance_rows,
        "compile": compile_rows, "training": training_rows,
    }  # fmt: skip
    rows = itertools.chain.from_iterable(groups[name](options) for name in options.only)
    report(rows, options.json, preset=options.preset)


# Groups


@torch.no_grad()
def cache_rows(options: Options) -> Iterator[Row]:
    """One step with the prefix cached against the step that encodes it again, and the share of the machine's rate."""
    model = DeepFusionDiT(options.config).eval()
    for kind, dtype, batch in options.kinds:
        model.to(dtype)
        x, sigmas = noise(model.config, batch, dtype), torch.full((batch,), 0.5)
        for case in (CASES[name] for name in options.cases):
            inputs = case.inputs(model, batch, dtype)
            encode = partial(model.encode_prefix, **inputs)
            cached, uncached = partial(model, x, sigmas, encode()), partial(model, x, sigmas, **inputs)
            product, product_gflop = matrix_product(dtype)
            timed = in_turns([cached, uncached, encode, product], options.repetitions)
            what = f"{case.name}, {kind}"
            of_cached, of_uncached, of_prefix, of_product = timed
            note = f"{statistics.median(of_cached):.2f} against {statistics.median(of_uncached):.2f} s"
            yield speedup(f"cached step, {what}", of_cached, of_uncached, case.target, note)
            ours = [prefix + STEPS * step for prefix, step in zip(of_prefix, of_cached, strict=True)]
            theirs = [STEPS * step for step in of_uncached]
            yield speedup(f"cached image, {what}", ours, theirs, case.target, per_image(ours, theirs, batch))
            yield rate_share(f"cached step, {what}", gflop(cached), of_cached, product_gflop, of_product)
            if options.images:
                images = [partial(whole_image, model, inputs, x, cached=cached) for cached in (True, False)]
                ours, theirs = map(seconds_of, images)
                note = f"{per_image([ours], [theirs], batch)}; {STEPS} steps run, once"
                name = f"cached image, sampled, {what}"
                yield Row(name, theirs / ours, "x", target=case.target, note=note, at_least=True)


@torch.no_grad()
def peer_rows(options: Options) -> Iterator[Row]:
    """An image against OmniGen's of the same width and depth, which computes its prefix in every step.

    Its attention takes no grouped keys, so it has as many key heads as query heads.
    """
    config = options.config.replace(vocab_size=1024)  # a look-up: its size costs memory alone
    ours = DeepFusionDiT(config).eval()
    linear = DeepFusionDiT(config.replace(head="linear")).eval()
    theirs = omnigen(config).eval()
    for kind, dtype, batch in options.kinds:
        for model in (ours, linear, theirs):
            model.to(dtype)
        inputs = LONG.inputs(ours, batch, dtype)
        x, sigmas = noise(config, batch, dtype), torch.full((batch,), 0.5)
        prefix = ours.encode_prefix(**inputs)
        calls = [
            partial(ours.encode_prefix, **inputs),
            partial(ours, x, sigmas, prefix),
            partial(linear, x, sigmas, prefix),
            partial(theirs, x, sigmas, **omnigen_inputs(inputs["input_ids"])),
        ]
        of_prefix, of_ours, of_linear, of_theirs = in_turns(calls, options.repetitions)
        other = [STEPS * step for step in of_theirs]
        for name, steps, target in (("DeepFusionDiT", of_ours, 1.5), ("with a linear head", of_linear, None)):
            image = [a + STEPS * step for a, step in zip(of_prefix, steps, strict=True)]
            what = f"{name} against OmniGen, image, {LONG.name}, {kind}"
            yield speedup(what, image, other, target, per_image(image, other, batch))


@torch.no_grad()
def attention_rows(options: Options) -> Iterator[Row]:
    """The attention of [source | text | noisy] alone: a call per segment against one call with a dense mask."""
    config = options.config
    for kind, dtype, batch in options.kinds:
        for case in (CASES[name] for name in options.cases):
            lengths = [GRID**2] * case.source + [case.words, GRID**2]
            heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
            q, k, v = (torch.randn(batch, h, sum(lengths), config.attention_head_dim, dtype=dtype) for h in heads)
            text = int(case.source)  # its place
            mask = visibility(lengths, text)
            calls = [
                partial(attend_by_segment, q, k, v, mask, lengths, text),
                partial(scaled_dot_product_attention, q, k, v, attn_mask=mask, enable_gqa=True),
            ]
            torch.testing.assert_close(calls[0](), calls[1](), rtol=1e-2, atol=1e-2)
            ours, theirs = in_turns([partial(repeat, call) for call in calls], options.repetitions)
            note = f"{statistics.median(ours) * 100:.2g} against {statistics.median(theirs) * 100:.2g} ms a layer"
            yield speedup(f"segment attention against a dense mask, {case.name}, {kind}", ours, theirs, note=note)


@torch.no_grad()
def guidance_rows(options: Options) -> Iterator[Row]:
    """A guided step with its branches in one batch against one after the other."""
    model = DeepFusionDiT(options.config).eval()
    for kind, dtype, batch in options.kinds:
        model.to(dtype)
        x, sigmas = noise(model.config, batch, dtype), torch.full((batch,), 0.5)
        inputs = EDIT.inputs(model, batch, dtype)
        empty = PrefixCache.empty(model.config, batch, dtype=dtype)
        text = model.encode_prefix(inputs["input_ids"])
        image = model.encode_prefix(source_latents=inputs["source_latents"])
        edit = {"full": model.encode_prefix(**inputs), "image": image, "text": text}
        for name, guidance, prefixes in (
            (f"{SHORT.name}, 2 branches", flow.Guidance(), {"full": text, "empty": empty}),
            (f"{EDIT.name}, 3 branches", flow.Guidance(image_scale=2.0), edit),
        ):
            calls = [
                partial(flow.guided(model, prefixes, guidance, batched=batched), x, sigmas) for batched in (True, False)
            ]
            ours, theirs = in_turns(calls, options.repetitions)
            note = f"{statistics.median(ours):.2f} against {statistics.median(theirs):.2f} s"
            yield speedup(f"batched guidance against sequential, {name}, {kind}", ours, theirs, note=note)


@torch.no_grad()
def compile_rows(options: Options) -> Iterator[Row]:
    """Graphs that `torch.compile` makes of the cached step; ``fullgraph`` raises at the first break."""
    model = DeepFusionDiT(options.config).eval()
    x, sigmas = noise(model.config, 1, torch.float32), torch.full((1,), 0.5)
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    step = torch.compile(model, fullgraph=True, backend=count)
    for length in PREFIX_LENGTHS:
        step(x, sigmas, model.encode_prefix(torch.zeros(1, length, dtype=torch.long)))
    note = f"no graph break; prefixes of {', '.join(map(str, PREFIX_LENGTHS))}"
    yield Row("graphs of the compiled cached step", len(graphs), "", target=2, note=note)
    if not options.inductor:
        return
    for kind, dtype, batch in options.kinds:
        torch.compiler.reset()
        model.to(dtype)
        x, sigmas = noise(model.config, batch, dtype), torch.full((batch,), 0.5)
        prefix = model.encode_prefix(**LONG.inputs(model, batch, dtype))
        compiled = partial(torch.compile(model, fullgraph=True), x, sigmas, prefix)
        ours, theirs = in_turns([compiled, partial(model, x, sigmas, prefix)], options.repetitions)
        note = f"{statistics.median(ours):.2f} against {statistics.median(theirs):.2f} s"
        yield speedup(f"compiled cached step against eager, {LONG.name}, {kind}", ours, theirs, note=note)


def training_rows(options: Options) -> Iterator[Row]:
    """Forward, backward and plain SGD: memory is weights, gradients and activations. Under autocast for bf16."""
    model = DeepFusionDiT(options.config)
    for kind, dtype, batch in options.kinds:
        kept, recomputed = (partial(training_step, model, batch, dtype, checkpointing=c) for c in (False, True))
        product, product_gflop = matrix_product(dtype)
        work = gflop(kept)
        of_kept, of_recomputed, of_product = in_turns([kept, recomputed, product], min(3, options.repetitions))
        note = f"{work:.0f} GFLOP"
        yield Row.of(f"training step, {SHORT.name}, {kind}", of_kept, "s", note=note)
        yield rate_share(f"training step, {kind}", work, of_kept, product_gflop, of_product)
        ratios = [a / b for a, b in zip(of_recomputed, of_kept, strict=True)]
        yield Row.of(f"time with gradient checkpointing / without, {kind}", ratios, "x")
    del model
    if not Path("/proc/self/status").exists():
        print("  training: the peak memory is read from /proc, which this system lacks")
        return
    for kind, dtype, batch in options.kinds:
        peaks = []
        for checkpointing in (True, False):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                peaks.append(pool.submit(training_memory, options.config, batch, dtype, checkpointing).result())
        note = f"{peaks[0] / 2**30:.2f} against {peaks[1] / 2**30:.2f} GiB above weights and gradients"
        yield Row(f"peak memory with gradient checkpointing / without, {kind}", peaks[0] / peaks[1], "x", note=note)


# Parts


def speedup(name: str, ours: list[float], theirs: list[float], target: float | None = None, note: str = "") -> Row:
    """How many times as fast ours is."""
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    return Row.of(name, ratios, "x", target, note, at_least=True)


def rate_share(name: str, work: float, seconds: list[float], product_work: float, of_product: list[float]) -> Row:
    """GFLOP/s over those of plain matrix products."""
    rates, most = ([amount / s for s in times] for amount, times in ((work, seconds), (product_work, of_product)))
    note = f"{statistics.median(rates):.0f} of {statistics.median(most):.0f} GFLOP/s"
    shares = [a / b for a, b in zip(rates, most, strict=True)]
    return Row.of(f"share of the matrix-product rate, {name}", shares, "", note=note)


def per_image(ours: list[float], theirs: list[float], batch: int) -> str:
    a, b = (statistics.median(seconds) / batch for seconds in (ours, theirs))
    return f"{a:.1f} against {b:.1f} s an image"


def noise(config: DeepFusionDiTConfig, batch: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(batch, config.in_channels, GRID, GRID, dtype=dtype)


def gflop(call: Callable) -> float:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 1e9


def repeat(call: Callable, times: int = 10) -> None:
    for _ in range(times):
        call()


def attend_by_segment(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, lengths: list[int], text: int) -> Tensor:
    """Each segment to those before it and to itself; only the text's call has a mask."""
    found, end = [], 0
    for index, length in enumerate(lengths):
        own, end = slice(end, end + length), end + length
        causal = mask[None, None, own, :end] if index == text else None
        found.append(attention(q[:, :, own], k[:, :, :end], v[:, :, :end], causal))
    return torch.cat(found, dim=2)


def whole_image(model: DeepFusionDiT, inputs: dict[str, Tensor], x: Tensor, *, cached: bool) -> Tensor:
    """50 Euler steps, the prefix encoded once or in each."""
    given = {"prefix": model.encode_prefix(**inputs)} if cached else inputs
    return flow.sample(lambda x, sigmas: model(x, sigmas, **given).sample, x, flow.sigma_schedule(STEPS, shift=3.0))


def visibility(lengths: list[int], text: int) -> Tensor:
    """Which token may look at which: all of the segments before, and of its own, causally in the text's."""
    kind = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    index = torch.arange(len(kind))
    later = (kind[:, None] == text) & (kind == text) & (index > index[:, None])
    return (kind <= kind[:, None]) & ~later


def omnigen(config: DeepFusionDiTConfig) -> OmniGenTransformer2DModel:
    turns = [1.0] * (config.attention_head_dim // 2)
    return OmniGenTransformer2DModel(
        in_channels=config.in_channels, patch_size=1, hidden_size=config.hidden_size, num_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads, num_key_value_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size, vocab_size=config.vocab_size, pad_token_id=0,
        pos_embed_max_size=GRID, rope_scaling={"short_factor": turns, "long_factor": turns},
    )  # fmt: skip


def omnigen_inputs(input_ids: Tensor) -> dict:
    """Text, one token of time, noisy latents; text causal, as its pipeline has it."""
    batch, words = input_ids.shape
    mask = visibility([words, 1, GRID**2], text=0)
    return {
        "input_ids": input_ids, "input_img_latents": [], "input_image_sizes": {},
        "attention_mask": mask.long().expand(batch, -1, -1),
        "position_ids": torch.arange(len(mask)).expand(batch, -1),
    }  # fmt: skip


def training_step(model: DeepFusionDiT, batch: int, dtype: torch.dtype, *, checkpointing: bool) -> None:
    (model.enable_gradient_checkpointing if checkpointing else model.disable_gradient_checkpointing)()
    inputs = SHORT.inputs(model, batch, torch.float32)
    x, noisy, sigmas = *(noise(model.config, batch, torch.float32) for _ in range(2)), flow.sample_sigmas(batch)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        velocity = model(flow.add_noise(x, noisy, sigmas), sigmas, **inputs).sample
    flow.flow_loss(velocity, x, noisy).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=1e-4)
                parameter.grad.zero_()


def training_memory(config: DeepFusionDiTConfig, batch: int, dtype: torch.dtype, checkpointing: bool) -> int:
    """Peak bytes of a step above weights and gradients. Runs in its own process."""
    torch.manual_seed(SEED)
    model = DeepFusionDiT(config)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) + 0  # touched, so that it is resident
    before = resident_memory("VmRSS")
    training_step(model, batch, dtype, checkpointing=checkpointing)
    return resident_memory("VmHWM") - before


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
