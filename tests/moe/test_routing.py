"""Routing against the published formulas, with ties to the lower expert id on every path."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.minimax_m2.configuration_minimax_m2 import MiniMaxM2Config
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2TopKRouter

from pointsman.moe.routing import Routing, RoutingSpec, route

MINIMAX = RoutingSpec(num_experts=64, top_k=8, score="sigmoid")
QWEN3 = RoutingSpec(num_experts=64, top_k=8, score="softmax")
DEEPSEEK = RoutingSpec(num_experts=64, top_k=8, score="sigmoid", scale=2.5, num_groups=8, top_groups=4)
T = 37


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def dense(routing: Routing) -> Tensor:
    return torch.zeros(len(routing.ids_TK), 64).scatter(1, routing.ids_TK, routing.weights_TK)


def brute_force(logits_TE: Tensor, spec: RoutingSpec, bias_E: Tensor) -> list[list[int]]:
    """The choice with Python's sort: by score, then by id. A group's rank is a float32, as scores are: what rounds to the same is a tie."""
    chosen = []
    for scores in (logits_TE.sigmoid() if spec.score == "sigmoid" else logits_TE.softmax(-1)) + bias_E:
        values, size = scores.tolist(), spec.num_experts // spec.num_groups
        best_two = [sorted(values[g * size : (g + 1) * size])[-2:] for g in range(spec.num_groups)]
        rank = [float(np.float32(sum(two))) for two in best_two]
        groups = sorted(range(spec.num_groups), key=lambda g: (-rank[g], g))[: spec.top_groups]
        experts = [e for e in range(spec.num_experts) if e // size in groups]
        chosen.append(sorted(experts, key=lambda e: (-values[e], e))[: spec.top_k])
    return chosen


def test_minimax_is_their_router() -> None:
    x_TD, bias_E = normal(T, 32), normal(64, seed=2) * 0.2
    router = MiniMaxM2TopKRouter(MiniMaxM2Config(hidden_size=32, num_local_experts=64, num_experts_per_tok=8))
    router.weight.data = normal(64, 32, seed=1)
    with torch.no_grad():
        logits, weights, ids = router(x_TD, bias_E)
    got = route(logits, MINIMAX, bias_E=bias_E)
    torch.testing.assert_close(dense(got), dense(Routing(ids, weights)), atol=1e-7, rtol=1e-6)


def test_the_bias_chooses_and_never_weighs() -> None:
    logits_TE, bias_E = normal(T, 64), torch.zeros(64)
    bias_E[[3, 60]] = 10
    got = route(logits_TE, MINIMAX, bias_E=bias_E)
    assert bool((got.ids_TK[:, :2].sort(-1).values == torch.tensor([3, 60])).all())
    scores = logits_TE.sigmoid().gather(1, got.ids_TK)
    torch.testing.assert_close(got.weights_TK, scores / scores.sum(-1, keepdim=True))


def test_qwen3_is_softmax_renormalized() -> None:
    logits_TE = normal(T, 64)
    weights, ids = logits_TE.softmax(-1).topk(8, -1)
    got = route(logits_TE, QWEN3)
    torch.testing.assert_close(dense(got), dense(Routing(ids, weights / weights.sum(-1, keepdim=True))))


@settings(deadline=None, max_examples=40)
@example(levels=3, shape=(12, 5, 3, 2), score="softmax", seed=442)  # two groups' ranks differ by less than float32 tells
@given(
    levels=st.integers(1, 5),
    shape=st.sampled_from([(64, 8, 1, 1), (64, 8, 8, 4), (12, 5, 3, 2), (6, 6, 1, 1), (5, 1, 5, 1), (300, 3, 1, 1)]),
    score=st.sampled_from(["sigmoid", "softmax"]),
    seed=st.integers(0, 999),
)
def test_ties_go_to_the_lower_expert(levels: int, shape: tuple[int, int, int, int], score: str, seed: int) -> None:
    num_experts, top_k, num_groups, top_groups = shape
    spec = RoutingSpec(num_experts=num_experts, top_k=top_k, score=score, num_groups=num_groups, top_groups=top_groups)
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randint(levels, (9, num_experts), generator=generator).float()
    bias_E = torch.randint(2, (num_experts,), generator=generator) * 0.25
    assert route(logits_TE, spec, bias_E=bias_E).ids_TK.tolist() == brute_force(logits_TE, spec, bias_E)


def test_equal_scores_of_saturated_logits_are_ties_too() -> None:
    logits_TE = torch.full((2, 64), 40.0)  # sigmoid is 1 exactly
    assert route(logits_TE, MINIMAX).ids_TK.tolist() == [list(range(8))] * 2


def test_deepseek_weights_are_scaled() -> None:
    got = route(normal(T, 64), DEEPSEEK, bias_E=normal(64, seed=1))
    torch.testing.assert_close(got.weights_TK.sum(-1), torch.full((T,), 2.5))


@pytest.mark.parametrize("spec", [MINIMAX, QWEN3, DEEPSEEK])
def test_given_ids_are_weighed_live(spec: RoutingSpec) -> None:
    logits_TE, bias_E = normal(T, 64), normal(64, seed=1) * 0.1
    free = route(logits_TE, spec, bias_E=bias_E)
    again = route(logits_TE, spec, ids_TK=free.ids_TK)
    assert torch.equal(again.ids_TK, free.ids_TK) and torch.equal(again.weights_TK, free.weights_TK)
    flipped = route(logits_TE, spec, ids_TK=free.ids_TK.flip(-1))
    torch.testing.assert_close(flipped.weights_TK.flip(-1), free.weights_TK)


def test_half_precision_logits_are_scored_in_float32() -> None:
    got = route(normal(T, 64).bfloat16(), MINIMAX)
    assert got.weights_TK.dtype == torch.float32 and got.ids_TK.dtype == torch.int64


@pytest.mark.parametrize(
    "values", [{"top_k": 0}, {"top_k": 65}, {"num_groups": 7}, {"num_groups": 8, "top_groups": 9}, {"num_groups": 64, "top_groups": 4}]
)
def test_impossible_routings_are_refused(values: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        RoutingSpec(**({"num_experts": 64, "top_k": 8, "score": "sigmoid"} | values))
