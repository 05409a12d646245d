"""Training checkpoints on accelerate: written whole or not at all, the newest few kept."""

import shutil
from pathlib import Path

from accelerate import Accelerator


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, keep: int) -> None:
    """All of accelerate's state as ``folder/step…``, written beside it and then renamed."""
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


def load_checkpoint(accelerator: Accelerator, folder: Path) -> int:
    """Load the newest checkpoint of ``folder``; returns its step, 0 if there is none."""
    found = sorted(folder.glob("step*"))
    if not found:
        return 0
    accelerator.load_state(str(found[-1]))
    return int(found[-1].name.removeprefix("step"))
