"""A plain VAE and a ReaLS VAE of one seed, data and steps, compared by what their latents know (``make reals``).

    python examples/compare_reals.py                         # drawn scenes; table.json and pictures in --output
    python examples/compare_reals.py --data cifar10.parquet  # any labelled pictures, without masks
    python examples/compare_reals.py --share 0.02            # the same path in a minute or two

Trained one after the other, each kept in its folder so that `--resume` goes on: a teacher and a judge (small Vision
Transformers that name a picture's class, of different seeds), the two VAEs by train_reals.py, and in the latents of
each a class-conditional SiT by generation.py. All numbers are of pictures that nothing was trained on; drawn ones are
held out by combinations of shape, colour, place and background.
"""

import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import downstream
import generation
import numpy as np
import torch
import train_reals
import tyro
import visualise_latents
from checkpoints import changed, write_text, write_whole
from data import DataOptions
from PIL import Image
from probes import accuracies
from reals_data import GRID, SIDE, classes_of, drawn, labelled, prepare, stored
from scenes.compose import SHAPES
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.functional import gaussian_blur
from torchvision.utils import save_image
from tqdm import tqdm

from psvae import PixelDecoderConfig, PixelVAE, PixelVAEConfig, SemanticEncoder, SemanticEncoderConfig
from psvae.encoders import EncoderTokens, PixelEncoderConfig

KINDS = ("plain", "reals")
CHANNELS, WIDTH = 8, 192  # Z, and the teacher's D
OF_CELLS = 4.0  # weight of naming each cell beside naming the picture; with 1, many shapes were not yet told apart
PALETTE = ((0, 0, 0), (230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48))  # of classes


@dataclass(frozen=True)
class Options:
    """Compare a ReaLS VAE with a plain one."""

    data: Path | None = None
    """Columns image and label: a parquet file, of which some pictures are held out, or a Hugging Face dataset (folder
    of parquet files) with splits train and test. None draws scenes. Pictures are brought to 32 x 32."""
    output: Path = Path("outputs/compare_reals")
    share: float = 1.0
    """Of all steps and pictures; 1 is at most 25 minutes on two cores. Less shows that it runs: nothing is learned in a
    twentieth, and no number is judged."""
    train_pictures: int = 8000
    test_pictures: int = 1000
    teacher_steps: int = 1300
    judge_steps: int = 800
    vae_steps: int = 2800
    sit_steps: int = 2000
    seed: int = 0
    resume: bool = False
    """Keep what an earlier run finished, and go on."""


class Classifier(NamedTuple):
    """The teacher, or the judge."""

    encoder: SemanticEncoder
    head: nn.Linear

    def features(self, images: Tensor) -> Tensor:
        """``B 3 H W`` → ``B D``, what ``head`` reads."""
        return pooled(self.encoder(images, return_all=True))

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        said = torch.cat([self.head(self.features(part)).argmax(dim=1) for part in images.split(128)])
        return round((said == labels).float().mean().item(), 4)


def main(options: Options) -> dict[str, Any]:
    """Returns the table."""
    started, data = time.time(), options.output / "data"
    counts = {
        "train": part_of(options, options.train_pictures, 64), "test": part_of(options, options.test_pictures, 64)
    }  # fmt: skip
    seed = options.seed
    source = drawn(seed) if options.data is None else stored(options.data, counts["test"], seed)
    claim(options)
    prepare(data, source, counts)
    held_out = labelled(data, "test")
    classifier(options, data, "teacher")
    judge = classifier(options, data, "judge")
    table: dict[str, Any] = {"judge_accuracy": judge.accuracy(*held_out)}
    for kind in KINDS:
        folder = train_vae(options, data, kind)
        table[kind] = json.loads((folder / "metrics.json").read_text())
        vae = PixelVAE.from_pretrained(folder / "vae")
        table[kind] |= probes(vae, labelled(data, "train"), held_out)
        table[kind] |= reconstructed(vae, held_out, judge)
        table[kind] |= generated(options, data, folder, held_out, judge)
    if (data / "masks").is_dir():
        table["segmentation"] = segmentation(options, data)
        save_masks(options.output, data)
    save_generated(options.output, held_out, classes=judge.head.out_features)
    save_latents(options, data)
    table["options"] = settings(options)
    table["minutes"], table["resumed"] = round((time.time() - started) / 60, 1), options.resume
    write_text(options.output / "table.json", json.dumps(table, indent=2) + "\n")
    show(table, options.output)
    return table


def settings(options: Options) -> dict[str, Any]:
    """What decides the result."""
    decisive = {name: value for name, value in vars(options).items() if name not in ("output", "resume")}
    return {name: str(value) if isinstance(value, Path) else value for name, value in decisive.items()}


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


def part_of(options: Options, full: int, least: int = 2) -> int:
    return max(least, round(full * options.share))


# Training


def classifier(options: Options, data: Path, name: Literal["teacher", "judge"]) -> Classifier:
    """A small Vision Transformer that learned the classes from their labels, and its last layer."""
    folder = options.output / name
    head = nn.Linear(WIDTH, len(classes_of(data)))
    if (folder / "head.pt").exists():
        head.load_state_dict(torch.load(folder / "head.pt", weights_only=True))
        return Classifier(SemanticEncoder.from_pretrained(folder), head)
    torch.manual_seed(options.seed + {"teacher": 1, "judge": 2}[name])
    patch = SIDE // GRID
    vit = {"img_size": SIDE, "patch_size": patch, "embed_dim": WIDTH, "depth": 4, "num_heads": 3}
    encoder = SemanticEncoder(SemanticEncoderConfig("vit_tiny_patch16_224", vit, stride=patch, final_norm="affine"))
    head.reset_parameters()
    of_cells = nn.Conv2d(WIDTH, 1 + len(SHAPES), 1)
    images, labels = labelled(data, "train")
    cells = torch.from_numpy(np.load(data / "cells.npy")).long() if (data / "cells.npy").exists() else None
    steps = part_of(options, {"teacher": options.teacher_steps, "judge": options.judge_steps}[name])
    parameters = [*encoder.parameters(), *head.parameters(), *of_cells.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    for _ in (bar := tqdm(range(steps), name)):
        places = torch.randint(len(images), (32,))
        shown = images[places] if cells is not None else shifted(images[places])
        with torch.autocast("cpu", torch.bfloat16):
            seen = encoder(worn(shown) if name == "judge" else shown, return_all=True)
            loss = F.cross_entropy(head(pooled(seen)), labels[places])
            if cells is not None:
                loss = loss + OF_CELLS * F.cross_entropy(of_cells(seen.features), cells[places])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    encoder.eval().save_pretrained(folder)
    write_whole(folder / "head.pt", partial(torch.save, head.state_dict()))
    return Classifier(encoder, head)


def pooled(seen: EncoderTokens) -> Tensor:
    """``B D``: of the global token and of the patches, so that the class is learned by both."""
    return seen.global_token + seen.features.mean(dim=(2, 3))


def shifted(images: Tensor) -> Tensor:
    """Half mirrored, all moved by up to a sixteenth."""
    images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(3), images)
    most = SIDE // 16
    dy, dx = torch.randint(-most, most + 1, (2,)).tolist()
    return F.pad(images, (most,) * 4, mode="replicate").roll((dy, dx), (2, 3))[..., most:-most, most:-most]


def worn(images: Tensor) -> Tensor:
    """Half of them blurred, all noisy, as decoders leave them: the judge is to see the thing and not the decoder."""
    soft = gaussian_blur(images, 7, 0.3 + 1.2 * torch.rand(1).item())
    images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, soft, images)
    return images + 0.1 * torch.rand(len(images), 1, 1, 1) * torch.randn_like(images)


def train_vae(options: Options, data: Path, kind: str) -> Path:
    """By train_reals.py; of the plain VAE, the alignment network reads the latents and teaches it nothing."""
    folder, config_file = options.output / kind, options.output / "vae.json"
    shape: dict[str, Any] = {
        "latent_channels": CHANNELS, "base_channels": 32, "channel_multipliers": (1, 2, 4), "norm_groups": 8,
        "num_res_blocks": 1, "attention_levels": 0,
    }  # fmt: skip
    config = PixelVAEConfig(PixelEncoderConfig(**shape), PixelDecoderConfig(**shape), sample_size=SIDE)
    write_text(config_file, json.dumps(config.to_dict()))
    steps = part_of(options, options.vae_steps)
    if not (folder / "metrics.json").exists():
        train_reals.train(
            train_reals.Options(
                data=DataOptions(str(data / "train"), size=SIDE, flip=False, workers=0), output=folder,
                model=config_file, teacher=str(options.output / "teacher"), align_hidden=256,
                losses=train_reals.LossOptions(
                    mse=10, patch=2.0, cls=0.25, perceptual=0, adversarial=0, kl=1e-5, kl_reduction="mean",
                    detach=kind == "plain",
                ),
                steps=steps, batch_size=8, lr=1e-3, betas=(0.9, 0.95), warmup=min(100, steps), final_lr=0.02, ema=0.99,
                seed=options.seed, resume=options.resume, sample_every=10**9, checkpoint_every=max(1, steps // 3),
                validation=str(data / "test"), validation_count=256, statistics_batches=64, tracker="none",
            )
        )  # fmt: skip
    return folder


# Measuring


def probes(vae: PixelVAE, train: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Of all cells of a latent."""

    def latents(images: Tensor) -> np.ndarray:
        with torch.no_grad():
            parts = [vae.encode(part).latent_dist.mode() for part in tqdm(images.split(128), "latents")]
        return vae.latent_spec.normalize(torch.cat(parts)).flatten(1).numpy()

    return accuracies(latents(train[0]), train[1].numpy(), latents(held_out[0]), held_out[1].numpy())


def reconstructed(vae: PixelVAE, held_out: tuple[Tensor, Tensor], judge: Classifier) -> dict[str, float]:
    """What the judge makes of reconstructions: no generator in these latents can be expected to do better."""
    images, labels = held_out
    with torch.no_grad():
        seen = torch.cat([vae(part).sample.clamp(-1, 1) for part in images.split(128)])
    return {
        "reconstructed_frechet_distance": round(generation.distance(images, seen, judge.features), 3),
        "reconstructed_class_accuracy": judge.accuracy(seen, labels),
    }


def generated(
    options: Options, data: Path, folder: Path, held_out: tuple[Tensor, Tensor], judge: Classifier
) -> dict[str, float]:
    """A tiny SiT in these latents: Fréchet distance in the judge's features, and how often the judge sees the class."""
    images, _ = held_out
    made = generation.generate(
        generation.Options(
            vae=folder / "vae", data=data / "train", output=folder, size=SIDE, count=len(images),
            steps=part_of(options, options.sit_steps), seed=options.seed,
        )
    )  # fmt: skip
    return {
        "frechet_distance": round(generation.distance(images, made, judge.features), 3),
        "class_accuracy": judge.accuracy(made, torch.arange(len(made)) % judge.head.out_features),
    }


def segmentation(options: Options, data: Path) -> dict[str, float]:
    """mIoU of a head fitted on the teacher's features: on those, and unchanged on features from either latents."""
    found: dict[str, float] = {}
    for kind in KINDS:
        folder = options.output / f"{kind}-masks"
        if not (folder / "downstream.png").exists():  # which is written last
            downstream.main(
                downstream.Options(
                    reals=str(options.output / kind), fit_head=data, size=SIDE, classes=1 + len(SHAPES), workers=0,
                    steps=part_of(options, 600), lr=1e-2, batch_size=32, seed=options.seed, output=folder,
                )
            )  # fmt: skip
        scores = json.loads((folder / "metrics.json").read_text())
        found |= {"teacher": scores["miou_teacher"], kind: scores["miou_latents"]}
    return {name: round(score, 4) for name, score in found.items()}


# Pictures that a person looks at


def save_generated(output: Path, held_out: tuple[Tensor, Tensor], classes: int) -> None:
    """generated.png: of each class two held-out pictures; below, two made in the plain latents; two in ReaLS's."""
    images, labels = held_out
    rows = [torch.cat([images[labels == label][:2] for label in range(classes)])]
    for kind in KINDS:
        with np.load(output / kind / "samples.npz") as made:
            pictures = torch.from_numpy(made["arr_0"][: 2 * classes]).permute(0, 3, 1, 2) / 127.5 - 1
        rows.append(torch.cat([pictures[label::classes] for label in range(classes)]))
    save_grid(torch.cat(rows) * 0.5 + 0.5, output / "generated.png", columns=2 * classes)


def save_masks(output: Path, data: Path) -> None:
    """masks.png: held-out pictures, their masks as drawn, as read from the plain latents, as read from ReaLS's."""
    names = sorted(file.name for file in (output / "reals-masks" / "masks").iterdir())[:10]
    folders = [data / "masks", *(output / f"{kind}-masks" / "masks" for kind in KINDS)]
    masks = [torch.from_numpy(np.array(Image.open(folder / name))).long() for folder in folders for name in names]
    pictures = [torch.from_numpy(np.array(Image.open(data / "images" / name))) for name in names]
    rows = torch.stack([*pictures, *(torch.tensor(PALETTE)[mask] for mask in masks)])
    save_grid(rows.permute(0, 3, 1, 2) / 255, output / "masks.png", columns=len(names))


def save_grid(pictures: Tensor, file: Path, columns: int) -> None:
    """Of ``N 3 H W`` in [0, 1], each pixel twice as large."""
    save_image(F.interpolate(pictures, scale_factor=2, mode="nearest"), file, nrow=columns)


def save_latents(options: Options, data: Path) -> None:
    """latents.png: both spaces side by side, by visualise_latents.py."""
    visualise_latents.main(
        visualise_latents.Options(
            data=str(data / "test"), vae=tuple(str(options.output / kind) for kind in KINDS), size=SIDE,
            count=min(500, part_of(options, options.test_pictures, 64)), output=options.output / "latents.png",
        )
    )  # fmt: skip


def show(table: dict[str, Any], output: Path) -> None:
    """In words, with what was wanted; active_channels is a share of them."""
    plain, reals = table["plain"], table["reals"]
    print(f"\n{'':24s}{'plain':>10s}{'ReaLS':>10s}")
    for name in plain:
        print(f"{name:24s}{plain[name]:10.3f}{reals[name]:10.3f}")
    whole = table["options"]["share"] == 1
    for name, (value, target) in targets(table).items():
        judged = f", wanted {target:g}: {'met' if value >= target else 'missed'}" if whole else ""
        print(f"{name}: {value:.3f}{judged}")
    if not whole:
        print(f"--share {table['options']['share']:g}: the aims are those of share 1")
    print(f"{table['minutes']} minutes; table.json, generated.png and latents.png are in {output}")


def targets(table: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Measured and wanted."""
    plain, reals = table["plain"], table["reals"]
    found = {
        "linear probe above plain, points": (100 * (reals["linear_probe"] - plain["linear_probe"]), 10.0),
        "Fréchet distance below plain, %": (100 * (1 - reals["frechet_distance"] / plain["frechet_distance"]), 10.0),
        "PSNR beside plain, dB": (reals["psnr"] - plain["psnr"], -1.5),
    }
    if "segmentation" in table:
        found["mIoU from latents over the teacher's"] = (
            table["segmentation"]["reals"] / table["segmentation"]["teacher"], 0.8,
        )  # fmt: skip
    return found


if __name__ == "__main__":
    main(tyro.cli(Options))
