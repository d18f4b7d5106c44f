"""What decides how long an engine is waited for, and how often another takes its place."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

MAX_RESTARTS = 3
RESTART_SECONDS = 600.0


class Restarts:
    """How often an engine that was ready once is started anew: so many times in so many seconds, and then no more."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._times: list[float] = []
        self._ever_ready = False

    def allowed(self, *, was_ready: bool) -> bool:
        """Whether to start another after one has failed, which counts as one. One that never was ready would fail again."""
        self._ever_ready = self._ever_ready or was_ready
        now = self._clock()
        self._times = [time for time in self._times if now - time < RESTART_SECONDS]
        if not self._ever_ready or len(self._times) >= MAX_RESTARTS:
            return False
        self._times.append(now)
        return True

    @property
    def number(self) -> int:
        """How many there have been of late."""
        return len(self._times)


async def first(*events: asyncio.Event, serving: asyncio.Task[None] | None = None, seconds: float | None = None) -> None:
    """Wait for any of these, and not longer than this."""
    tasks = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait([*tasks, *([serving] if serving else [])], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
