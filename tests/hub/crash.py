"""Run as ``python -m tests.hub.crash MODE FOLDER``: savers that are killed or run out of room.

Prints one line of JSON about what was left behind. A saver that is to be killed is a fork of this process, which
has everything imported and one thread.
"""

import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from psvae import PixelDecoder
from psvae.errors import CheckpointError
from tests.hub.checkpoints import fill, values, weight_files
from tests.tiny import tiny_decoder

SHARD = {"single": "5GB", "shards": "300KB"}  # the tiny decoder has 0.9 MB
MINUTE_SHARD = {"single": "5GB", "shards": "8KB"}  # the minute one has 0.02 MB
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "open"}  # audit events before a file system changes


def minute_decoder() -> PixelDecoder:
    """One level, so that a hundred saves take a few seconds."""
    return tiny_decoder(base_channels=8, channel_multipliers=(1,), num_res_blocks=1, attention_levels=0)


def held(folder: Path) -> list[float]:
    """The distinct numbers in the checkpoint that a reader finds: one of them if it is a whole save."""
    return sorted(values(PixelDecoder.from_pretrained(folder)))


def killed(work: Callable[[], None], wait: Callable[[], None] | None = None) -> bool:
    """Run ``work`` in a fork; SIGKILL it after ``wait``, if given. Whether a SIGKILL ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    if wait is not None:
        wait()
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        raise RuntimeError("the saver failed by itself")
    return os.WIFSIGNALED(status)


def at_every_change(folder: Path) -> dict[str, Any]:
    """Kill a save before its first, second, third... change of the file system, until one ends by itself.

    Gives for each pair of kinds, old and new: what each kill left, what the next save left, and its files.
    """
    results = {}
    first, new, newer = (fill(minute_decoder(), value) for value in (1.0, 2.0, 3.0))
    for before, after in itertools.product(MINUTE_SHARD, MINUTE_SHARD):
        old = folder / f"{before}-{after}"
        first.save_pretrained(old, max_shard_size=MINUTE_SHARD[before])
        left, mended = [], []
        for count in itertools.count(1):
            target = folder / f"{before}-{after}-{count}"
            shutil.copytree(old, target)
            alive = not killed(lambda: save_until(count, target, new, MINUTE_SHARD[after]))  # noqa: B023  (called at once)
            left.append(held(target))
            newer.save_pretrained(target, max_shard_size=MINUTE_SHARD[after])
            mended.append([held(target), len(weight_files(target)), (target / ".saving").exists()])
            shutil.rmtree(target)
            if alive:
                break
        results[f"{before} to {after}"] = {"left": left, "mended": mended}
    return results


def save_until(count: int, folder: Path, module: PixelDecoder, shard: str) -> None:
    """Save, and die before the ``count``-th change."""
    events = itertools.count(1)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        reads = event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in CHANGES and not reads and next(events) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    module.save_pretrained(folder, max_shard_size=shard)


def at_random(folder: Path, kills: int = 10) -> list[list[float]]:
    """Kill a process that saves in a loop. Gives for each kill the last save that returned and what is held."""
    model = fill(tiny_decoder(base_channels=32), 0.0)  # 3.6 MB: most of the time goes into writing
    model.save_pretrained(folder)
    results, dice = [], random.Random(0)
    for _ in range(kills):
        start = int(held(folder)[0])
        reader, writer = os.pipe()

        def work() -> None:
            for value in itertools.count(start + 1):  # noqa: B023  (called at once)
                fill(model, float(value)).save_pretrained(folder, max_shard_size="1MB" if value % 3 else "5GB")
                os.write(writer, b".")  # noqa: B023

        killed(work, wait=lambda: time.sleep(dice.uniform(0.05, 0.4)))
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            results.append([start + len(pipe.read()), *held(folder)])
    return results


def without_room(folder: Path, limit: int | None) -> dict[str, Any]:
    """Save over a checkpoint with no room for it. Gives the error, and what is there before and after."""
    fill(tiny_decoder(), 1.0).save_pretrained(folder)
    (folder / "notes.txt").write_text("mine")
    before = sorted(path.name for path in folder.iterdir())
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    messages = []
    for shard in SHARD.values():
        try:
            fill(tiny_decoder(), 2.0).save_pretrained(folder, max_shard_size=shard)
            messages.append("saved")
        except CheckpointError as error:
            messages.append(str(error))
    after = sorted(path.name for path in folder.iterdir())
    return {"messages": messages, "before": before, "after": after, "held": held(folder)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[2])
    results = {
        "every-change": lambda: at_every_change(target),
        "random": lambda: at_random(target),
        "limit": lambda: without_room(target, limit=100_000),
        "full": lambda: without_room(target, limit=None),
    }[sys.argv[1]]()
    print(json.dumps(results))
