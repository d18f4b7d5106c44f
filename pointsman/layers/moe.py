"""One mixture-of-experts layer: a router says which experts, a runner runs them.

Every rank routes over all experts and records the choice; what it runs is its own part, which the sum over ranks completes.

Shape suffixes: T rows, D hidden, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pointsman.kernels.unsummed import Unsummed
from pointsman.layers.context import StepContext
from pointsman.moe.router import Router, RouterInput
from pointsman.moe.routing import RoutingSpec
from pointsman.moe.runner import AnyRunner, counter_for, route_and_run
from pointsman.moe.weights import ExpertWeights


class MoE:
    """The experts of a layer, the `layer`-th that has any; what runs them gets the weights in its own form at first use or by `prepare`.

    Args:
        weights: of those experts, or of their columns, that this rank has.
        own: the experts that the weights are of; None for all.
    """

    def __init__(
        self,
        layer: int,
        gate_ED: Tensor,
        bias_E: Tensor | None,
        weights: ExpertWeights,
        spec: RoutingSpec,
        router: Router,
        runner: AnyRunner,
        dtype: torch.dtype,
        own: range | None = None,
    ) -> None:
        self.layer = layer
        self.gate_ED, self.bias_E, self.weights = gate_ED, bias_E, weights
        self.spec, self.runner, self._router = spec, runner, router
        self._dtype, self.own = dtype, own
        self._counter = counter_for(runner, gate_ED.device)
        self._ready: Any = None

    def prepare(self) -> Any:
        """The weights in the runner's form, made once."""
        if self._ready is None:
            self._ready = self.runner.prepare(self.weights, self._dtype)
        return self._ready

    def release(self) -> None:
        """Drop that form; it is made again at the next use."""
        self._ready = None

    def __call__(self, x_TD: Tensor, ctx: StepContext) -> Tensor | Unsummed:
        given_TK = None if ctx.replay_TNK is None else ctx.replay_TNK[:, self.layer]
        rows = RouterInput(x_TD, self.gate_ED, self.bias_E, self.layer, ctx.slots_T, ctx.routes, given_TK, self.own, self._counter)
        return self.run(rows)

    def run(self, rows: RouterInput) -> Tensor | Unsummed:
        """Route these rows and run their experts; the sum may be left to the norm that follows."""
        if self.weights.down.data.numel() == 0:  # a rank without a block of any expert
            self._router.run(rows, self.spec)
            return torch.zeros_like(rows.x_TD)
        return route_and_run(rows, self.spec, self._router, self.runner, self.prepare())
