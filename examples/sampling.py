"""Sample a trained DeepFusionDiT: texts, perhaps source pictures → pictures. Shared by generate.py and edit.py."""

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from train_generator import load_tokenizer, load_vae, scale_latents, unscale_latents

from psvae import DeepFusionDiT, PrefixCache, flow


@dataclass(frozen=True)
class SamplingOptions:
    """The paper: 50 Euler steps, timestep shift 3, guidance 6.5, for editing too (section 4.1)."""

    model: str = ""
    """Folder or Hub id of the DeepFusionDiT."""
    vae: str = ""
    """Folder or Hub id of the PSVAE or PixelVAE."""
    tokenizer: str = "Qwen/Qwen2.5-0.5B"
    """Folder or Hub id."""
    text_length: int = 256
    output: Path = Path("outputs/generated")
    size: int = 256
    """Side of the pictures, in pixels."""
    steps: int = 50
    """Updates of the sampler."""
    shift: float = 3.0
    guidance: float = 6.5
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Guided where low < σ ≤ high."""
    guidance_form: Literal["nested", "additive"] = "nested"
    """With a guidance towards the source: BAGEL's form or InstructPix2Pix's."""
    renorm: Literal["global", "channel"] | None = None
    """BAGEL's bound on the length of the guided velocity."""
    solver: Literal["euler", "heun"] = "euler"
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0


class Sampler:
    """The models, loaded once.

    Args:
        image_guidance: towards the source picture; None guides against no condition alone.
    """

    def __init__(self, options: SamplingOptions, device: torch.device, image_guidance: float | None = None) -> None:
        if not options.model or not options.vae:
            raise SystemExit("--model and --vae are needed")
        dtype = getattr(torch, options.dtype)
        self.options, self.device, self.dtype = options, device, dtype
        self.model = DeepFusionDiT.from_pretrained(options.model, dtype=dtype, device=device)
        self.vae = load_vae(options.vae).to(device, dtype)
        self.tokenise = load_tokenizer(options.tokenizer, options.text_length)
        self.guidance = flow.Guidance(
            options.guidance, image_guidance, options.guidance_form, options.guidance_interval, options.renorm
        )

    def __call__(self, texts: list[str], places: list[tuple[int, int]], sources: Tensor | None = None) -> Tensor:
        """Pictures ``B 3 H W`` in [-1, 1], fp32, on the CPU.

        Args:
            places: (prompt, number) of each picture; its noise depends on them and the seed alone.
            sources: ``B 3 H W`` in [-1, 1], to edit.
        """
        options = self.options
        ids, mask = (x.to(self.device) for x in self.tokenise(texts))
        source_latents = None
        if sources is not None:
            posterior = self.vae.encode(sources.to(self.device, self.dtype)).latent_dist
            source_latents = scale_latents(self.vae, posterior.mode())
        prefixes = self._prefixes(ids, mask, source_latents)
        velocity = flow.guided(self.model, prefixes, self.guidance)
        sigmas = flow.sigma_schedule(options.steps, options.shift)
        latents = flow.sample(velocity, self._noise(places), sigmas, solver=options.solver)
        return self.vae.decode(unscale_latents(self.vae, latents)).sample.float().clamp(-1, 1).cpu()

    def _prefixes(self, ids: Tensor, mask: Tensor, source_latents: Tensor | None) -> dict[str, PrefixCache]:
        """The branches that the guidance needs, each encoded once for all steps."""
        prefixes = {"full": self.model.encode_prefix(ids, mask, source_latents=source_latents)}
        for name in self.guidance.branches[1:]:
            if name == "empty":
                prefixes[name] = PrefixCache.empty(self.model.config, len(ids), device=self.device, dtype=self.dtype)
            elif name == "image":
                prefixes[name] = self.model.encode_prefix(source_latents=source_latents)
            else:
                prefixes[name] = self.model.encode_prefix(ids, mask)
        return prefixes

    def _noise(self, places: list[tuple[int, int]]) -> Tensor:
        spec, side = self.vae.latent_spec, self.options.size // self.vae.latent_spec.stride
        rows = []
        for place in places:
            draw = torch.Generator().manual_seed(zlib.crc32(repr((self.options.seed, *place)).encode()))
            rows.append(torch.randn(spec.channels, side, side, generator=draw))
        return torch.stack(rows).to(self.device, self.dtype)


def save_image(image: Tensor, path: Path) -> None:
    """``3 H W`` in [-1, 1] as a PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = (image.clamp(-1, 1) * 127.5 + 127.5).round().byte().permute(1, 2, 0).numpy()
    partial = path.with_name(path.name + ".partial")
    Image.fromarray(pixels).save(partial, format="PNG")
    partial.replace(path)
