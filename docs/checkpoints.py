"""Writes docs/checkpoints.md from the key maps: `python docs/checkpoints.py`. A test compares the two."""

from pathlib import Path
from typing import NamedTuple

import psvae
from psvae.hub.formats import Format
from psvae.hub.keymaps.ddt import DDT_HEAD
from psvae.hub.keymaps.llm import LANGUAGE_MODEL

CLASSES = ("PixelVAE", "PSVAE", "ViTPixelDecoder", "SemanticEncoder", "DeepFusionDiT")
# layouts that bring a part of a module, and the method that reads it
PARTS = {"DeepFusionDiT.from_llm": LANGUAGE_MODEL, "DeepFusionDiT.load_rae_head": DDT_HEAD}


class Facts(NamedTuple):
    """What is known of one layout.

    Attributes:
        published: (ids, licence).
        verified: what was compared, on random weights, and with what.
        tests: where.
        written: whether psvae writes it too; None where the layout itself says so.
    """

    published: tuple[tuple[str, str], ...]
    verified: str
    tests: str
    written: bool | None = None


FEATURES = "features equal transformers' to 2e-5, at the native grid, larger, smaller and not square"
ENCODERS = "tests/encoders/test_foreign.py"
GENERATORS = "tests/generators/test_weights.py"
# by `Format.name`; a layout that is not here stops the script
KNOWN = {
    "diffusers AutoencoderKL": Facts(
        (
            ("stabilityai/sd-vae-ft-mse, stabilityai/sd-vae-ft-ema", "MIT"),
            ("stabilityai/stable-diffusion-xl-base-1.0, subfolder `vae`", "OpenRAIL++"),
            ("stabilityai/stable-diffusion-3-medium-diffusers, subfolder `vae`", "Stability AI Community"),
            ("black-forest-labs/FLUX.1-schnell, subfolder `vae`", "Apache-2.0"),
            ("black-forest-labs/FLUX.1-dev, subfolder `vae`", "FLUX.1-dev non-commercial"),
            ("ReaLS (a folder from black-yt/ReaLS)", "not stated"),
        ),
        "encode and decode equal diffusers' AutoencoderKL to 1e-5; written back, the same names and bits; shards, "
        "variants, the attention names of 2022",
        "tests/hub/test_keymaps_vae.py",
    ),
    "LDM (VA-VAE, MAR, REPA-E, original SD and FLUX)": Facts(
        (
            ("hustvl/vavae-imagenet256-f16d32-dinov2", "MIT"),
            ("MAR's kl16.ckpt (LTH14/mar)", "MIT"),
            ("REPA-E (End2End-Diffusion/REPA-E)", "MIT"),
            ("`ae.safetensors` of FLUX.1, whole files of SD 1, 2, XL and 3", "of the model"),
        ),
        "encode and decode equal AutoencoderKL to 1e-5; the names are those that diffusers' own converter reads; "
        "inside the file of a whole generator too",
        "tests/hub/test_keymaps_vae.py",
    ),
    "psvae's AutoencoderPixelVAE": Facts(
        (("written by psvae's diffusers class", "yours"),), "the same weights", "tests/integrations/test_model.py"
    ),
    "psvae's AutoencoderPSVAE": Facts(
        (("written by psvae's diffusers class", "yours"),), "the same weights", "tests/integrations/test_model.py"
    ),
    "diffusers AutoencoderRAE": Facts(
        (
            (
                "nyu-visionx/RAE-dinov2-wReg-{small,base,large}-ViTXL-n08, ...-base-ViTXL-n08-i512",
                "MIT (bytetriper/RAE)",
            ),
            ("nyu-visionx/RAE-siglip2-base-p16-i256-ViTXL-n08", "MIT (bytetriper/RAE)"),
            ("nyu-visionx/RAE-mae-base-p16-ViTXL-n08", "MIT (bytetriper/RAE); the encoder CC-BY-NC-4.0"),
        ),
        "encode and decode equal diffusers' AutoencoderRAE to 1e-4 (DINOv2, MAE; grids 8, 14, 16 and 32), SigLIP 2's "
        "encode equals transformers'; names of transformers before and after 5.6, 5.9 and 5.18",
        "tests/hub/test_rae.py",
    ),
    "RAE's decoder": Facts(
        (("nyu-visionx/RAE-collections, `decoders/.../model.pt`, by `PSVAE.from_rae`", "MIT (bytetriper/RAE)"),),
        "decode equals diffusers' RAEDecoder to 1e-5, with the file's own position table; latents equal RAE's formula",
        "tests/hub/test_keymaps_rae.py",
    ),
    "timm": Facts(
        (
            ("timm/vit_{small,base,large,giant}_patch14_dinov2.lvd142m and ..._reg4_dinov2", "Apache-2.0"),
            ("timm/vit_{small,base,large}_patch16_dinov3.lvd1689m and its kin", "DINOv3 License (gated)"),
            ("timm/vit_base_patch16_siglip_256.v2_webli and its kin", "Apache-2.0"),
            ("timm/vit_{base,large}_patch16_224.mae", "CC-BY-NC-4.0"),
        ),
        "features equal timm's to 2e-5",
        ENCODERS,
    ),
    "transformers' DINOv2": Facts((("facebook/dinov2-{small,base,large,giant}", "Apache-2.0"),), FEATURES, ENCODERS),
    "transformers' DINOv2 with registers": Facts(
        (("facebook/dinov2-with-registers-{small,base,large,giant}", "Apache-2.0"),), FEATURES, ENCODERS
    ),
    "transformers' DINOv3": Facts(
        (("facebook/dinov3-vit{s,b,l}16-pretrain-lvd1689m and its kin", "DINOv3 License (gated)"),),
        f"{FEATURES}; with and without registers",
        ENCODERS,
    ),
    "transformers' SigLIP": Facts(
        (
            ("google/siglip2-base-patch16-256 and its kin of a fixed size", "Apache-2.0"),
            ("google/siglip-base-patch16-224 and its kin", "Apache-2.0"),
        ),
        FEATURES,
        ENCODERS,
    ),
    "transformers' SigLIP 2 NaFlex": Facts(
        (("google/siglip2-base-patch16-naflex, google/siglip2-so400m-patch16-naflex", "Apache-2.0"),),
        FEATURES,
        ENCODERS,
    ),
    "transformers' ViT-MAE": Facts(
        (("facebook/vit-mae-{base,large,huge}", "CC-BY-NC-4.0 (timm's card)"),), FEATURES, ENCODERS
    ),
    "Meta's DINOv2": Facts(
        (("dinov2_vit{s,b,l,g}14_pretrain.pth, ..._reg4_pretrain.pth (facebookresearch/dinov2)", "Apache-2.0"),),
        "features equal that code's equations, written out in the tests, to 2e-5, at any grid",
        ENCODERS,
    ),
    "BAGEL": Facts(
        (('ByteDance-Seed/BAGEL-7B-MoT, `file="ema.safetensors"`', "Apache-2.0"),),
        "names, and each token's equations, written out in the tests, to 1e-5; **not** BAGEL's sequence, see below",
        GENERATORS,
    ),
    "a transformers language model": Facts(
        (
            ("Qwen/Qwen2.5-0.5B, Qwen/Qwen2.5-1.5B (the paper's)", "Apache-2.0"),
            ("Qwen/Qwen2.5-3B", "Qwen Research (non-commercial)"),
            ("other Qwen2 and Qwen2.5 folders", "Apache-2.0; the 72B ones Tongyi Qianwen (2), Qwen (2.5)"),
            ("Qwen3 folders, dense ones", "Apache-2.0"),
            ("Llama folders, 3.1's RoPE scaling included", "Llama Community, another for each version (gated)"),
        ),
        "the text's hidden states, keys and values equal transformers' to 1e-4, padded on either side or not; shards, "
        "tied or own language head, folders of transformers 4 and 5",
        GENERATORS,
    ),
    "RAE's DDT head": Facts(
        (("nyu-visionx/RAE-collections, `DiTs/.../stage2_model.pt`", "MIT (bytetriper/RAE)"),),
        "equals RAE's equations, written out in the tests, to 1e-5; written back, the same names and bits",
        GENERATORS,
        written=True,
    ),
}


def layouts() -> list[tuple[str, Format]]:
    """Every layout with what reads it, in the order of the page."""
    whole = [(name, layout) for name in CLASSES for layout in getattr(psvae, name).foreign_formats]
    return [*whole, *PARTS.items()]


def page() -> str:
    """The text of docs/checkpoints.md."""
    rows = []
    for name, layout in layouts():
        facts = KNOWN[layout.name]
        written = bool(layout.write_config) if facts.written is None else facts.written
        for ids, licence in facts.published:
            how = f"{facts.verified} (`{facts.tests}`)"
            rows.append(f"| `{name}` | {layout.name} | {ids} | {licence} | {'yes' if written else 'no'} | {how} |")
    table = "\n".join(rows)
    return f"""# Checkpoints of other projects

Written by `python docs/checkpoints.py` from the key maps in `psvae/hub/keymaps/`. What was verified was verified on
random weights of the architecture, against the library that the files come from, as it is in the package index; none of
the published weights was run. Licences are as known when this was written, and are for you to check: `psvae inspect`
prints what the card of your copy says. Those of BAGEL and of the language models were read where their authors state
them: BAGEL's and Qwen3's READMEs on GitHub, a copy of Qwen2.5's, the Hub's pages of Qwen2.5-1.5B and -3B, Qwen2-0.5B
and -72B, and Qwen2.5-72B-Instruct, and Meta's licence file of Llama 3.1, by which a distributed model that was made
from it has a name that begins with "Llama". Not confirmed: the other sizes of Qwen2, of which an announcement, seen in
quotations alone, says Apache-2.0, and the terms of Llama's other versions.

| class | layout | published | licence | written too | verified, on random weights |
| --- | --- | --- | --- | --- | --- |
{table}

Pickles (`.bin`, `.pt`, `.pth`, `.ckpt`) are read with `allow_pickle=True` alone, by PyTorch's restricted unpickler.

LDM files hold no `scaling_factor`: it is 1 unless you pass one, such as 0.18215 for SD 1 and 2, 0.13025 for SDXL,
1.5305 (`shift_factor` 0.0609) for SD3, 0.3611 (0.1159) for FLUX.1, 0.2325 for MAR.

diffusers' AutoencoderRAE makes its decoder's position table anew, with coordinates that it rescales to a grid of 16,
and so does psvae for its folders. RAE's own code does not rescale: a decoder that it trained at another grid (the
published `-i512` has 32) and that was converted for diffusers keeps the table of its training by
`vae.decoder.positions.copy_(sincos_positions(vae.config.decoder.width, vae.config.decoder.grid))`
(`psvae.nn.positions`), under `torch.no_grad()`. RAE's own files bring their table.

Meta's own files of MAE and DINOv3 have timm's architecture but name neither it nor its colours: read them by
`SemanticEncoder.from_timm(name, file=...)`.

`DeepFusionDiT.from_llm` reads Qwen2, Qwen2.5, Qwen3 and Llama. Folders with a sliding window, another activation,
biases on the output projection or in the MLP, or a RoPE other than plain and Llama 3.1's are refused: such a model, and
any other decoder, conditions a generator of `fusion="prefix"` through `PrefixCache.from_hf`
(`tests/generators/test_prefix.py`: Mistral and Gemma 3 beside these).

BAGEL's configuration does not tell the transformer's sizes: they are read off the shapes, with its `patch_size` of 2.
Its vision encoder, connector and language head are not read; its position table is computed. Its VAE is FLUX.1's.
BAGEL puts a start and an end token inside the segment of each image, clean or noisy, and shows a source to its vision
encoder too; the sequence here has neither, so its weights begin a training and do not generate what BAGEL does.

The head of RAE's DiT-DH-XL reads 768 channels and a trunk 1152 wide, and modulates its last norm: it fits a
`DeepFusionDiTConfig` with `in_channels=768`, `hidden_size=1152` and `head_final_modulation=True`. RAE's trunk is not
read. No weight's shape tells `head_num_heads`, which orders queries and keys: it is compared with the file's table of
rotary positions, and taken on trust where a file lacks that.
"""


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(page(), encoding="utf-8")
