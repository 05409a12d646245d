"""What the benchmarks share: timing in turns, rows with targets, facts about the machine.

They measure and never judge: the exit code is 0 whether a target is met or missed.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Row:
    """A measured number. ``target`` is an upper bound, or with ``at_least`` a lower one."""

    name: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    target: float | None = None
    note: str = ""
    at_least: bool = False
    met: bool | None = field(init=False)

    def __post_init__(self) -> None:
        self.met = None
        if self.target is not None:
            self.met = self.value >= self.target if self.at_least else self.value <= self.target

    @classmethod
    def of(
        cls,
        name: str,
        values: list[float],
        unit: str,
        target: float | None = None,
        note: str = "",
        *,
        at_least: bool = False,
    ) -> "Row":
        """The median and quartiles of repeated measurements; of one, that one."""
        quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        low, middle, high = quartiles
        return cls(name, middle, unit, low, high, target, note, at_least)

    def cells(self) -> tuple[str, ...]:
        spread = "" if self.low is None or self.high is None else f"{self.low:.3g} to {self.high:.3g}"
        target = "" if self.target is None else f"{'>=' if self.at_least else '<='} {self.target:g}"
        verdict = {None: "", True: "met", False: "missed"}[self.met]
        return self.name, f"{self.value:.3g} {self.unit}".strip(), spread, target, verdict, self.note


def report(measured: Iterable[Row], path: Path, **facts: Any) -> None:
    """Print the rows as they come and then as a table. The JSON holds all up to the last one, should the next fail."""
    rows: list[Row] = []
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    for row in measured:
        rows.append(row)
        print(f"  {row.name}: {row.value:.3g} {row.unit}", flush=True)
        content = {"machine": machine(), **facts, "rows": [asdict(row) for row in rows]}
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    print_table(rows)
    print(f"\nwritten to {path}")


def print_table(rows: list[Row]) -> None:
    """The rows in aligned columns."""
    table = [("what", "median", "quartiles", "target", "", "note"), *(row.cells() for row in rows)]
    widths = [max(len(cells[column]) for cells in table) for column in range(len(table[0]))]
    print()
    for cells in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())


def in_turns(functions: list[Callable[[], Any]], repetitions: int) -> list[list[float]]:
    """Seconds of each function at each repetition. All are warmed up, then run A B, B A, A B, …"""
    for function in functions:
        function()
    seconds: list[list[float]] = [[] for _ in functions]
    for repetition in range(repetitions):
        for index in range(len(functions))[:: 1 if repetition % 2 == 0 else -1]:
            seconds[index].append(seconds_of(functions[index]))
    return seconds


def seconds_of(function: Callable[[], Any]) -> float:
    """Of one call, without warming up."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def matrix_product(dtype: torch.dtype, side: int = 2048, times: int = 8) -> tuple[Callable[[], None], float]:
    """A function that multiplies square matrices, and its GFLOP."""
    a, b = torch.randn(2, side, side).to(dtype)

    def product() -> None:
        for _ in range(times):
            torch.mm(a, b)

    return product, times * 2 * side**3 / 1e9


def resident_memory(name: Literal["VmRSS", "VmHWM"]) -> int:
    """Bytes resident in this process now, or at most so far (``getrusage`` would include the parent's)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def free_memory() -> int:
    """Bytes that can be allocated without swapping."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "bf16": [flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags],
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": {name: version(name) for name in ("torch", "timm", "diffusers")},
    }
