"""How a process ends when a rank was lost and the device still waits for it.

A kernel that exchanges with another rank spins until that one answers, which a lost one never does. The host need not wait for it, but
what frees the device's memory at the end of a process does, for ever. So after a loss the device is looked at once, and where it is not
through soon, the process is ended without freeing anything: the system takes the device back from it.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)

THROUGH_SECONDS = 3.0
STATUS = 1


def end_without(wait: Callable[[], object], what: str) -> None:
    """Where `wait` does not return soon, have this process end at once when it ends, with status 1: no hook of `atexit` that was there
    before is called then, and nothing is freed.

    Args:
        wait: returns when the device is through; called in a thread of its own, where it may stay.
        what: it waits for, for people.
    """
    if (reason := _reason_against(wait)) is None:
        return
    log.warning("a rank was lost, and %s %s; when this process ends, it ends at once, with status %d", what, reason, STATUS)
    atexit.register(_end)


def _reason_against(wait: Callable[[], object]) -> str | None:
    """Why its end cannot be waited for; None where it came."""
    outcome: list[str | None] = []

    def run() -> None:
        try:
            wait()
        except RuntimeError as error:
            first, _, _ = str(error).partition("\n")
            outcome.append(f"has failed ({first[:200]})")
        else:
            outcome.append(None)

    thread = threading.Thread(target=run, name="device", daemon=True)
    thread.start()
    thread.join(THROUGH_SECONDS)
    return outcome[0] if outcome else f"is not through after {THROUGH_SECONDS:g} s"


def _end() -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # streams that are closed or not there
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(STATUS)
