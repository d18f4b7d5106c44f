"""The runner that routes inside against the reference router and the reference runner: outputs, choice, record, padding.

In Triton's interpreter, whose programs run one after the other, the kernel's phases are launched one by one; on a GPU it is one launch.
Outputs and buffers are poisoned: torch fills what it hands out with NaN.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from pointsman.kernels.fused_experts import MOST_TOKENS
from pointsman.moe.capture import RouteStore
from pointsman.moe.fused import FusedRunner
from pointsman.moe.grouped import RoutedRunner
from pointsman.moe.router import ROUTERS, RouterInput
from pointsman.moe.routing import RoutingSpec
from tests.kernels.interpreter import correct
from tests.moe.test_grouped import (
    BOUND,
    DEVICE,
    NUM_EXPERTS,
    TOP_K,
    D,
    distance,
    experts,
    few_programs,
    normal,
    oracle,
    routing,
    wide,
)

__all__ = ["few_programs"]

correct()
LAYERS, SLOTS = 2, 24
SPECS = {
    "sigmoid": RoutingSpec(num_experts=NUM_EXPERTS, top_k=TOP_K, score="sigmoid"),
    "softmax": RoutingSpec(num_experts=NUM_EXPERTS, top_k=TOP_K, score="softmax", renormalize=False, scale=2.5),
}


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def rows(num_tokens: int, routes: RouteStore | None, *, biased: bool = True) -> RouterInput:
    """The last layer's rows, every third slot being padding where there are more than three."""
    slots_T = torch.arange(num_tokens, device=DEVICE) + 2
    if num_tokens > 3:
        slots_T[::3] = -1
    gate_ED, bias_E = normal(NUM_EXPERTS, D, seed=5).to(DEVICE), normal(NUM_EXPERTS, seed=6).to(DEVICE) / 4
    return RouterInput(normal(num_tokens, D).bfloat16().to(DEVICE), gate_ED, bias_E if biased else None, LAYERS - 1, slots_T, routes, None)


def store() -> RouteStore:
    routes = RouteStore(SLOTS, LAYERS, TOP_K, NUM_EXPERTS, DEVICE)
    routes.rows_SLK.fill_(255)
    return routes


@pytest.mark.parametrize("score", SPECS)
@pytest.mark.parametrize("num_tokens", [1, 3, 9, MOST_TOKENS, MOST_TOKENS + 1])
def test_it_routes_records_and_computes_as_the_reference(num_tokens: int, score: str) -> None:
    weights, spec, routes, want_routes = experts(True), SPECS[score], store(), store()
    runner = FusedRunner(few_tokens=MOST_TOKENS)
    mine = rows(num_tokens, routes, biased=score == "sigmoid")
    got_TD, chosen = runner.route_and_run(mine, spec, runner.prepare(weights, torch.bfloat16))
    live_T = mine.slots_T >= 0
    want = ROUTERS["reference"].run(rows(num_tokens, None, biased=score == "sigmoid"), spec)
    want_routes.record(LAYERS - 1, mine.slots_T[live_T], want.ids_TK[live_T])
    assert torch.equal(chosen.ids_TK[live_T].long(), want.ids_TK[live_T])
    torch.testing.assert_close(chosen.weights_TK[live_T], want.weights_TK[live_T], rtol=1e-5, atol=1e-6)
    assert (chosen.ids_TK[~live_T] == -1).all() and not chosen.weights_TK[~live_T].any() and not got_TD[~live_T].any()
    assert torch.equal(routes.rows_SLK, want_routes.rows_SLK)
    # of one token a single hidden number that the tensor cores' sums move to the next e4m3 shows
    bound = BOUND["routed"] if num_tokens > 1 or DEVICE.type == "cpu" else 1 / 32
    assert distance(got_TD, oracle(mine.x_TD, chosen, weights)) < bound
    again_TD, _ = runner.route_and_run(mine, spec, weights)
    assert torch.equal(got_TD, again_TD)


@pytest.mark.parametrize(("kind", "num_tokens"), [("uniform", 1), ("uniform", 7), ("skewed", 16), ("padding", 5)])
def test_experts_that_are_given_are_used_and_compared(kind: str, num_tokens: int) -> None:
    """All but the first row have theirs given, where there are several; the experts' products are those of `routed`, bit by bit."""
    weights, spec, routes, want_routes = experts(True), SPECS["sigmoid"], store(), store()
    given_TK = routing(kind, num_tokens).ids_TK.int()
    given_TK[: num_tokens - 1][:1] = -1
    mine = dataclasses.replace(rows(num_tokens, routes), given_TK=given_TK, layer=0)
    got_TD, chosen = FusedRunner(few_tokens=MOST_TOKENS).route_and_run(mine, spec, weights)
    want = ROUTERS["reference"].run(dataclasses.replace(mine, routes=want_routes), spec)
    live_T, forced_T = mine.slots_T >= 0, (given_TK >= 0).all(-1)
    assert torch.equal(chosen.ids_TK.long(), want.ids_TK) and bool((forced_T & live_T).any())
    torch.testing.assert_close(chosen.weights_TK, want.weights_TK, rtol=1e-5, atol=1e-6)
    assert torch.equal(routes.rows_SLK[mine.slots_T[live_T]], want_routes.rows_SLK[mine.slots_T[live_T]])
    compared_T = mine.slots_T[live_T & forced_T]
    assert torch.equal(routes.alike_S[compared_T], want_routes.alike_S[compared_T])
    assert torch.equal(got_TD, RoutedRunner(tiles=wide(quantize=True), deterministic=True)(mine.x_TD, chosen, weights))


def test_plain_weights_and_no_tokens_take_the_chain() -> None:
    weights, spec = experts(False), SPECS["sigmoid"]
    mine = rows(2, None)
    got_TD, chosen = FusedRunner(few_tokens=MOST_TOKENS).route_and_run(mine, spec, weights)
    assert distance(got_TD, oracle(mine.x_TD, chosen, weights)) < 0.0025
    none_TD, _ = FusedRunner(few_tokens=MOST_TOKENS).route_and_run(rows(0, None), spec, experts(True))
    assert none_TD.shape == (0, D)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="the interpreter has no CUDA graphs")
def test_a_graph_can_be_replayed() -> None:
    weights, spec = experts(True), SPECS["sigmoid"]
    runner, mine = FusedRunner(few_tokens=MOST_TOKENS), rows(4, None)
    want_TD, _ = runner.route_and_run(mine, spec, weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got_TD, _ = runner.route_and_run(mine, spec, weights)
        twice_TD, _ = runner.route_and_run(mine, spec, weights)
    for _ in range(3):
        got_TD.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(got_TD, want_TD) and torch.equal(twice_TD, want_TD)
