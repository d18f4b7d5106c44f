"""What could route a layer's rows, and what could run its experts: names, and why each cannot serve. No tensors, no library, no device.

`router.ROUTERS` and `runner.RUNNERS` have what runs under these names. Whether a library is there is asked of the installation.
"""

from __future__ import annotations

from collections.abc import Callable

from pointsman.kernels import triton_support
from pointsman.kernels.candidates import TRITON_CAPABILITY, VARIES
from pointsman.kernels.choice import Choice
from pointsman.kernels.device import Device
from pointsman.kernels.library import reason_against_library
from pointsman.moe import flashinfer_limits as flashinfer
from pointsman.moe.spec import ExpertForm, RoutingSpec

BLOCK = 128
MOST_EXPERTS = 1024  # what one program of the arrangement counts
DEEP_GEMM = ("sgl-deep-gemm", "deep-gemm")


def reason_against_form(spec: RoutingSpec, form: ExpertForm, dtype: str) -> str | None:
    """What the grouped kernels were not written for, or None."""
    if dtype != "bfloat16":
        return f"it computes in bfloat16; the dtype is {dtype}"
    if form.block not in (None, (BLOCK, BLOCK)):
        return f"it multiplies FP8 in blocks of {BLOCK}x{BLOCK}; the checkpoint's are {form.block[0]}x{form.block[1]}"
    if form.hidden % BLOCK or form.width % BLOCK:
        return f"hidden size and expert width must be multiples of {BLOCK}; they are {form.hidden} and {form.width}"
    if spec.num_experts > MOST_EXPERTS:
        return f"it sorts by at most {MOST_EXPERTS} experts; the model has {spec.num_experts}"
    return None


def _triton_router(spec: RoutingSpec, device: Device, dtype: str) -> str | None:
    if spec.top_groups < spec.num_groups:
        return "it chooses among all experts; this model limits a token to groups of them"
    if dtype != "bfloat16":
        return f"it takes bfloat16; the model computes in {dtype}"
    return triton_support.reason_against(device, needs=TRITON_CAPABILITY)


def _anywhere(*what: object) -> str | None:
    return None


def _cpu(spec: RoutingSpec, form: ExpertForm, device: Device, dtype: str) -> str | None:
    return None if device.type == "cpu" else f"it is made for CPUs; the device is {device.type}"


def _triton(spec: RoutingSpec, form: ExpertForm, device: Device, dtype: str) -> str | None:
    return triton_support.reason_against(device, needs=TRITON_CAPABILITY) or reason_against_form(spec, form, dtype)


def _routed(spec: RoutingSpec, form: ExpertForm, device: Device, dtype: str) -> str | None:
    return triton_support.reason_against(device, needs=(9, 0), exactly=True) or reason_against_form(spec, form, dtype)


def _fused(spec: RoutingSpec, form: ExpertForm, device: Device, dtype: str) -> str | None:
    return _routed(spec, form, device, dtype) or _triton_router(spec, device, dtype)


def _deep_gemm(spec: RoutingSpec, form: ExpertForm, device: Device, dtype: str) -> str | None:
    if form.block is None:
        return "it multiplies FP8; the checkpoint's experts are plain"
    return _routed(spec, form, device, dtype) or reason_against_library("deep_gemm", DEEP_GEMM, "deepgemm")


# in the order in which "auto" asks them
ROUTERS: dict[str, Callable[[RoutingSpec, Device, str], str | None]] = {"triton": _triton_router, "reference": _anywhere}
RUNNERS: dict[str, Callable[[RoutingSpec, ExpertForm, Device, str], str | None]] = {
    "routed": _routed,
    "fused": _fused,
    "triton": _triton,
    "deep_gemm": _deep_gemm,
    "flashinfer_cutlass": flashinfer.reason_against_cutlass,
    "flashinfer_trtllm_routed": flashinfer.reason_against_trtllm_routed,
    "flashinfer_trtllm": flashinfer.reason_against_trtllm,
    "cpu": _cpu,
    "reference": _anywhere,
}

# what a token gets does not depend there on the tokens beside it, not even in the last bit
INVARIANT_ROUTERS = frozenset({"triton"})
INVARIANT_RUNNERS = frozenset({"routed", "triton"})

# these ask the device what the rows' experts are, so a step that has them cannot be captured in a CUDA graph
WAITING_RUNNERS = frozenset({"cpu", "reference"})

# of a checkpoint's scales of activations these make use
STATIC_RUNNERS = frozenset({"flashinfer_trtllm"})

# the library times kernels of these at start-up
TUNED_RUNNERS = frozenset({"flashinfer_trtllm", "flashinfer_trtllm_routed"})

# for each that chooses experts inside its kernel, the one of its kind that is given them
ROUTED_ALIKE = {"fused": "routed", "flashinfer_trtllm": "flashinfer_trtllm_routed"}


def unsupported(name: str, spec: RoutingSpec, form: ExpertForm, device: Device, dtype: str) -> str | None:
    """Why the runner of this name cannot serve, or None."""
    if form.some and name == "fused":
        return "it chooses among all experts inside its kernel, and runs them; with --ep a rank has some of them"
    return RUNNERS[name](spec, form, device, dtype)


def runner_choice(wanted: str, spec: RoutingSpec, form: ExpertForm, *, device: Device, dtype: str, deterministic: bool = False) -> Choice:
    """The choice of what runs the experts.

    Args:
        deterministic: what a token gets must not depend, not even in the last bit, on how many others there are.
    """
    reasons = {name: unsupported(name, spec, form, device, dtype) for name in RUNNERS}
    if deterministic:
        reasons |= {name: VARIES for name, reason in reasons.items() if reason is None and name not in INVARIANT_RUNNERS}
    return Choice("MoE runner", wanted, reasons)


def router_choice(spec: RoutingSpec, *, device: Device, dtype: str, invariant: bool = False) -> Choice:
    """The choice of what routes; `invariant`: what a row gets does not depend on the rows beside it."""
    reasons = {name: why(spec, device, dtype) if name in INVARIANT_ROUTERS or not invariant else VARIES for name, why in ROUTERS.items()}
    return Choice("router", "auto", reasons)
