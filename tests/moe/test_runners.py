"""Runners against the oracle, the oracle against a sum over experts in float64, and the choice among them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pointsman.config import MOE_RUNNERS
from pointsman.kernels.device import Device
from pointsman.kernels.reference import quantize_weight
from pointsman.kernels.weight import Weight
from pointsman.moe import candidates
from pointsman.moe.candidates import runner_choice, unsupported
from pointsman.moe.router import INVARIANT_ROUTERS, ROUTERS
from pointsman.moe.routing import Routing, RoutingSpec, route
from pointsman.moe.runner import INVARIANT_RUNNERS, RUNNERS, make_runner
from pointsman.moe.spec import ExpertForm
from pointsman.moe.weights import ExpertWeights, stack_experts

SPEC = RoutingSpec(num_experts=7, top_k=3, score="sigmoid")
D, WIDTH = 40, 24
FORM = ExpertForm(D, WIDTH, None)
ANYWHERE = ("cpu", "reference")
CPU, CUDA = Device(type="cpu"), Device(type="cuda")


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def experts(block: tuple[int, int] | None, dtype: torch.dtype = torch.float32) -> ExpertWeights:
    def weight(rows: int, columns: int, seed: int) -> Weight:
        value = normal(rows, columns, seed=seed) * columns**-0.5
        return Weight(value.to(dtype)) if block is None else quantize_weight(value, block)

    return stack_experts([(weight(WIDTH, D, e), weight(WIDTH, D, 100 + e), weight(D, WIDTH, 200 + e)) for e in range(SPEC.num_experts)])


def problem(num_tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Routing]:
    return normal(num_tokens, D, seed=1).to(dtype), route(normal(num_tokens, SPEC.num_experts, seed=2), SPEC)


def dense_float64(x_TD: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
    """Every expert over every token, weighted by a dense matrix of weights."""
    plain = weights.dequantize(torch.float64)
    gate, up = (x_TD.double() @ plain.gate_up.data.transpose(1, 2)).chunk(2, -1)
    y_ETD = (gate * gate.sigmoid() * up) @ plain.down.data.transpose(1, 2)
    dense_TE = torch.zeros(len(x_TD), SPEC.num_experts, dtype=torch.float64).scatter(1, routing.ids_TK, routing.weights_TK.double())
    return torch.einsum("etd,te->td", y_ETD, dense_TE)


def run(name: str, x_TD: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
    runner = RUNNERS[name]()
    return runner(x_TD, routing, runner.prepare(weights, x_TD.dtype))


@pytest.mark.parametrize("name", ANYWHERE)
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_weights(name: str, num_tokens: int, dtype: torch.dtype) -> None:
    (x_TD, routing), weights = problem(num_tokens, dtype), experts(None, dtype)
    got = run(name, x_TD, routing, weights)
    assert got.dtype == dtype and got.shape == x_TD.shape
    # outputs are of size 0.3; float32 sums, or three roundings to bfloat16 of numbers up to 2
    tolerance = 1e-6 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(got.double(), dense_float64(x_TD, routing, weights), atol=tolerance, rtol=0)


@pytest.mark.parametrize("block", [(128, 128), (16, 8), (32, 20)])
@pytest.mark.parametrize(("name", "bound"), [("cpu", 1e-6), ("reference", 0.06)])
def test_fp8_weights(name: str, bound: float, block: tuple[int, int]) -> None:
    (x_TD, routing), weights = problem(33), experts(block)
    got, want = run(name, x_TD, routing, weights), dense_float64(x_TD, routing, weights)
    # W8A16 is exact but for float32 sums; W8A8 rounds activations twice by 2^-4 at most
    assert 0 < float((got - want).square().mean().sqrt() / want.square().mean().sqrt()) < bound


@pytest.mark.parametrize("name", ANYWHERE)
@pytest.mark.parametrize("block", [None, (16, 8)])
def test_a_token_does_not_see_the_others(name: str, block: tuple[int, int] | None) -> None:
    (x_TD, routing), weights = problem(12), experts(block)
    together = run(name, x_TD, routing, weights)
    alone = torch.cat([run(name, x_TD[t : t + 1], Routing(*(part[t : t + 1] for part in routing)), weights) for t in range(12)])
    torch.testing.assert_close(alone, together, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ANYWHERE)
def test_all_tokens_on_one_expert(name: str) -> None:
    x_TD, weights = normal(9, D), experts(None)
    routing = Routing(torch.full((9, 1), 6), torch.ones(9, 1))
    torch.testing.assert_close(run(name, x_TD, routing, weights).double(), dense_float64(x_TD, routing, weights), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ANYWHERE)
@pytest.mark.parametrize("num_tokens", [1, 13])
def test_ranks_with_some_of_the_experts_make_parts_of_the_sum(name: str, num_tokens: int) -> None:
    (x_TD, routing), weights = problem(num_tokens), experts((16, 8))
    total = torch.zeros_like(x_TD)
    for own in (slice(0, 3), slice(3, 7)):
        some = ExpertWeights(*(Weight(part.data[own], part.scale[own], part.block, part.parts) for part in weights))
        inside = (routing.ids_TK >= own.start) & (routing.ids_TK < own.stop)
        total += run(name, x_TD, Routing(torch.where(inside, routing.ids_TK - own.start, -1), routing.weights_TK), some)
    torch.testing.assert_close(total, run(name, x_TD, routing, weights), atol=1e-6, rtol=0)


def test_runners_that_cannot_have_some_of_the_experts_say_so() -> None:
    some = FORM._replace(some=True)
    reason = unsupported("fused", SPEC, some, Device(type="cuda", capability=(9, 0), triton=(3, 6)), "bfloat16")
    assert reason == "it chooses among all experts inside its kernel, and runs them; with --ep a rank has some of them"
    for name in "flashinfer_trtllm", "flashinfer_trtllm_routed", "flashinfer_cutlass":
        assert unsupported(name, SPEC, some, CUDA, "bfloat16") == unsupported(name, SPEC, FORM, CUDA, "bfloat16")
    assert unsupported("cpu", SPEC, some, CPU, "float32") is None


def test_stacking_keeps_the_scales_of_each_expert() -> None:
    weights = experts((32, 20))
    assert weights.gate_up.data.shape == (7, 2 * WIDTH, D) and weights.gate_up.parts == (WIDTH, WIDTH)
    assert weights.gate_up.scale is not None and weights.gate_up.scale.shape == (7, 2, 2)
    up = quantize_weight(normal(WIDTH, D, seed=104) * D**-0.5, (32, 20)).dequantize(torch.float32)
    assert torch.equal(weights.dequantize(torch.float32).gate_up.data[4, WIDTH:], up)
    assert torch.equal(weights.gate_up[4].dequantize(torch.float32)[WIDTH:], up)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_name_has_an_answer(device: str) -> None:
    for name in MOE_RUNNERS[1:]:
        reason = unsupported(name, SPEC, FORM, Device(type=device, triton=(3, 6)), "float32")
        assert (reason is None) == (name == "reference" or (name == "cpu" and device == "cpu"))
        if reason is not None:
            with pytest.raises(ValueError, match=f"MoE runner '{name}' cannot serve here: {reason[:12]}"):
                runner_choice(name, SPEC, FORM, device=Device(type=device, triton=(3, 6)), dtype="float32").take()


def test_auto_and_names() -> None:
    assert runner_choice("auto", SPEC, FORM, device=CPU, dtype="float32").take() == "cpu"
    assert runner_choice("auto", SPEC, FORM, device=CUDA, dtype="float32").take() == "reference"
    assert runner_choice("reference", SPEC, FORM, device=CPU, dtype="float32").take() == "reference"
    assert {name: make_runner(name).name for name in ANYWHERE} == {name: name for name in ANYWHERE}
    with pytest.raises(ValueError, match="unknown MoE runner 'marlin'; known are auto, routed, "):
        runner_choice("marlin", SPEC, FORM, device=CPU, dtype="float32").take()
    with pytest.raises(ValueError, match=r"sm_100.*these can: cpu, reference"):
        runner_choice("flashinfer_trtllm_routed", SPEC, FORM, device=CPU, dtype="float32").take()


def test_every_candidate_is_a_runner() -> None:
    """In the tables of reasons and of classes, under the same names; and what is said of one is so."""
    assert list(candidates.RUNNERS) == list(RUNNERS) and candidates.ROUTERS.keys() == ROUTERS.keys()
    assert candidates.ROUTED_ALIKE.keys() == {name for name, runner in RUNNERS.items() if runner.routes_itself}
    assert INVARIANT_RUNNERS.keys() == candidates.INVARIANT_RUNNERS and INVARIANT_ROUTERS.keys() == candidates.INVARIANT_ROUTERS
    assert RUNNERS.keys() >= candidates.WAITING_RUNNERS and all(runner.name == name for name, runner in RUNNERS.items())
