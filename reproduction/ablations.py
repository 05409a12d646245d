"""What the paper leaves open: the short trainings of each choice, and the rule by which they decide."""

from typing import Any

from reproduction.orderings import MADE, Results, deviation, last_of, over_seeds
from reproduction.plan import ABLATED_GENERATORS, MEANS, PS_VAE
from reproduction.spaces import ABLATED
from reproduction.tables import SAID, cells, number, table

COUNTED = {"psnr": 1, "frechet": -1, "probe": 1, "feature_cosine": 1}  # by the ablations' rule; 1 where more is better
CHOICES = {  # of each question: what all other tables have; and the others
    "KL weight": "1e-5", "L_s : L_p": "0.1 : 1", "terms of L_s": "MSE + cosine", "first log σ²": "-4",
    "first weights of the blocks": "fresh, LayerScale 1e-5",
    "ratio-1-0.1": "1 : 0.1", "ratio-1-1": "1 : 1", "mse-alone": "MSE", "cosine-alone": "cosine", "logvar-0": "0",
    "fresh-unscaled": "fresh, no LayerScale", "from-encoder": "the encoder's last ones, no LayerScale",
}  # fmt: skip


def section(found: Results, plan: dict[str, Any]) -> str:
    if not any(name.startswith("ablation-") for name in found):
        return ""
    metrics = (*COUNTED, "noise")
    twice = {m: 2 * deviation(over_seeds(found, "space", PS_VAE, m)) for m in COUNTED}
    default, rows = found.get(f"ablation-{PS_VAE}", {}), []
    for group, phases in ABLATED.items():
        for name in (PS_VAE, *(name for name in phases if not name.endswith("-stage1"))):
            stage, is_default = found.get(f"ablation-{name}", {}), name == PS_VAE
            choice = f"{CHOICES[group]} (as above)" if is_default else CHOICES.get(name, name.removeprefix("kl-"))
            made = cells(last_of(found.get(f"ablation-generator-{name}", {})), *MADE)
            rows.append(
                [group, choice, *cells(stage, *metrics), "" if is_default else ruled(default, stage, twice)]
                + (made if group in ABLATED_GENERATORS else [""] * len(MADE))
            )
    rows.append(["", "twice the spread", *cells(twice, *COUNTED), *[""] * (2 + len(MADE))])
    header = ["question", "choice", *(SAID[m] for m in COUNTED), "noise", "by the rule"]
    sampled, means = (last_of(found.get(f"generator-{name}-0", {})).get("frechet") for name in (PS_VAE, MEANS))
    steps = plan["ablation_steps"]
    return f"""
## What the paper leaves open

PS-VAE of {plan["convolutional_channels"]} channels, {steps} steps, {steps // 2} of them with pixels, the first seed;
for two questions a generator too, with half its steps. So short a training tells what learns faster, and may not tell
what ends better. The rule, from before the runs: a default changes where another choice is better by more than twice
the spread over seeds in the table of spaces (the last row), and nothing else is worse by as much; PSNR, Fréchet
distance, probe and cosine count. It changed two: the first log σ², which was 0, and the KL weight, which was 1e-5 and
is 1e-3 now. All other tables have -4 and 1e-5.

{table([*header, *(f"generated: {SAID[m]}" for m in MADE)], rows)}

Samples of the posterior or its means, for the generator: Fréchet {number(sampled, 2)} and {number(means, 2)}. The
reduction of the KL term is a matter of its weight alone: a sum over the latent is the mean times its numbers.
"""


def ruled(default: dict[str, Any], choice: dict[str, Any], twice: dict[str, float]) -> str:
    """Whether the ablations' rule changes a default to ``choice``, and why."""
    gains = {m: sign * (choice[m] - default[m]) for m, sign in COUNTED.items() if m in choice and m in default}
    better = [SAID[m] for m, gain in gains.items() if gain > twice[m]]
    worse = [SAID[m] for m, gain in gains.items() if gain < -twice[m]]
    if not gains:
        return "·"
    reasons = [f"{word}: {', '.join(which)}" for word, which in (("better", better), ("worse", worse)) if which]
    return "; ".join(["changes" if better and not worse else "stays", *reasons])
