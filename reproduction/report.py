"""docs/reproduction.md and its figures, drawn from the stages' numbers, so that text and numbers cannot part."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from checkpoints import write_text

from reproduction import ablations
from reproduction.figures import draw_curves, draw_sweep
from reproduction.orderings import GENERATORS, MADE, SPACES, Pair, Results, last_of, over_seeds, pairs, spread
from reproduction.paper import PAPER_REALS, PAPER_SWEEP
from reproduction.plan import COARSE, GENERATED, LABELS, LONGER, ONCE, PS_VAE, SWEEP
from reproduction.spaces import COARSE_PS_VAE, CONVOLUTIONAL
from reproduction.tables import SAID, cells, number, of_paper, of_seeds, table

EPOCH = 50_000  # pictures
SHOWN = (PS_VAE, "rae", "rae-hd")  # whose pictures
CURVES, CHANNELS = "reproduction_generation.png", "reproduction_channels.png"


def write(results: Path, output: Path, docs: Path, planned: int, remarks: str = "") -> Path:
    """The page, the numbers that it was drawn from, and its pictures below ``docs``; see `page`."""
    found: Results = {file.stem: json.loads(file.read_text()) for file in sorted(results.glob("*.json"))}
    plan = json.loads((output / "plan.json").read_text())
    images = docs / "images"
    images.mkdir(parents=True, exist_ok=True)
    draw_sweep(found, images / CHANNELS)
    draw_curves(found, images / CURVES)
    made = {f"generators/{name}-0/samples.png": f"reproduction_made_{name}.png" for name in SHOWN}
    made |= {f"longer/generators/{name}-0/samples.png": f"reproduction_longer_{name}.png" for name in LONGER}
    for source, name in (made | {"off_manifold/off_manifold.png": "off_manifold.png"}).items():
        if (output / source).exists():
            (images / name).write_bytes((output / source).read_bytes())
    write_text(docs / "reproduction.json", json.dumps({"plan": plan, "stages": found}, indent=1) + "\n")
    file = docs / "reproduction.md"
    write_text(file, page(found, plan, planned, remarks))
    return file


def page(found: Results, plan: dict[str, Any], planned: int, remarks: str = "") -> str:
    """Markdown.

    Args:
        found: by stage.
        planned: stages; the page says how many of them have run.
        remarks: of a person, about these very numbers.
    """
    parts = [
        head(found, plan, planned, bool(remarks)), spaces_section(found, plan), sweep_section(found),
        shortcut_section(found), generation_section(found, plan), coarse_section(found, plan), reals_section(found),
        toy_section(found), longer_section(found, plan), orderings_section(found), ablations.section(found, plan),
        remarks,
    ]  # fmt: skip
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


# Sections


def head(found: Results, plan: dict[str, Any], planned: int, remarked: bool) -> str:
    ran = str(planned) if len(found) == planned else f"so far {len(found)} of {planned}"
    encoder, judge, turns = (found.get(name, {}) for name in ("encoder", "judge", "judge-of-turns"))
    return f"""
# The papers' tables, small

<!-- written by `python -m reproduction.run`; the remarks at the end come from reproduction/remarks.md -->

`python -m reproduction.run --data cifar10/` trains everything below on CIFAR-10 and writes this page and
[its numbers](reproduction.json): {ran} stages, {plan["precision"]}, {work(found)}.
What is trained, by which of the library's classes, and what differs from the papers:
[reproduction/](../reproduction/README.md). The orders of the papers are looked for
[below](#does-each-ordering-appear){"; [remarks](#remarks) say why some do not appear" if remarked else ""}.

The representation encoder is a Vision Transformer of width {plan["width"]} and depth {plan["depth"]} with 8 × 8
tokens, trained here: linear probe {number(encoder.get("probe"))} (0.75 wanted), {encoder.get("parameters_m", "·")} M
parameters. It learned the labels that the probes and "class right" test afterwards, as DINOv2 did not, so it says more
about classes and less about everything else. RAE, S-VAE, PS-VAE, P-VAE and RAE-HD begin with it, the plain VAE and
ReaLS with random weights. One encoder and its judges serve all seeds; ± is the standard deviation over seeds, each with
spaces of its own and generators in them. A number without it is of the first seed alone.

Two judges look at pictures, convolutional classifiers of their own. Fréchet distances are in their features, and are no
FID. The first learned the classes (accuracy {number(judge.get("accuracy"))}), from the same pictures as the encoder;
"turns" is a second one that saw no label: it tells by how many quarters a picture is turned
({number(turns.get("accuracy"))}). The paper's numbers, in italics, are of DINOv2-B and ImageNet at 256 px: orders
compare, values do not.

What results changed, and nothing else: the encoder's steps, before anything was trained on it, for its probe missed
0.75; and after the first seed, where PS-VAE's generator did not come before RAE's, what could explain that was added:
the sections "Larger cells" and "Longer", the generator in PS-VAE of 64 channels, KL weights 1e-2 and 1e-1, "detail",
"turns", "blurred", "decoded", and more updates in sampling. The statistics of the plain VAE and of ReaLS became those
of each channel, as all others have; the first seed's generators were then trained again.
"""


def work(found: Results) -> str:
    """By what did it; stages can run beside each other."""
    hours: dict[str, float] = {}
    for stage in found.values():
        cores = re.fullmatch(r"CPU cores: (\d+)", stage["on"])
        name, times = ("core hours of a CPU", int(cores[1])) if cores else (f"hours of {stage['on']}", 1)
        hours[name] = hours.get(name, 0.0) + times * stage["minutes"] / 60
    total = " and ".join(f"{total:.1f} {name}" for name, total in sorted(hours.items()))
    longest = max(found, key=lambda name: found[name]["minutes"], default=None)
    if longest is None:
        return "nothing has run"
    stage = found[longest]
    return (
        f"{total} or a little more (a stage that was stopped counts from its last start); the longest stage, "
        f"{longest}, took {stage['minutes']:.0f} minutes ({stage['on']})"
    )


def spaces_section(found: Results, plan: dict[str, Any]) -> str:
    names = ["rae", "s-vae", PS_VAE, "rae-hd", "p-vae", "mlp", "on-features", *CONVOLUTIONAL]
    lpips = ("lpips",) if any("lpips" in stage for stage in found.values()) else ()
    seen = ("psnr", "ssim", *lpips, "detail", "frechet", "frechet_turns", "class_accuracy")
    meant = ("probe", "probe_cells", "knn", "encoder_cosine", "feature_cosine", "active_channels", "noise")
    pictures = [[LABELS[x], *of_seeds(found, x, *seen), *of_paper(x, "psnr", "ssim", "rfid")] for x in names]
    meaning = [[LABELS[x], *of_seeds(found, x, *meant), *of_paper(x, "probe")] for x in names]
    count = plan["space_steps"] * plan["space_batch"]
    header = [
        "meaning", "probe", "probe, all cells", "kNN", "cosine, encoder", "cosine, rebuilt", "active", "noise",
        "*paper: probe*",
    ]  # fmt: skip
    return f"""
## The spaces

Tables 2, 4, 5 and 6 of PS-VAE, and ReaLS. Each is trained with {plan["space_steps"]} steps of {plan["space_batch"]}
pictures, {count / EPOCH:.1f} epochs, and an L1 loss of pixels alone. A cell of the 8 × 8 stands for 48 numbers of
pixels; RAE and RAE-HD keep {plan["width"]} for it, the others {plan["convolutional_channels"]}. In the paper a cell
stands for 768 numbers of pixels; RAE and RAE-HD keep 768, PS-VAE 96, and the plain VAE, which is MAR's, 16.

{table(["reconstruction", *(SAID.get(x, x) for x in seen), "*paper: PSNR*", "*SSIM*", "*rFID*"], pictures)}

"detail" is how much energy of waves shorter than a sixth of the picture is left. "class right": how often the first
judge still names the class. The paper's PS-VAE is Table 4's; Table 5, which has the MLPs and the decoder on rebuilt
features, gives it 28.63, 0.813 and 0.214.

{table(header, meaning)}

The probe is linear and reads the mean over the latent's cells, or all of them; so do the 20 nearest neighbours. Cosines
are with the frozen encoder's features: of the tuned encoder's, and of those rebuilt from the latent. "active" is the
share of channels that carry anything, "noise" the posterior's standard deviation beside the latent's own.
"""


def sweep_section(found: Results) -> str:
    if sum(f"space-0-ps-vae-{z}" in found for z in SWEEP) < 2:
        return ""
    metrics = ("psnr", "ssim", "frechet", "probe", "feature_cosine", "noise")
    rows = [[str(z), *cells(found.get(f"space-0-ps-vae-{z}", {}), *metrics)] for z in SWEEP]
    shown = ", ".join(f"{z}: {psnr}" for z, psnr in PAPER_SWEEP.items())
    return (
        "## Channels (Figure 11)\n\n![PSNR and probe against channels]"
        f"(images/{CHANNELS})\n\n"
        + table(["channels", "PSNR", "SSIM", "Fréchet", "probe", "cosine, rebuilt", "noise"], rows)
        + f"\n\nThe paper's PSNR by channels, of 768 numbers of pixels: {shown}."
    )


def shortcut_section(found: Results) -> str:
    if "kept-moved" not in found:
        return ""
    rows = [
        [label, *cells(found.get(stage, {}), "psnr", "ssim")]
        for label, stage in (
            ("all of RAE-HD", "space-0-rae-hd"), ("those that moved most", "kept-moved"),
            ("those that moved least", "kept-still"), ("those that moved most, of the frozen encoder", "kept-frozen"),
            ("all of RAE, frozen", "space-0-rae"),
        )
    ]  # fmt: skip
    kept = found["kept-moved"]
    count, squares = len(kept["kept"]), sorted(found.get("moved", {}).get("squares", [1.0]), reverse=True)
    share = sum(squares[:count]) / sum(squares)
    return (
        f"## The shortcut of RAE-HD (section 5.4)\n\nA decoder of its own on {count} of the {kept['of']} channels, as "
        "the paper on 32 of 768, which reconstruct about as well as all there. Here those that moved most hold "
        f"{100 * share:.0f} % of the movement, of {100 * count / kept['of']:.0f} % of the channels.\n\n"
        + table(["channels read", "PSNR", "SSIM"], rows)
    )


def generation_section(found: Results, plan: dict[str, Any]) -> str:
    if not any(stage.startswith("generator-") for stage in found):
        return ""
    rows = [
        [
            LABELS[name], *of_seeds(found, name, *MADE, kind="generator"),
            *of_seeds(found, name, "frechet", "class_accuracy"), *of_paper(name, "geneval"),
        ]
        for name in (*GENERATED, *ONCE)
    ]  # fmt: skip
    header = [
        "space", *(SAID[metric] for metric in MADE), "Fréchet, reconstructed", "class right, reconstructed",
        "*paper: GenEval*",
    ]  # fmt: skip
    sizes, steps = plan["sizes"], plan["generator_steps"]
    epochs = steps * plan["generator_batch"] / sizes["pictures"]
    size = next((stage["parameters_m"] for name, stage in found.items() if name.startswith("generator-")), None)
    return f"""
## Generation

One class-conditional `DeepFusionDiT` with the wide head in each space: {size} M parameters, {steps} steps of
{plan["generator_batch"]} latents ({epochs:.1f} epochs of {sizes["pictures"]} pictures), noise shifted in training by
√(channels / 16) and in sampling by 3, both as in the paper, {sizes["updates"]} updates, no guidance.
{sizes["samples"]} pictures are made each time; a random class is right with 0.1.

"Fréchet" and "turns" compare with the test pictures, "blurred" with half of the resolution, without texture. "decoded"
compares with the test pictures as the space itself reconstructs them: the decoder's own faults cancel, and a space that
keeps little of a picture is easily matched. "Reconstructed" are those reconstructions themselves, from the table above.
The paper's GenEval asks whether a picture holds what its text says.

![Fréchet distance and class accuracy against steps](images/{CURVES})

{table(header, rows)}
{sampler_text(found, sizes)}
A column per class, the first seed, the last step.

{pictures(found, "made", "generator-{}-0", SHOWN)}
"""


def pictures(found: Results, kind: str, stage: str, names: Iterable[str]) -> str:
    shown = (name for name in names if stage.format(name) in found)
    return "\n\n".join(f"{LABELS[x]}:\n\n![Generated pictures](images/reproduction_{kind}_{x}.png)" for x in shown)


def sampler_text(found: Results, sizes: dict[str, Any]) -> str:
    if "sampler" not in found:
        return ""
    shown = ", ".join(
        f"{LABELS[name]} {last_of(found.get(f'generator-{name}-0', {})).get('frechet', 0):.2f} → "
        f"{found['sampler'][name]['frechet']:.2f}"
        for name in LONGER
    )
    return f"\nWith the paper's {sizes['more_updates']} updates, Fréchet of the first seed: {shown}.\n"


def coarse_section(found: Results, plan: dict[str, Any]) -> str:
    if not any(f"coarse-{name}" in found for name in COARSE):
        return ""
    encoder = found.get("coarse-encoder", {})
    rows = [
        [
            LABELS[name], *cells(found.get(f"coarse-{name}", {}), "psnr", "ssim", "detail", "frechet", "probe"),
            *cells(last_of(found.get(f"coarse-generator-{name}", {})), *MADE),
            *of_paper(PS_VAE if name == COARSE_PS_VAE else name, "psnr"),
        ]
        for name in COARSE
    ]  # fmt: skip
    header = ["space", "PSNR", "SSIM", "detail", "Fréchet", "probe", *(f"generated: {SAID[x]}" for x in MADE)]
    return f"""
## Larger cells

Added after the first seed's results, with its orderings written before it ran. Above, {plan["width"]} features of a
cell stand for 48 numbers of pixels, in the paper 768 for 768. Here an encoder of patch 8 was trained in the same way
(probe {number(encoder.get("probe"))}): {plan["width"]} features for 192 numbers, and a PS-VAE of 24 channels, an
eighth, the paper's share. The first seed.

{table([*header, "*paper: PSNR*"], rows)}
"""


def longer_section(found: Results, plan: dict[str, Any]) -> str:
    if f"longer-{PS_VAE}" not in found:
        return ""
    rows = []
    for name in LONGER:
        for steps, space, made in (
            (1, f"space-0-{name}", f"generator-{name}-0"),
            (plan["longer"], f"longer-{name}", f"longer-generator-{name}"),
        ):
            numbers = cells(found.get(space, {}), "psnr", "detail", "frechet", "probe")
            last = cells(last_of(found.get(made, {})), *MADE)
            rows.append([LABELS[name], str(steps * plan["space_steps"]), *numbers, *last])
    header = ["space", "steps", "PSNR", "detail", "Fréchet", "probe", *(f"generated: {SAID[x]}" for x in MADE)]
    return f"""
## Longer

Added after the first seed's results, as was the generator in the widest PS-VAE: does a longer training of the spaces
change the order of RAE and PS-VAE? The first seed; the generators as above. Its rows among the orderings were written
when PS-VAE's reconstructions had been measured.

{table(header, rows)}

{pictures(found, "longer", "longer-generator-{}", LONGER)}
"""


def reals_section(found: Results) -> str:
    ours = [over_seeds(found, "generator", name, "frechet") for name in CONVOLUTIONAL]
    if not all(ours):
        return ""
    rows = [
        [f"*the paper, FID, {name}*", f"{plain:.2f}", f"{reals:.2f}", f"{100 * (reals / plain - 1):+.0f} %"]
        for name, (plain, reals) in PAPER_REALS.items()
    ]
    plain, reals = map(fmean, ours)
    here = ["here, Fréchet", *(spread(numbers, 2) for numbers in ours), f"{100 * (reals / plain - 1):+.0f} %"]
    return (
        "## ReaLS\n\nThe generators of the table above in the plain latents and in ReaLS', beside the paper's:\n\n"
        + table(["", "plain", "ReaLS", "difference"], [here, *rows])
        + "\n\nA longer comparison, with masks read from latents: [docs/reals.md](reals.md)."
    )


def toy_section(found: Results) -> str:
    if "toy" not in found:
        return ""
    toy = found["toy"]
    tails = ", ".join(f"{name} {tail:.3f}" for name, tail in toy["tail"].items())
    return f"""
## The toy (Figure 3)

Two equal networks learn a flow to points of the letters "PS": one in their plane, one in eight dimensions that hold
this plane, where samples are projected back. The mean distance of their farthest twentieth from the letters: {tails},
fresh points {toy["floor"]:.3f}; the difference is {toy["mean difference"]:.4f} ± {toy["standard error"]:.4f} (standard
error, {len(toy["differences"])} seeds).

![The letters, samples of both flows, and the worst twentieth against steps](images/off_manifold.png)

More of it: [docs/paper_to_code.md](paper_to_code.md#toy-section-32-figure-3).
"""


def orderings_section(found: Results) -> str:
    among = [(ordering, pair) for ordering in SPACES for pair in pairs(found, ordering, ordering.metric)]
    rows = [
        [ordering.where + later(ordering), SAID[ordering.metric], f"{pair.names[0]} < {pair.names[1]}", str(pair)]
        for ordering, pair in among
    ]
    generated = [
        (ordering, same)
        for ordering in GENERATORS
        for same in zip(*(pairs(found, ordering, metric) for metric in MADE), strict=True)
    ]
    made = [
        [ordering.where + later(ordering), f"{same[0].names[0]} before {same[0].names[1]}", *map(str, same)]
        for ordering, same in generated
    ]
    counts = [counted(column) for column in zip(*(same for _, same in generated), strict=True)]
    return f"""
## Does each ordering appear?

Neighbours of each ordering, and the difference between them, its mean ± deviation over seeds; a positive one is as in
the paper. An order is "undecided" where the mean is within two standard errors of 0: the variance over seeds is taken
to be that of all spaces that have several, and a single seed has it too. An asterisk marks what was written after the
first seed's results; the rest was written before any. Of the measures of generators "turns", "blurred" and "decoded"
came after the first seed too.

{table(["the paper", "measure", "order", "here"], [*rows, ["", "", "all", counted([pair for _, pair in among])]])}

Of generators the better one comes first:

{table(["the paper", "order", *(SAID[metric] for metric in MADE)], [*made, ["", "all", *counts]])}
"""


def counted(found: Iterable[Pair]) -> str:
    """How many of them have each verdict, the most frequent one first."""
    return ", ".join(f"{verdict}: {n}" for verdict, n in Counter(pair.verdict for pair in found).most_common())


def later(ordering: Any) -> str:
    return " \\*" if ordering.later else ""
