"""The router's kernels against `route`: choice, ties, weights, record, replay and padding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pointsman.kernels import reference, routing
from pointsman.moe.routing import RoutingSpec, route
from tests.kernels.interpreter import correct

correct()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYERS, SLOTS = 3, 40


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def choose(logits_TE: Tensor, spec: RoutingSpec, slots_T: Tensor | None = None, **options: object) -> tuple[Tensor, Tensor]:
    choice = routing.Choice(
        top_k=spec.top_k,
        softmax=spec.score == "softmax",
        renormalize=spec.renormalize,
        scale=spec.scale,
        **options,  # type: ignore[arg-type]
    )
    return routing.choose_experts(logits_TE.unsqueeze(0).contiguous(), choice, slots_T)


@pytest.mark.parametrize(("num_tokens", "num_experts", "hidden"), [(1, 16, 256), (5, 72, 384), (70, 40, 200)])
@pytest.mark.parametrize("deterministic", [False, True])
def test_logits_are_as_good_as_float32(num_tokens: int, num_experts: int, hidden: int, deterministic: bool) -> None:
    x_TD, gate_ED = normal(num_tokens, hidden).bfloat16(), normal(num_experts, hidden, seed=1)
    got_TE = routing.router_logits(x_TD, gate_ED, deterministic=deterministic).double().sum(0)
    want_TE = x_TD.double() @ gate_ED.double().T
    # sums of `hidden` products of size 1 in float32; one bfloat16 of the gate less would be 30 times this
    assert float((got_TE - want_TE).abs().max()) < 2**-23 * hidden
    assert float((reference.router_logits(x_TD, gate_ED).double() - want_TE).abs().max()) < 2**-23 * hidden


@pytest.mark.parametrize(
    "spec",
    [
        RoutingSpec(num_experts=16, top_k=4, score="sigmoid"),
        RoutingSpec(num_experts=40, top_k=3, score="softmax", scale=2.5),
        RoutingSpec(num_experts=7, top_k=7, score="sigmoid", renormalize=False),
        RoutingSpec(num_experts=300, top_k=1, score="softmax", renormalize=False),
    ],
)
@pytest.mark.parametrize("biased", [False, True])
def test_choice_and_weights(spec: RoutingSpec, biased: bool) -> None:
    logits_TE = normal(6, spec.num_experts, seed=spec.num_experts)
    bias_E = normal(spec.num_experts, seed=1) * 0.2 if biased else None
    ids_TK, weights_TK = choose(logits_TE, spec, bias_E=bias_E)
    want = route(logits_TE, spec, bias_E=bias_E)
    assert ids_TK.dtype == torch.int32 and torch.equal(ids_TK.long(), want.ids_TK)
    torch.testing.assert_close(weights_TK, want.weights_TK, rtol=1e-6, atol=1e-7)  # a few roundings of float32


@pytest.mark.filterwarnings("ignore:overflow encountered in exp", "ignore:invalid value encountered in divide")  # scores of 0 alone
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_ties_go_to_the_lower_expert(score: str) -> None:
    spec = RoutingSpec(num_experts=20, top_k=5, score=score)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    logits_TE = torch.randint(3, (12, 20), generator=generator).float().to(DEVICE)
    logits_TE[0], logits_TE[1] = 40.0, -200.0  # scores of 1 all, and of 0 all
    logits_TE[2, ::2] = -0.0
    bias_E = (torch.randint(2, (20,), generator=generator) * 0.25).to(DEVICE)
    for bias in (None, bias_E, -bias_E):
        assert torch.equal(choose(logits_TE, spec, bias_E=bias)[0].long(), route(logits_TE, spec, bias_E=bias).ids_TK)


def test_infinite_and_missing_scores_still_give_different_experts() -> None:
    spec = RoutingSpec(num_experts=9, top_k=4, score="sigmoid")
    logits_TE = normal(3, 9)
    logits_TE[0, 5], logits_TE[1] = float("nan"), float("nan")
    bias_E = torch.full((9,), float("-inf"), device=DEVICE)
    ids_TK, _ = choose(logits_TE, spec)
    assert ids_TK[0, 0] == 5 and ids_TK[1].tolist() == [0, 1, 2, 3]  # as torch's sort has it
    assert choose(logits_TE[2:], spec, bias_E=bias_E)[0].tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_rows_are_recorded_at_their_slots_and_padding_has_no_expert(dtype: torch.dtype) -> None:
    spec = RoutingSpec(num_experts=12, top_k=3, score="sigmoid")
    logits_TE, slots_T = normal(4, 12), torch.tensor([31, -1, 0, 7], device=DEVICE)
    rows_CLK = torch.full((SLOTS, LAYERS, 3), 99, dtype=dtype, device=DEVICE)
    ids_TK, weights_TK = choose(logits_TE, spec, slots_T=slots_T, rows_CLK=rows_CLK, layer=1)
    want_TK = route(logits_TE, spec).ids_TK
    assert ids_TK[1].tolist() == [-1] * 3 and weights_TK[1].tolist() == [0.0] * 3
    expected = torch.full((SLOTS, LAYERS, 3), 99)
    for token in (0, 2, 3):
        assert torch.equal(ids_TK[token].long(), want_TK[token])
        expected[slots_T[token], 1] = want_TK[token].cpu()
    assert torch.equal(rows_CLK.cpu().long(), expected)


def test_given_experts_are_weighed_live_recorded_and_compared() -> None:
    spec = RoutingSpec(num_experts=12, top_k=3, score="sigmoid")
    logits_TE, bias_E, slots_T = normal(5, 12), normal(12, seed=1), torch.tensor([4, 3, 2, -1, 0], device=DEVICE)
    free_TK = route(logits_TE, spec, bias_E=bias_E).ids_TK
    given_TNK = torch.full((5, LAYERS, 3), -1, device=DEVICE)
    given_TNK[0, 1] = free_TK[0].flip(0)  # the same set
    given_TNK[1, 1] = (free_TK[1] + 1) % 12
    given_TNK[3, 1] = free_TK[3]
    given_TNK[4, 1, :2] = 5  # not all of them: free
    rows_CLK = torch.zeros(SLOTS, LAYERS, 3, dtype=torch.uint8, device=DEVICE)
    alike_C = torch.full((SLOTS,), 7, dtype=torch.int16, device=DEVICE)
    given_TK = given_TNK[:, 1]
    ids_TK, weights_TK = choose(
        logits_TE, spec, bias_E=bias_E, given_TK=given_TK, slots_T=slots_T, rows_CLK=rows_CLK, alike_C=alike_C, layer=1
    )
    forced_T1 = (given_TK >= 0).all(-1, keepdim=True)
    want = route(logits_TE, spec, ids_TK=torch.where(forced_T1, given_TK, free_TK))
    live = torch.tensor([0, 1, 2, 4], device=DEVICE)
    assert torch.equal(ids_TK[live].long(), want.ids_TK[live])
    torch.testing.assert_close(weights_TK[live], want.weights_TK[live], rtol=1e-6, atol=1e-7)
    assert torch.equal(rows_CLK[slots_T[live], 1].long(), want.ids_TK[live])
    alike = set((free_TK[1]).tolist()) == set(given_TK[1].tolist())
    assert alike_C[:6].tolist() == [7, 7, 7, 7 + alike, 8, 7]
    choose(logits_TE, spec, bias_E=bias_E, given_TK=given_TK, slots_T=slots_T, alike_C=alike_C, layer=0)
    assert alike_C[:6].tolist() == [7, 7, 7, int(alike), 1, 7]


@pytest.mark.parametrize("own", [range(0, 5), range(5, 16), range(7, 8)])
def test_ids_are_told_as_a_rank_counts_its_experts(own: range) -> None:
    """Of other ranks' experts nothing is told; weights and rows are as if all were here, and padding stays padding."""
    spec = RoutingSpec(num_experts=16, top_k=4, score="sigmoid")
    logits_TE, slots_T = normal(6, 16, seed=3), torch.tensor([3, 0, -1, 9, 1, 2], device=DEVICE)
    rows = [torch.zeros(SLOTS, LAYERS, 4, dtype=torch.uint8, device=DEVICE) for _ in range(2)]
    want_ids, want_weights = choose(logits_TE, spec, slots_T=slots_T, rows_CLK=rows[0], layer=1)
    ids, weights = choose(logits_TE, spec, slots_T=slots_T, rows_CLK=rows[1], layer=1, own=own)
    want = [[own.index(expert) if expert in own else -1 for expert in experts] for experts in want_ids.tolist()]
    assert ids.tolist() == want and torch.equal(weights, want_weights) and torch.equal(*rows)
