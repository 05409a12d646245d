"""What a PS-VAE does: reconstruct with the one that comes with the package, and look; with --train, train a small one.

    python examples/quickstart.py                       # seconds: psvae-tiny on scikit-image's photographs
    python examples/quickstart.py --data ~/Pictures     # on the first of any folder of images
    python examples/quickstart.py --train               # minutes: both stages, save, load, reconstruct, look

With --train, a small PS-VAE is trained by examples/train_tokenizer.py; the photograph in the report was never seen. Its
encoder is a small Vision Transformer with random weights, so that nothing is downloaded: it shows the method, not
semantics. With a network, `--encoder vit_small_patch14_reg4_dinov2.lvd142m` takes a real one.
"""

import json
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from checkpoints import write_text
from data import IMAGE_ENDINGS, UNREADABLE, DataOptions, center_transform, read_image
from measures import measure, step_seconds
from pictures import save_look, save_report
from PIL import Image
from sampling import plain_errors
from torchvision.transforms.functional import center_crop, to_tensor
from train_tokenizer import LossOptions, Options, build_model, main

from psvae import PSVAE, PixelDecoderConfig, PSVAEConfig, SemanticEncoderConfig, SemanticVAEConfig
from psvae.adapt import latent_shape

PHOTOGRAPHS = (
    "astronaut", "brick", "camera", "coffee", "coins", "grass", "gravel", "hubble_deep_field",
    "immunohistochemistry", "moon", "retina", "rocket",
)  # fmt: skip
HELD_OUT = "chelsea"
SHOWN = (HELD_OUT, "astronaut", "coffee")
LATENT_CHANNELS = 64
TRAINING_SECONDS = 200


@dataclass(frozen=True)
class Quickstart:
    """Look at psvae-tiny, or train a small PS-VAE in both stages and report on a photograph it never saw."""

    data: Path | None = None
    """A folder of images: the first three in name order are shown; in training the first is held out. Without it,
    scikit-image's photographs."""
    output: Path = Path("outputs/quickstart")
    """Where look.png goes; of --train, the model, report.png and metrics.json."""
    model: str = "psvae-tiny"
    """What is looked at: a model of the package, a folder, or a Hub id."""
    train: bool = False
    """Train one."""
    encoder: str | None = None
    """A timm model with published weights to start from, such as vit_small_patch14_reg4_dinov2.lvd142m (needs a
    network); without it, a small one with random weights."""
    steps1: int | None = None
    """Steps of stage 1; by default 220, fewer on a machine that would need more than four minutes."""
    steps2: int | None = None
    """Steps of stage 2; by default 380, likewise."""


def run(options: Quickstart) -> int:
    """Returns the exit code."""
    if options.train and options.model != Quickstart.model:
        raise SystemExit("--model is what is looked at, and --train trains a model of its own; wanted one of the two")
    for name in ("encoder", "steps1", "steps2"):
        if not options.train and getattr(options, name) is not None:
            raise SystemExit(f"--{name} came without --train; it is of a training")
    return train(options) if options.train else look(options)


def look(options: Quickstart) -> int:
    """Encode and decode photographs of any size, and draw what the latent holds."""
    from skimage import data

    with plain_errors():
        model = PSVAE.from_pretrained(options.model)
    if options.data is None:
        photographs = {name: Image.fromarray(getattr(data, name)()).convert("RGB") for name in SHOWN}
    else:
        photographs = {file.name: readable(file) for file in images_of(options.data, least=1)[: len(SHOWN)]}
    stride = model.config.spatial_compression_ratio
    images = {name: whole_cells(photograph, stride, name) for name, photograph in photographs.items()}
    options.output.mkdir(parents=True, exist_ok=True)
    for name, psnr in save_look(images, model, options.output / "look.png").items():
        size = tuple(images[name].shape[2:])
        print(f"{name}: {size} pixels, latents {latent_shape(model, size)}, PSNR {psnr:.2f} dB")
    print(f"the picture is {options.output / 'look.png'}; --train trains a model in a few minutes")
    return 0


def readable(file: Path) -> Image.Image:
    try:
        return read_image(file)
    except UNREADABLE as error:
        raise SystemExit(f"{file} cannot be read as a picture ({error}); move it out of the folder") from error


def whole_cells(photograph: Image.Image, stride: int, name: str) -> torch.Tensor:
    """``1 3 H W`` in [-1, 1]: at most 512 pixels a side, its middle cut to whole latent cells."""
    photograph.thumbnail((512, 512))
    width, height = (side - side % stride for side in photograph.size)
    if min(width, height) == 0:
        came = f"{photograph.size[0]} x {photograph.size[1]}"
        raise SystemExit(f"{name} has {came} pixels, shown at 512 at most; wanted {stride} a side or more")
    return center_crop(to_tensor(photograph), [height, width])[None] * 2 - 1


def train(options: Quickstart) -> int:
    """Train, save, load, measure, draw."""
    torch.manual_seed(0)
    folder, held_out = prepare_photographs(options)
    main(fit_steps(options, training_options(options, folder, held_out)))
    stages = {name: PSVAE.from_pretrained(options.output / name) for name in ("stage1", "stage2")}
    frozen = stages["stage1"].encoder  # frozen in stage 1, so still the original
    image = center_transform(256)(readable(held_out))[None]
    numbers = {name: measure(model, frozen, image, batch_size=1) for name, model in stages.items()}
    write_text(options.output / "metrics.json", json.dumps(numbers, indent=2) + "\n")
    save_report(image, stages["stage1"], stages["stage2"], frozen, options.output / "report.png")
    print_table(numbers, held_out.stem)
    gain = numbers["stage2"]["psnr"] - numbers["stage1"]["psnr"]
    print(f"stage 2 gains {gain:+.2f} dB; the picture is {options.output / 'report.png'}")
    return 0 if gain > 0 else 1


def prepare_photographs(options: Quickstart) -> tuple[Path, Path]:
    """A folder to train on, and one photograph that is not in it."""
    folder = options.output / ".prepared"  # a name that no one else's folder has
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "train").mkdir(parents=True)
    (folder / "held_out").mkdir()
    if options.data is not None:
        for number, file in enumerate(images_of(options.data, least=2)):
            place = "train" if number else "held_out"
            if place == "held_out":
                readable(file)  # before a training that ends with it
            (folder / place / f"{number:06d}-{file.name}").symlink_to(file.resolve())
    else:
        from skimage import data

        photographs = {name: getattr(data, name)() for name in (*PHOTOGRAPHS, HELD_OUT)}
        photographs["motorcycle_left"], photographs["motorcycle_right"], _ = data.stereo_motorcycle()
        for name, pixels in photographs.items():
            photograph = Image.fromarray(pixels).convert("RGB")
            if name == HELD_OUT:
                photograph.save(folder / "held_out" / f"{name}.png")
            else:
                photograph.thumbnail((512, 512))
                photograph.save(folder / "train" / f"{name}.bmp")  # read a hundred times each: no decompression
    return folder / "train", next((folder / "held_out").iterdir())


def images_of(folder: Path, least: int) -> list[Path]:
    """In name order."""
    if not folder.is_dir():
        raise SystemExit(f"there is no folder {folder}")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_ENDINGS)
    if len(files) < least:
        wanted = "two or more, one of them to hold out" if least > 1 else "one or more"
        raise SystemExit(f"{folder} holds {len(files)} images; wanted {wanted}")
    return files


def training_options(options: Quickstart, folder: Path, held_out: Path) -> Options:
    """A small model and a short schedule for examples/train_tokenizer.py."""
    if options.encoder is None:
        vit = {"img_size": 64, "patch_size": 8, "embed_dim": 192, "depth": 4, "num_heads": 3}
        encoder = SemanticEncoderConfig("vit_tiny_patch16_224", vit, stride=8)
        width, heads = 192, 3
    else:
        encoder = SemanticEncoderConfig.from_dict({"name": options.encoder, "stride": 8})
        width, heads = 384, 6
    config = PSVAEConfig(
        encoder=encoder,
        vae=SemanticVAEConfig(width, LATENT_CHANNELS, num_heads=heads, mlp_dim=4 * width),
        decoder=PixelDecoderConfig(
            LATENT_CHANNELS, base_channels=24, channel_multipliers=(1, 1, 2, 4), num_res_blocks=1, norm_groups=8
        ),
        sample_size=256,
    )
    model = options.output / "model.json"
    model.write_text(json.dumps(config.to_dict(), indent=2))
    return Options(
        data=DataOptions(str(folder), size=64, crop="zoom", zoom=(0.04, 0.4), workers=0),
        output=options.output,
        model=str(model),
        encoder_weights="random" if options.encoder is None else "timm",
        steps1=220 if options.steps1 is None else options.steps1,
        steps2=380 if options.steps2 is None else options.steps2,
        losses=LossOptions(semantic=1.0, perceptual=0.0, adversarial=0.0),
        batch_size=8,
        lr=1e-3,
        warmup=30,
        final_lr=0.05,
        ema=0.98,
        mixed_precision="auto",
        log_every=10,
        sample_every=10**9,
        validate_every=10**9,
        checkpoint_every=10**9,
        validation=str(held_out.parent),
        validation_count=1,
        statistics_batches=20,
        tracker="none",
    )


def fit_steps(options: Quickstart, training: Options) -> Options:
    """Fewer steps where this machine would need more than four minutes for all."""
    if options.steps1 is not None or options.steps2 is not None:
        return training
    seconds = min(step_seconds(build_model(training, stage=1), training.batch_size, training.data.size).values())
    # the whole step, with data, frozen encoder and optimiser, was measured at 1.5 times forward and backward
    share = TRAINING_SECONDS / (1.5 * seconds * (training.steps1 + training.steps2))
    if share >= 1.0:
        return training
    steps1, steps2 = max(20, int(share * training.steps1)), max(35, int(share * training.steps2))
    print(
        f"a step takes {seconds:.2f} s here: {steps1} + {steps2} steps instead of {training.steps1} + {training.steps2}"
    )
    return replace(training, steps1=steps1, steps2=steps2)


def print_table(numbers: dict[str, dict[str, float]], name: str) -> None:
    """PSNR, SSIM and feature cosine after each stage."""
    print("\nThe lines above measure a 64 px crop, the size of training; the whole photograph:")
    print(f"\n{name} at 256 px, not trained on     PSNR     SSIM   feature cosine")
    for stage, row in numbers.items():
        label = {"stage1": "stage 1, S-VAE", "stage2": "stage 2, PS-VAE"}[stage]
        print(f"{label:32s} {row['psnr']:6.2f}   {row['ssim']:6.3f}   {row['feature_cosine']:8.3f}")


if __name__ == "__main__":
    sys.exit(run(tyro.cli(Quickstart)))
