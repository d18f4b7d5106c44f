"""Which implementations each operation has, and the choice among them.

An operation has one signature and a table of implementations. Each says why it cannot serve on a device of this description, or None;
the choice is made once, at start-up, before any weight is touched. Who names an implementation gets that one or a ValueError with every
reason; "auto" takes the first that can serve and logs it.

`linear(x_TK, weight) -> y_TN`. `prepare` turns a checkpoint's weight into what the implementation multiplies with. One that takes
`Quantized` rows too says so (`takes_quantized`); whoever norms the rows before it can then quantize them in the same kernel.

`glue` is what stands between the matrices of a layer: `norm(x_TD, delta_TD | None, weight_D, epsilon, quantize) -> (x + delta, normed)`
and `qkv_post(qkv_TN, q_weight | None, k_weight | None, epsilon, cos_TR, sin_TR, k_PHSC, v_PHSC, slots_T) -> q_TQC`, which norms and
rotates q and k and writes the cache; `activate(gate_up_TF, quantize) -> silu(gate) * up`.

Attention is two functions. `plan(spans, num_rows, shape, device)` is called once a step, on the host, with the runs of rows that share a
lane; what it answers is the implementation's own and goes unread to
`run(q_TQC, k_PHSC, v_PHSC, plan, positions_T, page_table_LP, scale) -> out_TQC`, once a layer. The reference's plan is the spans. That of
`triton` is tensors on the device, and its `run` reads nothing from the host: a step can be captured in a CUDA graph with a plan whose
tensors are written anew for each replay. Such a plan is made of arrays of fixed sizes (`FixedPlan`).

The Triton kernels are imported where they are chosen, and nowhere else: this package imports without Triton.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from pointsman.kernels import reference, triton_support
from pointsman.kernels.choice import Choice
from pointsman.kernels.device import Device
from pointsman.kernels.weight import Quantized, Weight

TRITON_CAPABILITY = (8, 9)
TRITON_HEAD_DIMS = (16, 32, 64, 128, 256)
TRITON_MOST_HEADS = 16

Block = tuple[int, int] | None


@dataclass(frozen=True)
class Linear:
    """A way to multiply with a weight matrix.

    Attributes:
        unsupported: given the blocks of FP8 weights, None where there are none.
        prepare: of a weight, for rows of this dtype.
        takes_quantized: `run` takes `Quantized` rows for a weight that is quantized.
    """

    unsupported: Callable[[Device, torch.dtype, Block], str | None]
    prepare: Callable[[Weight, torch.dtype], Any]
    run: Callable[[Any, Any], Tensor]
    takes_quantized: bool = False


@dataclass(frozen=True)
class Glue:
    """A way to do what stands between the matrices of a layer.

    Attributes:
        takes_mailbox: `norm` and `qkv_post` take one more argument, a `mailbox.Mailbox`, and then sum over ranks.
    """

    unsupported: Callable[[Device, torch.dtype], str | None]
    norm: Callable[..., tuple[Tensor, Any]]
    qkv_post: Callable[..., Tensor]
    activate: Callable[[Tensor, bool], Any]
    takes_mailbox: bool = False


class AttentionShape(NamedTuple):
    """The sizes that an implementation of attention may depend on, of what one device holds."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class FixedPlan:
    """How a plan is made whose sizes depend on the numbers of rows and lanes alone.

    Attributes:
        arrays: what the host writes, given spans, number of rows (those behind the last span are padding), most lanes and the shape.
        of: the plan that those arrays are once they are on the device.
    """

    arrays: Callable[[Sequence[reference.Span], int, int, AttentionShape], list[npt.NDArray[Any]]]
    of: Callable[[Sequence[Tensor], AttentionShape], Any]


@dataclass(frozen=True)
class Attention:
    """A way to attend over the paged cache.

    Attributes:
        fixed: how to plan for a step that is captured; None where `run` reads from the host.
        run_quantize: `run` that answers `Quantized` rows, for heads of 128 channels; None where there is none.
    """

    unsupported: Callable[[Device, torch.dtype, AttentionShape], str | None]
    plan: Callable[[Sequence[reference.Span], int, AttentionShape, torch.device], Any]
    run: Callable[[Tensor, Tensor, Tensor, Any, Tensor, Tensor, float], Tensor]
    run_quantize: Callable[[Tensor, Tensor, Tensor, Any, Tensor, Tensor, float], Quantized] | None = None
    fixed: FixedPlan | None = None


def _anywhere(*what: Any) -> str | None:
    return None


def _needs_cpu(device: Device, dtype: torch.dtype, block: Block) -> str | None:
    return None if device.type == "cpu" else f"it is made for CPUs; the device is {device.type}"


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


def _triton_unsupported(device: Device, dtype: torch.dtype) -> str | None:
    reason = triton_support.reason_against(device, needs=TRITON_CAPABILITY)
    if reason is None and dtype != torch.bfloat16:
        return f"it computes in bfloat16; the model computes in {str(dtype).removeprefix('torch.')}"
    return reason


def _triton_linear_unsupported(device: Device, dtype: torch.dtype, block: Block) -> str | None:
    if block not in (None, (128, 128)):
        return f"it takes FP8 weights in blocks of 128 x 128; this model has {block[0]} x {block[1]}"
    return _triton_unsupported(device, dtype)


def _triton_attention_unsupported(device: Device, dtype: torch.dtype, shape: AttentionShape) -> str | None:
    if shape.head_dim not in TRITON_HEAD_DIMS:
        return f"it takes heads of {', '.join(map(str, TRITON_HEAD_DIMS))} channels; this model has {shape.head_dim}"
    if (group := shape.num_heads // shape.num_kv_heads) > TRITON_MOST_HEADS:
        return f"it takes up to {TRITON_MOST_HEADS} query heads per key/value head; this model has {group}"
    return _triton_unsupported(device, dtype)


def _later(module: str, function: str, **fixed: Any) -> Callable[..., Any]:
    """A function of a module of this package that is imported when it is first called."""

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(f"{__name__}.{module}"), function)(*args, **fixed)

    return call


def _triton_linear(*, invariant: bool) -> Linear:
    prepare, run = _later("block_gemm", "prepare", invariant=invariant), _later("block_gemm", "linear_or_torch")
    return Linear(_triton_linear_unsupported, prepare, run, takes_quantized=True)


def _triton_attention(*, invariant: bool) -> Attention:
    plan, run = _later("paged_attention", "plan", uniform=invariant), _later("paged_attention", "attention")
    fixed = FixedPlan(_later("paged_attention", "fixed_tiles", uniform=invariant), _later("paged_attention", "plan_of"))
    return Attention(_triton_attention_unsupported, plan, run, _later("paged_attention", "attention_quantize"), fixed)


LINEARS: dict[str, Linear] = {
    "triton": _triton_linear(invariant=False),
    "cpu": Linear(_needs_cpu, _dequantized, _plain_linear),
    "reference": Linear(_anywhere, _as_stored, reference.linear),
}
ATTENTIONS: dict[str, Attention] = {
    "triton": _triton_attention(invariant=False),
    "reference": Attention(_anywhere, _spans, reference.attention),
}
GLUES: dict[str, Glue] = {
    "triton": Glue(_triton_unsupported, _later("norm_quant", "norm"), _later("qkv_post", "qkv_post"), _later("gated", "activate"), True),
    "reference": Glue(_anywhere, _reference_norm, reference.qkv_post, _reference_activate),
}
# What a row gets does not depend on the rows beside it, not even in the last bit.
INVARIANT_LINEARS: dict[str, Linear] = {"triton": _triton_linear(invariant=True)}
INVARIANT_ATTENTIONS: dict[str, Attention] = {"triton": _triton_attention(invariant=True)}
VARIES = "on a GPU a row's bits depend there on the rows beside it"


def linears(*, invariant: bool) -> dict[str, Linear]:
    """Those of which `invariant` may be asked, or all."""
    return INVARIANT_LINEARS if invariant else LINEARS


def attentions(*, invariant: bool) -> dict[str, Attention]:
    """Those of which `invariant` may be asked, or all."""
    return INVARIANT_ATTENTIONS if invariant else ATTENTIONS


def linear_choice(wanted: str, *, device: Device, dtype: torch.dtype, block: Block = None, invariant: bool = False) -> Choice:
    """The choice of what multiplies with weight matrices."""
    table = linears(invariant=invariant)
    reasons = {name: table[name].unsupported(device, dtype, block) if name in table else VARIES for name in LINEARS}
    return Choice("FP8 linear backend", wanted, reasons)


def attention_choice(wanted: str, *, device: Device, dtype: torch.dtype, shape: AttentionShape, invariant: bool = False) -> Choice:
    """The choice of what attends."""
    table = attentions(invariant=invariant)
    reasons = {name: table[name].unsupported(device, dtype, shape) if name in table else VARIES for name in ATTENTIONS}
    reasons["flashinfer"] = "attention is by kernels of our own alone, on any device"
    return Choice("attention backend", wanted, reasons)


def glue_choice(*, device: Device, dtype: torch.dtype) -> Choice:
    """The choice of glue; a row's bits never depend there on the rows beside it."""
    return Choice("layer glue", "auto", {name: entry.unsupported(device, dtype) for name, entry in GLUES.items()})
