"""What runs the experts: the protocol, the table, and the choice.

A runner that routes inside its kernel takes router logits; every other takes a Routing, which is what makes capture and replay
possible. Libraries are imported by the runners made of them, when one is chosen: what is asked of all is only whether they could serve.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from pointsman.kernels import VARIES
from pointsman.kernels.choice import Choice
from pointsman.kernels.device import Device
from pointsman.moe.cpu import CpuRunner
from pointsman.moe.deep_gemm import DeepGemmRunner
from pointsman.moe.flashinfer import CutlassRunner, RoutedTrtllmRunner, TrtllmRunner
from pointsman.moe.fused import FusedRunner
from pointsman.moe.grouped import RoutedRunner, TritonRunner
from pointsman.moe.reference import ReferenceRunner
from pointsman.moe.router import RouterInput
from pointsman.moe.routing import Routing, RoutingSpec
from pointsman.moe.weights import ExpertForm, ExpertWeights


class MoERunner(Protocol):
    """Runs the experts of a layer over the rows of a step, which have been routed."""

    name: ClassVar[str]
    routes_itself: ClassVar[Literal[False]]

    @staticmethod
    def unsupported(spec: RoutingSpec, form: ExpertForm, device: Device, dtype: torch.dtype) -> str | None:
        """Why it cannot serve, or None."""

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

    @staticmethod
    def unsupported(spec: RoutingSpec, form: ExpertForm, device: Device, dtype: torch.dtype) -> str | None:
        """Why it cannot serve, or None."""

    def prepare(self, weights: ExpertWeights, dtype: torch.dtype) -> Any:
        """The checkpoint's weights in the form that `__call__` takes, which is the runner's own."""

    def __call__(self, rows: RouterInput, spec: RoutingSpec, weights: Any) -> Tensor:
        """The weighted sum of each token's experts [T, D], in x's dtype; records the experts where `rows` says."""


AnyRunner = MoERunner | RoutingRunner

# in the order in which "auto" asks them
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

# these can be told to give a token the same bits in every batch
INVARIANT_RUNNERS: dict[str, type[RoutedRunner] | type[TritonRunner]] = {"routed": RoutedRunner, "triton": TritonRunner}

# these ask the device what the rows' experts are, so a step that has them cannot be captured in a CUDA graph
WAITING_RUNNERS = frozenset({"cpu", "reference"})

# for each that cannot be given experts, the one of its kind that can
ROUTED_ALIKE = {"fused": "routed", "flashinfer_trtllm": "flashinfer_trtllm_routed"}


def unsupported(name: str, spec: RoutingSpec, form: ExpertForm, device: Device, dtype: torch.dtype) -> str | None:
    """Why the runner of this name cannot serve, or None."""
    if form.some and RUNNERS[name].routes_itself:
        return "it chooses among all experts inside its kernel; with --ep a rank has some of them"
    if form.some and name.startswith("flashinfer"):
        return "with --ep a rank has some of the experts, and this version does not tell the library which"
    return RUNNERS[name].unsupported(spec, form, device, dtype)


def runner_choice(
    wanted: str, spec: RoutingSpec, form: ExpertForm, *, device: Device, dtype: torch.dtype, deterministic: bool = False
) -> Choice:
    """The choice of what runs the experts.

    Args:
        deterministic: what a token gets must not depend, not even in the last bit, on how many others there are.
    """
    reasons = {name: unsupported(name, spec, form, device, dtype) for name in RUNNERS}
    if deterministic:
        reasons |= {name: VARIES for name, reason in reasons.items() if reason is None and name not in INVARIANT_RUNNERS}
    return Choice("MoE runner", wanted, reasons)


def make_runner(name: str, *, deterministic: bool = False) -> AnyRunner:
    """The runner of this name, which can serve."""
    return INVARIANT_RUNNERS[name](deterministic=True) if deterministic else RUNNERS[name]()


def reason_against_replay(runner: AnyRunner) -> str | None:
    """Why experts cannot be given to this runner, or None."""
    if not runner.routes_itself or runner.replays:
        return None
    other = ROUTED_ALIKE[runner.name]
    return f"the MoE runner {runner.name!r} chooses experts inside its kernel; with --moe-runner-backend {other} they can be given"
