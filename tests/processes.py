"""Run a function in several processes that talk over gloo on this machine, as ``torchrun`` would."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def in_processes(work: Callable[..., Any], folder: Path, *arguments: Any, count: int = 2) -> list[Any]:
    """``work(rank, *arguments)`` in each of ``count`` processes; what they return, by rank.

    Args:
        work: a function of a module, so that the other processes can import it. Returns tensors and plain data.
        folder: empty, for the processes to meet in and leave their results.
    """
    torch.multiprocessing.spawn(_process, (work, count, str(folder), arguments), nprocs=count)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]


def _process(rank: int, work: Callable[..., Any], count: int, folder: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the host's name need not resolve
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    try:
        torch.save(work(rank, *arguments), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()
