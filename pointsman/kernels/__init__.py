"""Which implementations each operation has, and the choice among them.

An operation has one signature and a table of implementations. Each says why it cannot serve, or None; the choice is made once,
at start-up, before any weight is touched. Who names an implementation gets that one or a ValueError with every reason; "auto"
takes the first that can serve and logs it.

`linear(x_TK, weight) -> y_TN`. `prepare` turns a checkpoint's weight into what the implementation multiplies with.
`attention(q_TQC, k_PHSC, v_PHSC, spans, positions_T, page_table_LP, scale) -> out_TQC`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pointsman.kernels import reference
from pointsman.kernels.weight import Weight

logger = logging.getLogger(__name__)

Unsupported = Callable[[torch.device, torch.dtype], str | None]


@dataclass(frozen=True)
class Linear:
    """A way to multiply with a weight matrix."""

    unsupported: Unsupported
    prepare: Callable[[Weight, torch.dtype], Weight]
    run: Callable[[Tensor, Weight], Tensor]


@dataclass(frozen=True)
class Attention:
    """A way to attend over the paged cache."""

    unsupported: Unsupported
    run: Callable[[Tensor, Tensor, Tensor, Sequence[reference.Span], Tensor, Tensor, float], Tensor]


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


LINEARS: dict[str, Linear] = {
    "cpu": Linear(_needs_cpu, _dequantized, _plain_linear),
    "reference": Linear(_anywhere, _as_stored, reference.linear),
}
ATTENTIONS: dict[str, Attention] = {
    "reference": Attention(_anywhere, reference.attention),
}


def choose_linear(wanted: str, *, device: torch.device, dtype: torch.dtype) -> Linear:
    """The implementation of `linear` by name, or the first that can serve for "auto"."""
    reasons = {name: entry.unsupported(device, dtype) for name, entry in LINEARS.items()}
    return LINEARS[choose("FP8 linear backend", wanted, reasons)]


def choose_attention(wanted: str, *, device: torch.device, dtype: torch.dtype) -> Attention:
    """The implementation of `attention` by name, or the first that can serve for "auto"."""
    reasons = {name: entry.unsupported(device, dtype) for name, entry in ATTENTIONS.items()}
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
