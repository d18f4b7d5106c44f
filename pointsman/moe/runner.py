"""What runs the experts: the protocol, the table, and the choice.

A runner that routes inside its kernel takes router logits; every other takes a Routing, which is what makes capture and replay
possible. Runners of `config.MOE_RUNNERS` that this version does not have are refused with what they need, so that the answer
to a name is never "unknown" when the name is right.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from torch import Tensor

from pointsman.config import MOE_RUNNERS
from pointsman.kernels import choose
from pointsman.moe.cpu import CpuRunner
from pointsman.moe.reference import ReferenceRunner
from pointsman.moe.routing import Routing, RoutingSpec
from pointsman.moe.weights import ExpertWeights


class MoERunner(Protocol):
    """Runs the experts of a layer over the rows of a step."""

    name: ClassVar[str]
    routes_itself: ClassVar[bool]

    @staticmethod
    def unsupported(spec: RoutingSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot serve, or None."""

    def prepare(self, weights: ExpertWeights, dtype: torch.dtype) -> ExpertWeights:
        """The checkpoint's weights in the form that `__call__` takes."""

    def __call__(self, x_TD: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
        """The weighted sum of each token's experts [T, D], in x's dtype."""


RUNNERS: dict[str, type[MoERunner]] = {"cpu": CpuRunner, "reference": ReferenceRunner}

_NEEDS = {
    "triton": "a CUDA device (sm_80 or later)",
    "fused": "a CUDA device (sm_90)",
    "routed": "a CUDA device (sm_90)",
    "deep_gemm": "a CUDA device (sm_90) and the deep_gemm library",
    "flashinfer_trtllm": "a CUDA device (sm_100) and the flashinfer library",
    "flashinfer_trtllm_routed": "a CUDA device (sm_100) and the flashinfer library",
    "flashinfer_cutlass": "a CUDA device (sm_90) and the flashinfer library",
}


def unsupported(name: str, spec: RoutingSpec, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the runner of this name cannot serve, or None."""
    if name in RUNNERS:
        return RUNNERS[name].unsupported(spec, device, dtype)
    if device.type != "cuda":
        return f"it needs {_NEEDS[name]}; the device is {device.type}"
    return "this version does not have it yet"


def choose_runner(wanted: str, spec: RoutingSpec, *, device: torch.device, dtype: torch.dtype) -> MoERunner:
    """The runner of this name, or for "auto" the first that can serve.

    Raises:
        ValueError: the name is unknown or cannot serve; the message has the reasons and what would work.
    """
    names = sorted((name for name in MOE_RUNNERS if name != "auto"), key=lambda name: name == "reference")
    reasons = {name: unsupported(name, spec, device, dtype) for name in names}
    return RUNNERS[choose("MoE runner", wanted, reasons)]()
