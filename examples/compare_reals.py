"""A plain VAE and a ReaLS VAE of one seed, data and steps, compared by what their latents know (``make reals``).

    python examples/compare_reals.py                         # drawn scenes; table.json and pictures in --output
    python examples/compare_reals.py --data cifar10.parquet  # any labelled pictures, without masks
    python examples/compare_reals.py --share 0.02            # the same path in a minute or two

Trained one after the other, each kept in its folder so that `--resume` goes on: a teacher and a judge (small Vision
Transformers that name a picture's class, of different seeds), the two VAEs by train_reals.py, and in the latents of
each a class-conditional SiT by train_sit.py. All numbers are of pictures that nothing was trained on.
"""

import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import downstream
import numpy as np
import scenes
import torch
import train_reals
import tyro
import visualise_latents
from checkpoints import changed, write_text
from data import DataOptions, center_transform, open_table, read_image
from generation import Options as Generation
from generation import distance, generate
from PIL import Image
from scenes.compose import SHAPES, background, place
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import save_image
from tqdm import tqdm

from psvae import PixelDecoderConfig, PixelVAE, PixelVAEConfig, SemanticEncoder, SemanticEncoderConfig
from psvae.encoders import EncoderTokens, PixelEncoderConfig

KINDS = ("plain", "reals")
GRID, CHANNELS, WIDTH = 8, 8, 192  # cells on a side of latents and features alike, Z, the teacher's D


@dataclass(frozen=True)
class Options:
    """Compare a ReaLS VAE with a plain one."""

    data: Path | None = None
    """Columns image and label: a parquet file, of which the last pictures are held out after shuffling, or a Hugging
    Face dataset (id, or folder of parquet files) with splits train and test. None draws scenes."""
    output: Path = Path("outputs/compare_reals")
    share: float = 1.0
    """Of all steps and pictures; 1 is at most 25 minutes on two cores."""
    train_pictures: int = 12_000
    test_pictures: int = 2000
    teacher_steps: int = 900
    vae_steps: int = 1500
    sit_steps: int = 2000
    seed: int = 0
    resume: bool = False
    """Keep what an earlier run finished, and go on."""


def main(options: Options) -> dict[str, Any]:
    """Returns the table."""
    started = time.time()
    claim(options)
    data = prepare(options)
    side = Image.open(next((data / "train").rglob("*.png"))).size[0]
    classifier(options, data, side, "teacher")
    judge, head = classifier(options, data, side, "judge")
    table: dict[str, Any] = {"judge_accuracy": accuracy(judge, head, labelled(data / "test"))}
    for kind in KINDS:
        folder = train_vae(options, data, side, kind)
        table[kind] = json.loads((folder / "metrics.json").read_text())
        table[kind] |= probes(PixelVAE.from_pretrained(folder / "vae"), data, options)
        table[kind] |= generation(options, data, folder, side, judge, head)
    if (data / "masks").is_dir():
        table["segmentation"] = segmentation(options, data, side)
        save_masks(options.output, data)
    save_generated(options.output, data, classes=head.out_features)
    save_latents(options, data, side)
    table["options"] = settings(options)
    table["minutes"], table["resumed"] = round((time.time() - started) / 60, 1), options.resume
    write_text(options.output / "table.json", json.dumps(table, indent=2) + "\n")
    show(table)
    return table


def settings(options: Options) -> dict[str, Any]:
    """What decides the result."""
    return {name: str(value) for name, value in vars(options).items() if name not in ("output", "resume")}


def claim(options: Options) -> None:
    """Leave what another run made alone."""
    file = options.output / "options.json"
    if not file.exists():
        write_text(file, json.dumps(settings(options), indent=2) + "\n")
    elif not options.resume:
        raise SystemExit(
            f"{options.output} holds an earlier run: --resume goes on with it, another --output begins anew"
        )
    elif difference := changed(json.loads(file.read_text()), settings(options)):
        raise SystemExit(f"{options.output} was begun with other options ({difference}); another --output begins anew")


def count(options: Options, full: int, least: int = 2) -> int:
    return max(least, round(full * options.share))


# Pictures


def prepare(options: Options) -> Path:
    """``train`` and ``test`` with one folder per class; of scenes also ``images`` and ``masks``, those of test, and
    ``cells``: a class for each cell of the training pictures' grid, N 8 8, 0 for background."""
    root = options.output / "data"
    if (root / "whole").exists():
        return root
    for split, full in (("train", options.train_pictures), ("test", options.test_pictures)):
        pictures = drawn(split, count(options, full, 64)) if options.data is None else stored(options, split, full)
        cells: dict[str, np.ndarray] = {}
        for number, (picture, label, mask) in enumerate(tqdm(pictures, f"{split} pictures")):
            save(picture, root / split / label / f"{number:05d}.png")
            if mask is None:
                continue
            if split == "test":
                save(picture, root / "images" / f"{number:05d}.png")
                save(mask, root / "masks" / f"{number:05d}.png")
            else:
                cells[f"{label}/{number:05d}"] = np.asarray(mask.resize((GRID, GRID), Image.Resampling.NEAREST))
        if cells:  # in the order of `labelled`
            np.save(root / "cells.npy", np.stack([cells[name] for name in sorted(cells)]))
    (root / "whole").touch()
    return root


def drawn(split: str, number: int) -> Iterator[tuple[Image.Image, str, Image.Image]]:
    """One thing of any colour, anywhere, before any background; its class is its shape."""
    for seed in range(number):
        rng = random.Random(f"reals {split} {seed}")
        thing = place(rng, rng.choice(list(scenes.COLOURS)), SHAPES[seed % len(SHAPES)], step=4)
        scene = scenes.Scene((thing,), background(rng))
        mask = Image.fromarray(scenes.class_map(scene).numpy().astype(np.uint8))
        yield to_pil_image(scenes.draw(scene) * 0.5 + 0.5), thing.shape, mask


def stored(options: Options, split: str, number: int) -> Iterator[tuple[Image.Image, str, None]]:
    import datasets

    if options.data.is_file():
        table = datasets.Dataset.from_parquet(str(options.data)).shuffle(seed=0)
        held_out = min(len(table) // 6, count(options, options.test_pictures, 64))
        first, end = (0, len(table) - held_out) if split == "train" else (len(table) - held_out, len(table))
        table = table.select(range(first, end))
    else:
        table = open_table(str(options.data), split).shuffle(seed=0)
    if missing := {"image", "label"} - set(table.column_names):
        raise SystemExit(f"{options.data} has the columns {table.column_names}; wanted also {sorted(missing)}")
    table = table.cast_column("image", datasets.Image(decode=False))
    for row in table.select(range(min(len(table), count(options, number, 64)))):
        yield read_image(row["image"]), f"{row['label']:03d}", None


def save(picture: Image.Image, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(file)


def labelled(folder: Path) -> tuple[Tensor, Tensor]:
    """All pictures ``N 3 H W`` in [-1, 1] and their classes ``N``."""
    files = sorted(folder.rglob("*.png"))
    classes = sorted({file.parent.name for file in files})
    transform = center_transform(Image.open(files[0]).size[0])
    return torch.stack([transform(read_image(file)) for file in files]), torch.tensor(
        [classes.index(file.parent.name) for file in files]
    )


# Training


def classifier(options: Options, data: Path, side: int, name: Literal["teacher", "judge"]) -> tuple[Any, nn.Linear]:
    """A small Vision Transformer that learned the classes from their labels, and its last layer on pooled features."""
    folder, patch = options.output / name, side // GRID
    classes = len(list((data / "train").iterdir()))
    head = nn.Linear(WIDTH, classes)
    if (folder / "head.pt").exists():
        head.load_state_dict(torch.load(folder / "head.pt", weights_only=True))
        return SemanticEncoder.from_pretrained(folder), head
    torch.manual_seed(options.seed + {"teacher": 1, "judge": 2}[name])
    vit = {"img_size": side, "patch_size": patch, "embed_dim": WIDTH, "depth": 4, "num_heads": 3}
    encoder = SemanticEncoder(SemanticEncoderConfig("vit_tiny_patch16_224", vit, stride=patch, final_norm="affine"))
    head.reset_parameters()
    images, labels = labelled(data / "train")
    known = (data / "cells.npy").exists()
    cells = (
        torch.from_numpy(np.load(data / "cells.npy")).long() if known else torch.zeros(len(images), GRID, GRID).long()
    )
    of_cells = nn.Conv2d(WIDTH, 1 + int(cells.max()), 1)
    steps = count(options, options.teacher_steps)
    parameters = [*encoder.parameters(), *head.parameters(), *of_cells.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    for _ in (bar := tqdm(range(steps), name)):
        places = torch.randint(len(images), (64,))
        with torch.autocast("cpu", torch.bfloat16):
            seen = encoder(images[places] if known else shifted(images[places]), return_all=True)
            loss = F.cross_entropy(head(pooled(seen)), labels[places])
            loss = loss + F.cross_entropy(of_cells(seen.features), cells[places]) * known
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    encoder.eval().save_pretrained(folder)
    torch.save(head.state_dict(), folder / "head.pt")
    return encoder, head


def pooled(seen: EncoderTokens) -> Tensor:
    """``B D``, so that the class is learned by the global token and by the patches."""
    return seen.global_token + seen.features.mean(dim=(2, 3))


def shifted(images: Tensor) -> Tensor:
    """Half mirrored, all moved by up to a sixteenth."""
    images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(3), images)
    most = images.shape[-1] // 16
    dy, dx = torch.randint(-most, most + 1, (2,)).tolist()
    return F.pad(images, (most,) * 4, mode="replicate").roll((dy, dx), (2, 3))[..., most:-most, most:-most]


def train_vae(options: Options, data: Path, side: int, kind: str) -> Path:
    """By train_reals.py; of the plain VAE, the alignment network reads the latents and teaches it nothing."""
    folder = options.output / kind
    strides = {8: (1, 2, 2, 4), 4: (1, 2, 4)}[side // GRID]
    shape: dict[str, Any] = {
        "latent_channels": CHANNELS, "base_channels": 32, "channel_multipliers": strides, "norm_groups": 8,
        "num_res_blocks": 1, "attention_levels": 0,
    }  # fmt: skip
    config = PixelVAEConfig(PixelEncoderConfig(**shape), PixelDecoderConfig(**shape), sample_size=side)
    write_text(options.output / "vae.json", json.dumps(config.to_dict()))
    steps = count(options, options.vae_steps)
    if not (folder / "metrics.json").exists():
        train_reals.train(
            train_reals.Options(
                data=DataOptions(str(data / "train"), size=side, flip=False, workers=0), output=folder,
                model=options.output / "vae.json", teacher=str(options.output / "teacher"), align_hidden=256,
                losses=train_reals.LossOptions(
                    perceptual=0, adversarial=0, kl=1e-5, kl_reduction="mean", detach=kind == "plain"
                ),
                steps=steps, batch_size=16, lr=1e-3, betas=(0.9, 0.95), warmup=min(100, steps), final_lr=0.02, ema=0.99,
                seed=options.seed, resume=options.resume, sample_every=10**9, checkpoint_every=max(1, steps // 3),
                validation=str(data / "test"), validation_count=256, statistics_batches=32, tracker="none",
            )
        )  # fmt: skip
    return folder


# Measuring


@torch.no_grad()
def accuracy(encoder: Any, head: nn.Linear, pictures: tuple[Tensor, Tensor]) -> float:
    images, labels = pictures
    said = [head(pooled(encoder(part, return_all=True))).argmax(dim=1) for part in images.split(128)]
    return round((torch.cat(said) == labels).float().mean().item(), 4)


def probes(vae: PixelVAE, data: Path, options: Options) -> dict[str, float]:
    """A linear layer, and twenty nearest neighbours by cosine, on all cells of a latent."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    parts = []
    for split in ("train", "test"):
        images, labels = labelled(data / split)
        with torch.no_grad():
            latents = torch.cat([vae.encode(part).latent_dist.mode() for part in tqdm(images.split(128), "latents")])
        parts.append((vae.latent_spec.normalize(latents).flatten(1).numpy(), labels.numpy()))
    (x, y), (held_out, wanted) = parts
    linear = LogisticRegression(C=0.01, max_iter=300).fit(x, y)
    near = KNeighborsClassifier(20, metric="cosine").fit(x, y)
    return {
        name: round(float((model.predict(held_out) == wanted).mean()), 4)
        for name, model in (("linear_probe", linear), ("knn", near))
    }


def generation(options: Options, data: Path, folder: Path, side: int, judge: Any, head: nn.Linear) -> dict[str, float]:
    """A tiny SiT in these latents: Fréchet distance in the judge's features, and how often the judge sees the class."""
    real, _ = labelled(data / "test")
    made = generate(
        Generation(
            vae=folder / "vae", data=data / "train", output=folder, size=side, steps=count(options, options.sit_steps),
            count=len(real), seed=options.seed,
        )
    )  # fmt: skip
    return {
        "frechet_distance": round(distance(real, made, lambda part: pooled(judge(part, return_all=True))), 3),
        "class_accuracy": accuracy(judge, head, (made, torch.arange(len(made)) % head.out_features)),
    }


def segmentation(options: Options, data: Path, side: int) -> dict[str, float]:
    """mIoU of a head fitted on the teacher's features: on those, and unchanged on features from either latents."""
    found: dict[str, float] = {}
    for kind in KINDS:
        scores = downstream.main(
            downstream.Options(
                reals=str(options.output / kind), fit_head=data, size=side, classes=1 + len(SHAPES), workers=0,
                steps=count(options, 1000), batch_size=32, seed=options.seed, output=options.output / f"{kind}-masks",
            )
        )  # fmt: skip
        found |= {"teacher": scores["miou_teacher"], kind: scores["miou_latents"]}
    return found


# Pictures that a person looks at


def save_generated(output: Path, data: Path, classes: int) -> None:
    """generated.png: of each class two held-out pictures; below, two made in the plain latents; two in ReaLS's."""
    real, labels = labelled(data / "test")
    rows = [torch.cat([real[labels == label][:2] for label in range(classes)])]
    for kind in KINDS:
        with np.load(output / kind / "samples.npz") as made:
            pictures = torch.from_numpy(made["arr_0"][: 2 * classes]).permute(0, 3, 1, 2) / 127.5 - 1
        rows.append(torch.cat([pictures[label::classes] for label in range(classes)]))
    save_image(torch.cat(rows) * 0.5 + 0.5, output / "generated.png", nrow=2 * classes)


def save_masks(output: Path, data: Path) -> None:
    """masks.png: held-out pictures, their masks as drawn, as read from the plain latents, as read from ReaLS's."""
    names = sorted(file.name for file in (output / "reals-masks" / "masks").iterdir())[:10]
    colours = torch.tensor([(0, 0, 0), (230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48)])
    folders = [data / "masks", *(output / f"{kind}-masks" / "masks" for kind in KINDS)]
    masks = [torch.from_numpy(np.array(Image.open(folder / name))).long() for folder in folders for name in names]
    pictures = [torch.from_numpy(np.array(Image.open(data / "images" / name))) for name in names]
    rows = torch.stack([*pictures, *(colours[mask] for mask in masks)])
    save_image(rows.permute(0, 3, 1, 2) / 255, output / "masks.png", nrow=len(names))


def save_latents(options: Options, data: Path, side: int) -> None:
    """latents.png: both spaces side by side, by visualise_latents.py."""
    visualise_latents.main(
        visualise_latents.Options(
            data=str(data / "test"), vae=tuple(str(options.output / kind) for kind in KINDS), size=side,
            count=min(500, count(options, options.test_pictures, 64)), output=options.output / "latents.png",
        )
    )  # fmt: skip


def show(table: dict[str, Any]) -> None:
    """In words, with what was wanted."""
    plain, reals = table["plain"], table["reals"]
    print(f"\n{'':24s}{'plain':>10s}{'ReaLS':>10s}")
    for name in plain:
        print(f"{name:24s}{plain[name]:10.3f}{reals[name]:10.3f}")
    for name, (value, target) in targets(table).items():
        print(f"{name}: {value:.3f}, wanted {target:g}: {'met' if value >= target else 'missed'}")
    print(f"{table['minutes']} minutes")


def targets(table: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Measured and wanted."""
    plain, reals = table["plain"], table["reals"]
    found = {
        "linear probe above plain, points": (100 * (reals["linear_probe"] - plain["linear_probe"]), 10.0),
        "Fréchet distance below plain": (1 - reals["frechet_distance"] / plain["frechet_distance"], 0.1),
        "PSNR beside plain, dB": (reals["psnr"] - plain["psnr"], -1.5),
    }
    if "segmentation" in table:
        found["mIoU from latents over the teacher's"] = (
            table["segmentation"]["reals"] / table["segmentation"]["teacher"], 0.8,
        )  # fmt: skip
    return found


if __name__ == "__main__":
    main(tyro.cli(Options))
