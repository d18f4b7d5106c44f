"""The scheduler: plans steps, and takes their results in.

A step is mixed. Every decoding sequence gets its one token first, and what the token budget leaves goes to prompts, in chunks,
larger priority first and in order of arrival within. A sequence starts with the pages of all its known tokens, so a prompt
under way never waits for memory; only decoding sequences grow, one page each page_size tokens.

**Memory.** Pages that only the prefix tree holds count as free: they are evicted when needed. A waiting sequence starts when the
pages it needs can be had and each running sequence, itself included, could still grow by `growth_tokens` afterwards. That
margin keeps a newcomer from taking what the running need at once, which would only get it preempted. Where nothing runs there
is no margin to keep. The first in the queue is never overtaken for lack of pages. When a decoding sequence finds no page for its
next token, the last in order of those running is preempted: its full pages go to the prefix tree and it
waits again, with all its tokens.

**Why this cannot stand still.** `add` refuses what does not fit the cache alone. The first in order of those running is preempted
only when it runs alone, and alone it has every page that it does not hold itself at its disposal, so it never is. It never loses what
it has computed, so it ends after finitely many steps, and so does the next, and what waits for their pages gets them.

**Overlap.** One more step may be planned while the one before is still in flight. What that step is still choosing is fed all the same;
who certainly ends with it is left out. Who turns out to have ended is struck from the newer plan when that is committed: the row
was computed for nothing, into a page that was given away only to later steps. A sequence is preempted only with nothing in flight, for
then all its tokens are known; where it comes to that, `plan` answers None until the step in flight is committed.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import deque
from collections.abc import Collection, Iterator
from itertools import chain

from pointsman.cache.pages import PagePool
from pointsman.cache.radix import RadixCache
from pointsman.request import FinishReason, Logprob, Request
from pointsman.scheduler.queue import Queue, order
from pointsman.scheduler.sequence import Advance, Sequence, check_replay, limit_of
from pointsman.step import LaneStart, Segment, StepPlan, StepResult

MAX_IN_FLIGHT = 2


class Scheduler:
    """Decides what runs; owns the queue, the lanes and, through the pool, the pages.

    Args:
        max_running: lanes, so the most sequences that run at once.
        token_budget: most tokens of a step, decode and prefill together.
        max_context: most tokens of prompt and output together.
        page_size: tokens a page.
        pool: the pages; the scheduler and the prefix tree alone hold any.
        radix: the prefix tree over the same pool; None shares nothing.
        eos_token_ids: tokens that end a text, unless a request ignores them.
        growth_tokens: each running sequence shall be able to grow by this many before another starts.
    """

    def __init__(
        self,
        *,
        max_running: int,
        token_budget: int,
        max_context: int,
        page_size: int,
        pool: PagePool,
        radix: RadixCache | None,
        eos_token_ids: Collection[int] = (),
        growth_tokens: int = 32,
    ) -> None:
        assert min(max_running, token_budget, max_context, page_size) > 0 and growth_tokens >= 0
        self._token_budget = token_budget
        self._max_context = max_context
        self._page_size = page_size
        self._pool = pool
        self._radix = radix
        self._eos = frozenset(eos_token_ids)
        self._growth_pages = self._pages_for(growth_tokens)
        self._free_lanes = list(range(max_running))
        self._queue = Queue()
        self._running: dict[int, Sequence] = {}
        self._prefilling: list[Sequence] = []  # running, part of the prompt not yet planned; sorted by order
        self._decoding: dict[int, Sequence] = {}  # running, all known tokens planned
        self._requests: dict[str, list[Sequence]] = {}
        self._in_flight: deque[tuple[StepPlan, list[Sequence]]] = deque()  # with those that decode in it
        self._num_added = 0
        self._num_plans = 0
        self.preempted: list[Sequence] = []
        """Whom the latest plan sent back to the queue; the `pages` of these too can be read until the next one."""

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    @property
    def has_work(self) -> bool:
        """Something runs or waits, or a plan is still to be committed."""
        return bool(self._running or self._queue or self._in_flight)

    @property
    def usage(self) -> float:
        """Share of the pages that sequences hold; those that are only cached do not count."""
        return 1.0 - self._num_available / self._pool.num_pages

    @property
    def _num_available(self) -> int:
        return self._pool.num_free + (0 if self._radix is None else self._radix.num_evictable)

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_size)

    @property
    def sequences(self) -> Iterator[Sequence]:
        """All that have not ended, running and waiting."""
        return chain.from_iterable(self._requests.values())

    def add(self, request: Request, seeds: tuple[int, ...]) -> list[Sequence]:
        """Queue a request: one sequence for each of its n choices, with a seed each.

        The other choices wait until the first has computed the prompt, so that they find it in the prefix cache.

        Raises:
            ValueError: it could not run even alone, or its rid is in use.
        """
        assert len(seeds) == request.sampling.n
        if request.rid in self._requests:
            raise ValueError(f"rid {request.rid!r} is the name of a request that is not finished yet; each needs its own")
        limit = limit_of(request, self._max_context, self._pool.num_pages * self._page_size)
        check_replay(request, limit)
        prompt, first = request.prompt_token_ids, self._num_added
        self._num_added += len(seeds)
        sequences = [
            Sequence(number=first + index, request=request, index=index, seed=seed, limit=limit, tokens=list(prompt))
            for index, seed in enumerate(seeds)
        ]
        self._requests[request.rid] = list(sequences)
        shares = self._radix is not None and request.sampling.prompt_logprobs is None
        together = sequences[:1] if shares and len(prompt) > self._page_size else sequences
        for sequence in together:
            self._queue.join(sequence)
        if len(sequences) > len(together):
            self._queue.follow(sequences[1:], sequences[0])
        return sequences

    def plan(self) -> StepPlan | None:
        """The next step; None when nothing can run before the step in flight is committed, or nothing is there to run."""
        assert len(self._in_flight) < MAX_IN_FLIGHT, "commit the oldest plan first"
        self.preempted = []
        room = self._make_room()
        if room is None:
            return None
        decoding, growing = room
        lanes, growths = self._decode(decoding, growing)
        segments: list[Segment] = []
        starts = self._prefill(segments, self._token_budget - len(lanes))
        if not lanes and not segments:
            assert self._in_flight or not (self._running or self._queue), "there is work, but none that could run"
            return None
        plan = StepPlan(self._num_plans, tuple(starts), lanes, growths, tuple(segments))
        self._num_plans += 1
        self._in_flight.append((plan, decoding))
        return plan

    def _make_room(self) -> tuple[list[Sequence], list[Sequence]] | None:
        """Who decodes in this step: all who do not end with a token already in flight. And who of them grow by a page, which is then
        to be had; None if someone must be preempted but not now."""
        page_size = self._page_size
        while True:
            decoding = [sequence for sequence in self._decoding.values() if len(sequence.tokens) + sequence.num_pending < sequence.limit]
            growing = [sequence for sequence in decoding if not sequence.num_planned % page_size]
            if len(growing) <= self._num_available:
                return decoding, growing
            if self._in_flight:
                return None
            assert len(self._running) > 1, "a sequence does not fit the cache alone"
            self._preempt(max(self._running.values(), key=order))

    def _decode(self, decoding: list[Sequence], growing: list[Sequence]) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
        """One token for each: their lanes, and what their page tables grow by."""
        assert len(decoding) <= self._token_budget
        growths: list[tuple[int, int]] = []
        for sequence, page in zip(growing, self._take(len(growing)), strict=True):
            assert sequence.lane is not None and sequence.num_planned == len(sequence.pages) * self._page_size
            sequence.pages.append(page)
            growths.append((sequence.lane, page))
        lanes: list[int] = []
        for sequence in decoding:
            assert sequence.lane is not None
            lanes.append(sequence.lane)
            sequence.num_planned += 1
            sequence.num_pending += 1
        return tuple(lanes), tuple(growths)

    def _prefill(self, segments: list[Segment], budget: int) -> list[LaneStart]:
        """Chunks of prompts, in order, of the sequences under way and of those that can start now; returns the starts.

        Nobody starts in a step that preempts: those just preempted, whose pages can still be read, are the next in line.
        """
        starts: list[LaneStart] = []
        under_way = deque(self._prefilling)
        held_up = bool(self.preempted)
        while budget > 0:
            head = None if held_up else self._queue.head
            if head is not None and not (under_way and under_way[0].order < head.order):
                start = self._start(head)
                if start is None:
                    held_up = True
                    continue
                starts.append(start)
                segment = self._chunk(head, budget, tuple(head.pages))
            elif under_way:
                segment = self._chunk(under_way.popleft(), budget, ())
            else:
                break
            segments.append(segment)
            budget -= len(segment.tokens)
        return starts

    def _chunk(self, sequence: Sequence, budget: int, pages: tuple[int, ...]) -> Segment:
        """The next of its known tokens, as many as the budget allows; after the last of them it decodes."""
        assert sequence.lane is not None and not sequence.num_pending
        known, start = len(sequence.tokens), sequence.num_planned
        end = min(known, start + budget)
        sequence.num_planned = end
        sample = end == known and known < sequence.limit
        if end == known:
            self._prefilling.remove(sequence)
            self._decoding[sequence.number] = sequence
        if sample:
            sequence.num_pending = 1
        rows = sequence.wants_prompt_rows and start < sequence.num_prompt - 1 and sequence.num_prompt_rows < end
        return Segment(sequence.lane, sequence.number, start, tuple(sequence.tokens[start:end]), pages, sample, rows)

    def _start(self, sequence: Sequence) -> LaneStart | None:
        """Give the first of the queue a lane and the pages of its known tokens, or None if either cannot be had now."""
        if not self._free_lanes:
            return None
        before, margin = self._num_available, self._growth_pages * (len(self._running) + 1) if self._running else 0
        if self._running and before < sequence.num_wanted + margin:
            return None
        hit: list[int] = []
        if self._radix is not None and not sequence.wants_prompt_rows:
            hit = self._radix.match(sequence.keys[: len(sequence.tokens) - 1], sequence.request.cache_salt)
            if sequence.num_preemptions:  # another's pages of the same tokens are not what its own tokens were drawn from
                hit = sequence.own(self._pool.dated(hit))
            self._pool.share(hit)
        num_new = self._pages_for(len(sequence.tokens)) - len(hit)
        if self._num_available < num_new + margin:
            sequence.num_wanted = num_new + before - self._num_available
            self._pool.release(hit)
            return None
        self._queue.remove(sequence)
        self._running[sequence.number] = sequence
        insort(self._prefilling, sequence, key=order)
        sequence.num_shared = len(hit)
        sequence.pages = hit + self._take(num_new)
        sequence.lane = heapq.heappop(self._free_lanes)
        sequence.num_planned = sequence.num_computed = sequence.num_found = sequence.num_shared * self._page_size
        sequence.cacheable = not sequence.tainted
        if not sequence.num_preemptions:
            sequence.num_cached = sequence.num_computed
        request, output = sequence.request, tuple(sequence.tokens[sequence.num_prompt :])
        return LaneStart(
            sequence.lane, sequence.number, request.prompt_token_ids, output, request.sampling, sequence.seed, sequence.replays
        )

    def _take(self, num_pages: int) -> list[int]:
        """Pages that are known to be available."""
        missing = num_pages - self._pool.num_free
        if missing > 0:
            assert self._radix is not None
            num_freed = self._radix.evict(missing)
            assert num_freed == missing
        pages = self._pool.allocate(num_pages)
        assert pages is not None
        return pages

    def commit(self, plan: StepPlan, result: StepResult) -> list[Advance]:
        """Take in the result of the oldest plan in flight; returns what it added, in the plan's order."""
        assert self._in_flight and plan is self._in_flight[0][0], "plans are committed in the order in which they were made"
        assert result.index == plan.index
        _, decoding = self._in_flight.popleft()
        advances: list[Advance] = []
        for index, sequence in enumerate(decoding):
            if sequence.finish_reason is None:  # else it ended while the step was in flight
                sequence.num_computed += 1
                advances.append(self._grow(sequence, index, result, None))
        index = len(decoding)
        for segment in plan.segments:
            running = self._running.get(segment.seq)
            if running is not None:
                advance = self._feed(running, segment, index, result)
                if advance is not None:
                    advances.append(advance)
            index += segment.sample
        assert index == len(result.tokens)
        return advances

    def _grow(self, sequence: Sequence, index: int, result: StepResult, rows: list[dict[int, Logprob]] | None) -> Advance:
        """The token of that index in the result joins the sequence."""
        sequence.num_pending -= 1
        if index in result.errors:
            self.finish(sequence, FinishReason.ERROR)
            return Advance(sequence, finish_reason=FinishReason.ERROR, error=result.errors[index])
        token = result.tokens[index]
        sequence.tokens.append(token)
        advance = Advance(sequence, token, result.logprobs.get(index), rows)
        ended = sequence.ending(self._eos, index in result.final)
        if ended is not None:
            advance.finish_reason, advance.stop_reason = ended
            self.finish(sequence, *ended)
        return advance

    def _feed(self, sequence: Sequence, segment: Segment, index: int, result: StepResult) -> Advance | None:
        """A part of its known tokens is computed; where it samples, the token of that index follows."""
        sequence.num_computed = end = segment.start + len(segment.tokens)
        rows = None
        if not (segment.sample and index in result.errors):
            if segment.prompt_logits:
                rows = sequence.more_prompt_rows(result.prompt_logprobs[segment.seq], segment.start)
            if segment.start < sequence.num_prompt:
                self._extend_cache(sequence)
        if segment.sample:
            return self._grow(sequence, index, result, rows)
        if end < sequence.limit:
            return Advance(sequence, prompt_logprobs=rows) if rows else None
        self.finish(sequence, FinishReason.LENGTH)  # nothing was to be generated
        return Advance(sequence, prompt_logprobs=rows, finish_reason=FinishReason.LENGTH)

    def _extend_cache(self, sequence: Sequence) -> None:
        """Full pages of the prompt go to the prefix tree as soon as they are computed, and the other choices may start after the last."""
        if self._radix is not None and sequence.cacheable:
            num_full = min(sequence.num_computed, sequence.num_prompt) // self._page_size
            if num_full > sequence.num_shared:
                sequence.num_shared = self._radix.extend(
                    sequence.keys, sequence.pages[:num_full], sequence.request.cache_salt, sequence.num_shared
                )
        if sequence.num_computed >= sequence.num_prompt:
            self._queue.release(sequence)

    def finish(self, sequence: Sequence, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """End a sequence, wherever it is; a row of it in flight is discarded when that comes back."""
        assert sequence.finish_reason is None, f"sequence {sequence.number} has ended already"
        sequence.finish_reason, sequence.stop_reason = reason, stop_reason
        if sequence.lane is not None:
            self._leave(sequence)
        else:
            self._queue.remove(sequence)
            sequence.pages, sequence.num_computed = [], 0  # if it had any, they may be others' by now
        self._queue.release(sequence)
        siblings = self._requests[sequence.request.rid]
        siblings.remove(sequence)
        if not siblings:
            del self._requests[sequence.request.rid]

    def abort(self, rid: str) -> list[Sequence]:
        """End all choices of a request; returns those that had not ended. An unknown rid is no fault: it may have ended just now."""
        sequences = list(self._requests.get(rid, ()))
        for sequence in sequences:
            self.finish(sequence, FinishReason.ABORT)
        return sequences

    def _preempt(self, sequence: Sequence) -> None:
        assert not sequence.num_pending
        sequence.left = self._pool.dated(sequence.pages)
        self._leave(sequence)
        sequence.num_preemptions += 1
        self._queue.join(sequence)
        self.preempted.append(sequence)

    def retract(self) -> None:
        """Preempt all that run; nothing may be in flight. Like those of a plan, they are in `preempted`, and their pages readable."""
        assert not self._in_flight
        self.preempted = []
        for sequence in sorted(self._running.values(), key=order, reverse=True):
            self._preempt(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Take the lane and the pages back; full computed pages stay in the prefix tree, unless a fault may have spoilt them."""
        assert sequence.lane is not None
        del self._running[sequence.number]
        if self._decoding.pop(sequence.number, None) is None:
            self._prefilling.remove(sequence)
        heapq.heappush(self._free_lanes, sequence.lane)
        sequence.lane = None
        if self._radix is not None and sequence.cacheable and sequence.finish_reason is not FinishReason.ERROR:
            full = sequence.pages[: sequence.num_computed // self._page_size]
            self._radix.insert(sequence.keys, full, sequence.request.cache_salt, sequence.num_shared)
        self._pool.release(sequence.pages)

    def reset_cache(self) -> None:
        """Forget all cached prefixes. What the running sequences have computed so far will not be cached either."""
        if self._radix is not None:
            self._radix.reset()
        for sequence in self._running.values():
            sequence.cacheable = False
