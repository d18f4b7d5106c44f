"""The engine: plan, execute, commit, deliver.

`step` runs those four for one step. In the plain order each waits for the one before. Overlapped, the next step is planned and
handed over before the result of this one is asked for: the same calls in another order, so both give the same tokens.

A request with a grammar first waits until that is compiled (`waiting_room`), and is then one like any other.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Collection
from typing import Any

from pointsman.config import EngineConfig
from pointsman.engine.assembly import OnLost, assemble
from pointsman.engine.choice import Choice
from pointsman.engine.executor import Pending
from pointsman.engine.rows import RoutingRows
from pointsman.engine.waiting_room import WaitingRoom
from pointsman.engine.weights import Fresh
from pointsman.grammar import Grammar
from pointsman.moe.runner import reason_against_replay
from pointsman.replay import check_sizes
from pointsman.request import ChoiceDelta, EngineStats, FinishReason, MemoryTag, QueueFull, Request
from pointsman.scheduler import Advance, Sequence
from pointsman.step import StepPlan

log = logging.getLogger(__name__)

# Where nothing but grammars is waited for, messages and aborts are looked after so often.
ROOM_SECONDS = 0.005


class Engine:
    """One model, on one rank or several; not thread-safe, one caller drives it.

    Args:
        on_lost: called in another thread when a rank is lost, while loading too, with the error that whoever waits for it gets.

    Attributes:
        folder: where the checkpoint is.
        tokenizer: None where the checkpoint's folder has none; then prompts are token ids and answers have no text.
        chat_template: None where the checkpoint has none.
        context_length: most tokens of prompt and answer.
        model_name: what the API calls it.
        generation_defaults: sampling values the checkpoint advises.
        choices: flag name to what "auto" became.
        num_preemptions: how often a running sequence had to give its pages to others.
        num_steps: steps whose results are in.
        weights: those in force, and what makes others.
        paused: no step runs; requests wait, wherever they are (`control`).
    """

    def __init__(self, config: EngineConfig, *, progress: bool | None = None, on_lost: OnLost | None = None) -> None:
        assembled = assemble(config, progress=progress, on_lost=on_lost)
        parts = assembled.parts
        self.config = config
        self.folder = parts.folder
        self.architecture = parts.architecture
        self.tokenizer = parts.tokenizer
        self.chat_template = parts.chat_template
        self.context_length = parts.context_length
        self.model_name = parts.model_name
        self.generation_defaults = parts.generation_defaults
        self.choices = parts.choices
        self.scheduler = parts.scheduler
        self.cache_tokens = parts.cache.num_tokens
        self.weights = assembled.weights
        self.paused = False
        self._grammars = parts.grammars
        self._room = None if parts.grammars is None else WaitingRoom(parts.grammars)
        self._given_back: list[Grammar] = []
        self._runner = parts.runner
        self._rows = RoutingRows(parts.runner)
        self._no_replay = reason_against_replay(parts.moe_runner)
        self._overlap = not config.scheduler.disable_overlap_schedule
        self._executor = assembled.executor
        self._seeds = random.Random(config.model.random_seed)
        self._choices: dict[int, Choice] = {}
        self._live: dict[str, int] = {}
        self._in_flight: tuple[StepPlan, Pending] | None = None
        self._held: list[ChoiceDelta] = []
        self.num_preemptions = 0
        self.num_steps = 0

    @property
    def routing_sizes(self) -> dict[str, Any]:
        """What a replay must fit."""
        architecture = self.architecture
        return {"layers": architecture.expert_layers, "num_experts": architecture.num_experts, "top_k": architecture.top_k}

    @property
    def has_work(self) -> bool:
        waits = self._in_flight is not None or self.scheduler.has_work or bool(self._room)
        return bool(self._held) or (waits and not self.halted)

    @property
    def halted(self) -> bool:
        """No step runs, and requests wait: it is paused, or is without some of its memory."""
        return self.paused or not self._runner.has_step

    @property
    def num_waiting(self) -> int:
        """Sequences that wait, for a lane or for their grammar."""
        return self.scheduler.num_waiting + len(self._room or ())

    @property
    def weight_version(self) -> str:
        """What the weights in force are called."""
        return self._runner.versions.current

    @property
    def step_name(self) -> str:
        """What computes a step just now: `torch` or `compiled`; `none` while memory is released that a step needs."""
        return self._runner.step_name

    @property
    def step_is_final(self) -> bool:
        """Whether that will stay so; it does not while the compiled step is still being made."""
        return self._runner.step_is_final

    def add(self, request: Request) -> None:
        """Queue a request. Raises ValueError if it can never run here, or if its name is taken; QueueFull if it may be taken later.

        Whether its grammar can be used is known later: if not, its choices end with the reason, `refused`.
        """
        self._check(request)
        sampling = request.sampling
        first = self._seeds.getrandbits(63) if sampling.seed is None else sampling.seed
        seeds = tuple((first + index) % 2**64 for index in range(sampling.n))
        if sampling.grammar is None:
            self._schedule(request, seeds)
        else:
            assert self._room is not None
            self._room.enter(request, seeds)
        self._live[request.rid] = sampling.n

    def _schedule(self, request: Request, seeds: tuple[int, ...]) -> None:
        for sequence in self.scheduler.add(request, seeds):
            self._choices[sequence.number] = Choice(request, self.tokenizer)

    def _check(self, request: Request) -> None:
        if request.rid in self._live:
            raise ValueError(f"rid {request.rid!r} is already in use by a running request")
        vocab = self.architecture.vocab_size
        if request.replay is not None:
            if self._no_replay is not None:
                raise ValueError(f"experts are given, but {self._no_replay}")
            check_sizes(request.replay, **self.routing_sizes)
        ids = (*request.prompt_token_ids, *request.sampling.stop_token_ids, *request.sampling.logit_bias)
        if (highest := max(ids)) >= vocab or min(ids) < 0:
            wrong = highest if highest >= vocab else min(ids)
            raise ValueError(f"token id {wrong} is not in the vocabulary; ids go from 0 to {vocab - 1}")
        if request.sampling.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and this checkpoint has none; use stop_token_ids")
        if request.sampling.grammar is not None and self._room is None:
            raise ValueError("a grammar needs a tokenizer and an end-of-text token, and this checkpoint does not have both")
        waiting = self.num_waiting
        if waiting >= self.config.scheduler.max_queued_requests:
            raise QueueFull(f"{waiting} requests are waiting already, the most that --max-queued-requests allows")

    def abort(self, rid: str) -> list[ChoiceDelta]:
        """End every choice of a request, wherever it is; an unknown name is no error."""
        if self._room is not None and (request := self._room.leave(rid)) is not None:
            return self._turned_away(request, FinishReason.ABORT)
        held = [delta for delta in self._held if delta.rid == rid]
        self._held = [delta for delta in self._held if delta.rid != rid]
        ended = [self._finished(sequence) for sequence in self.scheduler.abort(rid)]
        self._rows.settle()
        return held + ended

    def flush_cache(self) -> None:
        """Forget cached prefixes; what runs goes on."""
        self.scheduler.reset_cache()

    def step(self) -> list[ChoiceDelta]:
        """Run one step and return what it added; an empty list where no choice grew. Raises what the model raises."""
        held, self._held = self._held, []
        if self.halted:
            return held
        refused = held + (self._call_room() if self._room else [])
        given_back, self._given_back = self._given_back, []
        now, self._in_flight = self._in_flight or self._submit(self.scheduler.plan()), None
        if now is None:
            self._release(given_back)
            return refused
        plan, pending = now
        self._in_flight = self._submit(self.scheduler.plan()) if self._overlap else None
        result = pending.result()
        self._release(given_back)
        self.num_steps += 1
        return refused + self._deliver(self.scheduler.commit(plan, result))

    def _call_room(self) -> list[ChoiceDelta]:
        """Schedule those whose grammars are ready, and return the ends of those who cannot be scheduled."""
        assert self._room is not None
        idle = self._in_flight is None and not self.scheduler.has_work
        ready, refused = self._room.call(ROOM_SECONDS if idle else 0.0)
        for request, seeds in ready:
            try:
                self._schedule(request, seeds)
            except ValueError as error:
                assert request.sampling.grammar is not None
                self._given_back.append(request.sampling.grammar)
                refused.append((request, str(error)))
        return [delta for request, reason in refused for delta in self._turned_away(request, FinishReason.ERROR, reason)]

    def _turned_away(self, request: Request, reason: FinishReason, error: str | None = None) -> list[ChoiceDelta]:
        """The ends of a request that was never scheduled."""
        del self._live[request.rid]
        return [
            ChoiceDelta(
                rid=request.rid,
                index=index,
                num_prompt_tokens=len(request.prompt_token_ids),
                finish_reason=reason,
                weight_version=self.weight_version,
                error=error,
                refused=error is not None,
            )
            for index in range(request.sampling.n)
        ]

    def _release(self, grammars: list[Grammar]) -> None:
        """Give back grammars of requests that ended before the step whose result is in was planned: no step needs them now."""
        for grammar in grammars:
            assert self._grammars is not None
            self._grammars.release(grammar)

    def _submit(self, plan: StepPlan | None) -> tuple[StepPlan, Pending] | None:
        if plan is None:
            return None
        if self.scheduler.preempted:
            self._keep_rows(self.scheduler.preempted)
        return plan, self._executor.submit(plan)

    def _keep_rows(self, preempted: list[Sequence]) -> None:
        """Read the routing of who was preempted, while its pages are still its own: it computes anew under the same experts.

        Under a runner that takes none it routes anew, and the record is what it then used.
        """
        self.num_preemptions += len(preempted)
        self._runner.load.settle()
        if self._no_replay is not None:
            return
        for sequence in preempted:
            self._rows.keep(sequence)

    def _deliver(self, advances: list[Advance]) -> list[ChoiceDelta]:
        deltas, choices, version = [], self._choices, self.weight_version
        for advance in advances:
            sequence = advance.sequence
            choice = choices[sequence.number]
            if advance.prompt_logprobs:
                choice.prompt_logprobs.extend(choice.decoded(entry) for entry in advance.prompt_logprobs)
            if advance.token is None and advance.finish_reason is None:
                continue
            delta = _blank(sequence, version)
            matched = choice.take(advance, delta)
            if matched is not None:
                self._stop(sequence, matched)
            if sequence.finish_reason is not None:
                self._close(sequence, delta)
                delta.error = advance.error
            deltas.append(delta)
        self._rows.settle()
        return deltas

    def _stop(self, sequence: Sequence, matched: str) -> None:
        """A stop string ends it, be it that the same token has ended it in another way."""
        if sequence.finish_reason is None:
            self.scheduler.finish(sequence, FinishReason.STOP, matched)
        else:
            sequence.finish_reason, sequence.stop_reason = FinishReason.STOP, matched

    def _finished(self, sequence: Sequence) -> ChoiceDelta:
        delta = _blank(sequence, self.weight_version)
        self._close(sequence, delta)
        return delta

    def _close(self, sequence: Sequence, delta: ChoiceDelta) -> None:
        """Fill in the last delta of a choice. The routing rows are read, and have come, before the next plan can give its pages away."""
        delta.finish_reason, delta.stop_reason = sequence.finish_reason, sequence.stop_reason
        self._runner.load.settle()
        if delta.finish_reason is not FinishReason.ERROR:
            self._rows.give(sequence, delta)
        del self._choices[sequence.number]
        self._live[sequence.request.rid] -= 1
        if not self._live[sequence.request.rid]:
            del self._live[sequence.request.rid]
            if (grammar := sequence.request.sampling.grammar) is not None:
                self._given_back.append(grammar)

    def settle(self) -> None:
        """Take in the step in flight, so that none is. What it added is handed out by the next `step`."""
        if self._in_flight is not None:
            plan, pending = self._in_flight
            result = pending.result()
            self._in_flight = None
            self.num_steps += 1
            self._held += self._deliver(self.scheduler.commit(plan, result))

    def abort_all(self) -> None:
        """End every request. The next `step` hands out the ends."""
        for rid in list(self._live):
            ended = self.abort(rid)  # which takes some of those held
            self._held += ended

    def retract(self) -> None:
        """Send every running sequence back to the queue, as a preemption does."""
        self.settle()
        self.scheduler.retract()
        self._keep_rows(self.scheduler.preempted)

    def install(self, fresh: Fresh) -> None:
        """Put new weights in force, between two steps. What runs goes on with them from its next token."""
        self.settle()
        version = self.weight_version if fresh.same else fresh.update.weight_version or self._next_version()
        self.weights.enter(fresh, version)
        self._runner.enter(fresh.step, None if fresh.same else version)
        if fresh.same:
            return
        for sequence in self.scheduler.sequences:
            if sequence.kept is not None:
                sequence.tainted, sequence.cacheable = True, False
        if fresh.update.flush_cache:
            self.flush_cache()

    def release(self, tags: Collection[MemoryTag]) -> None:
        """Free memory between two steps, when no sequence runs. Raises ValueError where one does."""
        self.settle()
        if running := self.scheduler.num_running:
            raise ValueError(f"{running} sequences are running or kept; pause with mode 'abort' or 'retract', or wait for their end")
        if "kv_cache" in tags:
            self.flush_cache()
        self._runner.drop_step()
        self.weights.release(tags)

    def _next_version(self) -> str:
        current = self.weight_version
        return str(int(current) + 1 if current.isdecimal() and current.isascii() else self._runner.versions.number + 1)

    def stats(self) -> EngineStats:
        """What it is doing. Counts the rows that are not counted yet, so not for every step."""
        return EngineStats(
            num_running=self.scheduler.num_running,
            num_waiting=self.num_waiting,
            cache_usage=self.scheduler.usage,
            num_preemptions=self.num_preemptions,
            num_steps=self.num_steps,
            expert_load=self._runner.load.counts_LE(),
        )

    def close(self) -> None:
        """Wait for the step in flight and end the threads and processes."""
        self._executor.close()
        if self._grammars is not None:
            self._grammars.close()


def _blank(sequence: Sequence, version: str) -> ChoiceDelta:
    return ChoiceDelta(
        rid=sequence.request.rid,
        index=sequence.index,
        num_prompt_tokens=sequence.num_prompt,
        num_cached_tokens=sequence.num_cached,
        weight_version=version,
    )
