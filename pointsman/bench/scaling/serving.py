"""Requests served in simulated time: the engine's own scheduler plans each step, and a step lasts as long as its layout says.

Each group of a layout has a scheduler; requests go to the group with the fewest. Steps of all groups begin together, as the experts need
all rows. What the server costs beside the step (HTTP, text) is left out.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pointsman.bench.scaling.layouts import Load
from pointsman.bench.serving.query import Outcome, Query
from pointsman.cache.pages import PagePool
from pointsman.cache.radix import RadixCache
from pointsman.request import Request, SamplingParams
from pointsman.scheduler import Scheduler
from pointsman.step import StepPlan, StepResult

PAGE_SIZE = 16
MAX_CONTEXT = 196_608
TOKEN = 1


@dataclass
class Served:
    """What came of the requests, and the parts of all steps' time in microseconds."""

    outcomes: list[Outcome] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    parts_us: dict[str, float] = field(default_factory=dict)


def new_scheduler(cache_tokens: int, max_running: int, token_budget: int) -> Scheduler:
    """As the engine would make it."""
    pool = PagePool(cache_tokens // PAGE_SIZE)
    return Scheduler(
        max_running=max_running,
        token_budget=token_budget,
        max_context=MAX_CONTEXT,
        page_size=PAGE_SIZE,
        pool=pool,
        radix=RadixCache(pool, PAGE_SIZE),
    )


def load_of(plan: StepPlan, lengths: dict[int, int], returned: set[int]) -> Load:
    """What the plan's rows are to the layout.

    Args:
        lengths: how far each lane is, brought up to date.
        returned: sequences that were preempted and run again, brought up to date.
    """
    returned.update(start.seq for start in plan.starts if start.output)
    rows = sampled = len(plan.decoding)
    read, pairs = 0, 0.0
    for lane in plan.decoding:
        lengths[lane] += 1
        read += lengths[lane]
    for segment in plan.segments:
        count = len(segment.tokens)
        lengths[segment.lane] = segment.start + count
        rows += count
        sampled += segment.sample
        if count == 1:
            read += segment.start + 1
        else:
            pairs += count * (segment.start + count / 2)
    recomputes = any(len(segment.tokens) > 1 and segment.seq in returned for segment in plan.segments)
    return Load(rows, sampled, read, pairs, recomputes)


NOTHING = Load(0, 0, 0, 0.0)


def serve(
    queries: Sequence[Query],
    schedulers: Sequence[Scheduler],
    time_of: Callable[[list[Load]], dict[str, float]],
    max_concurrency: int | None,
) -> Served:
    """Serve queries with ids: at their moments, or in order, so many at once. Raises ValueError for one that no scheduler can run."""
    served = Served([Outcome(query=query) for query in queries])
    waiting = deque(range(len(queries)))
    rows: dict[int, Outcome] = {}  # by number of a sequence and scheduler
    running = 0
    busy = [(0, index) for index in range(len(schedulers))]
    states: list[tuple[dict[int, int], set[int]]] = [({}, set()) for _ in schedulers]
    now = 0.0

    def admit() -> None:
        nonlocal running
        while waiting and (max_concurrency is None or running < max_concurrency):
            outcome = served.outcomes[waiting[0]]
            if (outcome.query.arrival_s or 0.0) > now:
                return
            number = waiting.popleft()
            held, index = heapq.heappop(busy)
            heapq.heappush(busy, (held + 1, index))
            sampling = SamplingParams(max_tokens=outcome.query.output_len, ignore_eos=True, temperature=0.0)
            assert outcome.query.ids is not None
            request = Request(rid=str(number), prompt_token_ids=outcome.query.ids, sampling=sampling)
            (sequence,) = schedulers[index].add(request, (0,))
            rows[id(sequence)] = outcome
            # a trace's request waits from its own moment on
            outcome.sent_s = now if outcome.query.arrival_s is None else outcome.query.arrival_s
            running += 1

    while waiting or running:
        admit()
        if not running:
            now = served.outcomes[waiting[0]].query.arrival_s or now
            continue
        plans = [scheduler.plan() if scheduler.has_work else None for scheduler in schedulers]
        found = time_of([NOTHING if plan is None else load_of(plan, *states[index]) for index, plan in enumerate(plans)])
        now += sum(found.values()) / 1e6
        served.steps += 1
        for name, us in found.items():
            served.parts_us[name] = served.parts_us.get(name, 0.0) + us
        for index, (scheduler, plan) in enumerate(zip(schedulers, plans, strict=True)):
            ended = 0 if plan is None else _commit(scheduler, plan, now, rows)
            running -= ended
            if ended:
                busy = [(held - (ended if which == index else 0), which) for held, which in busy]
                heapq.heapify(busy)
    served.seconds = now
    return served


def _commit(scheduler: Scheduler, plan: StepPlan, now: float, rows: dict[int, Outcome]) -> int:
    """Take the step's tokens in; how many requests ended with it."""
    result = StepResult(plan.index, [TOKEN] * (len(plan.decoding) + sum(segment.sample for segment in plan.segments)))
    ended = 0
    for advance in scheduler.commit(plan, result):
        outcome = rows[id(advance.sequence)]
        if advance.token is not None:
            outcome.piece_s.append(now)
            outcome.counted += 1
        if advance.finish_reason is not None:
            outcome.end_s = now
            del rows[id(advance.sequence)]
            ended += 1
    return ended


def distinct(lengths: Sequence[tuple[int, int]]) -> list[Query]:
    """Queries of these lengths, in and out, no two of which begin alike."""
    numbers = itertools.count(2)
    return [Query(ids=tuple(itertools.islice(numbers, length)), input_len=length, output_len=output) for length, output in lengths]
