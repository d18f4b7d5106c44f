"""The step that is launched on a device, on a CPU in a device's place: the same calls, the same order, copies that copy at once.

The oracle is the torch step, which runs unpadded in the plain order. Where the device step does not pad either, every number must be
the same bits, whatever the engine does meanwhile. Where it pads, torch may pick other kernels for other shapes: the tokens must be equal
and log-probabilities within 2e-3, as in `test_invariance`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pointsman import LLM, RequestOutput, SamplingParams
from pointsman.engine import build
from pointsman.engine.batch import Batch
from pointsman.engine.device_step import pad, size_for, step_sizes
from tests.engine.test_invariance import run, same, workload

SETUPS: dict[str, dict[str, Any]] = {
    "overlapped": {},
    "plain order": {"disable_overlap_schedule": True},
    "small chunks": {"chunked_prefill_size": 7},
    "tiny cache": {"page_size": 4, "max_total_tokens": 160, "chunked_prefill_size": 48},
    "tiny cache, plain order": {"page_size": 4, "max_total_tokens": 160, "disable_overlap_schedule": True},
}


def mixed() -> list[tuple[list[int], SamplingParams]]:
    """As in `test_invariance`, and as many greedy requests that tell no log-probabilities: those are drawn on the device."""
    requests = [(prompt, params.replace(max_tokens=params.max_tokens // 3)) for prompt, params in workload()[:8]]  # type: ignore[operator]
    bare = [
        (prompt[::-1], SamplingParams(temperature=0.0, max_tokens=40, min_tokens=3 * (index % 2), return_routed_experts=True))
        for index, (prompt, _) in enumerate(requests)
    ]
    return [request for pair in zip(requests, bare, strict=True) for request in pair]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that stands in for a device."""
    monkeypatch.setattr(build, "launches_steps", lambda device: True)


@pytest.fixture
def unpadded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "step_sizes", lambda max_tokens: tuple(range(1, max_tokens + 1)))


def answers(folder: Path, **config: Any) -> tuple[list[RequestOutput], LLM]:
    return run(folder, mixed(), cpu_step="torch", **config)


@pytest.fixture(scope="module", params=SETUPS.values(), ids=SETUPS.keys())
def setup(request: pytest.FixtureRequest) -> dict[str, Any]:
    config: dict[str, Any] = request.param
    return config


@pytest.fixture(scope="module")
def torch_step(folder: Path, setup: dict[str, Any]) -> list[RequestOutput]:
    return answers(folder, **setup)[0]


def test_unpadded_it_is_the_torch_step_bit_by_bit(
    folder: Path, setup: dict[str, Any], torch_step: list[RequestOutput], device: None, unpadded: None
) -> None:
    mine, llm = answers(folder, **setup)
    assert llm.engine.step_name == "eager"
    compare(mine, torch_step, exact=True)
    if "max_total_tokens" in setup:
        assert llm.engine.num_preemptions > 0, "the cache was not small enough to force a preemption"


def test_padding_changes_no_token(folder: Path, setup: dict[str, Any], torch_step: list[RequestOutput], device: None) -> None:
    compare(answers(folder, **setup)[0], torch_step, exact=False)


def compare(mine: list[RequestOutput], theirs: list[RequestOutput], *, exact: bool) -> None:
    for one, other in zip(mine, theirs, strict=True):
        if one.outputs[0].logprobs is not None:
            same(one, other, exact=exact)
            continue
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        if exact:
            np.testing.assert_array_equal(one.outputs[0].routed_experts, other.outputs[0].routed_experts)
