"""Routing rows and their counts, as the engine hands them out: from a start, of aborted choices, and summed over all steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pointsman import LLM, FinishReason, SamplingParams
from pointsman.engine.engine import Engine
from pointsman.request import ChoiceDelta, Request

PROMPT = tuple(range(40, 70))
GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, return_routed_experts=True)
LAYERS, TOP_K, EXPERTS = 3, 3, 10


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    model = LLM(str(folder), load_format="dummy", progress=False, cpu_step="torch", dtype="float32", page_size=4)
    yield model
    model.close()


@pytest.fixture(scope="module")
def whole(llm: LLM) -> np.ndarray:
    return np.asarray(llm.generate(list(PROMPT), GREEDY)[0].outputs[0].routed_experts)


def test_rows_before_the_start_are_left_out(llm: LLM, whole: np.ndarray) -> None:
    assert whole.shape == (len(PROMPT) + 19, LAYERS, TOP_K)
    for start in (0, 1, 29, 30):
        params = GREEDY.replace(routed_experts_start=start)
        assert np.array_equal(llm.generate(list(PROMPT), params)[0].outputs[0].routed_experts, whole[start:])


def test_a_start_behind_the_prompt_is_refused(llm: LLM) -> None:
    with pytest.raises(ValueError, match="routed_experts_start is 31; it must be at most 30"):
        llm.generate(list(PROMPT), GREEDY.replace(routed_experts_start=31))
    with pytest.raises(ValueError, match="needs return_routed_experts"):
        SamplingParams(routed_experts_start=1)
    with pytest.raises(ValueError, match="routed_experts_start is -1"):
        SamplingParams(routed_experts_start=-1, return_routed_experts=True)


@pytest.mark.parametrize("start", [0, 30])
def test_nothing_generated_has_the_rows_of_all_but_the_last(llm: LLM, whole: np.ndarray, start: int) -> None:
    """Its last token is fed, but so it is when something is generated, and a record does not depend on that."""
    params = GREEDY.replace(max_tokens=0, routed_experts_start=start)
    assert np.array_equal(llm.generate(list(PROMPT), params)[0].outputs[0].routed_experts, whole[start:29])


def aborted(engine: Engine, rid: str) -> ChoiceDelta:
    (delta,) = engine.abort(rid)
    assert delta.finish_reason is FinishReason.ABORT
    return delta


@pytest.mark.parametrize("disable_overlap_schedule", [False, True])
def test_an_aborted_choice_has_the_rows_that_were_computed(folder: Path, whole: np.ndarray, disable_overlap_schedule: bool) -> None:
    llm = LLM(
        str(folder),
        load_format="dummy",
        progress=False,
        cpu_step="torch",
        dtype="float32",
        chunked_prefill_size=8,
        disable_radix_cache=True,
        disable_overlap_schedule=disable_overlap_schedule,
    )
    engine = llm.engine
    for steps in range(12):
        rid = f"after {steps}"
        engine.add(Request(rid=rid, prompt_token_ids=PROMPT, sampling=GREEDY.replace(routed_experts_start=5)))
        num_tokens = len(PROMPT)
        for _ in range(steps):
            num_tokens += sum(len(delta.token_ids) for delta in engine.step())
        delta = aborted(engine, rid)
        assert delta.routed_experts.shape == (num_tokens - 1 - 5, LAYERS, TOP_K)
        known = min(max(8 * steps - 5, 0), num_tokens - 6)
        assert delta.routed_experts_missing == (((known, num_tokens - 6),) if known < num_tokens - 6 else ())
        assert np.array_equal(delta.routed_experts[:known], whole[5 : 5 + known])
        while engine.has_work:
            engine.step()
    llm.close()


@pytest.mark.parametrize("disable_overlap_schedule", [False, True])
def test_every_row_of_every_step_is_counted(folder: Path, disable_overlap_schedule: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle looks at each step's rows right after it. The cache is too small, so that pages change hands all the time."""
    llm = LLM(
        str(folder),
        load_format="dummy",
        progress=False,
        cpu_step="torch",
        page_size=4,
        max_total_tokens=150,
        disable_overlap_schedule=disable_overlap_schedule,
    )
    engine, load = llm.engine, llm.engine._runner.load
    expected = np.zeros((LAYERS, EXPERTS), np.int64)
    note = load.after_step

    def after_step(slots_T: np.ndarray) -> None:
        for row in engine._runner._routes.gather(slots_T.tolist()).numpy():
            for layer, ids in enumerate(row):
                expected[layer, ids] += 1
        note(slots_T)

    monkeypatch.setattr(load, "after_step", after_step)
    random = np.random.default_rng(3)
    prompts = [random.integers(0, 256, int(random.integers(1, 20))).tolist() for _ in range(12)]
    llm.generate(prompts, [SamplingParams(max_tokens=int(random.integers(20, 130)), seed=seed, ignore_eos=True) for seed in range(12)])
    while engine.has_work:
        engine.step()
    stats = engine.stats()
    assert engine.num_preemptions and stats.num_preemptions == engine.num_preemptions
    assert np.array_equal(stats.expert_load, expected)
    assert (stats.num_running, stats.num_waiting, stats.cache_usage) == (0, 0, 0.0)
    llm.close()
