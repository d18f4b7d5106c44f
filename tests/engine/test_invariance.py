"""A request's answer does not depend on what it shared the engine with, or on how the engine was set up to get there.

The oracle is each request run alone, in the plain order, without a prefix cache and in one chunk. The compiled step promises
more than the torch one: every number bit for bit. Torch picks its kernels by shape, so there the tokens must be equal and the
log-probabilities within 2e-3: a float32 sum in another order can tip the rounding of a bfloat16 key or value in the cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pointsman import LLM, RequestOutput, SamplingParams

STEPS = ["torch", "compiled"]


def workload() -> list[tuple[list[int], SamplingParams]]:
    """Prompts of many lengths, some with a common beginning, sampled in many ways."""
    rng = np.random.default_rng(0)
    shared = rng.integers(0, 256, 40).tolist()
    requests = []
    for index in range(14):
        own = rng.integers(0, 256, int(rng.integers(1, 60))).tolist()
        prompt = (shared[: int(rng.integers(1, 40))] if index % 2 else []) + own
        ways = [
            {"temperature": 0.0},
            {"temperature": 1.0},
            {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
            {"temperature": 1.2, "min_p": 0.02, "repetition_penalty": 1.3, "presence_penalty": 0.5},
        ]
        params = SamplingParams(
            max_tokens=int(rng.integers(30, 110)),
            seed=index,
            logprobs=2,
            return_routed_experts=True,
            **ways[index % len(ways)],
        )
        requests.append((prompt, params))
    return requests


def run(folder: Path, requests: list[tuple[list[int], SamplingParams]], **config: Any) -> tuple[list[RequestOutput], LLM]:
    llm = LLM(str(folder), load_format="dummy", progress=False, **config)
    try:
        return llm.generate([prompt for prompt, _ in requests], [params for _, params in requests]), llm
    finally:
        llm.close()


@pytest.fixture(scope="module", params=STEPS)
def step(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def alone(folder: Path, step: str) -> list[RequestOutput]:
    config = {"cpu_step": step, "disable_radix_cache": True, "disable_overlap_schedule": True, "chunked_prefill_size": 256}
    llm = LLM(str(folder), load_format="dummy", progress=False, **config)
    results = [llm.generate([prompt], params)[0] for prompt, params in workload()]
    llm.close()
    return results


SETUPS: dict[str, dict[str, Any]] = {
    "together": {},
    "plain order": {"disable_overlap_schedule": True},
    "without prefix cache": {"disable_radix_cache": True},
    "small chunks": {"chunked_prefill_size": 7},
    "one lane": {"max_running_requests": 1},
    "pages of one token": {"page_size": 1, "chunked_prefill_size": 33},
    "large pages": {"page_size": 64},
    "tiny cache": {"page_size": 4, "max_total_tokens": 208, "chunked_prefill_size": 48},
    "tiny cache, plain order": {"page_size": 4, "max_total_tokens": 208, "disable_overlap_schedule": True},
    "one thread": {"num_threads": 1},
}


@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS.keys())
def test_company_and_setup_change_nothing(folder: Path, step: str, alone: list[RequestOutput], setup: dict[str, Any]) -> None:
    together, llm = run(folder, workload(), cpu_step=step, **setup)
    for mine, theirs in zip(together, alone, strict=True):
        same(mine, theirs, exact=step == "compiled")
    if "max_total_tokens" in setup:
        assert llm.engine.num_preemptions > 0, "the cache was not small enough to force a preemption"


def test_a_second_run_finds_its_prefixes_and_answers_alike(folder: Path, step: str, alone: list[RequestOutput]) -> None:
    llm = LLM(str(folder), load_format="dummy", progress=False, cpu_step=step, page_size=4)
    requests = workload()
    for _ in range(2):
        results = llm.generate([prompt for prompt, _ in requests], [params for _, params in requests])
    llm.close()
    for mine, theirs in zip(results, alone, strict=True):
        assert mine.num_cached_tokens == (len(mine.prompt_token_ids) - 1) // 4 * 4
        same(mine, theirs, exact=step == "compiled")


def same(mine: RequestOutput, theirs: RequestOutput, *, exact: bool) -> None:
    ours, oracle = mine.outputs[0], theirs.outputs[0]
    assert ours.token_ids == oracle.token_ids
    assert (ours.finish_reason, ours.text) == (oracle.finish_reason, oracle.text)
    assert ours.logprobs is not None and oracle.logprobs is not None
    if exact:
        assert ours.logprobs == oracle.logprobs
        np.testing.assert_array_equal(ours.routed_experts, oracle.routed_experts)
    else:
        for one, other in zip(ours.logprobs, oracle.logprobs, strict=True):
            token = next(iter(one))
            assert one[token].logprob == pytest.approx(other[token].logprob, abs=2e-3)
    assert ours.routed_experts.shape == (len(mine.prompt_token_ids) + len(ours.token_ids) - 1, 3, 3)
