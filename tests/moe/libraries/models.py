"""A small layer of FP8 experts, routings of several kinds, and the reference's answer."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from pointsman.kernels.reference import quantize_weight
from pointsman.kernels.weight import FP8, Weight
from pointsman.moe.capture import RouteStore
from pointsman.moe.reference import ReferenceRunner
from pointsman.moe.router import RouterInput
from pointsman.moe.routing import Routing, RoutingSpec, route
from pointsman.moe.spec import ExpertForm
from pointsman.moe.weights import ExpertWeights, stack_experts

NUM_EXPERTS, TOP_K, D, WIDTH = 8, 3, 256, 128
FORM = ExpertForm(D, WIDTH, (128, 128))
SPECS = {
    "minimax": RoutingSpec(num_experts=NUM_EXPERTS, top_k=TOP_K, score="sigmoid"),
    "scaled": RoutingSpec(num_experts=NUM_EXPERTS, top_k=TOP_K, score="sigmoid", scale=2.5),
    "grouped": RoutingSpec(num_experts=NUM_EXPERTS, top_k=TOP_K, score="sigmoid", scale=1.5, num_groups=4, top_groups=2),
    "qwen3": RoutingSpec(num_experts=NUM_EXPERTS, top_k=TOP_K, score="softmax"),
    "softmax": RoutingSpec(num_experts=NUM_EXPERTS, top_k=TOP_K, score="softmax", renormalize=False),
}


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def experts(width: int = WIDTH, num_experts: int = NUM_EXPERTS, device: torch.device | str = "cpu") -> ExpertWeights:
    """Matrices of unlike sizes, so that no scale can stand for another."""

    def weight(rows: int, columns: int, seed: int) -> Weight:
        factor = 1 + normal(-(-rows // 128), columns // 128, seed=seed + 1).abs().repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)
        found = quantize_weight(normal(rows, columns, seed=seed) * columns**-0.5 * factor)
        assert found.scale is not None
        return dataclasses.replace(found, data=found.data.to(device), scale=found.scale.to(device))

    return stack_experts(
        [(weight(width, D, 3 * e), weight(width, D, 1000 + 3 * e), weight(D, width, 2000 + 3 * e)) for e in range(num_experts)]
    )


def scalar_experts(width: int = WIDTH, num_experts: int = NUM_EXPERTS) -> ExpertWeights:
    """Matrices with a scale each, no two alike, which all their blocks have; scales of activations come of rows that are there."""

    def weight(rows: int, columns: int, seed: int, most: float) -> Weight:
        numbers = normal(rows, columns, seed=seed) * columns**-0.5 * (1 + seed % 7 / 5)
        found = quantize_weight(numbers, (rows, columns))
        assert found.scale is not None
        scale = found.scale.expand(rows // 128, columns // 128).contiguous()
        return Weight(found.data, scale, input_scale=torch.tensor([most / 448]))

    rows_TD = hidden_rows(64).float()
    stacked = []
    for e in range(num_experts):
        most = float(rows_TD.abs().max()) * (1 + e / 50)
        gate, up = weight(width, D, 3 * e, most), weight(width, D, 1000 + 3 * e, most * 0.97)
        hidden = torch.nn.functional.silu(rows_TD @ gate.dequantize(torch.float32).T) * (rows_TD @ up.dequantize(torch.float32).T)
        stacked.append((gate, up, weight(D, width, 2000 + 3 * e, float(hidden.abs().max()))))
    return stack_experts(stacked)


def static_oracle(x_TD: Tensor, chosen: Routing, weights: ExpertWeights) -> Tensor:
    """Dequantized matrices; rows and hidden numbers in e4m3 by the scales of the checkpoint, rows by the largest of all experts here."""
    both, down = weights
    assert both.input_scale is not None and down.input_scale is not None
    gate_up, output = both.dequantize(torch.float32), down.dequantize(torch.float32)

    def rounded(rows: Tensor, scale: Tensor) -> Tensor:
        return (rows / scale).clamp(-448, 448).to(FP8).float() * scale

    rows_TD = rounded(x_TD.float(), both.input_scale.max())
    out_TD = torch.zeros(x_TD.shape)
    for token, (ids, shares) in enumerate(zip(chosen.ids_TK.tolist(), chosen.weights_TK.tolist(), strict=True)):
        for expert, share in zip(ids, shares, strict=True):
            gate, up = (gate_up[expert] @ rows_TD[token]).chunk(2)
            out_TD[token] += share * (output[expert] @ rounded(torch.nn.functional.silu(gate) * up, down.input_scale[expert]))
    return out_TD


def hidden_rows(num_tokens: int) -> Tensor:
    """bfloat16 rows, one of them all zeros where there are several."""
    x_TD = normal(num_tokens, D, seed=7).bfloat16()
    if num_tokens > 3:
        x_TD[2] = 0
    return x_TD


def routing(kind: str, num_tokens: int, device: torch.device | str = "cpu") -> Routing:
    generator = torch.Generator().manual_seed(num_tokens)
    ids_TK = torch.stack([torch.randperm(NUM_EXPERTS - 2, generator=generator)[:TOP_K] for _ in range(num_tokens)])  # two have no tokens
    ids_TK[: num_tokens // 2] = torch.tensor([3, 0, 2])
    if kind == "one expert":
        ids_TK = torch.full((num_tokens, 1), 3)
    elif kind == "padding":
        ids_TK[::2] = -1
    weights_TK = torch.rand(ids_TK.shape, generator=generator) + 0.1
    return Routing(ids_TK.int().to(device), weights_TK.to(device))


def rows(x_TD: Tensor, spec: RoutingSpec, routes: RouteStore | None = None, *, biased: bool = True) -> RouterInput:
    """Rows of layer 1 with a gate and, where the score is a sigmoid and unless it is not `biased`, a bias; slots run backwards."""
    gate_ED = normal(spec.num_experts, D, seed=5) * D**-0.5
    bias_E = normal(spec.num_experts, seed=6) / 4 if biased and spec.score == "sigmoid" else None
    return RouterInput(x_TD, gate_ED, bias_E, 1, torch.arange(len(x_TD)).flip(0), routes, None)


def chosen_by_reference(given: RouterInput, spec: RoutingSpec) -> Routing:
    """The experts that float32 chooses."""
    return route(given.x_TD.float() @ given.gate_ED.T, spec, bias_E=given.bias_E)


def oracle(x_TD: Tensor, chosen: Routing, weights: ExpertWeights) -> Tensor:
    """The reference's sums before they are rounded; nothing where there is no expert."""
    live_T = (chosen.ids_TK >= 0).all(-1)
    out_TD = torch.zeros(x_TD.shape, device=x_TD.device)
    out_TD[live_T] = ReferenceRunner()(x_TD[live_T].float(), Routing(chosen.ids_TK[live_T].long(), chosen.weights_TK[live_T]), weights)
    return out_TD


def distance(got: Tensor, want: Tensor) -> float:
    """Relative to the norm."""
    return float((got.float() - want).norm() / want.norm())
