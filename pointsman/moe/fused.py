"""The experts with routing inside: runner `fused`.

Up to `FEW_TOKENS` tokens of block FP8 go through one kernel from the router's input to the sum (`kernels.fused_experts`); more, or plain
weights, through the kernels of the router and of `routed` one after the other. What was chosen is written on the way, and may be given,
as under every other runner.
"""

from __future__ import annotations

import importlib
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from pointsman.kernels.capability import chains
from pointsman.moe.grouped import RoutedRunner
from pointsman.moe.router import ROUTERS, RouterInput, choice
from pointsman.moe.routing import Routing, RoutingSpec
from pointsman.moe.weights import ExpertWeights

FEW_TOKENS = 4  # from 8 on the chain was faster on an H100: the weights are as many, and one kernel waits for the slowest part thrice


class FusedRunner:
    """Gate, choice, up, down and sum of few tokens in one kernel; of many, in a chain."""

    name: ClassVar[str] = "fused"
    routes_itself: ClassVar[Literal[True]] = True
    replays: ClassVar[bool] = True

    def __init__(self, *, few_tokens: int = FEW_TOKENS, cut: Any = None) -> None:
        self._kernel: Any = importlib.import_module("pointsman.kernels.fused_experts")
        self._few_tokens, self._cut, self._chain = few_tokens, cut, RoutedRunner()
        self._counter: Tensor | None = None

    def prepare(self, weights: ExpertWeights, dtype: torch.dtype) -> ExpertWeights:
        return self._chain.prepare(weights, dtype)

    def __call__(self, rows: RouterInput, spec: RoutingSpec, weights: ExpertWeights) -> Tensor:
        return self.route_and_run(rows, spec, weights)[0]

    def route_and_run(self, rows: RouterInput, spec: RoutingSpec, weights: ExpertWeights) -> tuple[Tensor, Routing]:
        """The weighted sum [T, D] and what was chosen or given."""
        num_tokens, device = len(rows.x_TD), rows.x_TD.device
        if not weights.quantized or not 0 < num_tokens <= self._few_tokens:
            routing = ROUTERS["triton"].run(rows, spec)
            return self._chain(rows.x_TD, routing, weights), routing
        if self._counter is None:
            kernels: Any = importlib.import_module("pointsman.kernels.routing")
            self._counter = kernels.counters(self._kernel.NUM_COUNTERS, device)
        ids_TK = torch.empty(num_tokens, spec.top_k, dtype=torch.int32, device=device)
        weights_TK = torch.empty(num_tokens, spec.top_k, device=device)
        on_gpu = device.type == "cuda"
        out_TD: Tensor = self._kernel.run(
            rows.x_TD,
            weights.gate_up,
            weights.down,
            rows.gate_ED,
            rows.slots_T,
            choice(rows, spec),
            ids_TK,
            weights_TK,
            self._counter,
            processors=torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 1,
            cut=self._cut,
            together=on_gpu,
            pdl=chains(device),
        )
        return out_TD, Routing(ids_TK, weights_TK)
