"""One mixture-of-experts layer: gate, route, record or replay, run.

Shape suffixes: T rows, D hidden, E experts, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pointsman.kernels import reference
from pointsman.layers.context import StepContext
from pointsman.moe.routing import Routing, RoutingSpec, route
from pointsman.moe.runner import MoERunner
from pointsman.moe.weights import ExpertWeights


class MoE:
    """The experts of one layer; what runs them gets the weights in its own form at first use, or by `prepare`."""

    def __init__(
        self,
        layer: int,
        gate_ED: Tensor,
        bias_E: Tensor | None,
        weights: ExpertWeights,
        spec: RoutingSpec,
        runner: MoERunner,
        dtype: torch.dtype,
    ) -> None:
        self.layer = layer
        self.gate_ED, self.bias_E, self.weights = gate_ED, bias_E, weights
        self.spec, self.runner = spec, runner
        self._dtype = dtype
        self._ready: ExpertWeights | None = None

    def prepare(self) -> ExpertWeights:
        """The weights in the runner's form, made once."""
        if self._ready is None:
            self._ready = self.runner.prepare(self.weights, self._dtype)
        return self._ready

    def release(self) -> None:
        """Drop that form; it is made again at the next use."""
        self._ready = None

    def __call__(self, x_TD: Tensor, ctx: StepContext) -> Tensor:
        routing = self._route(reference.router_logits(x_TD, self.gate_ED), ctx)
        if ctx.routes is not None:
            ctx.routes.record(self.layer, ctx.slots_T, routing.ids_TK)
        return self.runner(x_TD, routing, self.prepare())

    def _route(self, logits_TE: Tensor, ctx: StepContext) -> Routing:
        if ctx.replay_TNK is None:
            return route(logits_TE, self.spec, bias_E=self.bias_E)
        given_TK = ctx.replay_TNK[:, self.layer]
        forced_T = (given_TK >= 0).all(-1)
        free_TK = route(logits_TE, self.spec, bias_E=self.bias_E).ids_TK
        if ctx.routes is not None:
            alike_T = (free_TK.sort(-1).values == given_TK.sort(-1).values).all(-1)
            ctx.routes.compare(self.layer, ctx.slots_T[forced_T], alike_T[forced_T])
        return route(logits_TE, self.spec, ids_TK=torch.where(forced_T.unsqueeze(-1), given_TK, free_TK))
