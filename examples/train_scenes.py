"""A tokenizer, text-to-image and editing from nothing, on two CPU cores, scored as GenEval scores (``make scenes``).

    python examples/train_scenes.py                  # about 21 minutes; pictures and scores.json in outputs/scenes
    python examples/train_scenes.py --share 0.02     # the same path in seconds

The data is drawn (examples/scenes), so nothing is downloaded; what is scored was held out of training: colours on
shapes, and pairs of things, that no training picture shows. `--resume` goes on after a kill.
"""

import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import scenes
import torch
import tyro
from checkpoints import changed, write_text
from pairs import Batches, Pairs
from sampling import TOKENIZER
from scenes.show import sheet
from scenes.world import Scene
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from train_generator import Training, TrainingOptions, make_accelerator

from psvae import (
    PSVAE,
    DeepFusionDiT,
    DeepFusionDiTConfig,
    PixelDecoderConfig,
    PrefixCache,
    PSVAEConfig,
    SemanticEncoderConfig,
    SemanticVAEConfig,
    fit_latent_statistics,
    flow,
    losses,
)

CHANNELS, STRIDE, PATCH, WIDTH = 4, 4, 4, 192  # four tokens of the generator per cell of the board
GRID = scenes.SIZE // STRIDE
# What a picture of flat colours shows is decided early, in much noise: there it is trained and sampled most.
SIGMA_MEAN, SIGMA_STD, SHIFT = 1.0, 1.5, 4.0
HELD_OUT_SEED = 10**9  # beyond every seed that training draws


@dataclass(frozen=True)
class Options:
    """Train and score the three on drawn scenes."""

    output: Path = Path("outputs/scenes")
    share: float = 1.0
    """Of the steps; 1 is about 21 minutes on two cores."""
    prompts: int = 100
    """Per task."""
    edits: int = 50
    """Per kind of edit."""
    seed: int = 0
    resume: bool = False
    """Keep what an earlier run finished, and go on."""
    compile: bool = True
    """`torch.compile` the generator; needs a C++ compiler."""
    tokenizer_steps: int = 1800
    image_steps: int = 5500
    edit_steps: int = 6000
    image_pairs: int = 24_000
    """Pictures and captions to train on, each seen several times."""
    edit_pairs: int = 12_000
    guidance: float = 3.0
    edit_guidance: float = 2.0
    sampling_steps: int = 25


def main(options: Options) -> dict[str, Any]:
    started = time.time()
    claim(options)
    vae = tokenizer(options)
    generator = train(options, vae, "text_to_image", None)
    editor = train(options, vae, "editing", options.output / "text_to_image" / "model")
    table: dict[str, Any] = {"tokenizer": score_tokenizer(vae, options)}
    table["text_to_image"] = score_images(generator, vae, options)
    table["editing"] = score_edits(editor, vae, options, held_out=True)
    table["editing_seen_combinations"] = score_edits(editor, vae, options, held_out=False)
    table["minutes"] = round((time.time() - started) / 60, 1)
    table["resumed"] = options.resume
    table["options"] = settings(options)
    write_text(options.output / "scores.json", json.dumps(table, indent=2) + "\n")
    print_table(table)
    return table


def settings(options: Options) -> dict[str, Any]:
    """What decides the result."""
    return {key: value for key, value in vars(options).items() if key not in ("output", "resume", "compile")}


def claim(options: Options) -> None:
    """Leave what another run made alone: stages of two runs do not go together."""
    file = options.output / "options.json"
    earlier = json.loads(file.read_text()) if file.exists() else None
    if earlier is None:
        write_text(file, json.dumps(settings(options), indent=2) + "\n")
    elif not options.resume:
        raise SystemExit(
            f"{options.output} holds an earlier run: --resume goes on with it, another --output begins anew"
        )
    elif earlier != settings(options):
        said = changed(earlier, settings(options))
        raise SystemExit(f"{options.output} was begun with other options ({said}); another --output begins anew")


# Training


def tokenizer(options: Options) -> PSVAE:
    """A PSVAE trained on pixels alone: there is no pretrained encoder here to stay near to."""
    folder = options.output / "tokenizer"
    if options.resume and (folder / "config.json").exists():
        return PSVAE.from_pretrained(folder)
    torch.manual_seed(options.seed)
    width, heads = 128, 2
    vit = {"img_size": scenes.SIZE, "patch_size": STRIDE, "embed_dim": width, "depth": 2, "num_heads": heads}
    vae = PSVAE(
        PSVAEConfig(
            encoder=SemanticEncoderConfig("vit_tiny_patch16_224", vit, stride=STRIDE),
            vae=SemanticVAEConfig(
                width, CHANNELS, depth=1, num_heads=heads, mlp_dim=4 * width, layer_scale=None, initial_logvar=-5.0
            ),
            decoder=PixelDecoderConfig(
                CHANNELS, base_channels=16, channel_multipliers=(1, 2, 4), num_res_blocks=1, norm_groups=8
            ),
            sample_size=scenes.SIZE,
        )
    )
    steps = max(2, round(options.tokenizer_steps * options.share))
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-4, total_steps=steps, pct_start=0.1)
    for step in (bar := tqdm(range(steps), "tokenizer")):
        images = pictures(step * 8, 8)
        with torch.autocast("cpu", torch.bfloat16):
            output = vae(images, sample_posterior=True)
        sample = output.sample.float()
        loss = losses.pixel_loss(sample, images) + 2 * losses.pixel_loss(sample, images, norm="l2")
        loss = loss + 1e-5 * losses.kl_loss(output.posterior, reduction="mean")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    fit_latent_statistics(vae.eval(), (pictures(step * 64, 64) for step in range(16)))
    vae.save_pretrained(folder)
    return vae


def train(options: Options, vae: PSVAE, task: str, init: Path | None) -> DeepFusionDiT:
    """`train_generator.Training` on drawn pairs, or on drawn triples from an earlier model."""
    folder = options.output / task
    if options.resume and (folder / "model" / "config.json").exists():
        return DeepFusionDiT.from_pretrained(folder / "model")
    edits = init is not None
    steps = max(2, round((options.edit_steps if edits else options.image_steps) * options.share))
    training = TrainingOptions(
        output=folder, steps=steps, batch_size=32, lr=1e-3, warmup=min(100, steps // 10 + 1), final_lr=0.02,
        ema=0.995, drop_source=0.0, shift=1.0, sigma_mean=SIGMA_MEAN, sigma_std=SIGMA_STD, mixed_precision="bf16",
        compile=options.compile, seed=options.seed, resume=options.resume, log_every=20,
        sample_every=max(1, steps // 4), checkpoint_every=max(1, steps // 4), sampling_steps=options.sampling_steps,
        sampling_shift=SHIFT, guidance=options.guidance, tracker="none",
    )  # fmt: skip
    count = max(64, round((options.edit_pairs if edits else options.image_pairs) * options.share))
    pairs = (edit_pairs if edits else image_pairs)(vae, count)
    tokenise = partial(scenes.encode_many, length=scenes.EDIT_LENGTH if edits else scenes.LENGTH)
    accelerator = make_accelerator(training)
    if init is None:
        torch.manual_seed(options.seed)
        model = DeepFusionDiT(generator_config())
    else:
        model = DeepFusionDiT.from_pretrained(init)
    with sdpa_kernel(SDPBackend.MATH):  # on a CPU the backward of flash attention is slow in bf16 with few tokens
        Training(training, accelerator, model, vae, tokenise, pairs).run()
    scenes.save_tokenizer(folder / "model" / TOKENIZER)
    accelerator.free_memory()
    vae.cpu()  # back from where it was trained with; scoring is on the CPU
    return DeepFusionDiT.from_pretrained(folder / "model")


def generator_config() -> DeepFusionDiTConfig:
    return DeepFusionDiTConfig.tiny(CHANNELS, len(scenes.WORDS)).replace(
        patch_size=PATCH, hidden_size=WIDTH, num_attention_heads=3, num_key_value_heads=1, intermediate_size=512,
        head_width=WIDTH, head_num_heads=3, head_intermediate_size=512,
    )  # fmt: skip


def image_pairs(vae: PSVAE, count: int) -> Batches:
    """(caption, picture), the picture as latents: encoding one again costs as much as training on it."""
    examples = [scenes.example(place) for place in range(count)]
    return shuffled(
        [prompt.text for _, prompt in examples], encode_all(vae, [scene for scene, _ in examples]), sources=None
    )


def edit_pairs(vae: PSVAE, count: int) -> Batches:
    """(source, instruction, target), the pictures as latents."""
    edits = [scenes.edit_example(place) for place in range(count)]
    targets, sources = (encode_all(vae, [getattr(edit, side) for edit in edits]) for side in ("target", "source"))
    return shuffled([edit.instruction for edit in edits], targets, sources)


@torch.no_grad()
@torch.autocast("cpu", torch.bfloat16)
def encode_all(vae: PSVAE, drawn: list[Scene]) -> Tensor:
    parts = [drawn[start : start + 64] for start in range(0, len(drawn), 64)]
    return torch.cat([
        vae.encode(scenes.draw_many(part)).latent_dist.mode().float() for part in tqdm(parts, "latents")
    ])  # fmt: skip


def shuffled(texts: list[str], latents: Tensor, sources: Tensor | None) -> Batches:
    """An endless stream of random batches, each a function of its number alone, so that a resumed run repeats it."""

    def batches(batch_size: int, seed: int, rank: int, world: int, start: int) -> Iterator[Pairs]:
        for step in itertools.count(start * world + rank, world):
            draw = torch.Generator().manual_seed(seed * 1_000_003 + step)
            places = torch.randint(len(texts), (batch_size,), generator=draw)
            picked = None if sources is None else sources[places]
            yield Pairs([texts[place] for place in places], None, latents[places], None, picked, [])

    return batches


def pictures(seed: int, count: int) -> Tensor:
    """As captions and as edits have them, half and half."""
    half = range(seed // 2, (seed + count) // 2)
    return scenes.draw_many([
        *(scenes.example(place)[0] for place in half), *(scenes.edit_example(place).target for place in half)
    ])  # fmt: skip


# Scoring


@torch.no_grad()
@torch.autocast("cpu", torch.bfloat16)
def score_tokenizer(vae: PSVAE, options: Options) -> dict[str, float]:
    """What the latents can hold: an upper bound for all that follows."""
    found, error = [], []
    for task in scenes.TASKS:
        examples = [scenes.example(HELD_OUT_SEED + place, task, held_out=True) for place in range(options.prompts)]
        images = scenes.draw_many([scene for scene, _ in examples])
        rebuilt = vae(images, sample_posterior=False).sample.float().clamp(-1, 1)
        found += scenes.score_prompts(rebuilt, [prompt for _, prompt in examples])
        error.append((rebuilt - images).square().mean())
    psnr = 10 * torch.log10(4 / torch.stack(error).mean())
    return {"psnr": round(psnr.item(), 2), "detected": round(sum(found) / len(found), 3)}


@torch.no_grad()
def score_images(model: DeepFusionDiT, vae: PSVAE, options: Options) -> dict[str, float]:
    """Share of right pictures by task, on combinations that training never saw; the mean is GenEval's."""
    scores, cells = {}, []
    for task in tqdm(scenes.TASKS, "text to image"):
        prompts = scenes.evaluation_prompts(task, options.prompts, held_out=True, seed=HELD_OUT_SEED)
        images = generate(model, vae, [prompt.text for prompt in prompts], None, options)
        right = scenes.score_prompts(images, prompts)
        scores[task] = round(sum(right) / len(right), 3)
        cells += [([image], prompt.text) for image, prompt in zip(images[:8], prompts, strict=False)]
    sheet(cells, columns=8).save(options.output / "text_to_image.png")
    return scores | {"mean": round(sum(scores.values()) / len(scores), 3)}


@torch.no_grad()
def score_edits(model: DeepFusionDiT, vae: PSVAE, options: Options, held_out: bool) -> dict[str, Any]:
    """By kind of edit: share followed, and the PSNR of what should stay, against the source's own pixels."""
    table: dict[str, Any] = {}
    cells: list[tuple[list[Tensor], str]] = []
    for kind in tqdm(scenes.EDITS, "editing"):
        edits = [scenes.edit_example(HELD_OUT_SEED + place, kind, held_out) for place in range(options.edits)]
        sources = scenes.draw_many([edit.source for edit in edits])
        images = generate(model, vae, [edit.instruction for edit in edits], sources, options)
        found = scenes.score_edits(sources, images, edits)
        followed = [right for right, _ in found]
        table[kind] = {
            "followed": round(sum(followed) / len(found), 3),
            "preserved_psnr": round(sum(psnr for _, psnr in found) / len(found), 2),
        }
        cells += [([s, i], e.instruction) for s, i, e in zip(sources[:4], images, edits, strict=False)]
    if held_out:
        sheet(cells, columns=4).save(options.output / "editing.png")
    for name in ("followed", "preserved_psnr"):
        table[name] = round(sum(table[kind][name] for kind in scenes.EDITS) / len(scenes.EDITS), 3)
    return table


@torch.autocast("cpu", torch.bfloat16)
def generate(model: DeepFusionDiT, vae: PSVAE, texts: list[str], sources: Tensor | None, options: Options) -> Tensor:
    """Pictures ``B 3 64 64`` in [-1, 1], guided against no condition, of an edit against its source alone."""
    ids, mask = scenes.encode_many(texts)
    source_latents = None if sources is None else vae.encode(sources).latent_dist.mode()
    full = model.encode_prefix(ids, mask, source_latents=source_latents)
    if sources is None:
        empty, scale = PrefixCache.empty(model.config, len(texts)), options.guidance
    else:
        empty, scale = model.encode_prefix(source_latents=source_latents), options.edit_guidance
    velocity = flow.guided(model, {"full": full, "empty": empty}, flow.Guidance(scale))
    noise = torch.randn(len(texts), CHANNELS, GRID, GRID, generator=torch.Generator().manual_seed(options.seed))
    latents = flow.sample(velocity, noise, flow.sigma_schedule(options.sampling_steps, SHIFT))
    return vae.decode(latents).sample.float().clamp(-1, 1)


def print_table(table: dict[str, Any]) -> None:
    print(f"\ntokenizer {table['tokenizer']['psnr']} dB, {table['tokenizer']['detected']:.0%} of scenes still detected")
    for task, score in table["text_to_image"].items():
        print(f"{task:24s}{score:7.2f}")
    edits, seen = table["editing"], table["editing_seen_combinations"]
    for kind in scenes.EDITS:
        print(f"edit: {kind:18s}{edits[kind]['followed']:7.2f}   {edits[kind]['preserved_psnr']:.1f} dB kept")
    print(f"edits{edits['followed']:26.2f}   {edits['preserved_psnr']:.1f} dB kept")
    print(f"edits, combinations seen{seen['followed']:7.2f}   {seen['preserved_psnr']:.1f} dB kept")
    for name, (value, target) in targets(table).items():
        print(f"{name}: {value:.2f}, wanted {target:g}: {'met' if value >= target else 'missed'}")
    print(f"{table['minutes']} minutes")


def targets(table: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Measured and wanted."""
    images, edits = table["text_to_image"], table["editing"]
    return {
        "single object": (images["single_object"], 0.9),
        "colour": (images["colour"], 0.85),
        "two objects": (images["two_objects"], 0.6),
        "edits followed": (edits["followed"], 0.6),
        "edits preserved, dB": (edits["preserved_psnr"], 24.0),
    }


if __name__ == "__main__":
    main(tyro.cli(Options))
