"""One training loop for all stages: killed at any moment, it goes on where it was, with the same random numbers."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from checkpoints import write_whole
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

SAVE_EVERY = 60  # seconds
ENDED = "ended"  # a file beside the weights of a training that ended


@dataclass(frozen=True)
class Machine:
    """Where and how precisely everything runs."""

    device: torch.device
    bf16: bool = True

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """On a CPU with attention as plain products: the backward pass of PyTorch's fused one is slow in bf16 there,
        by a factor of 4 at 36 tokens and of 2 at 64 (2.15)."""
        plain = sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else nullcontext()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16), plain:
            yield


@dataclass(frozen=True)
class Recipe:
    """Of one training: AdamW, a linear warm-up under a cosine to a twentieth, clipped gradients, averaged weights."""

    steps: int
    batch: int
    lr: float
    seed: int
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    ema: float = 0.0
    first_step: int = 0
    """Of the random numbers: a second phase goes on where the first one's ended."""


Loss = Callable[[nn.Module, Tensor, int], Tensor]  # model, places of the batch in the data, step


def fit(
    model: nn.Module,
    loss: Loss,
    recipe: Recipe,
    count: int,
    folder: Path,
    machine: Machine,
    each: Callable[[nn.Module, int], None] = lambda model, step: None,
) -> nn.Module:
    """Train what requires gradients of ``model``; returns its averaged twin with ``recipe.ema``, else itself.

    Args:
        loss: sees the model, ``B`` places of 0 to ``count`` − 1, and the step from 0. Every random number that it
            draws from PyTorch's generator is decided by seed and step.
        folder: keeps ``state.pt`` until `end`, and gives the progress bar its name.
        each: called after each step with the (averaged) model and the steps done; not again for steps that an earlier
            run did.

    Raises:
        SystemExit: the loss is NaN or infinite.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, recipe.lr, recipe.betas, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(share_of_rate, steps=recipe.steps))
    averaged = AveragedModel(model, multi_avg_fn=moving_average(recipe.ema)) if recipe.ema else None
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule}
    if averaged is not None:
        parts["averaged"] = averaged
    file, done = folder / "state.pt", 0
    if file.exists():
        state = torch.load(file, map_location=machine.device, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        done = state["step"]
    model.train()
    saved = time.monotonic()
    for step in (bar := tqdm(range(done, recipe.steps), folder.name, initial=done, total=recipe.steps, mininterval=5)):
        torch.manual_seed(1_000_003 * recipe.seed + recipe.first_step + step)
        places = torch.randint(count, (recipe.batch,))
        with machine.autocast():
            value = loss(model, places, step)
        optimizer.zero_grad()
        value.backward()
        norm = nn.utils.clip_grad_norm_(trained, recipe.clip)
        if not (value.isfinite() and norm.isfinite()):
            raise SystemExit(f"{folder}: the loss of step {step} is {value.item()}, its gradient {norm.item()}")
        optimizer.step()
        schedule.step()
        if averaged is not None:
            averaged.update_parameters(model)
        each(model if averaged is None else averaged.module, step + 1)
        if time.monotonic() - saved > SAVE_EVERY:
            state = {name: part.state_dict() for name, part in parts.items()} | {"step": step + 1}
            write_whole(file, partial(torch.save, state))
            saved = time.monotonic()
            bar.set_postfix(loss=f"{value.item():.3f}")
    return (model if averaged is None else averaged.module).eval()


def share_of_rate(step: int, steps: int) -> float:
    """Of the learning rate: warm for a twentieth of the steps, at most 200."""
    warm = max(1, min(200, steps // 20))
    cosine = 0.05 + 0.95 * 0.5 * (1.0 + math.cos(math.pi * step / max(1, steps)))
    return cosine * min(1.0, (step + 1) / warm)


def moving_average(decay: float) -> Callable[..., None]:
    """Warmed up as LDM's, so that a short run does not keep its first weights."""

    def update(averaged: Any, current: Any, updates: Any) -> None:
        torch._foreach_lerp_(list(averaged), list(current), 1 - min(decay, float((1 + updates) / (10 + updates))))

    return update


def end(folder: Path) -> None:
    """The weights of a training are in ``folder``, whole."""
    (folder / ENDED).touch()
    (folder / "state.pt").unlink(missing_ok=True)


def done(folder: Path) -> bool:
    return (folder / ENDED).exists()


def batched(
    read: Callable[[Tensor], Tensor],
    items: Tensor,
    machine: Machine,
    size: int = 250,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``read`` of all items, part by part, without gradients, in ``dtype`` and on the CPU."""
    with torch.inference_mode(), machine.autocast():
        found = [read(part.to(machine.device)).to("cpu", dtype) for part in items.split(size)]
    return torch.cat(found)  # autocast on a CPU refuses halves
