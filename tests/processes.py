"""Processes as the system knows them."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

LISTEN = "0A"  # as the system spells the state of a connection


def children(pid: int) -> list[int]:
    """Those that a process has started and that have not ended."""
    return [child for child in map(int, filter(str.isdecimal, os.listdir("/proc"))) if _status(child) == pid]


def descendants(pid: int) -> list[int]:
    return [found for child in children(pid) for found in (child, *descendants(child))]


def is_there(pid: int) -> bool:
    """Whether it has not ended; one that nobody has asked how it ended has."""
    return _status(pid) is not None


def listening(pid: int) -> list[int]:
    """The ports at which a process listens over IPv4; none where it has ended."""
    sockets = set()
    for number in _entries(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):  # it was closed meanwhile
            sockets.add(os.readlink(f"/proc/{pid}/fd/{number}"))
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [int(line[1].partition(":")[2], 16) for line in lines if line[3] == LISTEN and f"socket:[{line[9]}]" in sockets]


def _entries(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, ProcessLookupError):
        return []


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
