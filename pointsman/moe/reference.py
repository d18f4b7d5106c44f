"""The experts one at a time, in the numerics of `kernels.reference`: slow, obvious, and the oracle of every other runner.

Shape suffixes: T tokens, K experts per token, D hidden.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from pointsman.kernels import reference
from pointsman.moe.routing import Routing
from pointsman.moe.weights import ExpertWeights


class ReferenceRunner:
    """W8A8 for FP8 weights; the weighted sum over a token's experts is float32 and rounded once."""

    name: ClassVar[str] = "reference"
    routes_itself: ClassVar[Literal[False]] = False

    def prepare(self, weights: ExpertWeights, dtype: torch.dtype) -> ExpertWeights:
        return weights

    def __call__(self, x_TD: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
        out_TD = torch.zeros(x_TD.shape, device=x_TD.device)
        for expert in torch.unique(routing.ids_TK[routing.ids_TK >= 0]).tolist():
            token, choice = (routing.ids_TK == expert).nonzero(as_tuple=True)
            y = reference.expert(x_TD[token], weights.gate_up[expert], weights.down[expert])
            out_TD.index_add_(0, token, y * routing.weights_TK[token, choice, None])
        return out_TD.to(x_TD.dtype)
