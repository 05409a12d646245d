"""The step of diffusers' train_text_to_image script: one import line differs."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers", reason="diffusers comes with psvae[diffusers]")

from diffusers import DDPMScheduler

from psvae import AutoencoderPSVAE as AutoencoderKL
from tests.integrations.tiny_pipelines import clip, tiny_vae, unet


def test_one_step(tmp_path):
    tiny_vae().save_pretrained(tmp_path / "model" / "vae")
    vae = AutoencoderKL.from_pretrained(tmp_path / "model", subfolder="vae", revision=None, variant=None)
    vae.requires_grad_(False)
    weight_dtype = torch.float32
    vae.to("cpu", dtype=weight_dtype)
    denoiser, scheduler = unet().train(), DDPMScheduler(num_train_timesteps=10)
    text_encoder, tokenizer = clip(tmp_path / "clip")
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-2)
    torch.manual_seed(0)
    pixel_values = torch.rand(2, 3, 64, 64) * 2 - 1
    tokens = tokenizer(["a cat", "a dog"], padding="max_length", truncation=True, return_tensors="pt").input_ids
    losses = []
    for _ in range(8):
        latents = vae.encode(pixel_values.to(weight_dtype)).latent_dist.sample()
        latents = latents * vae.config.scaling_factor
        noise = torch.randn_like(latents, generator=None)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (2,)).long()
        noisy = scheduler.add_noise(latents, noise, timesteps)
        hidden = text_encoder(tokens, return_dict=False)[0]
        prediction = denoiser(noisy, timesteps, hidden, return_dict=False)[0]
        loss = F.mse_loss(prediction.float(), noise.float(), reduction="mean")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with torch.no_grad():
        image = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
    assert image.shape == pixel_values.shape
    assert all(parameter.grad is None for parameter in vae.parameters())
