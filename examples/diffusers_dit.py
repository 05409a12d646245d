"""A DiT on our latents, trained for a minute and sampled by diffusers' own DiTPipeline.

    pip install -e '.[train,diffusers]'
    python examples/diffusers_dit.py                                     # trains a small PSVAE first, then the DiT
    python examples/diffusers_dit.py --vae outputs/quickstart/stage2     # or takes a trained one
    python examples/diffusers_dit.py --data ~/Pictures                   # one class per subfolder

The five photographs beside this file are the data: one class each, random crops of it. It shows that the latents
work in diffusers' models, schedulers and pipelines; a minute on a CPU makes no good generator.
"""

import argparse
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDIMScheduler, DiffusionPipeline, DiTPipeline, DiTTransformer2DModel
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from tqdm import tqdm

from psvae import (
    PSVAE,
    AutoencoderPSVAE,
    PixelDecoderConfig,
    PSVAEConfig,
    SemanticEncoderConfig,
    SemanticVAEConfig,
    fit_latent_statistics,
    losses,
)
from psvae.adapt import latent_shape

SIZE, BATCH, NULL_CLASS = 64, 16, 1000  # DiTPipeline counts on ImageNet's thousand classes
PHOTOGRAPHS = Path(__file__).parent / "photographs"
ENDINGS = {".jpg", ".jpeg", ".png", ".webp"}


class Crops:
    """Random crops B 3 H W in [-1, 1] of a folder's images, and their classes: subfolders, or one class per file."""

    def __init__(self, folder: Path, seed: int) -> None:
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS)
        if not files:
            raise SystemExit(f"{folder} holds no images ({', '.join(sorted(ENDINGS))}); wanted one or more")
        nested = all(path.parent != folder for path in files)
        names = [path.parent.name if nested else path.stem for path in files]
        self.classes = sorted(set(names))
        self.labels = [self.classes.index(name) for name in names]
        self.images = [Image.open(path).convert("RGB") for path in files]
        self.random = random.Random(seed)
        self.crop = v2.Compose([
            v2.RandomResizedCrop(SIZE, scale=(0.8, 1.0), ratio=(1.0, 1.0)), v2.RandomHorizontalFlip(), v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.5]),
        ])  # fmt: skip

    def batch(self) -> tuple[Tensor, Tensor]:
        picks = self.random.choices(range(len(self.images)), k=BATCH)
        images = torch.stack([self.crop(self.images[pick]) for pick in picks])
        return images, torch.tensor([self.labels[pick] for pick in picks])


def train_vae(crops: Crops, accelerator: Accelerator, steps: int) -> PSVAE:
    """A small PSVAE from random weights: stride 8, 16 channels. For real ones see train_tokenizer.py."""
    vit = {"img_size": SIZE, "patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 3}
    config = PSVAEConfig(
        encoder=SemanticEncoderConfig("vit_tiny_patch16_224", vit, stride=8),
        vae=SemanticVAEConfig(96, 16, depth=1, num_heads=3, mlp_dim=192, layer_scale=None),
        decoder=PixelDecoderConfig(
            16, base_channels=16, channel_multipliers=(1, 1, 2, 4), num_res_blocks=1, norm_groups=8
        ),
        sample_size=SIZE,
    )
    vae = PSVAE(config)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
    model, optimizer = accelerator.prepare(vae, optimizer)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in (bar := tqdm(range(steps), "autoencoder", disable=not accelerator.is_main_process)):
        images = crops.batch()[0].to(accelerator.device)
        output = model(images, sample_posterior=True)
        kl = losses.kl_loss(output.posterior, reduction="mean")
        loss = losses.pixel_loss(output.sample, images) + 1e-3 * kl
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return accelerator.unwrap_model(model).eval()


def train_dit(vae: PSVAE, crops: Crops, accelerator: Accelerator, steps: int) -> DiTTransformer2DModel:
    """DiT's own recipe: predict the noise, drop the class one time in ten."""
    channels, side, _ = latent_shape(vae, SIZE)
    transformer = DiTTransformer2DModel(
        sample_size=side, in_channels=channels, out_channels=channels, patch_size=1, num_layers=4,
        num_attention_heads=6, attention_head_dim=32, num_embeds_ada_norm=NULL_CLASS,
    )  # fmt: skip
    scheduler, optimizer = DDIMScheduler(clip_sample=False), torch.optim.AdamW(transformer.parameters(), lr=1e-3)
    model, optimizer = accelerator.prepare(transformer, optimizer)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for _ in (bar := tqdm(range(steps), "DiT", disable=not accelerator.is_main_process)):
        images, labels = (x.to(accelerator.device) for x in crops.batch())
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.sample() * vae.config.scaling_factor
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(labels),), device=labels.device)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        loss = F.mse_loss(model(noisy, timesteps, class_labels=labels).sample, noise)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return accelerator.unwrap_model(model).eval()


def grid(rows: list[Tensor]) -> Image.Image:
    """Rows of images B 3 H W in [-1, 1] as one picture."""
    pixels = torch.cat([torch.cat(list(row.clamp(-1, 1)), dim=2) for row in rows], dim=1)
    return Image.fromarray((pixels * 127.5 + 127.5).round().byte().permute(1, 2, 0).numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=PHOTOGRAPHS, help="folder of images, or of one folder per class")
    parser.add_argument("--vae", default=None, help="folder or Hub id of a PSVAE; without it a small one is trained")
    parser.add_argument("--vae-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=900, help="of the DiT")
    parser.add_argument("--output", type=Path, default=Path("outputs/diffusers_dit"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    accelerator = Accelerator()
    torch.manual_seed(options.seed + accelerator.process_index)
    crops = Crops(options.data, options.seed + accelerator.process_index)
    if options.vae is None:
        vae = train_vae(crops, accelerator, options.vae_steps)
        fit_latent_statistics(vae, (crops.batch()[0].to(accelerator.device) for _ in range(8)))
    else:
        vae = PSVAE.from_pretrained(options.vae, device=accelerator.device)
    transformer = train_dit(vae, crops, accelerator, options.steps)
    if not accelerator.is_main_process:
        return
    codec = AutoencoderPSVAE.from_psvae(vae.cpu())
    pipeline = DiTPipeline(transformer.cpu(), codec, DDIMScheduler(clip_sample=False))
    pipeline.save_pretrained(options.output / "pipeline")
    pipeline = DiffusionPipeline.from_pretrained(options.output / "pipeline")  # whole, from the disk
    shown = list(range(min(5, len(crops.classes))))
    drawn = [
        pipeline(
            shown,
            guidance_scale=1.0,
            num_inference_steps=50,
            output_type="np",
            generator=torch.Generator().manual_seed(options.seed + row),
        ).images
        for row in range(3)
    ]
    firsts = torch.stack([crops.crop(crops.images[crops.labels.index(label)]) for label in shown])
    with torch.no_grad():
        rebuilt = pipeline.vae(firsts).sample
    rows = [firsts, rebuilt, *(torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1 for images in drawn)]
    path = options.output / "samples.png"
    grid(rows).resize((len(shown) * SIZE * 2, len(rows) * SIZE * 2), Image.Resampling.NEAREST).save(path)
    psnr = 10 * torch.log10(4 / F.mse_loss(rebuilt.clamp(-1, 1), firsts))
    print(f"rows: crops, their reconstructions ({psnr:.1f} dB), three draws of {', '.join(crops.classes[:5])}: {path}")


if __name__ == "__main__":
    main()
