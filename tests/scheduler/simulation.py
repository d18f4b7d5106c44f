"""Runs a scheduler against the rank that remembers, and checks every promise at every step."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from pointsman.cache.pages import PagePool
from pointsman.cache.radix import RadixCache
from pointsman.request import FinishReason, Logprob, Replay, Request
from pointsman.scheduler import Advance, Scheduler, Sequence
from pointsman.step import StepPlan, StepResult
from tests.scheduler.rank import EOS, STOP_PAIR, Rank, fingerprints, run_alone


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A scheduler's configuration."""

    max_running: int = 4
    token_budget: int = 16
    max_context: int = 64
    page_size: int = 4
    num_pages: int = 64
    radix: bool = True
    growth_tokens: int = 0


@dataclass
class Simulation:
    setup: Setup
    outputs: dict[int, list[int]] = field(default_factory=dict)
    prompt_rows: dict[int, list[dict[int, Logprob]]] = field(default_factory=dict)
    sequences: dict[int, Sequence] = field(default_factory=dict)
    in_flight: deque[tuple[StepPlan, StepResult]] = field(default_factory=deque)
    num_preemptions: int = 0
    num_steps: int = 0

    def __post_init__(self) -> None:
        setup = self.setup
        self.pool = PagePool(setup.num_pages)
        self.radix = RadixCache(self.pool, setup.page_size) if setup.radix else None
        self.rank = Rank(setup.max_running, setup.page_size)
        self.scheduler = Scheduler(
            max_running=setup.max_running,
            token_budget=setup.token_budget,
            max_context=setup.max_context,
            page_size=setup.page_size,
            pool=self.pool,
            radix=self.radix,
            eos_token_ids=(EOS,),
            growth_tokens=setup.growth_tokens,
        )
        self.prompt_done: set[int] = set()
        self.decoding: set[int] = set()
        self.started: set[int] = set()
        self.own: dict[int, list[int]] = {}  # which plans wrote what the preempted had

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.setup.page_size)

    # What happens to it

    def add(self, request: Request, seeds: tuple[int, ...] | None = None) -> list[Sequence]:
        sequences = self.scheduler.add(request, seeds or tuple(range(1, request.sampling.n + 1)))
        for sequence in sequences:
            self.sequences[sequence.number] = sequence
            self.outputs[sequence.number] = []
            self.prompt_rows[sequence.number] = []
        self.check_counts()
        return sequences

    def abort(self, rid: str) -> None:
        live = [sequence for sequence in self.sequences.values() if sequence.request.rid == rid and sequence.finish_reason is None]
        assert self.scheduler.abort(rid) == live
        for sequence in live:
            assert sequence.finish_reason is FinishReason.ABORT
            self.check_end(sequence)
        self.check_counts()

    def plan(self) -> bool:
        """Plan and execute a step; false if there was none to run."""
        before = [sequence for sequence in self.sequences.values() if sequence.lane is not None]
        plan = self.scheduler.plan()
        if plan is None:
            assert self.in_flight or not self.scheduler.has_work, "it stands still"
            return False
        self.num_steps += 1
        self.check_preempted(before)
        self.check_plan(plan)
        self.check_starts(plan)
        requests = {number: sequence.request for number, sequence in self.sequences.items()}
        self.in_flight.append((plan, self.rank.execute(plan, requests)))
        self.check_counts()
        return True

    def commit(self) -> list[Advance]:
        plan, result = self.in_flight.popleft()
        live = {number for number, sequence in self.sequences.items() if sequence.lane is not None}
        advances = self.scheduler.commit(plan, result)
        rows = self.rank.steps[plan.index]
        order = [row.seq for row in rows]
        assert [advance.sequence.number for advance in advances] == sorted((a.sequence.number for a in advances), key=order.index)
        assert {advance.sequence.number for advance in advances} <= live
        self.prompt_done |= {row.seq for row in rows if row.start + row.count >= self.sequences[row.seq].num_prompt and row.seq in live}
        for advance in advances:
            self.take(advance)
        self.check_counts()
        return advances

    def take(self, advance: Advance) -> None:
        sequence = advance.sequence
        if advance.token is not None:
            assert sequence.tokens[-1] == advance.token and advance.logprobs is not None and advance.token in advance.logprobs
            self.outputs[sequence.number].append(advance.token)
        assert (advance.error is not None) == (advance.finish_reason is FinishReason.ERROR)
        self.prompt_rows[sequence.number] += advance.prompt_logprobs or []
        assert advance.finish_reason is sequence.finish_reason and advance.stop_reason == sequence.stop_reason
        sampling, output = sequence.request.sampling, self.outputs[sequence.number]
        ends = sampling.stop and tuple(output[-2:]) == STOP_PAIR and len(output) >= sampling.min_tokens
        if sequence.finish_reason is None and advance.token is not None and ends:
            self.scheduler.finish(sequence, FinishReason.STOP, sampling.stop[0])
        if sequence.finish_reason is not None:
            self.check_end(sequence)

    def run(self, *, overlap: bool = False) -> None:
        """To the end of all work, in the plain order or overlapped."""
        while self.scheduler.has_work:
            self.step(overlap=overlap)
        self.check_finished()

    def step(self, *, overlap: bool) -> None:
        assert self.num_steps < 20_000, "it does not end"
        if not self.in_flight:
            self.plan()
        if overlap and self.in_flight:
            self.plan()
        if self.in_flight:
            self.commit()

    # What must hold

    def waiting(self) -> list[Sequence]:
        """Who may start: all that wait, but for choices whose first one is still at their prompt."""
        waiting = [sequence for sequence in self.sequences.values() if sequence.lane is None and sequence.finish_reason is None]
        return [sequence for sequence in waiting if not self.follows(sequence)]

    def follows(self, sequence: Sequence) -> bool:
        if not (sequence.index and self.setup.radix) or sequence.request.sampling.prompt_logprobs is not None:
            return False
        first = self.sequences[sequence.number - sequence.index]
        return sequence.num_prompt > self.setup.page_size and first.finish_reason is None and first.number not in self.prompt_done

    def check_preempted(self, before: list[Sequence]) -> None:
        preempted = self.scheduler.preempted
        self.num_preemptions += len(preempted)
        assert not (preempted and self.in_flight), "a preemption with a step in flight"
        for sequence in preempted:
            self.decoding.discard(sequence.number)
            stayed = [other for other in before if other.lane is not None]
            assert all(other.order < sequence.order for other in stayed), "who is preempted is the last in order"
            self.rank.check_memory(sequence.request, sequence.tokens[: sequence.num_computed], sequence.pages)
            self.own[sequence.number] = self.rank.plans(sequence.pages, sequence.num_computed)
            if sequence.num_computed:
                sequence.kept = Replay(shape=(sequence.num_computed, 1, 1), data=bytes(sequence.num_computed))

    def check_plan(self, plan: StepPlan) -> None:
        setup = self.setup
        assert 0 < plan.num_tokens <= setup.token_budget
        pending = [row.seq for older, _ in self.in_flight for row in self.rank.steps[older.index] if row.sampled]
        due = {
            number
            for number in self.decoding
            if (sequence := self.sequences[number]).lane is not None and len(sequence.tokens) + pending.count(number) < sequence.limit
        }
        running = {sequence.lane: sequence for sequence in self.sequences.values() if sequence.lane is not None}
        decode = [running[lane] for lane in plan.decoding]
        assert len(decode) == len(due) and {sequence.number for sequence in decode} == due, "every decoding sequence"
        for sequence in decode:
            assert self.pool.count(sequence.pages[(sequence.num_planned - 1) // setup.page_size]) == 1, (
                "a page that is written has one holder"
            )
        prefill = [self.sequences[segment.seq] for segment in plan.segments]
        assert [s.order for s in prefill] == sorted(s.order for s in prefill)
        for segment in plan.segments:
            sequence = self.sequences[segment.seq]
            assert sequence.lane == segment.lane
            assert not segment.prompt_logits or sequence.num_prompt_rows < min(
                segment.start + len(segment.tokens), sequence.num_prompt - 1
            ), "rows that were handed out already"
            first, last = segment.start // setup.page_size, (segment.start + len(segment.tokens) - 1) // setup.page_size
            for page in sequence.pages[first : last + 1]:
                assert self.pool.count(page) == 1, "a page that is written has one holder"
            if segment.sample:
                self.decoding.add(segment.seq)

    def check_starts(self, plan: StepPlan) -> None:
        started = [self.sequences[start.seq] for start in plan.starts]
        assert not (started and self.scheduler.preempted)
        assert [s.order for s in started] == sorted(s.order for s in started)
        waiting = sorted(self.waiting(), key=lambda sequence: sequence.order)
        if started and waiting:
            assert started[-1].order < waiting[0].order, "somebody was overtaken"
        segments = {segment.seq: segment for segment in plan.segments}
        for start, sequence in zip(plan.starts, started, strict=True):
            first = segments[start.seq]
            assert list(first.pages) == sequence.pages and [*start.prompt, *start.output] == sequence.tokens
            assert start.replays == tuple(rows for rows in (sequence.kept, sequence.request.replay) if rows is not None)
            if start.seq in self.own:
                assert self.rank.plans(sequence.pages, first.start) == self.own[start.seq][: first.start], "another's pages"
            if start.seq not in self.started:
                assert sequence.num_cached == first.start < sequence.num_prompt
            if not self.setup.radix or sequence.wants_prompt_rows:
                assert first.start == 0
        self.started |= {start.seq for start in plan.starts}
        room = self.setup.token_budget - plan.num_tokens
        if waiting and room and not self.scheduler.preempted and self.scheduler.num_running < self.setup.max_running:
            margin = self.pages_for(self.setup.growth_tokens) * (self.scheduler.num_running + 1)
            needed = self.pages_for(len(waiting[0].tokens)) + margin
            assert self.scheduler.num_running and self.num_available() < needed, "it could have started"

    def num_available(self) -> int:
        held = {page for sequence in self.sequences.values() if sequence.lane is not None for page in sequence.pages}
        return self.setup.num_pages - len(held)

    def check_counts(self) -> None:
        running = [sequence for sequence in self.sequences.values() if sequence.lane is not None]
        live = [sequence for sequence in self.sequences.values() if sequence.finish_reason is None]
        assert self.scheduler.num_running == len(running) <= self.setup.max_running
        assert self.scheduler.num_waiting == len(live) - len(running)
        assert self.scheduler.has_work == bool(live or self.in_flight)
        assert len({sequence.lane for sequence in running}) == len(running)
        cached = self.radix.num_cached_pages if self.radix else 0
        evictable = self.radix.num_evictable if self.radix else 0
        counts = sum(self.pool.count(page) for page in range(self.setup.num_pages))
        assert counts == cached + sum(len(sequence.pages) for sequence in running)
        assert self.pool.num_free + evictable == self.num_available()
        assert abs(self.scheduler.usage - (1 - self.num_available() / self.setup.num_pages)) < 1e-9

    def check_end(self, sequence: Sequence) -> None:
        """Called before the next plan: the pages are still to be read."""
        assert sequence.lane is None
        self.decoding.discard(sequence.number)
        tokens = sequence.tokens[: sequence.num_computed]
        if sequence.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            assert tokens == (sequence.tokens[:-1] if self.outputs[sequence.number] else sequence.tokens)
            self.rank.check_memory(sequence.request, tokens, sequence.pages)

    def check_finished(self) -> None:
        """Every answer is the oracle's, and nothing is left behind."""
        room = self.setup.num_pages * self.setup.page_size
        for number, sequence in self.sequences.items():
            answer = run_alone(sequence.request, sequence.seed, self.setup.max_context, room)
            output = self.outputs[number]
            assert sequence.tokens == [*sequence.request.prompt_token_ids, *output]
            if sequence.finish_reason is FinishReason.ABORT:
                assert output == answer.output[: len(output)]
            else:
                assert (output, sequence.finish_reason, sequence.stop_reason) == (answer.output, answer.reason, answer.stop_reason)
                self.check_prompt_rows(sequence)
        assert not self.scheduler.has_work and not self.scheduler.num_running and not self.scheduler.num_waiting
        cached = self.radix.num_cached_pages if self.radix else 0
        assert self.pool.num_free + cached == self.setup.num_pages
        if self.radix:
            assert self.radix.evict(self.setup.num_pages) == cached
        assert self.pool.num_free == self.setup.num_pages

    def check_prompt_rows(self, sequence: Sequence) -> None:
        prompt = list(sequence.request.prompt_token_ids)
        prints = fingerprints(sequence.request, prompt)
        rows = [{token: Logprob(float(before), 1)} for token, before in zip(prompt[1:], prints, strict=False)]
        wanted = sequence.request.sampling.prompt_logprobs is not None and sequence.finish_reason is not FinishReason.ERROR
        if wanted or self.prompt_rows[sequence.number]:
            got = self.prompt_rows[sequence.number]
            assert got == (rows if wanted else rows[: len(got)])
