"""What routes a layer's rows: gate, choice or replay, weights, and the record, by one of two implementations.

The reference is the functions of `kernels.reference` and `moe.routing` one after the other, and runs anywhere. `triton` is two kernels,
which also write the routing row and count what a replay agrees with; of few rows it is one, which quantizes and arranges them besides.
Rows that pad a step get no expert from either.

Shape suffixes: T rows, D hidden, E experts, K experts per token.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pointsman.kernels import reference
from pointsman.kernels.capability import chains
from pointsman.moe.capture import RouteStore
from pointsman.moe.routing import Routing, RoutingSpec, route

if TYPE_CHECKING:
    from pointsman.kernels.routing import Choice


@dataclass(frozen=True, eq=False, slots=True)
class RouterInput:
    """One layer's rows and what routes them.

    Attributes:
        gate_ED, bias_E: the layer's router.
        layer: its number among the layers that have experts.
        slots_T: where the rows' routing is recorded; below zero where a row is padding.
        routes: None records nothing.
        given_TK: int32 or int64 expert ids to use; a row with a negative one chooses freely. None: all do.
        own: experts that are run here, None for all. The routing counts from the first of them, and has -1 for those of others; the
            record has every expert as the model counts it.
        counter: of `kernels.few_tokens`; None where few rows are routed as many are.
    """

    x_TD: Tensor
    gate_ED: Tensor
    bias_E: Tensor | None
    layer: int
    slots_T: Tensor
    routes: RouteStore | None
    given_TK: Tensor | None
    own: range | None = None
    counter: Tensor | None = None


class Wanted(NamedTuple):
    """What a runner wants of few rows that are routed for it: `arranged`, their pairs in the order of experts; and so many zeros."""

    arranged: bool
    zeros: int


@dataclass(frozen=True)
class Router:
    """A way to route.

    Attributes:
        always_given: experts may always be given, as rows of -1 cost nothing.
        run_few: `run` for few rows, which come quantized and with what a runner wants (`kernels.few_tokens.Few`); None where there is none.
    """

    run: Callable[[RouterInput, RoutingSpec], Routing]
    always_given: bool = False
    run_few: Callable[[RouterInput, RoutingSpec, Wanted], Any] | None = None


def _reference(rows: RouterInput, spec: RoutingSpec) -> Routing:
    logits_TE = reference.router_logits(rows.x_TD, rows.gate_ED)
    routing = route(logits_TE, spec, bias_E=rows.bias_E)
    if rows.given_TK is not None:
        forced_T = (rows.given_TK >= 0).all(-1)
        if rows.routes is not None:
            alike_T = (routing.ids_TK.sort(-1).values == rows.given_TK.sort(-1).values).all(-1)
            rows.routes.compare(rows.layer, rows.slots_T, alike_T)
        routing = route(logits_TE, spec, ids_TK=torch.where(forced_T.unsqueeze(-1), rows.given_TK, routing.ids_TK))
    if rows.routes is not None:
        rows.routes.record(rows.layer, rows.slots_T, routing.ids_TK)
    # what pads a step has no expert: it would be one more row of the expert's products, and those round by how many rows they have
    live_T1 = (rows.slots_T >= 0).unsqueeze(-1)
    routing = Routing(torch.where(live_T1, routing.ids_TK, -1), torch.where(live_T1, routing.weights_TK, 0.0))
    return routing if rows.own is None else Routing(_own_ids(routing.ids_TK, rows.own), routing.weights_TK)


def _own_ids(ids_TK: Tensor, own: range) -> Tensor:
    return torch.where((ids_TK >= own.start) & (ids_TK < own.stop), ids_TK - own.start, -1)


def _triton(deterministic: bool) -> Router:
    def run(rows: RouterInput, spec: RoutingSpec) -> Routing:
        kernels: Any = importlib.import_module("pointsman.kernels.routing")
        pdl = chains(rows.x_TD.device)
        logits_STE = kernels.router_logits(rows.x_TD, rows.gate_ED, deterministic=deterministic, pdl=pdl)
        return Routing(*kernels.choose_experts(logits_STE, choice(rows, spec), rows.slots_T, pdl=pdl))

    def run_few(rows: RouterInput, spec: RoutingSpec, wanted: Wanted) -> Any:
        kernels: Any = importlib.import_module("pointsman.kernels.few_tokens")
        pdl, counter = chains(rows.x_TD.device), rows.counter
        options = {"arranged": wanted.arranged, "num_zeros": wanted.zeros, "pdl": pdl}
        return kernels.route_few(rows.x_TD, rows.gate_ED, rows.slots_T, counter, choice(rows, spec), **options)

    return Router(run, always_given=True, run_few=None if deterministic else run_few)


def choice(rows: RouterInput, spec: RoutingSpec) -> Choice:
    """What the kernels that choose are told."""
    kernels: Any = importlib.import_module("pointsman.kernels.routing")
    made: Choice = kernels.Choice(
        top_k=spec.top_k,
        softmax=spec.score == "softmax",
        renormalize=spec.renormalize,
        scale=spec.scale,
        bias_E=rows.bias_E,
        given_TK=rows.given_TK,
        rows_CLK=None if rows.routes is None else rows.routes.rows_SLK,
        alike_C=None if rows.routes is None else rows.routes.alike_S,
        layer=rows.layer,
        own=rows.own,
    )
    return made


ROUTERS: dict[str, Router] = {
    "triton": _triton(deterministic=False),
    "reference": Router(_reference),
}
INVARIANT_ROUTERS: dict[str, Router] = {"triton": _triton(deterministic=True)}


def routers(*, invariant: bool) -> dict[str, Router]:
    """All, or those where what a row gets does not depend on the rows beside it."""
    return INVARIANT_ROUTERS if invariant else ROUTERS
