"""SiT, class-conditional, as diffusers' DiTTransformer2DModel: its sizes, its first weights, its velocity, its folder.

Three things of diffusers' class are not SiT's. Each block embeds time and class anew, and drops labels by its own draw;
SiT has one embedding for all, and so has this. It starts from PyTorch's weights; SiT from zero modulation, and so does
this. And the 128 frequencies of time are 10000^(−k / 127); DiT's and SiT's code has 10000^(−k / 128). That stays:
diffusers opens the folder and would compute no other.
"""

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from checkpoints import write_text, write_whole
from diffusers import DiTTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from safetensors.torch import save_file
from sampling import digest
from torch import Tensor, nn

from psvae import PSVAE, LatentSpec, PixelVAE, flow

PRESETS = {"tiny/2": (4, 192, 3), "B/2": (12, 768, 12), "L/2": (24, 1024, 16), "XL/2": (28, 1152, 16)}
STATISTICS = "latents_stats.safetensors"  # beside a saved SiT: those of the latents that it was trained on
LATENTS = "latents.json"  # beside a saved SiT: digests of what made those latents


def build_sit(preset: str, channels: int, side: int, classes: int, patch_size: int = 2) -> DiTTransformer2DModel:
    """With random weights, for latents ``Z side side``. Class ``classes`` stands for none.

    Args:
        preset: blocks, width and heads of SiT's models.py; ``tiny/2`` is ours.
    """
    depth, width, heads = PRESETS[preset]
    if side % patch_size:
        raise SystemExit(
            f"latents are {side} x {side}, which patches of {patch_size} do not fill: take --patch-size 1, or a --size "
            f"that is a multiple of the VAE's stride times {patch_size}"
        )
    model = DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=width // heads, in_channels=channels, out_channels=channels,
        num_layers=depth, sample_size=side, patch_size=patch_size, num_embeds_ada_norm=classes, norm_eps=1e-6,
    )  # fmt: skip
    share_embedding(model)
    initialise(model)
    return model


def share_embedding(model: DiTTransformer2DModel) -> None:
    """The first block's embedding of time and class for all blocks, with no labels dropped behind our back."""
    first, *others = [block.norm1 for block in model.transformer_blocks]
    for norm in others:
        del norm.emb
        object.__setattr__(norm, "emb", first.emb)  # not as a submodule: its weights are counted and saved once
    first.emb.class_embedder.dropout_prob = 0.0  # the caller drops them, by passing the class that stands for none


@torch.no_grad()
def initialise(model: DiTTransformer2DModel) -> None:
    """As DiT and SiT do (models.py, initialize_weights): each block begins as the identity, the output as zero."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            joined = name.endswith(("to_q", "to_k", "to_v"))  # one layer of three times the width there
            nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(0.5) if joined else 1.0)
            nn.init.zeros_(layer.bias)
    nn.init.xavier_uniform_(model.pos_embed.proj.weight.flatten(1))
    nn.init.zeros_(model.pos_embed.proj.bias)
    embedding = model.transformer_blocks[0].norm1.emb
    times = embedding.timestep_embedder
    for weight in (embedding.class_embedder.embedding_table.weight, times.linear_1.weight, times.linear_2.weight):
        nn.init.normal_(weight, std=0.02)
    for layer in (*(block.norm1.linear for block in model.transformer_blocks), model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(layer.weight)


# Velocity


@dataclass(frozen=True)
class Labels:
    """Classes, ``B``, as `flow.guided` wants what conditions a batch."""

    ids: Tensor

    @property
    def batch_size(self) -> int:
        return len(self.ids)

    @classmethod
    def concat_batch(cls, parts: list["Labels"]) -> "Labels":
        return cls(torch.cat([part.ids for part in parts]))


def velocity(model: nn.Module, latents: Tensor, sigmas: Tensor, labels: Tensor) -> Tensor:
    """ε − x at σ, of a network in SiT's convention: time 1 − σ, output x − ε. A learned variance is left out."""

    def network(x: Tensor, time: Tensor) -> Tensor:
        return model(x, timestep=time, class_labels=labels).sample[:, : x.shape[1]]

    return flow.from_sit(network)(latents, sigmas)


def guided_velocity(model: DiTTransformer2DModel, classes: Tensor, guidance: flow.Guidance) -> flow.Velocity:
    """Towards ``classes``, ``B``, and away from none. All channels are guided; SiT's own code guides the first three.

    Raises:
        SystemExit: the model knows no such class.
    """
    none = model.config.num_embeds_ada_norm
    check_classes(classes.tolist(), none, "the model's num_embeds_ada_norm")

    def predict(latents: Tensor, sigmas: Tensor, labels: Labels) -> Transformer2DModelOutput:
        return Transformer2DModelOutput(sample=velocity(model, latents, sigmas, labels.ids))

    labels = {"full": Labels(classes), "empty": Labels(torch.full_like(classes, none))}
    return flow.guided(predict, labels, guidance)


def check_classes(found: Any, classes: int, option: str) -> None:
    """Whether all are of 0 to classes − 1; where not, ``option`` is what to look at."""
    wrong = sorted({label for label in found if not 0 <= label < classes})
    if wrong:
        shown = ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
        raise SystemExit(
            f"labels {shown} are out of range; there are {classes} classes, 0 to {classes - 1}: see {option}"
        )


# Folders


def save_sit(model: DiTTransformer2DModel, spec: LatentSpec, folder: Path) -> None:
    """A folder that diffusers opens, where each block has its embedding, and the statistics of the latents."""
    whole = copy.deepcopy(model)
    first, *others = [block.norm1 for block in whole.transformer_blocks]
    for norm in others:
        norm.emb = copy.deepcopy(first.emb)
    whole.save_pretrained(folder)
    tensors = {"mean": spec.mean.detach().cpu().contiguous(), "std": spec.std.detach().cpu().contiguous()}
    write_whole(folder / STATISTICS, lambda place: save_file(tensors, place))


def load_sit(folder: str, dtype: torch.dtype = torch.float32) -> DiTTransformer2DModel:
    """What `save_sit` wrote, or any class-conditional DiT of diffusers' that was trained as a SiT."""
    try:
        return DiTTransformer2DModel.from_pretrained(folder, torch_dtype=dtype).eval().requires_grad_(False)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{folder} holds no SiT as train_sit.py writes it: {error}") from error


# Which latents


def latents_of(vae: PSVAE | PixelVAE) -> dict[str, str]:
    """Digests of what makes a VAE's latents as a generator sees them. Its decoder does not: SD has several."""
    after = ("decoder.", "post_quant_conv.", "latent_spec.")
    weights = {name: tensor for name, tensor in vae.state_dict().items() if not name.startswith(after)}
    scale = {}
    if isinstance(vae, PixelVAE):  # a PSVAE has none
        scale = {"scaling_factor": vae.config.scaling_factor, "shift_factor": vae.config.shift_factor or 0.0}
    statistics = {"mean": vae.latent_spec.mean, "std": vae.latent_spec.std}
    return {"encoder": digest({}, weights), "statistics or scale": digest(scale, statistics)}


def note_latents(vae: PSVAE | PixelVAE, folder: Path) -> None:
    """For `check_latents`."""
    write_text(folder / LATENTS, json.dumps(latents_of(vae), indent=2) + "\n")


def check_latents(vae: PSVAE | PixelVAE, name: str, folder: Path, remedy: str) -> None:
    """Whether the VAE, loaded from ``name``, makes the latents that were noted in the folder; any may where none were,
    as in older folders.

    Raises:
        SystemExit: it makes others.
    """
    file = folder / LATENTS
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    others = [what for what, found in latents_of(vae).items() if before.get(what, found) != found]
    if others:
        raise SystemExit(
            f"the latents of {name} are not those that {folder} was trained on (another {', another '.join(others)}): "
            f"{remedy}"
        )
