"""How much of everything: the whole reproduction, and a tenth of it."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from reproduction.generation import Sizes
from reproduction.spaces import ABLATED, COARSE_PS_VAE, CONVOLUTIONAL, PHASES, PS_VAE, SWEEP

GENERATED = ("rae-hd", "rae", "s-vae", PS_VAE, "p-vae", *CONVOLUTIONAL)  # with every seed: Tables 2, 4 and 6, and ReaLS
MEANS = f"{PS_VAE}-means"  # PS-VAE, with a generator of its posterior's means
WIDEST = f"ps-vae-{SWEEP[-1]}"
ONCE = (MEANS, "mlp", "on-features", WIDEST)  # a generator of the first seed alone
LONGER = ("rae", PS_VAE)  # trained longer too, the first seed
COARSE = ("rae", "rae-hd", COARSE_PS_VAE)  # on 4 x 4 tokens of patch 8, the first seed
SEEDS = (0, 1, 2)  # of the spaces and of the generators in them
LABELS = {
    "rae": "RAE", "s-vae": "S-VAE", PS_VAE: "PS-VAE", "rae-hd": "RAE-HD", "p-vae": "P-VAE", "mlp": "2-layer MLPs",
    "on-features": "decoder on rebuilt features", "plain": "plain VAE", "reals": "ReaLS",
    MEANS: "PS-VAE, its posterior's means", COARSE_PS_VAE: "PS-VAE",
    **{f"ps-vae-{z}": f"PS-VAE, {z} channels" for z in SWEEP if f"ps-vae-{z}" != PS_VAE},
}  # fmt: skip
ABLATED_GENERATORS = ("KL weight", "L_s : L_p")  # what a generator could mind


@dataclass(frozen=True)
class Plan:
    """Steps, batches and pictures."""

    width: int = 128
    depth: int = 6
    encoder_small_steps: int = 4400
    encoder_steps: int = 5000
    """2200 and 1550 steps of batch 256 gave a probe of 73.35 %, and 75 % was wanted."""
    encoder_batch: int = 128
    judge_width: int = 32
    judge_steps: int = 2800
    judge_batch: int = 128
    space_steps: int = 1500
    """Of each space; half of them before the encoder is tuned."""
    space_batch: int = 32
    ablation_steps: int = 750
    longer: int = 3
    """Times as many steps, of `LONGER`."""
    generator_steps: int = 1500
    """Of each generator; half of them in the ablations."""
    generator_batch: int = 64
    kept: int = 5
    """Channels of the shortcut test: the paper's 32 of 768, of 128."""
    convolutional_channels: int = 16
    probe_pictures: int = 10_000
    test_pictures: int = 10_000
    seeds: tuple[int, ...] = SEEDS
    sizes: Sizes = field(default_factory=Sizes)
    toy_steps: int = 3000


WHOLE = Plan()
QUICK = replace(
    WHOLE, encoder_small_steps=440, encoder_steps=500, judge_steps=280, space_steps=150, ablation_steps=75,
    generator_steps=150, probe_pictures=2000, test_pictures=1000, toy_steps=300, seeds=SEEDS[:1],
    sizes=replace(WHOLE.sizes, samples=500, updates=10, measured=2, pictures=2500),
)  # fmt: skip


def phases_of(space: str) -> list[str]:
    """Its phases, the first one first."""
    chain = [space]
    while space in PHASES and (before := PHASES[chain[0]].after) is not None:
        chain.insert(0, before)
    return chain


def spaces() -> list[str]:
    """In the order of the paper's tables: the last phases."""
    return ["rae", "s-vae", *(f"ps-vae-{z}" for z in SWEEP), "rae-hd", "p-vae", "mlp", "on-features", *CONVOLUTIONAL]


def ablations(groups: Iterable[str] = ABLATED) -> list[str]:
    return [name for group in groups for name in ABLATED[group] if not name.endswith("-stage1")]
