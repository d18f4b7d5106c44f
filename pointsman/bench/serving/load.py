"""Keep requests running against a server, and stamp what comes back.

The clock of a request starts when it is written to its connection, after it has waited for its turn under `max_concurrency`, as the
benchmarks of the field have it. The client is one thread, so its own delay is watched: what a timer is late by is what a stamp
may be wrong by.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

from pointsman.bench.serving.backends import AnswerFault, Backend, StreamTaker, Wish, error_of
from pointsman.bench.serving.http import OK, HttpClient
from pointsman.bench.serving.metrics import percentile
from pointsman.bench.serving.query import Outcome, Query

LOOK_SECONDS = 0.02
LATE_SECONDS = 0.02
BUSY_SHARE = 0.8
SPARE_FILES = 256
NO_TOKENS = "the answer has no tokens"


@dataclass
class Effort:
    """What the client itself spent on a run.

    Attributes:
        busy_share: CPU seconds of this process by seconds of the run.
        late_s: what a timer was late by, each time it was looked at.
    """

    busy_share: float = 0.0
    late_s: list[float] = field(default_factory=list)

    @property
    def p99_late_s(self) -> float:
        return percentile(sorted(self.late_s), 99) if self.late_s else 0.0

    def warning(self) -> str | None:
        """Why the figures may be the client's own, or None."""
        if self.p99_late_s > LATE_SECONDS:
            return f"this client's event loop was {1000 * self.p99_late_s:.0f} ms late at its 99th percentile: times are wrong by as much"
        if self.busy_share > BUSY_SHARE:
            return f"this client used {100 * self.busy_share:.0f} % of a core: it may be what limits the throughput"
        return None


@dataclass(kw_only=True)
class Run:
    """Outcomes in the order of their queries."""

    outcomes: list[Outcome]
    duration_s: float
    effort: Effort


@dataclass(frozen=True, kw_only=True)
class Load:
    """How queries are sent.

    Attributes:
        max_concurrency: most requests that run at once; None is no limit.
        timeout_s: most seconds of one request.
        on_end: called with each outcome when it is there.
    """

    client: HttpClient
    backend: Backend
    wish: Wish
    max_concurrency: int | None = None
    timeout_s: float = 21600.0
    on_end: Callable[[Outcome], None] = lambda outcome: None

    async def run(self, queries: Sequence[Query], offsets_s: Sequence[float]) -> Run:
        """Send every query at its moment, in seconds after the start, or as soon after it as `max_concurrency` lets it."""
        raise_file_limit(self.max_concurrency or len(queries))
        outcomes = [Outcome(query=query) for query in queries]
        bodies = [msgspec.json.encode(self.backend.body(query, self.wish)) for query in queries]
        turns = asyncio.Semaphore(self.max_concurrency or len(queries) or 1)
        effort = Effort()
        with _quiet_memory():
            watch = asyncio.create_task(watch_delay(effort))
            spent, start = time.process_time(), time.perf_counter()
            tasks = []
            for outcome, body, offset in zip(outcomes, bodies, offsets_s, strict=True):
                if (wait := start + offset - time.perf_counter()) > 0:
                    await asyncio.sleep(wait)
                await turns.acquire()
                tasks.append(asyncio.create_task(self._one(outcome, body, start, turns)))
            await asyncio.gather(*tasks)
            duration = time.perf_counter() - start
            effort.busy_share = (time.process_time() - spent) / duration
            watch.cancel()
        return Run(outcomes=outcomes, duration_s=duration, effort=effort)

    async def _one(self, outcome: Outcome, body: bytes, start: float, turns: asyncio.Semaphore) -> None:
        def clock() -> float:
            return time.perf_counter() - start

        try:
            outcome.sent_s = clock()
            outcome.error = await self._ask(outcome, body, clock)
        finally:
            outcome.end_s = clock()
            turns.release()
        self.on_end(outcome)

    async def _ask(self, outcome: Outcome, body: bytes, clock: Callable[[], float]) -> str | None:
        """Fill in the outcome; returns what went wrong."""
        taker = StreamTaker(self.backend, outcome, clock)
        try:
            async with asyncio.timeout(self.timeout_s):
                answer = await self.client.post(self.backend.path, body, taker)
        except AnswerFault as error:
            return str(error)
        except TimeoutError:
            return f"no whole answer within {self.timeout_s:g} s"
        except OSError as error:
            return f"{type(error).__name__}: {error}"
        if answer.status != OK:
            return f"{answer.status}: {error_of(answer.body)}"
        if not outcome.piece_s:
            return NO_TOKENS
        return None


def raise_file_limit(connections: int) -> None:
    """Let this process open so many connections. Raises ValueError where the system does not allow it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            raise ValueError(
                f"{connections} connections at once are more than the {hard} open files of this process; set --max-concurrency"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextlib.contextmanager
def _quiet_memory() -> Iterator[None]:
    """No garbage collection of what was there before: with a thousand long prompts it would stop the clock for milliseconds."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


async def watch_delay(effort: Effort) -> None:
    while True:
        due = time.perf_counter() + LOOK_SECONDS
        await asyncio.sleep(LOOK_SECONDS)
        effort.late_s.append(max(time.perf_counter() - due, 0.0))
