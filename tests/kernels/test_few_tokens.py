"""Routing of few tokens in one kernel against the kernels that do it one after the other, which are tested against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pointsman.kernels import few_tokens, reference
from pointsman.kernels.few_tokens import GateCut, route_few
from pointsman.kernels.routing import Choice, counters
from pointsman.moe.routing import RoutingSpec, route
from tests.kernels.interpreter import correct

correct()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYERS, SLOTS, D = 3, 40, 384


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def run(x_TD: Tensor, gate_ED: Tensor, slots_T: Tensor, spec: RoutingSpec, counter: Tensor, **options: Any) -> few_tokens.Few:
    chosen = {name: options.pop(name) for name in ("bias_E", "given_TK", "rows_CLK", "alike_C", "layer", "own") if name in options}
    score = {"softmax": spec.score == "softmax", "renormalize": spec.renormalize, "scale": spec.scale}
    return route_few(x_TD, gate_ED, slots_T, counter, Choice(top_k=spec.top_k, **score, **chosen), **options)


def blocks_of(few: few_tokens.Few) -> list[tuple[int, list[int]]]:
    """The expert of each block, and its pairs."""
    assert few.arrangement is not None
    pairs_P, expert_B, num_blocks = few.arrangement
    rows, num_pairs = pairs_P.view(-1, 16).tolist(), few.ids_TK.numel()
    assert all(pair == num_pairs or 0 <= pair < num_pairs for row in rows for pair in row), "nothing is left as memory was"
    return [(int(expert_B[b]), [pair for pair in rows[b] if pair < num_pairs]) for b in range(int(num_blocks))]


def pairs_by_expert(ids_TK: Tensor) -> list[tuple[int, list[int]]]:
    flat = ids_TK.flatten().tolist()
    return [(expert, [pair for pair, it in enumerate(flat) if it == expert]) for expert in sorted({it for it in flat if it >= 0})]


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 16])
@pytest.mark.parametrize(
    "spec",
    [
        RoutingSpec(num_experts=40, top_k=3, score="sigmoid"),
        RoutingSpec(num_experts=7, top_k=7, score="softmax", renormalize=False, scale=2.5),
        RoutingSpec(num_experts=300, top_k=8, score="softmax"),
    ],
)
def test_it_routes_records_arranges_and_quantizes(num_tokens: int, spec: RoutingSpec) -> None:
    x_TD, gate_ED = normal(num_tokens, D).bfloat16(), normal(spec.num_experts, D, seed=1) / D**0.5
    bias_E = normal(spec.num_experts, seed=2) / 8
    slots_T = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(3))[:num_tokens].to(DEVICE)
    rows_CLK = torch.full((SLOTS, LAYERS, spec.top_k), 999, dtype=torch.int16, device=DEVICE)
    counter = counters(few_tokens.NUM_COUNTERS, DEVICE)
    for cut in (GateCut(), GateCut(experts=16, columns=128)):
        got = run(x_TD, gate_ED, slots_T, spec, counter, bias_E=bias_E, rows_CLK=rows_CLK, layer=1, num_zeros=5, cut=cut)
        # the choice is by float32 logits, whose sums differ in their order: scores apart by less than that might go either way
        want = route(reference.router_logits(x_TD, gate_ED), spec, bias_E=bias_E)
        assert torch.equal(got.ids_TK.long(), want.ids_TK)
        torch.testing.assert_close(got.weights_TK, want.weights_TK, rtol=1e-5, atol=1e-6)
        assert torch.equal(rows_CLK[slots_T, 1].long(), want.ids_TK) and (rows_CLK[:, [0, 2]] == 999).all()
        assert blocks_of(got) == pairs_by_expert(want.ids_TK)
        q_TD, scale_TG = reference.quantize_activation(x_TD)
        assert got.q_TD is not None and got.scale_TG is not None
        assert torch.equal(got.q_TD.view(torch.uint8), q_TD.contiguous().view(torch.uint8)) and torch.equal(got.scale_TG, scale_TG)
        assert got.zeros.tolist() == [0] * 5 and counter.tolist() == [0, 0]
        again = run(x_TD, gate_ED, slots_T, spec, counter, bias_E=bias_E, quantize=False, arranged=False, num_zeros=3, cut=cut)
        assert again.arrangement is None and again.zeros.tolist() == [0] * 3 and counter.tolist() == [0, 0]
        assert torch.equal(again.ids_TK, got.ids_TK) and torch.equal(again.weights_TK, got.weights_TK) and again.q_TD is None


def test_padding_has_no_expert_and_a_rank_sees_its_own() -> None:
    spec = RoutingSpec(num_experts=12, top_k=4, score="sigmoid")
    x_TD, gate_ED, counter = normal(6, D).bfloat16(), normal(12, D, seed=1) / D**0.5, counters(few_tokens.NUM_COUNTERS, DEVICE)
    slots_T = torch.tensor([3, -1, 0, 9, -1, 4], device=DEVICE)
    rows_CLK = torch.full((10, 1, 4), 255, dtype=torch.uint8, device=DEVICE)
    want = route(reference.router_logits(x_TD, gate_ED), spec)
    dead_T1 = (slots_T < 0).unsqueeze(-1)
    for own in (range(0, 5), range(5, 12)):
        got = run(x_TD, gate_ED, slots_T, spec, counter, rows_CLK=rows_CLK, own=own)
        ids_TK = torch.where((want.ids_TK >= own.start) & (want.ids_TK < own.stop) & ~dead_T1, want.ids_TK - own.start, -1)
        assert torch.equal(got.ids_TK.long(), ids_TK)
        assert blocks_of(got) == pairs_by_expert(ids_TK)
        assert torch.equal(rows_CLK[slots_T[slots_T >= 0], 0].long(), want.ids_TK[slots_T >= 0])
    nothing = run(x_TD, gate_ED, torch.full_like(slots_T, -1), spec, counter)
    assert blocks_of(nothing) == [] and not nothing.weights_TK.any()


def test_given_experts_are_weighed_live_and_compared() -> None:
    spec = RoutingSpec(num_experts=12, top_k=3, score="sigmoid")
    x_TD, gate_ED, counter = normal(3, D).bfloat16(), normal(12, D, seed=1) / D**0.5, counters(few_tokens.NUM_COUNTERS, DEVICE)
    slots_T = torch.tensor([4, 1, 2], device=DEVICE)
    free = run(x_TD, gate_ED, slots_T, spec, counter)
    given_TK = torch.stack([free.ids_TK[0].flip(0), torch.tensor([0, 1, 2], dtype=torch.int32, device=DEVICE), free.ids_TK[2] * 0 - 1])
    alike_C = torch.full((5,), 99, dtype=torch.int16, device=DEVICE)
    got = run(x_TD, gate_ED, slots_T, spec, counter, given_TK=given_TK, alike_C=alike_C)
    assert got.ids_TK.tolist() == [given_TK[0].tolist(), [0, 1, 2], free.ids_TK[2].tolist()]
    assert torch.equal(got.weights_TK[0].flip(0), free.weights_TK[0]) and torch.equal(got.weights_TK[2], free.weights_TK[2])
    assert (
        alike_C[4] == 1 and alike_C[1] == int(set(free.ids_TK[1].tolist()) == {0, 1, 2}) and blocks_of(got) == pairs_by_expert(got.ids_TK)
    )
