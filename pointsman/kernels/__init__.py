"""Which implementations each operation has, and the choice among them.

An operation has one signature and a table of implementations. Each says why it cannot serve, or None; the choice is made once,
at start-up, before any weight is touched. Who names an implementation gets that one or a ValueError with every reason; "auto"
takes the first that can serve and logs it.

`linear(x_TK, weight) -> y_TN`. `prepare` turns a checkpoint's weight into what the implementation multiplies with.

Attention is two functions. `plan(spans, num_rows, shape, device)` is called once a step, on the host, with the runs of rows that share a
lane; what it answers is the implementation's own and goes unread to
`run(q_TQC, k_PHSC, v_PHSC, plan, positions_T, page_table_LP, scale) -> out_TQC`, once a layer. The reference's plan is the spans. That of
`triton` is tensors on the device, and its `run` reads nothing from the host: a step can be captured in a CUDA graph with a plan whose
tensors are written anew for each replay (`paged_attention` has the pieces: how much room, which tiles, in which order).

The Triton kernels are imported where they are chosen, and nowhere else: this package imports without Triton.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pointsman.kernels import reference, triton_support
from pointsman.kernels.weight import Weight

logger = logging.getLogger(__name__)

TRITON_CAPABILITY = (8, 9)
TRITON_HEAD_DIMS = (16, 32, 64, 128, 256)
TRITON_MOST_HEADS = 16

Unsupported = Callable[[torch.device, torch.dtype], str | None]


@dataclass(frozen=True)
class Linear:
    """A way to multiply with a weight matrix."""

    unsupported: Unsupported
    prepare: Callable[[Weight, torch.dtype], Weight]
    run: Callable[[Tensor, Weight], Tensor]


class AttentionShape(NamedTuple):
    """The sizes that an implementation of attention may depend on, of what one device holds."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Attention:
    """A way to attend over the paged cache."""

    unsupported: Callable[[torch.device, torch.dtype, AttentionShape], str | None]
    plan: Callable[[Sequence[reference.Span], int, AttentionShape, torch.device], Any]
    run: Callable[[Tensor, Tensor, Tensor, Any, Tensor, Tensor, float], Tensor]


def _anywhere(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def _needs_cpu(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if device.type == "cpu" else f"it is made for CPUs; the device is {device.type}"


def _as_stored(weight: Weight, dtype: torch.dtype) -> Weight:
    return weight


def _dequantized(weight: Weight, dtype: torch.dtype) -> Weight:
    return Weight(weight.dequantize(dtype), parts=weight.parts)


def _plain_linear(x_TK: Tensor, weight: Weight) -> Tensor:
    return F.linear(x_TK, weight.data)


def _spans(spans: Sequence[reference.Span], num_rows: int, shape: AttentionShape, device: torch.device) -> Sequence[reference.Span]:
    return spans


def _triton_attention_unsupported(device: torch.device, dtype: torch.dtype, shape: AttentionShape) -> str | None:
    reason = triton_support.reason_against(device, needs=TRITON_CAPABILITY)
    if reason is not None:
        return reason
    if dtype != torch.bfloat16:
        return f"it computes in bfloat16; the model computes in {str(dtype).removeprefix('torch.')}"
    if shape.head_dim not in TRITON_HEAD_DIMS:
        return f"it takes heads of {', '.join(map(str, TRITON_HEAD_DIMS))} channels; this model has {shape.head_dim}"
    if (group := shape.num_heads // shape.num_kv_heads) > TRITON_MOST_HEADS:
        return f"it takes up to {TRITON_MOST_HEADS} query heads per key/value head; this model has {group}"
    return None


def _triton_plan(spans: Sequence[reference.Span], num_rows: int, shape: AttentionShape, device: torch.device) -> Any:
    from pointsman.kernels import paged_attention  # noqa: PLC0415 - Triton is not everywhere

    return paged_attention.plan(spans, num_rows, num_heads=shape.num_heads, num_kv_heads=shape.num_kv_heads, device=device)


def _triton_attention(
    q_TQC: Tensor, k_PHSC: Tensor, v_PHSC: Tensor, plan: Any, positions_T: Tensor, page_table_LP: Tensor, scale: float
) -> Tensor:
    from pointsman.kernels import paged_attention  # noqa: PLC0415

    return paged_attention.attention(q_TQC, k_PHSC, v_PHSC, plan, positions_T, page_table_LP, scale)


LINEARS: dict[str, Linear] = {
    "cpu": Linear(_needs_cpu, _dequantized, _plain_linear),
    "reference": Linear(_anywhere, _as_stored, reference.linear),
}
ATTENTIONS: dict[str, Attention] = {
    "triton": Attention(_triton_attention_unsupported, _triton_plan, _triton_attention),
    "reference": Attention(lambda device, dtype, shape: None, _spans, reference.attention),
}


def choose_linear(wanted: str, *, device: torch.device, dtype: torch.dtype) -> Linear:
    """The implementation of `linear` by name, or the first that can serve for "auto"."""
    reasons = {name: entry.unsupported(device, dtype) for name, entry in LINEARS.items()}
    return LINEARS[choose("FP8 linear backend", wanted, reasons)]


def choose_attention(wanted: str, *, device: torch.device, dtype: torch.dtype, shape: AttentionShape) -> Attention:
    """The implementation of `attention` by name, or the first that can serve for "auto"."""
    reasons = {name: entry.unsupported(device, dtype, shape) for name, entry in ATTENTIONS.items()}
    reasons["flashinfer"] = "it needs a CUDA device" if device.type != "cuda" else "this version does not have it yet"
    return ATTENTIONS[choose("attention backend", wanted, reasons)]


def choose(what: str, wanted: str, reasons: Mapping[str, str | None]) -> str:
    """Resolve a name given each candidate's reason against it; "auto" takes the first without one.

    Raises:
        ValueError: the name is unknown, or there is a reason against it; the message has the reasons and what would work.
    """
    fine = [name for name, reason in reasons.items() if reason is None]
    against = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason is not None)
    if wanted == "auto" and fine:
        logger.info("%s: %s (auto%s)", what, fine[0], f"; {against}" if against else "")
        return fine[0]
    if wanted == "auto":
        raise ValueError(f"no {what} can serve here ({against})")
    if wanted not in reasons:
        raise ValueError(f"unknown {what} {wanted!r}; known are auto, {', '.join(reasons)}")
    if reasons[wanted] is not None:
        raise ValueError(f"{what} {wanted!r} cannot serve here: {reasons[wanted]}; these can: {', '.join(fine) or 'none'}")
    return wanted
