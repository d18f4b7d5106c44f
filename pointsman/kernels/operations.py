"""The implementations that each operation has: tables of functions, by the names under which `candidates` chooses among them.

`linear(x_TK, weight) -> y_TN`. `prepare` turns a checkpoint's weight into what the implementation multiplies with. One that takes
`Quantized` rows too says so (`takes_quantized`); whoever norms the rows before it can then quantize them in the same kernel.

`glue` is what stands between the matrices of a layer: `norm(x_TD, delta_TD | None, weight_D, epsilon, quantize) -> (x + delta, normed)`
and `qkv_post(qkv_TN, q_weight | None, k_weight | None, epsilon, cos_TR, sin_TR, k_PHSC, v_PHSC, slots_T) -> q_TQC`, which norms and
rotates q and k and writes the cache; `activate(gate_up_TF, quantize) -> silu(gate) * up`.

Attention is two functions. `plan(spans, num_rows, shape, device)` is called once a step, on the host, with the runs of rows that share a
lane; what it answers is the implementation's own and goes unread to
`run(q_TQC, k_PHSC, v_PHSC, plan, positions_T, page_table_LP, scale) -> out_TQC`, once a layer. The reference's plan is the spans. That of
`triton` is tensors on the device, and its `run` reads nothing from the host: a step can be captured in a CUDA graph with a plan whose
tensors are written anew for each replay. Such a plan is made of arrays of fixed sizes (`FixedPlan`). A library that plans by itself has an
object that keeps its plans instead (`Planner`), one for an engine.

The Triton kernels are imported where they are chosen, and nowhere else: this module imports without Triton.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from pointsman.kernels import reference
from pointsman.kernels.candidates import AttentionShape, StepBounds
from pointsman.kernels.weight import Quantized, Weight


@dataclass(frozen=True)
class Linear:
    """A way to multiply with a weight matrix.

    Attributes:
        prepare: of a weight, for rows of this dtype.
        takes_quantized: `run` takes `Quantized` rows for a weight that is quantized.
    """

    prepare: Callable[[Weight, torch.dtype], Any]
    run: Callable[[Any, Any], Tensor]
    takes_quantized: bool = False


@dataclass(frozen=True)
class Glue:
    """A way to do what stands between the matrices of a layer.

    Attributes:
        takes_mailbox: `norm` and `qkv_post` take one more argument, a `mailbox.Mailbox`, and then sum over ranks.
        takes_unsummed: the `delta_TD` of `norm` may be `Unsummed`.
    """

    norm: Callable[..., tuple[Tensor, Any]]
    qkv_post: Callable[..., Tensor]
    activate: Callable[[Tensor, bool], Any]
    takes_mailbox: bool = False
    takes_unsummed: bool = False


@dataclass(frozen=True)
class FixedPlan:
    """How a plan is made whose sizes depend on the numbers of rows and lanes alone.

    Attributes:
        arrays: what the host writes, given spans, number of rows (those behind the last span are padding), most lanes and the shape.
        of: the plan that those arrays are once they are on the device.
    """

    arrays: Callable[[Sequence[reference.Span], int, int, AttentionShape], list[npt.NDArray[Any]]]
    of: Callable[[Sequence[Tensor], AttentionShape], Any]


class Planner(Protocol):
    """Plans steps and keeps the memory that its plans are in, at places that graphs may hold."""

    def requests(self, spans: Sequence[reference.Span], lengths: Sequence[int], page_table_LP: npt.NDArray[Any], num_rows: int) -> Any:
        """What `plan` wants of a step of these spans, of sequences of so many positions, padded to so many rows.

        Its int32 array `pages_N` is what the device must be told.
        """

    def plan(self, requests: Any, pages_N: Tensor) -> Any:
        """The plan of a step, before it is launched."""


@dataclass(frozen=True)
class Attention:
    """A way to attend over the paged cache.

    Attributes:
        plan: of a step that is not captured; None where a planner plans every step.
        fixed: how to plan for a step that is captured, without a planner; None where `run` reads from the host.
        planner: makes what plans every step, for rows of one type over pages of another; None where there is none.
        run_quantize: `run` that answers `Quantized` rows, for heads of 128 channels; None where there is none.
    """

    plan: Callable[[Sequence[reference.Span], int, AttentionShape, torch.device], Any] | None
    run: Callable[[Tensor, Tensor, Tensor, Any, Tensor, Tensor, float], Tensor]
    run_quantize: Callable[[Tensor, Tensor, Tensor, Any, Tensor, Tensor, float], Quantized] | None = None
    fixed: FixedPlan | None = None
    planner: Callable[[AttentionShape, StepBounds, torch.dtype, torch.dtype, torch.device], Planner] | None = None

    @property
    def reads_host(self) -> bool:
        """`run` reads its plan from the host, so that no step can be captured."""
        return self.fixed is None and self.planner is None


def _as_stored(weight: Weight, dtype: torch.dtype) -> Weight:
    return weight


def _dequantized(weight: Weight, dtype: torch.dtype) -> Weight:
    return Weight(weight.dequantize(dtype), parts=weight.parts)


def _plain_linear(x_TK: Tensor, weight: Weight) -> Tensor:
    return F.linear(x_TK, weight.data)


def _reference_norm(x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, epsilon: float, quantize: bool) -> tuple[Tensor, Tensor]:
    assert not quantize, "no linear beside the reference's norm takes quantized rows"
    sum_TD = x_TD if delta_TD is None else x_TD + delta_TD
    return sum_TD, reference.rms_norm(sum_TD, weight_D, epsilon)


def _reference_activate(gate_up_TF: Tensor, quantize: bool) -> Tensor:
    assert not quantize, "no linear beside the reference's activation takes quantized rows"
    return reference.silu_and_mul(gate_up_TF).to(gate_up_TF.dtype)


def _spans(spans: Sequence[reference.Span], num_rows: int, shape: AttentionShape, device: torch.device) -> Sequence[reference.Span]:
    return spans


def _later(module: str, function: str, **fixed: Any) -> Callable[..., Any]:
    """A function of a module of this package that is imported when it is first called."""

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(f"{__package__}.{module}"), function)(*args, **fixed)

    return call


def _triton_linear(*, invariant: bool) -> Linear:
    prepare, run = _later("block_gemm", "prepare", invariant=invariant), _later("block_gemm", "linear_or_torch")
    return Linear(prepare, run, takes_quantized=True)


def _triton_attention(*, invariant: bool) -> Attention:
    plan, run = _later("paged_attention", "plan", uniform=invariant), _later("paged_attention", "attention")
    fixed = FixedPlan(_later("paged_attention", "fixed_tiles", uniform=invariant), _later("paged_attention", "plan_of"))
    return Attention(plan, run, _later("paged_attention", "attention_quantize"), fixed)


LINEARS: dict[str, Linear] = {
    "triton": _triton_linear(invariant=False),
    "cpu": Linear(_dequantized, _plain_linear),
    "reference": Linear(_as_stored, reference.linear),
}
ATTENTIONS: dict[str, Attention] = {
    "triton": _triton_attention(invariant=False),
    "flashinfer": Attention(None, _later("flashinfer_attention", "attention"), planner=_later("flashinfer_attention", "Planner")),
    "reference": Attention(_spans, reference.attention),
}
GLUES: dict[str, Glue] = {
    "triton": Glue(_later("norm_quant", "norm"), _later("qkv_post", "qkv_post"), _later("gated", "activate"), True, True),
    "reference": Glue(_reference_norm, reference.qkv_post, _reference_activate),
}
# What a row gets does not depend on the rows beside it, not even in the last bit.
INVARIANT_LINEARS: dict[str, Linear] = {"triton": _triton_linear(invariant=True)}
INVARIANT_ATTENTIONS: dict[str, Attention] = {"triton": _triton_attention(invariant=True)}


def linears(*, invariant: bool) -> dict[str, Linear]:
    """Those of which `invariant` may be asked, or all."""
    return INVARIANT_LINEARS if invariant else LINEARS


def attentions(*, invariant: bool) -> dict[str, Attention]:
    """Those of which `invariant` may be asked, or all."""
    return INVARIANT_ATTENTIONS if invariant else ATTENTIONS
