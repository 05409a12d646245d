"""What both trainings share on accelerate: its start, checkpoints, written whole or not at all, averaged weights, the
learning rate, the options, and the names of what could not be read."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration, gather_object
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

WARMED_UP = 10**12  # updates, of any decay


def accelerator_for(options: Any, precision: str, **more: Any) -> Accelerator:
    """By either training's options; ``more`` is Accelerator's.

    Raises:
        SystemExit: weights are to be averaged under FSDP.
    """
    accelerator = Accelerator(
        mixed_precision=precision,
        gradient_accumulation_steps=options.accumulate,
        log_with=None if options.tracker == "none" else options.tracker,
        project_config=ProjectConfiguration(str(options.output), logging_dir=str(options.output / "logs")),
        **more,
    )
    if options.ema and accelerator.distributed_type == DistributedType.FSDP:
        raise SystemExit("averaged weights are not sharded: pass --ema 0 under FSDP")
    kind = accelerator.distributed_type.value
    accelerator.print(f"{accelerator.num_processes} process(es), {kind}, {accelerator.device}, precision {precision}")
    if options.tracker != "none":
        accelerator.init_trackers("psvae")
    return accelerator


def learning_rate(options: Any, step: int, steps: int) -> float:
    """A linear warm-up under a cosine from ``options.lr`` to its share ``final_lr``."""
    cosine = options.final_lr + (1.0 - options.final_lr) * 0.5 * (1.0 + math.cos(math.pi * step / max(1, steps)))
    return options.lr * cosine * min(1.0, (step + 1) / max(1, options.warmup))


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, keep: int | None) -> None:
    """All of accelerate's state as ``folder/step…``, written beside it and then renamed; the newest ``keep`` stay, or
    with None all."""
    partial, final = folder / "partial", folder / f"step{step:07d}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        partial.rename(final)
        for old in [] if keep is None else sorted(folder.glob("step*"))[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def stop_at_nan(
    accelerator: Accelerator,
    terms: dict[str, Tensor],
    gradients: dict[str, Tensor],
    step: int,
    output: Path,
    unreadable: set[str],
    remedy: str,
) -> None:
    """Before an optimiser steps and the weights are spoilt: save what there is, name what is NaN or infinite in any
    process. All processes call it.

    Args:
        terms: of the loss, by name.
        gradients: their norms, by whose they are; named where all terms are finite. Under fp16, whose scaler passes
            over a step with infinite gradients and goes on, they are left alone.
        unreadable: names of what could not be read so far, which `write_names` keeps.
        remedy: what to go on with, for the message.

    Raises:
        SystemExit: something is. The state is below ``output``, beside all older ones.
    """
    gradients = {} if accelerator.scaler is not None else {f"gradient of {name}": x for name, x in gradients.items()}
    values = torch.stack([value.detach().float() for value in (terms | gradients).values()])
    spoilt = accelerator.reduce((~values.isfinite()).float(), "sum").bool().tolist()
    if not any(spoilt):
        return
    names = [name for name, bad in zip(terms | gradients, spoilt, strict=True) if bad]
    folder = output / "checkpoints"
    if not (folder / f"step{step:07d}").exists():  # of a --resume that came to the same
        write_names(accelerator, unreadable, output / "unreadable.txt")
        save_checkpoint(accelerator, folder, step, keep=None)
    raise SystemExit(
        f"step {step}: {', '.join([name for name in names if name in terms] or names)} became NaN or infinite; the "
        f"state before it is saved in {folder}: go on with --resume and {remedy}"
    )


def first_step(accelerator: Accelerator, folder: Path, steps: int) -> int:
    """The step to go on from: that of the newest checkpoint, which is loaded, or 0 where there is none.

    Raises:
        SystemExit: it is beyond the steps asked for.
    """
    found = sorted(folder.glob("step*"))
    if not found:
        return 0
    step = int(found[-1].name.removeprefix("step"))
    if step >= steps:
        raise SystemExit(
            f"{found[-1]} is of step {step} and {steps} were asked for; wanted more steps, or another output"
        )
    accelerator.load_state(str(found[-1]))
    return step


def refuse_to_start_over(folder: Path, resume: bool) -> None:
    """Before anything of the earlier run is overwritten.

    Raises:
        SystemExit: there are checkpoints, and they are not to be resumed.
    """
    if not resume and any(folder.glob("step*")):
        raise SystemExit(f"{folder} holds checkpoints of an earlier run: pass --resume, or another --output")


def write_options(accelerator: Accelerator, output: Path, options: Any) -> None:
    """The dataclass as ``output/options.json``: once the run can begin, for there may be one of an earlier run."""
    if accelerator.is_main_process:
        text = json.dumps(asdict(options), indent=2, default=str) + "\n"
        file = output / "options.json"
        if options.resume and file.exists():
            before = json.loads(file.read_text("utf-8")) | {"resume": True}
            if said := changed(before, json.loads(text)):
                print(f"goes on with other options: {said}")
        write_text(file, text)


def write_names(accelerator: Accelerator, names: set[str], file: Path) -> list[str]:
    """Those of all processes, sorted, one to a line; no file where there are none. All processes call it."""
    known = sorted(set(gather_object(sorted(names))))
    if accelerator.is_main_process:
        if known:
            write_text(file, "\n".join(known) + "\n")
        else:
            file.unlink(missing_ok=True)
    return known


def read_names(file: Path) -> set[str]:
    """What `write_names` left, so that a resumed run forgets none."""
    return set(file.read_text(encoding="utf-8").splitlines()) if file.exists() else set()


def write_text(file: Path, text: str) -> None:
    write_whole(file, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_whole(file: Path, write: Callable[[Path], Any]) -> None:
    """All of it or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    write(partial)
    partial.replace(file)


def changed(before: dict[str, Any], asked: dict[str, Any]) -> str:
    """What was otherwise before, in words; empty where nothing was."""
    found = [(name, before.get(name), value) for name, value in asked.items() if before.get(name) != value]
    return "; ".join(f"{name}: {was!r} before, {now!r} now" for name, was, now in found)


def mean_of(accelerator: Accelerator, numbers: dict[str, Tensor]) -> dict[str, float]:
    """Over the processes, which all call it."""
    if not numbers:
        return {}
    values = torch.stack([value.detach().float() for value in numbers.values()])
    return dict(zip(numbers, accelerator.reduce(values, "mean").tolist(), strict=True))


def averaged(accelerator: Accelerator, model: nn.Module, ema: "Ema | None", plain: Callable[[], Any]) -> Any:
    """The plain model with the averaged weights (all weights, gathered where they are sharded)."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if ema is not None:
        state = {**state, **ema.named(accelerator.unwrap_model(model))}
    with torch.device("meta"):
        made = plain()
    made.load_state_dict(state, assign=True)
    for module in made.modules():
        if hasattr(module, "_fill_constant_buffers"):  # which no checkpoint holds
            module._fill_constant_buffers(accelerator.device)
    return made.to(accelerator.device).eval()


class Ema:
    """Exponential moving average of a model's trained parameters, checkpointed by accelerate.

    Warmed up as LDM's: the t-th update keeps min(decay, (1 + t) / (10 + t)) of the average, so that a run shorter than
    1 / (1 − decay) steps does not end at its initial weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.parameters = [p.detach().clone() for p in model.parameters() if p.requires_grad]

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """average ← decay_t · average + (1 − decay_t) · parameter."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = [p.detach() for p in model.parameters() if p.requires_grad]
        torch._foreach_lerp_(self.parameters, current, 1.0 - decay)

    def named(self, model: nn.Module) -> dict[str, Tensor]:
        """The averages under the names that the parameters have in ``model``."""
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        return dict(zip(names, self.parameters, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """For `Accelerator.register_for_checkpointing`."""
        return {"parameters": self.parameters, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """For `Accelerator.register_for_checkpointing`."""
        self.updates = state.get("updates", WARMED_UP)  # none in a state of before there was a warm-up
        for mine, saved in zip(self.parameters, state["parameters"], strict=True):
            mine.copy_(saved)
