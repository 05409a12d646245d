"""What a training run keeps on accelerate: checkpoints, written whole or not at all, and averaged weights."""

import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, keep: int) -> None:
    """All of accelerate's state as ``folder/step…``, written beside it and then renamed; the newest ``keep`` stay."""
    partial, final = folder / "partial", folder / f"step{step:07d}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        partial.rename(final)
        for old in sorted(folder.glob("step*"))[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def first_step(accelerator: Accelerator, folder: Path, resume: bool) -> int:
    """The step to go on from: with ``resume`` that of the newest checkpoint, which is loaded; otherwise 0.

    Raises:
        SystemExit: there are checkpoints, and they are not to be resumed.
    """
    found = sorted(folder.glob("step*"))
    if not found:
        return 0
    if not resume:
        raise SystemExit(f"{folder} holds checkpoints of an earlier run: pass --resume, or another --output")
    accelerator.load_state(str(found[-1]))
    return int(found[-1].name.removeprefix("step"))


class Ema:
    """Exponential moving average of a model's trained parameters, checkpointed by accelerate."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = [p.detach().clone() for p in model.parameters() if p.requires_grad]

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """average ← decay · average + (1 − decay) · parameter."""
        current = [p.detach() for p in model.parameters() if p.requires_grad]
        torch._foreach_lerp_(self.parameters, current, 1.0 - self.decay)

    def named(self, model: nn.Module) -> dict[str, Tensor]:
        """The averages under the names that the parameters have in ``model``."""
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        return dict(zip(names, self.parameters, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """For `Accelerator.register_for_checkpointing`."""
        return {"parameters": self.parameters}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """For `Accelerator.register_for_checkpointing`."""
        for mine, saved in zip(self.parameters, state["parameters"], strict=True):
            mine.copy_(saved)
