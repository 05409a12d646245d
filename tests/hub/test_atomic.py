"""A save that is killed or runs out of room leaves a whole checkpoint: the old one, or the new one."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def crash(mode: str, folder: Path, prefix: tuple[str, ...] = ()) -> Any:
    """What ``tests.hub.crash`` reports."""
    command = [*prefix, sys.executable, "-m", "tests.hub.crash", mode, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_killed_before_every_change_of_the_file_system(tmp_path: Path) -> None:
    for change, result in crash("every-change", tmp_path).items():
        left, mended = result["left"], result["mended"]
        assert len(left) >= 8, change
        assert all(numbers in ([1.0], [2.0]) for numbers in left), (change, left)
        assert left == sorted(left), f"{change}: once the new checkpoint is read, it stays"
        assert (left[0], left[-1]) == ([1.0], [2.0]), change
        # the next save is not disturbed by what the killed one left, and cleans it up
        files = 1 if change.endswith("single") else mended[-1][1]
        assert all(numbers == [3.0] and not staging for numbers, _, staging in mended), (change, mended)
        assert all(count == files for _, count, _ in mended), (change, mended)


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """Whatever is held is one save, whole, and none that had returned is lost."""
    results = crash("random", tmp_path)
    assert all(len(numbers) == 1 for _, *numbers in results), results
    assert all(returned <= number <= returned + 1 for returned, number in results), results
    assert results[-1][0] >= 3, f"the saver must get some work done before each kill: {results}"


def assert_nothing_lost(result: dict[str, Any], reason: str) -> None:
    assert result["held"] == [1.0]
    assert result["after"] == result["before"]
    for message in result["messages"]:
        assert "could not save to" in message
        assert reason in message
        assert "0.9 MB were to be written and " in message
        assert " MB are free there" in message
        assert "What was saved before is untouched: make room or choose another folder" in message


def test_a_file_size_limit(tmp_path: Path) -> None:
    assert_nothing_lost(crash("limit", tmp_path), "File too large")


def test_a_full_disk(tmp_path: Path) -> None:
    """A file system of 1.5 MB in memory, in a mount namespace of its own: room for one checkpoint, not for two."""
    mount = f'mount -t tmpfs -o size=1500k none {tmp_path} && exec "$@"'
    prefix = ("unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh")
    if (
        shutil.which("unshare") is None
        or subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("this machine lets nobody mount a small file system (unshare --map-root-user --mount)")
    result = crash("full", tmp_path / "model", prefix)
    assert_nothing_lost(result, "No space left on device")
    assert all("and 0.6 MB are free" in message for message in result["messages"]), result["messages"]
