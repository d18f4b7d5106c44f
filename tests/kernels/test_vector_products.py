"""Products of very few rows against the reference: linears, and experts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pointsman.kernels import block_gemm, reference, vector_products
from pointsman.kernels.vector_products import Cut, experts, num_arrivals, vector_linear
from pointsman.kernels.weight import Weight
from pointsman.moe.reference import ReferenceRunner
from pointsman.moe.routing import Routing
from pointsman.moe.weights import ExpertWeights, join_rows, stack_experts
from tests.kernels.interpreter import correct

correct()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# both round the same float32 sums, added in another order, to bfloat16
BOUND = {"rtol": 2**-7, "atol": 1e-3}


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("cut", [Cut(), Cut(rows=4, warps=8), Cut(rows=16)], ids=str)
@pytest.mark.parametrize(("num_rows", "height", "width"), [(1, 128, 128), (2, 200, 384), (1, 64, 1000)])
def test_a_linear_is_the_reference(cut: Cut, num_rows: int, height: int, width: int) -> None:
    weight = reference.quantize_weight(normal(height, width))
    x_TK = normal(num_rows, width, seed=1).bfloat16()
    q_TK, scale_TB = reference.quantize_activation(x_TK)
    got = vector_linear(q_TK, scale_TB, weight.data, weight.scale, cut=cut)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, reference.linear(x_TK, weight), **BOUND)


def test_one_row_is_multiplied_so_unless_it_must_not_vary(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, ragged = reference.quantize_weight(normal(128, 256)), join_rows([reference.quantize_weight(normal(60, 256)) for _ in range(2)])
    made = []

    def seen(x: Tensor, *rest: Tensor, **options: object) -> Tensor:
        made.append(vector_linear(x, *rest, **options))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(block_gemm, "vector_linear", seen)
    got = []
    for rows in (1, 2):
        x_TK = normal(rows, 256, seed=1).bfloat16()
        for each, invariant in ((weight, False), (weight, True), (ragged, False)):
            got.append(block_gemm.linear(x_TK, block_gemm.prepare(each, invariant=invariant)))
    assert len(made) == 1 and made[0] is got[0]
    torch.testing.assert_close(got[0], reference.linear(normal(1, 256, seed=1).bfloat16(), weight), **BOUND)


def drawn(num_experts: int, hidden: int, width: int) -> ExpertWeights:
    def weight(rows: int, columns: int, seed: int) -> Weight:
        return reference.quantize_weight(normal(rows, columns, seed=seed) * columns**-0.5)

    return stack_experts(
        [(weight(width, hidden, e), weight(width, hidden, 100 + e), weight(hidden, width, 200 + e)) for e in range(num_experts)]
    )


@pytest.mark.parametrize("cuts", [(Cut(), Cut(rows=4)), (Cut(rows=32, warps=8), Cut(rows=16))], ids=str)
@pytest.mark.parametrize(("num_tokens", "top_k", "hidden", "width"), [(1, 3, 256, 128), (4, 2, 384, 384), (2, 4, 128, 256)])
def test_experts_are_the_reference(cuts: tuple[Cut, Cut], num_tokens: int, top_k: int, hidden: int, width: int) -> None:
    weights = drawn(5, hidden, width)
    x_TD = normal(num_tokens, hidden, seed=1).bfloat16()
    ids_TK = torch.stack([torch.randperm(5, generator=torch.Generator().manual_seed(t))[:top_k] for t in range(num_tokens)]).to(DEVICE)
    weights_TK = normal(num_tokens, top_k, seed=2).abs()
    want = ReferenceRunner()(x_TD.float(), Routing(ids_TK, weights_TK), weights)
    some_TK, some = ids_TK.int(), weights_TK.clone()
    if num_tokens > 1:  # one token is padding, another has a choice that is another rank's
        some_TK[0], some[0], want[0] = -1, 0.0, 0.0
        alone = torch.full_like(ids_TK[-1:], 0)
        alone[0, 0] = ids_TK[-1, 0]
        want[-1] -= ReferenceRunner()(x_TD[-1:].float(), Routing(alone[:, :1], weights_TK[-1:, :1]), weights)[0]
        some_TK[-1, 0] = -1
    arrivals = torch.zeros(num_arrivals(num_tokens * top_k, width), dtype=torch.int32, device=DEVICE)
    q_TD, scale_TG = reference.quantize_activation(x_TD)
    runs = []
    for _ in range(2):
        runs.append(
            experts(
                q_TD, scale_TG, some_TK, some, weights.gate_up, weights.down, arrivals.clone(), up_cut=cuts[0], down_cut=cuts[1]
            )
        )  # fmt: skip
    assert runs[0].dtype == torch.bfloat16 and torch.equal(*runs)
    # the result is rounded to bfloat16, and a hidden number near a border may be the neighbouring bfloat16 and e4m3
    assert float((runs[0].float() - want).norm() / want.norm()) < (0.005 if DEVICE.type == "cpu" else 0.01)
    assert num_tokens == 1 or not runs[0][0].any()


def test_what_a_program_could_not_hold_is_left_to_tiles() -> None:
    assert vector_products.takes_linear(2, 6144) and not vector_products.takes_linear(3, 128) and not vector_products.takes_linear(1, 32896)
    assert vector_products.takes_experts(4, 8, 3072, 1536) and vector_products.takes_experts(1, 2, 4096, 14336)
    assert not vector_products.takes_experts(1, 8, 4096, 14336) and not vector_products.takes_experts(5, 8, 3072, 768)
