"""Markdown tables of numbers."""

from typing import Any

from reproduction.orderings import Results, over_seeds, spread
from reproduction.paper import PAPER

SAID = {  # of the metrics
    "psnr": "PSNR", "ssim": "SSIM", "lpips": "LPIPS", "frechet": "Fréchet", "frechet_turns": "Fréchet, turns",
    "frechet_blurred": "Fréchet, blurred", "frechet_decoded": "Fréchet, decoded",
    "class_accuracy": "class right", "probe": "probe", "feature_cosine": "cosine",
}  # fmt: skip
DIGITS = {"psnr": 2, "frechet": 2, "frechet_turns": 2, "frechet_blurred": 2, "frechet_decoded": 2}  # else 3


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None, digits: int = 3) -> str:
    return "·" if value is None else f"{value:.{digits}f}"


def cells(stage: dict[str, Any], *metrics: str) -> list[str]:
    return [number(stage.get(metric), DIGITS.get(metric, 3)) for metric in metrics]


def of_seeds(found: Results, name: str, *metrics: str, kind: str = "space") -> list[str]:
    return [spread(over_seeds(found, kind, name, metric), DIGITS.get(metric, 3)) for metric in metrics]


def of_paper(name: str, *metrics: str) -> list[str]:
    known = PAPER.get(name, {})
    return [f"*{known[metric]:g}*" if metric in known else "·" for metric in metrics]
