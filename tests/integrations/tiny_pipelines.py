"""The smallest real pipelines of diffusers around a stride-16, 96-channel PSVAE. Nothing is downloaded."""

import json
from pathlib import Path

import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from psvae import (
    AutoencoderPSVAE,
    PixelDecoderConfig,
    PSVAEConfig,
    SemanticEncoderConfig,
    SemanticVAEConfig,
)

Z = 96


def tiny_vae():
    """Stride 16, 96 channels, as the paper's, and little else."""
    torch.manual_seed(0)
    args = {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 1, "num_heads": 3}
    config = PSVAEConfig(
        encoder=SemanticEncoderConfig("vit_tiny_patch16_224", args, stride=16),
        vae=SemanticVAEConfig(feature_dim=48, latent_channels=Z, depth=1, num_heads=3, mlp_dim=48),
        decoder=PixelDecoderConfig(Z, base_channels=8, channel_multipliers=(1, 1, 1, 1, 2), norm_groups=4),
        sample_size=64,
    )
    return AutoencoderPSVAE(core=config.to_dict()).eval()


def clip(folder: Path, width: int = 8):
    """A CLIP text model and a tokenizer of single letters."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=16, pad_token="<|endoftext|>")
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1, projection_dim=width,
    )  # fmt: skip
    return CLIPTextModel(config).eval(), tokenizer


def ddim():
    return diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)


def unet(**fields):
    return diffusers.UNet2DConditionModel(
        **{
            "sample_size": 4, "in_channels": Z, "out_channels": Z, "layers_per_block": 1, "block_out_channels": (8, 16),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 8, "norm_num_groups": 4, "attention_head_dim": 4, **fields,
        }
    )  # fmt: skip


def stable_diffusion(vae, folder, kind=diffusers.StableDiffusionPipeline, in_channels=Z):
    text_encoder, tokenizer = clip(folder)
    pipeline = kind(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet(in_channels=in_channels),
        scheduler=ddim(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    return pipeline, {"prompt": "a cat"}


def image_to_image(vae, folder):
    pipeline, _ = stable_diffusion(vae, folder, diffusers.StableDiffusionImg2ImgPipeline)
    return pipeline, {"prompt": "a cat", "image": picture(), "strength": 0.9}


def inpaint(vae, folder):
    pipeline, _ = stable_diffusion(vae, folder, diffusers.StableDiffusionInpaintPipeline)
    return pipeline, {"prompt": "a cat", "image": picture(), "mask_image": upper_half(), "strength": 0.9}


def sdxl(vae, folder):
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=vae, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None,
        unet=unet(
            addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=8 + 6 * 4
        ),
        scheduler=ddim(), add_watermarker=False,
    )  # fmt: skip
    prompt = {name: noise(1, 5, 8) for name in ("prompt_embeds", "negative_prompt_embeds")}
    pooled = {name: noise(1, 8) for name in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")}
    return pipeline, prompt | pooled


def dit(vae, folder):
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=4, in_channels=Z, out_channels=2 * Z, num_layers=1, patch_size=2, attention_head_dim=4,
        num_attention_heads=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    pipeline = diffusers.DiTPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=ddim(),
        id2label={0: "cat"},
    )
    return pipeline, {"class_labels": [0], "guidance_scale": 2.0}


def sd3(vae, folder):
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=4, patch_size=1, in_channels=Z, out_channels=Z, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=16, pooled_projection_dim=8,
    )  # fmt: skip
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=transformer, vae=vae, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    prompt = {name: noise(1, 5, 8) for name in ("prompt_embeds", "negative_prompt_embeds")}
    pooled = {name: noise(1, 8) for name in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")}
    return pipeline, prompt | pooled


def flux(vae, folder, kind=diffusers.FluxPipeline):
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4 * Z, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    pipeline = kind(
        transformer=transformer, vae=vae, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip
    return pipeline, {"prompt_embeds": noise(1, 5, 8), "pooled_prompt_embeds": noise(1, 8)}


def flux_inpaint(vae, folder):
    pipeline, call = flux(vae, folder, diffusers.FluxInpaintPipeline)
    return pipeline, call | {"image": picture(), "mask_image": upper_half(), "strength": 0.9}


def pixart(vae, folder):
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=4, patch_size=2, in_channels=Z, out_channels=2 * Z, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, cross_attention_dim=16, caption_channels=8, use_additional_conditions=False,
    )  # fmt: skip
    pipeline = diffusers.PixArtAlphaPipeline(
        transformer=transformer, vae=vae, scheduler=ddim(), text_encoder=None,
        tokenizer=None,
    )  # fmt: skip
    return pipeline, embedded_prompt() | {"use_resolution_binning": False}


def sana(vae, folder):
    transformer = diffusers.SanaTransformer2DModel(
        sample_size=4, patch_size=1, in_channels=Z, out_channels=Z, num_layers=1, num_attention_heads=2,
        attention_head_dim=8, num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
        caption_channels=8,
    )  # fmt: skip
    pipeline = diffusers.SanaPipeline(
        transformer=transformer, vae=vae, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), text_encoder=None,
        tokenizer=None,
    )  # fmt: skip
    return pipeline, embedded_prompt() | {"use_resolution_binning": False}


def embedded_prompt():
    """What a text encoder would have given, with its mask."""
    ones = torch.ones(1, 5)
    return {
        "prompt_embeds": noise(1, 5, 8), "prompt_attention_mask": ones,
        "negative_prompt_embeds": noise(1, 5, 8), "negative_prompt_attention_mask": ones, "negative_prompt": None,
    }  # fmt: skip


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def upper_half():
    mask = torch.zeros(1, 1, 64, 64)
    mask[:, :, :32] = 1
    return mask


def picture():
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))


PIPELINES = {
    "stable_diffusion": stable_diffusion,
    "image_to_image": image_to_image,
    "sdxl": sdxl,
    "dit": dit,
    "sd3": sd3,
    "flux": flux,
    "flux_inpaint": flux_inpaint,
    "pixart": pixart,
    "sana": sana,
}
TAKES_A_SIZE = ("stable_diffusion", "inpaint", "sdxl", "sd3", "flux", "flux_inpaint", "pixart", "sana")


def run(name, pipeline, call):
    """The picture, B H W C in [0, 1], from a fixed seed."""
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": 64, "width": 64} if name in TAKES_A_SIZE else {}
    return pipeline(
        **call | size, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np"
    ).images
