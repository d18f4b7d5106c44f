"""The experts on a CPU by torch: weights dequantized once (W8A16), then one pair of products for each expert in use.

A token alone takes views of its experts: indexing rows would cost more than the products. Otherwise the (token, choice) pairs
are sorted by expert, once, so that each expert's rows are a slice.

Shape suffixes: T tokens, K experts per token, D hidden, N (token, choice) pairs.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pointsman.kernels import reference
from pointsman.moe.routing import Routing
from pointsman.moe.weights import ExpertWeights


class CpuRunner:
    """W8A16: products in the activations' dtype, the weighted sum over a token's experts in float32 in the order of expert ids."""

    name: ClassVar[str] = "cpu"
    routes_itself: ClassVar[Literal[False]] = False

    def prepare(self, weights: ExpertWeights, dtype: torch.dtype) -> ExpertWeights:
        return weights.dequantize(dtype)

    def __call__(self, x_TD: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
        top_k = routing.ids_TK.shape[1]
        expert_N, pair_N = routing.ids_TK.flatten().sort(stable=True)
        token_N = pair_N // top_k
        weight_N1 = routing.weights_TK.flatten()[pair_N].unsqueeze(-1)
        experts, counts = torch.unique_consecutive(expert_N, return_counts=True)
        out_TD = torch.zeros(x_TD.shape, device=x_TD.device)
        first = 0
        for expert, count in zip(experts.tolist(), counts.tolist(), strict=True):
            pairs = slice(first, first + count)
            first += count
            if expert < 0:
                continue
            rows = x_TD if len(x_TD) == 1 else x_TD[token_N[pairs]]
            gate_up = F.linear(rows, weights.gate_up.data[expert])
            y = F.linear(reference.silu_and_mul(gate_up).to(rows.dtype), weights.down.data[expert])
            if len(x_TD) == 1:
                out_TD.addcmul_(y.float(), weight_N1[pairs])
            else:
                out_TD.index_add_(0, token_N[pairs], y.float() * weight_N1[pairs])
        return out_TD.to(x_TD.dtype)
