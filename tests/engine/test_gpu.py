"""The engine on a real GPU: the bundled checkpoint's answers, with and without graphs, and deterministic.

The oracle of accuracy is the number of right answers on the CPU, on the same questions: 49 of 50 or more. Both ways to run a step
call the same kernels with the same padded rows, so tokens must be equal.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import torch

from pointsman import LLM, RequestOutput, SamplingParams
from pointsman.bench.accuracy import ARITHMETIC, held_out

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
PROBLEMS = held_out(ARITHMETIC, 50, 0)
DRAWN = SamplingParams(temperature=1.0, top_p=0.95, seed=3, max_tokens=48, logprobs=0, return_routed_experts=True, ignore_eos=True)


def answers(params: SamplingParams, **config: Any) -> list[RequestOutput]:
    with contextlib.closing(LLM(device="cuda", progress=False, **config)) as llm:
        return llm.generate([llm.render(problem.messages) for problem in PROBLEMS], params)


@pytest.fixture(scope="module")
def greedy() -> list[RequestOutput]:
    return answers(SamplingParams(temperature=0.0, max_tokens=512, return_routed_experts=True))


def test_answers_are_as_right_as_on_a_cpu(greedy: list[RequestOutput]) -> None:
    right = [ARITHMETIC.check(problem, result.outputs[0].text) == "right" for problem, result in zip(PROBLEMS, greedy, strict=True)]
    assert sum(right) >= 49


@pytest.mark.parametrize("config", [{"disable_cuda_graph": True}, {"disable_overlap_schedule": True}, {"cuda_graph_max_bs": 8}])
def test_graphs_and_overlap_change_nothing(greedy: list[RequestOutput], config: dict[str, Any]) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=512, return_routed_experts=True)
    for mine, theirs in zip(answers(params, **config), greedy, strict=True):
        assert mine.outputs[0].token_ids == theirs.outputs[0].token_ids


def test_deterministic_answers_are_the_same_bits_alone_and_together() -> None:
    together = answers(DRAWN, enable_deterministic_inference=True)
    with contextlib.closing(LLM(device="cuda", progress=False, enable_deterministic_inference=True, disable_radix_cache=True)) as llm:
        for problem, theirs in zip(PROBLEMS[:4], together, strict=False):
            (mine,) = llm.generate([llm.render(problem.messages)], DRAWN)
            one, other = mine.outputs[0], theirs.outputs[0]
            assert (one.token_ids, one.logprobs) == (other.token_ids, other.logprobs)
            assert np.array_equal(one.routed_experts, other.routed_experts)


def test_a_replay_of_its_own_record_agrees_wholly(greedy: list[RequestOutput]) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=64, return_routed_experts=True)
    with contextlib.closing(LLM(device="cuda", progress=False)) as llm:
        first = llm.generate(greedy[0].prompt_token_ids, params)[0].outputs[0]
        llm.engine.flush_cache()
        again = llm.generate(greedy[0].prompt_token_ids, params, replay_routed_experts=first.routed_experts)[0].outputs[0]
    assert again.token_ids == first.token_ids and again.routing_agreement == 1.0
    assert np.array_equal(again.routed_experts, first.routed_experts)
