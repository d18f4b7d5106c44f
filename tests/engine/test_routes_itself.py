"""A runner that chooses experts itself: its choices are recorded as any others, across a preemption too, and nobody can give it experts."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import pytest
from torch import Tensor

from pointsman import LLM, SamplingParams
from pointsman.kernels import reference
from pointsman.models import backends
from pointsman.moe.candidates import ROUTED_ALIKE
from pointsman.moe.cpu import CpuRunner
from pointsman.moe.router import RouterInput
from pointsman.moe.routing import RoutingSpec, route
from pointsman.moe.runner import RUNNERS, reason_against_replay
from pointsman.moe.weights import ExpertWeights

PROMPTS = [list(range(20, 30)), list(range(60, 68)), list(range(100, 112))]
PARAMS = SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True, return_routed_experts=True)


class Itself(CpuRunner):
    """The CPU runner, with the choice inside."""

    name: ClassVar[str] = "flashinfer_trtllm"
    routes_itself: ClassVar[Literal[True]] = True  # type: ignore[assignment]
    replays: ClassVar[bool] = False

    def __call__(self, rows: RouterInput, spec: RoutingSpec, weights: ExpertWeights) -> Tensor:  # type: ignore[override]
        routing = route(reference.router_logits(rows.x_TD, rows.gate_ED), spec, bias_E=rows.bias_E)
        assert rows.given_TK is None and rows.routes is not None
        rows.routes.record(rows.layer, rows.slots_T, routing.ids_TK)
        return super().__call__(rows.x_TD, routing, weights)


def answers(**config: object) -> tuple[list[list[int]], list[np.ndarray], int]:
    llm = LLM(progress=False, cpu_step="torch", disable_radix_cache=True, page_size=4, **config)
    try:
        outputs = [answer.outputs[0] for answer in llm.generate(PROMPTS, PARAMS)]
        return [one.token_ids for one in outputs], [one.routed_experts for one in outputs], llm._engine.num_preemptions
    finally:
        llm.close()


@pytest.fixture
def itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "make_runner", lambda name, **options: Itself())


def test_it_records_what_a_router_would_have_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, rows, _ = answers(moe_runner_backend="cpu")
    monkeypatch.setattr(backends, "make_runner", lambda name, **options: Itself())
    # room for a sequence and a half: others lose their pages, and are computed anew
    got_tokens, got_rows, num_preemptions = answers(max_total_tokens=96)
    assert num_preemptions > 0
    assert got_tokens == tokens
    for got, want in zip(got_rows, rows, strict=True):
        assert got.shape == want.shape
        # prefill sums a prompt in another order than decode, which may tip a choice between equals
        assert (np.sort(got, -1) == np.sort(want, -1)).mean() > 0.99


def test_experts_cannot_be_given(itself: None) -> None:
    llm = LLM(progress=False, cpu_step="torch")
    try:
        rows = np.zeros((4, 6, 4), np.uint8) + np.arange(4, dtype=np.uint8)
        with pytest.raises(ValueError, match=r"'flashinfer_trtllm' chooses experts inside its kernel; with .* flashinfer_trtllm_routed"):
            llm.generate(PROMPTS[0], PARAMS, replay_routed_experts=rows)
        assert len(llm.generate(PROMPTS[0], PARAMS)[0].outputs[0].token_ids) == 48
    finally:
        llm.close()


def test_each_of_them_names_one_that_takes_experts() -> None:
    assert reason_against_replay(CpuRunner()) is None
    for name, runner in RUNNERS.items():
        if runner.routes_itself and not runner.replays:
            assert not RUNNERS[ROUTED_ALIKE[name]].routes_itself
