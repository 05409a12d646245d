"""Writes docs/checkpoints.md from the key maps: `python docs/checkpoints.py`. A test compares the two."""

from pathlib import Path

import psvae

# (layout, class) → (published examples, how it was verified, on random weights)
KNOWN = {
    "diffusers AutoencoderKL": ("stabilityai/sd-vae-ft-mse, -ema; the `vae` folders of SDXL, SD3, FLUX.1; ReaLS",
                                "encode and decode equal diffusers' AutoencoderKL to 1e-5, both directions"),
    "LDM": ("VA-VAE f16d32, MAR kl16, REPA-E, original SD and FLUX files",
            "the same, through diffusers' own converter of these names"),
    "psvae's AutoencoderPixelVAE": ("written by psvae in diffusers", "same state dict"),
    "psvae's AutoencoderPSVAE": ("written by psvae in diffusers", "same state dict"),
    "diffusers AutoencoderRAE": ("nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08 and its kin",
                                 "encode and decode equal diffusers' AutoencoderRAE to 1e-4 (DINOv2, MAE)"),
    "RAE's decoder": ("nyu-visionx/RAE-collections", "equals diffusers' RAEDecoder to 1e-5"),
    "timm": ("`timm/...` of DINOv2, DINOv3, SigLIP 2, MAE", "features equal timm's"),
    "transformers": ("facebook/dinov2-*, google/siglip2-*, facebook/vit-mae-*",
                     "features equal transformers', at native and other sizes"),
    "Meta": ("Meta's own DINOv2 files", "features equal a plain forward of that code's equations"),
}  # fmt: skip
CLASSES = ("PixelVAE", "PSVAE", "ViTPixelDecoder", "SemanticEncoder")


def page() -> str:
    rows = []
    for name in CLASSES:
        for layout in getattr(psvae, name).foreign_formats:
            examples, verified = next(
                (facts for start, facts in KNOWN.items() if layout.name.lower().startswith(start.lower())),
                next((facts for word, facts in KNOWN.items() if word.lower() in layout.name.lower()), ("", "")),
            )
            written = "yes" if layout.write_config else "no"
            rows.append(f"| `{name}` | {layout.name} | {written} | {examples} | {verified} |")
    table = "\n".join(rows)
    return f"""# Checkpoints of other projects

Written by `python docs/checkpoints.py` from the key maps in `psvae/hub/keymaps/`. Every row was verified on random
weights against the library that it comes from; none was run on the published weights. Each checkpoint has its own
licence: DINOv2 and SigLIP 2 are Apache-2.0, MAE is CC-BY-NC-4.0, DINOv3 has Meta's own; `psvae inspect` prints what a
model card states.

| class | layout | written too | published examples | verified |
| --- | --- | --- | --- | --- |
{table}

Pickles (`.bin`, `.pt`, `.pth`, `.ckpt`) are read with `allow_pickle=True` alone, by PyTorch's restricted unpickler.
"""


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(page(), encoding="utf-8")
