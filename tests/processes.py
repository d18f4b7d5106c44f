"""Processes as the system knows them."""

from __future__ import annotations

import os
import time
from pathlib import Path


def children(pid: int) -> list[int]:
    """Those that a process has started and that have not ended."""
    return [child for child in map(int, filter(str.isdecimal, os.listdir("/proc"))) if _status(child) == pid]


def descendants(pid: int) -> list[int]:
    return [found for child in children(pid) for found in (child, *descendants(child))]


def is_there(pid: int) -> bool:
    """Whether it has not ended; one that nobody has asked how it ended has."""
    return _status(pid) is not None


def wait_gone(pids: list[int]) -> None:
    while any(map(is_there, pids)):  # the test run has a time limit
        time.sleep(0.02)


def _status(pid: int) -> int | None:
    """The parent of a process; None where it has ended."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else int(parent)
