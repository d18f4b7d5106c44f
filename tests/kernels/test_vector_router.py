"""Sum, norm and routing of very few tokens in one kernel against the reference, and against the kernels that do it one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pointsman.kernels import norm_quant, reference, vector_router
from pointsman.kernels.fresh import Fresh, fresh
from pointsman.kernels.routing import Choice
from pointsman.kernels.vector_router import Cut
from pointsman.moe.routing import RoutingSpec, route
from tests.kernels.interpreter import correct

correct()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYERS, SLOTS, D = 3, 40, 384
SPECS = [
    RoutingSpec(num_experts=20, top_k=3, score="sigmoid"),
    RoutingSpec(num_experts=7, top_k=7, score="softmax", renormalize=False, scale=2.5),
]


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def choice(spec: RoutingSpec, **options: Any) -> Choice:
    return Choice(top_k=spec.top_k, softmax=spec.score == "softmax", renormalize=spec.renormalize, scale=spec.scale, **options)


def drawn(num_tokens: int, hidden: int = D) -> Fresh:
    x_TD, delta_TD = normal(num_tokens, hidden).bfloat16(), normal(num_tokens, hidden, seed=1).bfloat16()
    return fresh(x_TD, delta_TD, normal(hidden, seed=2).bfloat16(), 1e-6)


def normed(rows: Fresh) -> Tensor:
    _, normed_TD = norm_quant.norm(*rows[:4])
    assert isinstance(normed_TD, Tensor)
    return normed_TD


@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("spec", SPECS, ids=["sigmoid", "softmax"])
@pytest.mark.parametrize("cut", [Cut(), Cut(experts=8, warps=2)], ids=str)
@pytest.mark.parametrize("hidden", [384, 256])
def test_it_sums_norms_quantizes_routes_and_records(num_tokens: int, spec: RoutingSpec, cut: Cut, hidden: int) -> None:
    rows, gate_ED = drawn(num_tokens, hidden), normal(spec.num_experts, hidden, seed=3) / hidden**0.5
    bias_E = normal(spec.num_experts, seed=4) / 8
    slots_T = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(3))[:num_tokens].to(DEVICE)
    rows_CLK = torch.full((SLOTS, LAYERS, spec.top_k), 999, dtype=torch.int16, device=DEVICE)
    places = vector_router.places(spec.num_experts, DEVICE)
    asked = choice(spec, bias_E=bias_E, rows_CLK=rows_CLK, layer=1)
    got, again = (vector_router.route(rows, gate_ED, slots_T, places, asked, num_zeros=5, cut=cut) for _ in range(2))
    assert torch.equal(rows.sum_TD, rows.x_TD + rows.delta_TD)
    normed_TD = normed(rows)
    want = route(reference.router_logits(normed_TD, gate_ED), spec, bias_E=bias_E)
    assert torch.equal(got.ids_TK.long(), want.ids_TK)
    # a mean summed in another order may move a number to the neighbouring bfloat16, and that one to the neighbouring e4m3
    torch.testing.assert_close(got.weights_TK, want.weights_TK, rtol=2**-7, atol=1e-6)
    assert torch.equal(rows_CLK[slots_T, 1].long(), want.ids_TK) and (rows_CLK[:, [0, 2]] == 999).all()
    q_TD, scale_TG = reference.quantize_activation(normed_TD)
    assert got.q_TD is not None and got.scale_TG is not None and got.arrangement is None
    torch.testing.assert_close(got.scale_TG, scale_TG, rtol=2**-7, atol=0)
    assert float((got.q_TD.view(torch.uint8) != q_TD.contiguous().view(torch.uint8)).double().mean()) < 0.01
    assert got.zeros.tolist() == [0] * 5 and (places == -(2**31)).all()
    assert torch.equal(again.ids_TK, got.ids_TK) and torch.equal(again.weights_TK, got.weights_TK)
    assert again.q_TD is not None and torch.equal(again.q_TD.view(torch.uint8), got.q_TD.view(torch.uint8))


def test_padding_has_no_expert_and_a_rank_sees_its_own() -> None:
    spec, rows = RoutingSpec(num_experts=12, top_k=4, score="sigmoid"), drawn(3)
    gate_ED, places = normal(12, D, seed=3) / D**0.5, vector_router.places(12, DEVICE)
    slots_T = torch.tensor([3, -1, 0], device=DEVICE)
    rows_CLK = torch.full((10, 1, 4), 255, dtype=torch.uint8, device=DEVICE)
    want = route(reference.router_logits(normed(rows), gate_ED), spec)
    for own in (range(0, 5), range(5, 12)):
        got = vector_router.route(rows, gate_ED, slots_T, places, choice(spec, rows_CLK=rows_CLK, own=own))
        mine_TK = (want.ids_TK >= own.start) & (want.ids_TK < own.stop) & (slots_T >= 0).unsqueeze(-1)
        assert torch.equal(got.ids_TK.long(), torch.where(mine_TK, want.ids_TK - own.start, -1))
        assert torch.equal(rows_CLK[slots_T[slots_T >= 0], 0].long(), want.ids_TK[slots_T >= 0]) and not got.weights_TK[1].any()


def test_given_experts_are_weighed_live_and_compared() -> None:
    spec, rows = RoutingSpec(num_experts=12, top_k=3, score="sigmoid"), drawn(3)
    gate_ED, places = normal(12, D, seed=3) / D**0.5, vector_router.places(12, DEVICE)
    slots_T = torch.tensor([4, 1, 2], device=DEVICE)
    free = vector_router.route(rows, gate_ED, slots_T, places, choice(spec))
    given_TK = torch.stack([free.ids_TK[0].flip(0), torch.tensor([0, 1, 2], dtype=torch.int32, device=DEVICE), free.ids_TK[2] * 0 - 1])
    alike_C = torch.full((5,), 99, dtype=torch.int16, device=DEVICE)
    got = vector_router.route(rows, gate_ED, slots_T, places, choice(spec, given_TK=given_TK, alike_C=alike_C))
    assert got.ids_TK.tolist() == [given_TK[0].tolist(), [0, 1, 2], free.ids_TK[2].tolist()]
    torch.testing.assert_close(got.weights_TK[0].flip(0), free.weights_TK[0], rtol=1e-6, atol=0.0)  # their sum has another order
    assert torch.equal(got.weights_TK[2], free.weights_TK[2])
    assert alike_C[4] == 1 and alike_C[1] == int(set(free.ids_TK[1].tolist()) == {0, 1, 2})
