"""psvae-tiny: the trained PS-VAE that comes with the package, and how it was made.

    python -m reproduction.tiny --cifar cifar10/ --photographs photographs/

Both folders are in the Hugging Face parquet layout, with splits train and test. The encoder learns the labels of
CIFAR-10, enlarged; the tokenizer learns photographs and CIFAR-10's pictures, by examples/train_tokenizer.py; a plain
VAE of the same size learns the same, by examples/train_reals.py. Each part is kept in --output and not made again. What
the package then has is written to --package: half precision, with the numbers of held-out pictures in its card.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import train_reals  # noqa: E402
import train_tokenizer  # noqa: E402
from checkpoints import write_text  # noqa: E402
from data import DataOptions, center_transform, open_table, read_image  # noqa: E402
from measures import picture_measures  # noqa: E402
from torchvision.transforms.functional import to_pil_image  # noqa: E402

from psvae import (  # noqa: E402
    PSVAE,
    PixelDecoderConfig,
    PixelVAE,
    PixelVAEConfig,
    PSVAEConfig,
    SemanticEncoder,
    SemanticEncoderConfig,
    SemanticVAEConfig,
)  # fmt: skip
from psvae.encoders import PixelEncoderConfig  # noqa: E402
from reproduction import cifar  # noqa: E402
from reproduction.classifiers import Classifier, augmented, cross_entropy, finish  # noqa: E402
from reproduction.measures import as_saved, normalised, probe  # noqa: E402
from reproduction.training import Machine, Recipe, batched, fit  # noqa: E402

WIDTH, DEPTH, STRIDE, PATCH = 128, 6, 16, 8
CHANNELS = 64
ENLARGED = 128  # side of a CIFAR-10 picture, so that it has 8 x 8 tokens
DECODER: dict[str, Any] = {
    "base_channels": 16, "channel_multipliers": (1, 2, 4, 5, 5), "num_res_blocks": 1, "norm_groups": 8,
    "attention_levels": 0,
}  # fmt: skip
SAID = {  # in the card
    "psnr": "PSNR, dB", "ssim": "SSIM",
    "probe": "linear probe, mean over cells", "probe_cells": "linear probe, all cells",
    "knn": "20 nearest neighbours, mean over cells", "knn_cells": "20 nearest neighbours, all cells",
}  # fmt: skip
WIDER: dict[str, Any] = DECODER | {"channel_multipliers": (1, 2, 4, 8, 8)}  # the plain VAE's encoder: of one size then


@dataclass(frozen=True)
class Options:
    """Train psvae-tiny, compare it with a plain VAE, and write the package's files."""

    cifar: Path
    """Folder with train*.parquet and test*.parquet of CIFAR-10."""
    photographs: Path
    """Folder with the same of photographs of 256 pixels or more, column image."""
    output: Path = Path("outputs/tiny")
    package: Path = Path("outputs/tiny/psvae-tiny")
    share: float = 1.0
    """Of all steps."""
    encoder_steps: int = 3500
    steps1: int = 1000
    steps2: int = 9000
    batch_size: int = 8
    cifar_pictures: int = 3000
    """Of CIFAR-10 that the tokenizer learns, beside as many views of the photographs."""
    seed: int = 0


def main(options: Options) -> dict[str, Any]:
    """Returns the numbers of held-out pictures."""
    machine = Machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    train, test = cifar.load(options.cifar, options.output / "cifar")
    train_encoder(options, train, machine)
    data = prepare(options, train)
    train_psvae(options, data)
    train_plain(options, data)
    vae = in_half_precision(PSVAE.from_pretrained(options.output / "tokenizer" / "stage2"))
    plain = PixelVAE.from_pretrained(options.output / "plain" / "vae")
    photographs = held_out(options.photographs)
    numbers = {
        name: {"parameters": sum(p.numel() for p in model.parameters())}
        | reconstruction(model, photographs) | probed(partial(normalised, model), train, test, machine)
        for name, model in (("psvae-tiny", vae), ("plain VAE", plain))
    }  # fmt: skip
    numbers["psvae-tiny's encoder"] = probed(vae.features, train, test, machine)
    write_text(options.output / "metrics.json", json.dumps(numbers, indent=2) + "\n")
    print(json.dumps(numbers, indent=2))
    command = "python -m reproduction.tiny --cifar cifar10/ --photographs photographs/"
    vae.half().save_pretrained(
        options.package, training_command=command, training_data=data_in_words(options),
        metrics={said: numbers["psvae-tiny"][name] for name, said in SAID.items()}
        | {f"{SAID['probe']}, of the encoder's features": numbers["psvae-tiny's encoder"]["probe"]},
        license="apache-2.0",
    )  # fmt: skip
    return numbers


def data_in_words(options: Options) -> str:
    """For the card."""
    count, tested = (len(open_table(str(options.photographs), part)) for part in ("train", "test"))
    return (
        f"The encoder: the labels of CIFAR-10's 50 000 training pictures, enlarged to {ENLARGED} px, "
        f"{steps_of(options, options.encoder_steps)} steps of 128. The tokenizer: {count} photographs of ImageNet, "
        f"each of a class of its own, and {options.cifar_pictures} of these pictures, as often the ones as the others, "
        f"random crops of {ENLARGED} px, "
        f"stage 1 of {steps_of(options, options.steps1)} steps and stage 2 of {steps_of(options, options.steps2)}, "
        f"batches of {options.batch_size}. Seed {options.seed}. Measured on {tested} other photographs of ImageNet at "
        "256 px and, the probes, on 5000 of CIFAR-10's test pictures, enlarged likewise: a linear layer and nearest "
        "neighbours learn 10 000 of the training pictures, whose labels the encoder knows. The length of stage 2 and "
        "the scale of the crops were chosen after a first training of half the steps had been measured on the same "
        "photographs (22.8 dB)."
    )


def steps_of(options: Options, steps: int) -> int:
    return max(2, round(options.share * steps))


# Training


def train_encoder(options: Options, train: cifar.Split, machine: Machine) -> None:
    """By the labels of CIFAR-10. The encoder halves what it sees, so an enlarged picture comes as 64 x 64."""
    folder = options.output / "encoder"
    if (folder / "config.json").exists():
        return
    vit = {"img_size": 64, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": WIDTH // 32}
    config = SemanticEncoderConfig("vit_tiny_patch16_224", vit, stride=STRIDE, resize_antialias=True)
    torch.manual_seed(options.seed)
    model = Classifier(SemanticEncoder(config)).to(machine.device)

    def loss(model: nn.Module, places: Tensor, step: int) -> Tensor:
        shown = enlarged(augmented(train.images(places), cifar.SIDE)).to(machine.device)
        return cross_entropy(model(shown), train.labels[places].to(machine.device))

    recipe = Recipe(steps_of(options, options.encoder_steps), 128, 1e-3, options.seed, weight_decay=0.05)
    model = fit(model, loss, recipe, len(train.labels), folder, machine)
    finish(model, folder)
    model.encoder.eval().save_pretrained(folder)


def enlarged(images: Tensor) -> Tensor:
    return F.interpolate(images, ENLARGED, mode="bicubic", antialias=True).clamp(-1, 1)


def prepare(options: Options, train: cifar.Split) -> Path:
    """A folder of photographs and of enlarged CIFAR-10 pictures, as many views of each."""
    folder = options.output / "data"
    if (folder / "complete").exists():
        return folder / "train"
    for part in ("photographs", "cifar"):
        (folder / "train" / part).mkdir(parents=True, exist_ok=True)
    table = open_table(str(options.photographs), "train")
    for number in range(len(table)):
        picture = read_image(table[number]["image"])
        for view in range(max(1, options.cifar_pictures // len(table))):  # a view is a random crop of the training
            file = folder / "train" / "photographs" / f"{number:05d}-{view}.png"
            if view == 0:
                picture.save(file, compress_level=1)
                first = file
            elif not file.exists():
                file.symlink_to(first.name)
    for number, picture in enumerate(train.pictures[: options.cifar_pictures]):
        image = to_pil_image(enlarged(cifar.to_images(picture[None]))[0] * 0.5 + 0.5)
        image.save(folder / "train" / "cifar" / f"{number:05d}.png", compress_level=1)
    write_text(folder / "complete", "")
    return folder / "train"


def data_options(data: Path) -> DataOptions:
    return DataOptions(str(data), size=ENLARGED, crop="zoom", zoom=(0.2, 0.6), workers=1)


def train_psvae(options: Options, data: Path) -> None:
    """Both stages, with the library's defaults but without the terms whose networks would have to be fetched."""
    output = options.output / "tokenizer"
    if (output / "stage2" / "config.json").exists():
        return
    encoder = SemanticEncoder.from_pretrained(options.output / "encoder")
    config = PSVAEConfig(
        encoder.config,
        SemanticVAEConfig(WIDTH, CHANNELS, depth=1, num_heads=WIDTH // 32, mlp_dim=4 * WIDTH),
        PixelDecoderConfig(CHANNELS, **DECODER),
        sample_size=ENLARGED,
    )
    file = options.output / "psvae.json"
    write_text(file, json.dumps(config.to_dict()))
    train_tokenizer.main(
        train_tokenizer.Options(
            data=data_options(data), output=output, model=str(file), encoder_weights=str(options.output / "encoder"),
            steps1=steps_of(options, options.steps1), steps2=steps_of(options, options.steps2),
            losses=train_tokenizer.LossOptions(perceptual=0.0, adversarial=0.0, kl=1e-5),  # the default then
            batch_size=options.batch_size, lr=1e-3, warmup=100, final_lr=0.02, ema=0.998, seed=options.seed,
            resume=(output / "checkpoints").exists() or (output / "stage1").exists(), checkpoint_every=500,
            sample_every=10**9, validate_every=10**9, tracker="none",
        )
    )  # fmt: skip


def train_plain(options: Options, data: Path) -> None:
    """A plain VAE of the same size, stride and channels, on the same pictures for the same steps."""
    output = options.output / "plain"
    if (output / "metrics.json").exists():
        return
    encoder = PixelEncoderConfig(latent_channels=CHANNELS, **WIDER)
    config = PixelVAEConfig(encoder, PixelDecoderConfig(CHANNELS, **DECODER))
    file = options.output / "plain.json"
    write_text(file, json.dumps(config.to_dict()))
    train_reals.main(
        train_reals.Options(
            data=data_options(data), output=output, model=file,
            losses=train_reals.LossOptions(
                mse=10.0, perceptual=0.0, adversarial=0.0, patch=0.0, cls=0.0, kl=1e-5, kl_reduction="mean"
            ),
            steps=steps_of(options, options.steps1) + steps_of(options, options.steps2),
            batch_size=options.batch_size, lr=1e-3, betas=(0.9, 0.95), warmup=100, final_lr=0.02, ema=0.998,
            seed=options.seed, resume=(output / "checkpoints").exists(), checkpoint_every=500, sample_every=10**9,
            tracker="none",
        )
    )  # fmt: skip


def in_half_precision(vae: PSVAE) -> PSVAE:
    """What the package's file holds, computed in fp32: the numbers are of the weights that users load."""
    return vae.half().float()


# Measuring


def held_out(photographs: Path) -> Tensor:
    """The test split's, ``N 3 256 256`` in [-1, 1]."""
    table, crop = open_table(str(photographs), "test"), center_transform(256)
    return torch.stack([crop(read_image(table[number]["image"])) for number in range(len(table))])


@torch.inference_mode()
def reconstruction(vae: Any, images: Tensor) -> dict[str, float]:
    """psnr and ssim of pictures of 8 bits, from the posterior's mean, in fp32."""
    rows = []
    for part in images.split(10):
        made = as_saved(vae.decode(vae.encode(part).latent_dist.mode()).sample)
        rows.append({name: float(value) * len(part) for name, value in picture_measures(made, part).items()})
    return {name: round(sum(row[name] for row in rows) / len(images), 4) for name in rows[0]}


def probed(
    read: Callable[[Tensor], Tensor], train: cifar.Split, test: cifar.Split, machine: Machine
) -> dict[str, float]:
    """Linear probe and nearest neighbours on what is read of enlarged CIFAR-10; 10 000 pictures to fit, 5000 to test.

    Args:
        read: images ``B 3 128 128`` → ``B F h w``.
    """
    known, unknown = (
        batched(lambda part: read(enlarged(cifar.to_images(part))), pictures, replace(machine, bf16=False), 50)
        for pictures in (train.pictures[-10_000:], test.pictures[:5000])
    )
    found = probe(known, train.labels[-10_000:], unknown, test.labels[:5000])
    return {name: round(value, 4) for name, value in found.items()}


if __name__ == "__main__":
    main(tyro.cli(Options))
