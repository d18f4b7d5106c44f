"""What the server knows of itself: plain numbers, counted as answers pass.

Thousands of tokens a second pass here, so counting one is a few additions and no lock; `metrics` turns the numbers into what a
monitoring system reads, when it asks. Times are taken when a step's tokens reach this process: what a client sees besides is the
network and its own reading. What the engine alone knows comes with its statistics, a few times a second.
"""

from __future__ import annotations

import datetime
import itertools
import logging
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from pointsman.request import ChoiceDelta, EngineStats, FinishReason, Request

FIRST_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
BETWEEN_TOKENS_SECONDS = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5, 10)
REQUEST_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
RECENT_SECONDS = 60.0
SNAPSHOT_SECONDS = 10.0

request_log = logging.getLogger("pointsman.requests")


class Histogram:
    """How often a value was at most each of some bounds; the last count is of those above all of them."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    @property
    def buckets(self) -> list[tuple[str, float]]:
        """Bounds as text and how many values were at most that, `+Inf` last."""
        names = [*(repr(float(bound)) for bound in self.bounds), "+Inf"]
        return list(zip(names, itertools.accumulate(self.counts), strict=True))


@dataclass(slots=True)
class _Running:
    """A request on its way; `last` is when each choice that is not over got its latest token."""

    name: str
    begun: float
    num_choices: int
    num_prompt: int
    num_cached: int = 0
    num_generated: int = 0
    first: float | None = None
    last: dict[int, float] = field(default_factory=dict)
    finishes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ExpertLoad:
    """How many tokens used each expert, by layer, since the engine started."""

    num_layers: int
    num_experts: int
    counts: Sequence[int]

    def layer(self, index: int) -> Sequence[int]:
        return self.counts[index * self.num_experts : (index + 1) * self.num_experts]


class Meter:
    """Numbers of one engine since its start.

    Attributes:
        first_token, between_tokens, whole: seconds to a request's first token, from one token of a choice to the next, to its end.
        num_prompt, num_cached, num_generated: tokens; cached ones are those of prompts that were found in the cache.
        finished: choices by why they ended.
        stats, load: the engine's latest.
    """

    def __init__(self, *, log_requests: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._log_requests = log_requests
        self._clock = clock
        self._running: dict[str, _Running] = {}
        self._snapshots: deque[tuple[float, ExpertLoad]] = deque()
        self.first_token = Histogram(FIRST_TOKEN_SECONDS)
        self.between_tokens = Histogram(BETWEEN_TOKENS_SECONDS)
        self.whole = Histogram(REQUEST_SECONDS)
        self.num_prompt = self.num_cached = self.num_generated = 0
        self.finished = {reason.value: 0 for reason in FinishReason}
        self.stats: EngineStats | None = None
        self.load: ExpertLoad | None = None
        self._told = 0.0

    def begin(self, request: Request, name: str) -> None:
        """A request goes to the engine; `name` is what its client calls it."""
        self._running[request.rid] = _Running(name, self._clock(), request.sampling.n, len(request.prompt_token_ids))

    def take(self, deltas: Iterable[ChoiceDelta]) -> None:
        """What a step added."""
        now = self._clock()
        for delta in deltas:
            if (running := self._running.get(delta.rid)) is not None:
                self._take(running, delta, now)

    def _take(self, running: _Running, delta: ChoiceDelta, now: float) -> None:
        if running.first is None and delta.finish_reason is not FinishReason.ABORT:
            running.first = now
            running.num_cached = delta.num_cached_tokens
            self.num_prompt += running.num_prompt
            self.num_cached += running.num_cached
            self.first_token.add(now - running.begun)
        if num_tokens := len(delta.token_ids):
            running.num_generated += num_tokens
            self.num_generated += num_tokens
            before = running.last.get(delta.index)
            if before is not None:
                self.between_tokens.add((now - before) / num_tokens, num_tokens)
            running.last[delta.index] = now
        if delta.finish_reason is not None:
            running.last.pop(delta.index, None)
            running.finishes.append(delta.finish_reason.value)

    def refuse(self, rid: str) -> None:
        """The engine did not take it: it was never a request."""
        self._running.pop(rid, None)

    def end(self, rid: str) -> None:
        """Nobody waits for a request any more. What had not ended by itself was aborted."""
        running = self._running.pop(rid, None)
        if running is None:
            return
        running.finishes += [FinishReason.ABORT.value] * (running.num_choices - len(running.finishes))
        for reason in running.finishes:
            self.finished[reason] += 1
        seconds = self._clock() - running.begun
        self.whole.add(seconds)
        if self._log_requests:
            request_log.info("%s", msgspec.json.encode(_line(rid, running, seconds)).decode())

    def told(self, stats: EngineStats, load: ExpertLoad) -> None:
        """The engine's numbers have come. Of the experts' load a snapshot is kept now and then, to tell what is recent in it."""
        now = self._clock()
        self.stats, self.load, self._told = stats, load, now
        if not self._snapshots or now - self._snapshots[-1][0] >= SNAPSHOT_SECONDS:
            self._snapshots.append((now, load))
        while len(self._snapshots) > 1 and self._snapshots[1][0] <= now - RECENT_SECONDS:
            self._snapshots.popleft()

    def imbalance(self) -> list[float]:
        """For each layer the busiest expert's load over the mean, in about the last minute; empty where no token passed."""
        if self.load is None or self._clock() - self._told > RECENT_SECONDS:
            return []
        before, now = self._snapshots[0][1], self.load
        ratios = []
        for index in range(now.num_layers):
            grown = [new - old for old, new in zip(before.layer(index), now.layer(index), strict=True)]
            ratios.append(max(grown) * len(grown) / (sum(grown) or 1))
        return ratios if any(ratios) else []


def array_load(array: Any) -> ExpertLoad:
    """The load out of an int64 array [layers, experts] as the wire has it."""
    num_layers, num_experts = array.shape
    return ExpertLoad(num_layers, num_experts, memoryview(array.data).cast("q"))


def log_requests_to(stream: Any) -> None:
    """Write one line of JSON for each finished request there, and nothing around it."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(message)s"))
    request_log.handlers = [handler]
    request_log.setLevel(logging.INFO)
    request_log.propagate = False


def _line(rid: str, running: _Running, seconds: float) -> dict[str, Any]:
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        "event": "request",
        "id": rid,
        "rid": running.name,
        "prompt_tokens": running.num_prompt,
        "cached_tokens": running.num_cached,
        "completion_tokens": running.num_generated,
        "finish_reasons": running.finishes,
        "first_token_seconds": None if running.first is None else round(running.first - running.begun, 6),
        "seconds": round(seconds, 6),
    }
