"""Who has to make room for others computes anew under the experts that it had, so that its record is of one computation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pointsman.engine.engine import Engine
from pointsman.replay import keep, replay_of
from pointsman.request import ChoiceDelta, Replay, Request
from pointsman.scheduler import Sequence
from tests.engine.replays import ALONE, PARAMS, SIZES, alone, drive, model, rows, same, start

__all__ = ["alone", "model"]


def preempt(engine: Engine, replay: Replay | None = None) -> Sequence:
    """Fill a cache of 140 slots until someone has to make room; who did, waiting."""
    for index in range(3):
        prompt = tuple(range(50 * index, 50 * index + 10))
        engine.add(Request(rid=str(index), prompt_token_ids=prompt, sampling=PARAMS.replace(max_tokens=90), replay=replay))
    for _ in range(80):
        if not engine.num_preemptions:
            engine.step()
    assert engine.num_preemptions == 1 and engine.scheduler.num_waiting == 1
    [waiting] = engine.scheduler._requests["2"]
    assert waiting.lane is None and waiting.kept is not None
    assert waiting.kept.shape[0] == waiting.num_computed == len(waiting.tokens) - 1 > 20
    return waiting


def finish(engine: Engine) -> ChoiceDelta:
    while True:
        for delta in engine.step():
            if delta.rid == "2" and delta.finish_reason is not None:
                return delta


TINY: dict[str, Any] = {"page_size": 4, "max_total_tokens": 140, "disable_radix_cache": True}


@pytest.mark.parametrize("step", ["torch", "compiled"])
def test_who_was_preempted_recomputes_under_the_rows_that_it_had(model: Path, step: str) -> None:
    """While it waits, what is kept of it is set to other rows: what it computes anew, it computes under these."""
    llm = start(model, step, **TINY)
    waiting = preempt(llm.engine)
    other = rows(waiting.num_computed, 8)
    waiting.kept = keep(other)
    delta = finish(llm.engine)
    assert np.array_equal(delta.routed_experts[: len(other)], other)
    assert not delta.routed_experts_missing and delta.routing_agreement is None
    llm.close()


def test_a_router_that_changes_meanwhile_changes_no_row_that_was_used(model: Path) -> None:
    """Computed anew freely, its first rows would be others than those that its tokens came from."""
    untouched = start(model, "torch", dtype="float32", **ALONE)
    before = untouched.generate(list(range(100, 110)), PARAMS.replace(max_tokens=60))[0].outputs[0].routed_experts
    untouched.close()
    llm = start(model, "torch", dtype="float32", **TINY)
    num_kept = preempt(llm.engine).num_computed
    for layer in llm.engine._runner._step._decoder.parameters.layers:  # type: ignore[attr-defined]
        layer.gate_ED.copy_(torch.randn(layer.gate_ED.shape, generator=torch.Generator().manual_seed(1)))
    after = finish(llm.engine).routed_experts
    assert np.array_equal(after[:num_kept], before[:num_kept])
    assert not np.array_equal(after[num_kept : len(before)], before[num_kept:])
    llm.close()


@pytest.mark.parametrize("disable_radix_cache", [False, True])
@pytest.mark.parametrize("disable_overlap_schedule", [False, True])
def test_preempted_again_and_again(
    model: Path, alone: Engine, disable_overlap_schedule: bool, disable_radix_cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on its way back: the scheduler keeps nothing free for growth here, and computing again takes many steps of few tokens."""
    config = {"page_size": 4, "max_total_tokens": 140, "chunked_prefill_size": 8, "disable_radix_cache": disable_radix_cache}
    llm = start(model, **config, disable_overlap_schedule=disable_overlap_schedule)
    scheduler, seen = llm.engine.scheduler, []
    monkeypatch.setattr(scheduler, "_growth_pages", 0)
    keep_rows = llm.engine._rows.keep

    def note(sequence: Sequence) -> None:
        seen.append((sequence.num_preemptions, sequence.kept is not None and sequence.num_computed < sequence.kept.end))
        keep_rows(sequence)

    monkeypatch.setattr(llm.engine._rows, "keep", note)
    requests = [
        Request(
            rid=str(index),
            prompt_token_ids=tuple(range(20 * index, 20 * index + 12)),
            sampling=PARAMS.replace(max_tokens=70 + 9 * index, temperature=1.0, seed=index),
            replay=replay_of(rows(40 + index, index), **SIZES) if index % 2 else None,
        )
        for index in range(6)
    ]
    heard = drive(llm.engine, requests, {}, [0] * 6)
    for request in requests:
        same(heard[request.rid, 0], drive(alone, [request], {}, [0])[request.rid, 0], request)
    assert max(times for times, _ in seen) > 1 and any(under_way for _, under_way in seen)
    llm.close()


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("disable_overlap_schedule", [False, True])
def test_an_aborted_choice_that_had_to_make_room_has_its_rows(model: Path, disable_overlap_schedule: bool, replayed: bool) -> None:
    """While it waits, and at every step of its way back, of which it takes some, nine tokens a step."""
    alone = start(model, **ALONE)
    replay = replay_of(rows(60, 4), **SIZES) if replayed else None
    params = PARAMS.replace(max_tokens=90)
    whole = alone.generate(list(range(100, 110)), params, replay_routed_experts=replay)[0].outputs[0].routed_experts
    alone.close()
    llm = start(model, **TINY, disable_overlap_schedule=disable_overlap_schedule, chunked_prefill_size=9)
    engine, under_way = llm.engine, set()
    for steps in range(8):
        waiting = preempt(engine, replay)
        for rid in ("0", "1") if steps else ():
            engine.abort(rid)
        for _ in range(steps):
            engine.step()
        under_way.add(waiting.num_computed if waiting.lane is not None else -1)
        [delta] = engine.abort("2")
        assert len(delta.routed_experts) == len(waiting.tokens) - 1
        assert np.array_equal(delta.routed_experts, whole[: len(delta.routed_experts)])
        assert not delta.routed_experts_missing
        for rid in ("0", "1"):
            engine.abort(rid)
        while engine.has_work:
            engine.step()
        engine.num_preemptions = 0
    assert -1 in under_way and len(under_way) > 4, "it was never on its way back"
    llm.close()
