"""What runs the experts: the protocol, and the table of what `candidates` chooses among.

A runner that routes inside its kernel takes router logits; every other takes a Routing, which is what makes capture and replay
possible. Libraries are imported by the runners made of them, when one is chosen.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from pointsman.kernels.unsummed import Unsummed
from pointsman.moe.candidates import ROUTED_ALIKE
from pointsman.moe.cpu import CpuRunner
from pointsman.moe.deep_gemm import DeepGemmRunner
from pointsman.moe.flashinfer import CutlassRunner, RoutedTrtllmRunner, TrtllmRunner
from pointsman.moe.flashinfer_scalar import ScalarTrtllmRunner
from pointsman.moe.fused import FusedRunner
from pointsman.moe.grouped import RoutedRunner, TritonRunner
from pointsman.moe.reference import ReferenceRunner
from pointsman.moe.router import Router, RouterInput
from pointsman.moe.routing import Routing, RoutingSpec
from pointsman.moe.spec import Share
from pointsman.moe.weights import ExpertWeights


class MoERunner(Protocol):
    """Runs the experts of a layer over the rows of a step, which have been routed."""

    name: ClassVar[str]
    routes_itself: ClassVar[Literal[False]]

    def prepare(self, weights: ExpertWeights, dtype: torch.dtype) -> Any:
        """The checkpoint's weights in the form that `__call__` takes, which is the runner's own."""

    def __call__(self, x_TD: Tensor, routing: Routing, weights: Any) -> Tensor:
        """The weighted sum of each token's experts [T, D], in x's dtype."""


class RoutingRunner(Protocol):
    """Routes the rows of a layer and runs their experts, in one.

    Attributes:
        replays: uses the experts that rows are given, and counts what agrees with its own choice, as a router does.
    """

    name: ClassVar[str]
    routes_itself: ClassVar[Literal[True]]
    replays: ClassVar[bool]

    def prepare(self, weights: ExpertWeights, dtype: torch.dtype) -> Any:
        """The checkpoint's weights in the form that `__call__` takes, which is the runner's own."""

    def __call__(self, rows: RouterInput, spec: RoutingSpec, weights: Any) -> Tensor:
        """The weighted sum of each token's experts [T, D], in x's dtype; records the experts where `rows` says."""


AnyRunner = MoERunner | RoutingRunner

RUNNERS: dict[str, type[MoERunner] | type[RoutingRunner]] = {
    "routed": RoutedRunner,
    "fused": FusedRunner,
    "triton": TritonRunner,
    "deep_gemm": DeepGemmRunner,
    "flashinfer_cutlass": CutlassRunner,
    "flashinfer_trtllm_routed": RoutedTrtllmRunner,
    "flashinfer_trtllm": TrtllmRunner,
    "cpu": CpuRunner,
    "reference": ReferenceRunner,
}

# told to give a token the same bits in every batch
INVARIANT_RUNNERS: dict[str, type[RoutedRunner] | type[TritonRunner]] = {"routed": RoutedRunner, "triton": TritonRunner}

# these launch kernels of our own alone
OWN_RUNNERS = frozenset({"routed", "fused", "triton"})


def make_runner(name: str, *, deterministic: bool = False, share: Share | None = None, input_scales: bool = False) -> AnyRunner:
    """The runner of this name, which can serve and may say how weights are loaded for it.

    Args:
        share: where some of the experts are here; most runners need not know, for others' choices are ids below zero to them.
        input_scales: a matrix has one scale, and so has what it multiplies.
    """
    if deterministic:
        return INVARIANT_RUNNERS[name](deterministic=True)
    match name:
        case RoutedTrtllmRunner.name:
            return RoutedTrtllmRunner(share=share, up_first=True)
        case TrtllmRunner.name:
            return (ScalarTrtllmRunner if input_scales else TrtllmRunner)(share=share, up_first=True)
        case CutlassRunner.name:
            return CutlassRunner(up_first=True)
    return RUNNERS[name]()


def takes_up_first(runner: AnyRunner) -> bool:
    """Whether its experts' weights are to be loaded with the rows of up before those of gate."""
    return isinstance(runner, TrtllmRunner | ScalarTrtllmRunner | RoutedTrtllmRunner | CutlassRunner) and runner.up_first


def route_and_run(rows: RouterInput, spec: RoutingSpec, router: Router, runner: AnyRunner, weights: Any) -> Tensor | Unsummed:
    """What a layer's experts add to these rows [T, D]: the router routes them, unless the runner does. A sum may be left to who adds it."""
    if runner.routes_itself:
        return runner(rows, spec, weights)
    if router.run_few is not None and rows.counter is not None and isinstance(runner, RoutedRunner):
        wanted = runner.wanted(len(rows.x_TD), spec.top_k, weights)
        if wanted is not None:
            return runner.run_few(router.run_few(rows, spec, wanted), weights)
    if isinstance(runner, RoutedRunner) and len(rows.x_TD):
        return runner.unsummed(rows.x_TD, router.run(rows, spec), weights)
    return runner(rows.x_TD, router.run(rows, spec), weights)


def counter_for(runner: AnyRunner, device: torch.device) -> Tensor | None:
    """What a router counts with that routes few rows for this runner; None where it does not."""
    return runner.counters(device) if isinstance(runner, RoutedRunner) else None


def reason_against_replay(runner: AnyRunner) -> str | None:
    """Why experts cannot be given to this runner, or None."""
    if not runner.routes_itself or runner.replays:
        return None
    other = ROUTED_ALIKE[runner.name]
    return f"the MoE runner {runner.name!r} chooses experts inside its kernel; with --moe-runner-backend {other} they can be given"
