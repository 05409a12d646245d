"""Tiny models of transformers and of Meta's code, and their patch features as ``B D h w``."""

import math

import torch
import transformers
from torch import nn
from torch.nn import functional as F

from psvae.encoders.semantic_encoder import IMAGENET_MEAN, IMAGENET_STD

T = transformers
SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
MLP = {"intermediate_size": 100}
# name → (model class, its configuration); the tables are 4 x 4
FAMILIES = {
    "dinov2": (T.Dinov2Model, T.Dinov2Config(**SMALL, image_size=56, patch_size=14)),
    "dinov2_giant": (T.Dinov2Model, T.Dinov2Config(**SMALL, image_size=56, patch_size=14, use_swiglu_ffn=True)),
    "dinov2_reg": (
        T.Dinov2WithRegistersModel,
        T.Dinov2WithRegistersConfig(**SMALL, image_size=56, patch_size=14, num_register_tokens=4),
    ),
    "dinov2_reg_giant": (
        T.Dinov2WithRegistersModel,
        T.Dinov2WithRegistersConfig(
            **SMALL, image_size=56, patch_size=14, num_register_tokens=3, use_swiglu_ffn=True, mlp_ratio=3
        ),
    ),
    "dinov3": (T.DINOv3ViTModel, T.DINOv3ViTConfig(**SMALL, **MLP, num_register_tokens=4)),
    "dinov3_bare": (T.DINOv3ViTModel, T.DINOv3ViTConfig(**SMALL, **MLP, num_register_tokens=0)),
    "dinov3_no_bias": (
        T.DINOv3ViTModel,
        T.DINOv3ViTConfig(**SMALL, **MLP, num_register_tokens=4, query_bias=False, value_bias=False, rope_theta=50.0),
    ),
    "dinov3_gated": (
        T.DINOv3ViTModel,
        T.DINOv3ViTConfig(**SMALL, **MLP, num_register_tokens=4, use_gated_mlp=True, hidden_act="silu"),
    ),
    "siglip": (T.SiglipVisionModel, T.SiglipVisionConfig(**SMALL, **MLP, image_size=64, patch_size=16)),
    "siglip2_naflex": (T.Siglip2VisionModel, T.Siglip2VisionConfig(**SMALL, **MLP, num_patches=16, patch_size=16)),
    "mae": (T.ViTMAEModel, T.ViTMAEConfig(**SMALL, **MLP, image_size=64, patch_size=16, mask_ratio=0.0)),
}


@torch.no_grad()
def fill(module, seed=0):
    """Seeded weights in which norms, LayerScales, biases and position tables all matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2 and not any(part in name for part in ("position", "pos_embed", "token", "probe")):
            parameter.copy_(noise / math.sqrt(parameter[0].numel()))
        elif name.endswith(("weight", "lambda1", "gamma")) and parameter.ndim == 1:
            parameter.copy_(1.0 + 0.3 * noise)
        else:
            parameter.copy_(0.3 * noise)
    return module.eval()


def family_model(family, **fields):
    """A model of transformers with weights that matter."""
    model_class, config = FAMILIES[family]
    return fill(model_class(type(config)(**{**config.to_dict(), **fields})))


def normalised(x, family):
    """[-1, 1] → the family's mean and std."""
    if "siglip" in family:
        return x
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    return ((x + 1.0) / 2.0 - mean) / std


@torch.no_grad()
def features(model, x, family):
    """The library's own last hidden state of the patches, at any grid."""
    patch, pixels = model.config.patch_size, normalised(x, family)
    height, width = x.shape[-2] // patch, x.shape[-1] // patch
    prefix = 1 + getattr(model.config, "num_register_tokens", 0)
    if family == "mae":
        order = torch.arange(height * width).float().expand(len(x), -1)  # keeps the raster order
        tokens = model(pixels, noise=order, interpolate_pos_encoding=True).last_hidden_state
    elif family == "siglip":
        tokens, prefix = model(pixels, interpolate_pos_encoding=True).last_hidden_state, 0
    elif family == "siglip2_naflex":
        patches = pixels.unflatten(2, (height, patch)).unflatten(4, (width, patch))  # B 3 h p w p
        patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        shapes, mask = torch.tensor([[height, width]] * len(x)), torch.ones(patches.shape[:2])
        tokens, prefix = model(patches, mask, shapes).last_hidden_state, 0
    else:
        tokens = model(pixels).last_hidden_state
    return tokens[:, prefix:].mT.unflatten(2, (height, width))


class MetaDINOv2(nn.Module):
    """facebookresearch/dinov2's DinoVisionTransformer written out: its names, and its resize of the table."""

    def __init__(self, dim=128, depth=2, patch=14, grid=4, registers=0, gated=False):
        super().__init__()
        self.patch, self.grid, self.heads = patch, grid, dim // 64
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, dim, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, grid * grid + 1, dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, dim)) if registers else None
        self.blocks = nn.ModuleList(MetaBlock(dim, gated) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def positions(self, height, width):
        if height == width == self.grid:
            return self.pos_embed
        table = self.pos_embed[:, 1:].unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        if self.register_tokens is None:
            factor = ((height + 0.1) / self.grid, (width + 0.1) / self.grid)
            table = F.interpolate(table, scale_factor=factor, mode="bicubic")
        else:
            table = F.interpolate(table, size=(height, width), mode="bicubic", antialias=True)
        return torch.cat([self.pos_embed[:, :1], table.flatten(2).mT], dim=1)

    @torch.no_grad()
    def forward(self, x):
        height, width = x.shape[-2] // self.patch, x.shape[-1] // self.patch
        tokens = self.patch_embed.proj(normalised(x, "dinov2")).flatten(2).mT
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], dim=1) + self.positions(height, width)
        prefix = 1
        if self.register_tokens is not None:
            registers = self.register_tokens.expand(len(x), -1, -1)
            tokens = torch.cat([tokens[:, :1], registers, tokens[:, 1:]], dim=1)
            prefix += registers.shape[1]
        for block in self.blocks:
            tokens = block(tokens, self.heads)
        return self.norm(tokens)[:, prefix:].mT.unflatten(2, (height, width))


class MetaBlock(nn.Module):
    def __init__(self, dim, gated):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp, self.ls1, self.ls2 = nn.Module(), nn.Module(), nn.Module(), nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        if gated:
            self.mlp.w12, self.mlp.w3 = nn.Linear(dim, 2 * 96), nn.Linear(96, dim)
        else:
            self.mlp.fc1, self.mlp.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.ls1.gamma, self.ls2.gamma = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))
        self.gated = gated

    def forward(self, x, heads):
        q, k, v = self.attn.qkv(self.norm1(x)).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.ls1.gamma * self.attn.proj(attended)
        y = self.norm2(x)
        if self.gated:
            gate, value = self.mlp.w12(y).chunk(2, dim=-1)
            y = self.mlp.w3(F.silu(gate) * value)
        else:
            y = self.mlp.fc2(F.gelu(self.mlp.fc1(y)))
        return x + self.ls2.gamma * y
