"""Attention by FlashInfer's kernel over paged keys and values: decode and prefill in one call that a CUDA graph can hold.

What the library calls paged prefill is all of it. A decoding row is a request of one row, and its decode on tensor cores is this kernel;
the other one, without them, repeats the work for each query head of a group. (Its `BatchAttention` waits for the device in every plan,
and the kernels that need no plan are for Blackwell alone.) The layout is ours as it is: pages [P, H, S, C], which it calls HND, keys and
values apart. Scores and sums are float32, what multiplies values is rounded to bfloat16, e4m3 is widened in the kernel.

The host plans every step: how sequences are cut among the processors, from the numbers of rows and of pages. A plan is written into
memory that keeps its place, so a graph that was captured with one serves every later one of its size. For that, a size has always as many
*requests*: the runs of rows of lanes, one of no positions whose rows are those that pad, which come out as zeros, and empty ones.

A plan is copied from pinned memory that the next plan of the same size is written into, so that one waits until the copy is through.
Memory that the kernel works in is shared by all sizes, since steps run one after another.

Shape suffixes: T rows, Q query heads, C channels of a head, P pages, H key/value heads, S slots of a page, L lanes, B requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pointsman.kernels.candidates import AttentionShape, StepBounds
from pointsman.kernels.flashinfer import find, parameters
from pointsman.kernels.flashinfer_room import float_bytes, int_bytes, num_requests
from pointsman.kernels.reference import Span

WRAPPER = "BatchPrefillWithPagedKVCacheWrapper"
NEEDS = {
    "__init__": (
        "kv_layout",
        "use_cuda_graph",
        "qo_indptr_buf",
        "paged_kv_indptr_buf",
        "paged_kv_indices_buf",
        "paged_kv_last_page_len_buf",
        "backend",
    ),
    "plan": (
        "qo_indptr",
        "paged_kv_indptr",
        "paged_kv_indices",
        "paged_kv_last_page_len",
        "num_qo_heads",
        "num_kv_heads",
        "head_dim_qk",
        "page_size",
        "causal",
        "sm_scale",
        "q_data_type",
        "kv_data_type",
        "max_token_per_sequence",
    ),
    "run": ("q", "paged_kv_cache", "out"),
    "reset_workspace_buffer": ("float_workspace_buffer", "int_workspace_buffer"),
}


Ints32 = npt.NDArray[np.int32]


class Requests(NamedTuple):
    """A step's rows as the library wants them.

    Attributes:
        rows_B1, pages_B1: where each request's rows and pages begin, and where the last one's end.
        last_B: positions on the last page of each; 0 where it has none.
        pages_N: the pages of one request after another's.
        most_rows: of a request.
    """

    rows_B1: Ints32
    pages_B1: Ints32
    last_B: Ints32
    pages_N: Ints32
    most_rows: int


def lay_out_requests(
    spans: Sequence[Span], lengths: Sequence[int], page_table_LP: npt.NDArray[Any], num_rows: int, num_lanes: int, page_size: int
) -> Requests:
    """The requests of a step.

    Args:
        lengths: positions of each span's sequence, its own rows included.
        num_rows: with those that pad, which are behind the last span.
    """
    number = num_requests(num_rows, num_lanes)
    assert len(spans) < number and all(length >= span.length for span, length in zip(spans, lengths, strict=True))
    rows_B1, pages_B1 = np.full(number + 1, num_rows, np.int32), np.zeros(number + 1, np.int32)
    last_B = np.zeros(number, np.int32)
    used = [-(-length // page_size) for length in lengths]
    end = sum(span.length for span in spans)
    rows_B1[: len(spans) + 1] = [*(span.start for span in spans), end]
    pages_B1[1 : len(spans) + 1] = np.cumsum(used)
    pages_B1[len(spans) + 1 :] = pages_B1[len(spans)]
    last_B[: len(spans)] = [length - (pages - 1) * page_size for length, pages in zip(lengths, used, strict=True)]
    parts = [page_table_LP[span.lane, :pages] for span, pages in zip(spans, used, strict=True)]
    pages_N = np.concatenate(parts).astype(np.int32) if parts else np.zeros(0, np.int32)
    return Requests(rows_B1, pages_B1, last_B, pages_N, max((span.length for span in spans), default=0))


class Plan(NamedTuple):
    """What the library keeps of a plan, and the scale of scores that it was made for."""

    wrapper: Any
    scale: float


class Planner:
    """Plans the steps of one engine, and keeps the memory that its plans are in.

    Raises:
        ValueError: the installed version lacks what is needed.
    """

    def __init__(self, shape: AttentionShape, bounds: StepBounds, dtype: torch.dtype, kv_dtype: torch.dtype, device: torch.device) -> None:
        self._make = find("flashinfer", WRAPPER)
        for method, needs in NEEDS.items():
            parameters(getattr(self._make, method), f"{WRAPPER}.{method}", needs)
        self._shape, self._bounds, self._device = shape, bounds, device
        self._dtype, self._kv_dtype = dtype, kv_dtype
        self._scale = shape.head_dim**-0.5
        most = num_requests(bounds.sizes[-1], bounds.num_lanes)

        rooms = float_bytes(shape, bounds), int_bytes(shape, bounds)
        self._work = [torch.empty(size, dtype=torch.uint8, device=device) for size in rooms]
        sizes = most + 1, most + 1, most, bounds.num_lanes * bounds.max_pages
        self._rows_B1, self._pages_B1, self._last_B, self._pages_N = (torch.zeros(size, dtype=torch.int32, device=device) for size in sizes)
        self._wrappers: dict[int, Any] = {}
        self._copied: dict[int, torch.cuda.Event] = {}

    def requests(self, spans: Sequence[Span], lengths: Sequence[int], page_table_LP: npt.NDArray[Any], num_rows: int) -> Requests:
        """What `plan` wants of a step of these spans, padded to so many rows; `pages_N` is to be brought to the device."""
        return lay_out_requests(spans, lengths, page_table_LP, num_rows, self._bounds.num_lanes, self._bounds.page_size)

    def plan(self, requests: Requests, pages_N: Tensor) -> Plan:
        """Plan a step; copies are launched, and nothing of the device is waited for but the last plan of this size."""
        size = int(requests.rows_B1[-1])
        wrapper = self._wrapper(size)
        if size in self._copied:
            self._copied[size].synchronize()
        shape = self._shape
        wrapper.plan(
            qo_indptr=torch.from_numpy(requests.rows_B1),
            paged_kv_indptr=torch.from_numpy(requests.pages_B1),
            paged_kv_indices=pages_N,
            paged_kv_last_page_len=torch.from_numpy(requests.last_B),
            num_qo_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim_qk=shape.head_dim,
            page_size=self._bounds.page_size,
            causal=True,
            sm_scale=self._scale,
            q_data_type=self._dtype,
            kv_data_type=self._kv_dtype,
            max_token_per_sequence=max(requests.most_rows, 1),  # the library would ask tensors for it, one by one
        )
        if self._device.type == "cuda":
            self._copied[size] = torch.cuda.current_stream(self._device).record_event()
        return Plan(wrapper, self._scale)

    def _wrapper(self, size: int) -> Any:
        """The library's object for steps of so many rows: it holds what a graph of that size reads."""
        if size not in self._wrappers:
            number = num_requests(size, self._bounds.num_lanes)
            wrapper = self._make(
                self._work[0],
                kv_layout="HND",
                use_cuda_graph=True,
                qo_indptr_buf=self._rows_B1[: number + 1],
                paged_kv_indptr_buf=self._pages_B1[: number + 1],
                paged_kv_indices_buf=self._pages_N,
                paged_kv_last_page_len_buf=self._last_B[:number],
                backend="fa2",
            )
            wrapper.reset_workspace_buffer(*self._work)
            self._wrappers[size] = wrapper
        return self._wrappers[size]


def attention(
    q_TQC: Tensor, k_PHSC: Tensor, v_PHSC: Tensor, plan: Plan, positions_T: Tensor, page_table_LP: Tensor, scale: float
) -> Tensor:
    """`reference.attention` of the rows that were planned, [T, Q, C]; zeros in the rows that pad.

    Args:
        q_TQC: bfloat16.
        k_PHSC, v_PHSC: one layer's pages in bfloat16, or in e4m3 of scale 1.
        positions_T, page_table_LP: not read; the plan has them.
    """
    assert scale == plan.scale, "planned for another scale"
    out_TQC = torch.empty_like(q_TQC)
    plan.wrapper.run(q_TQC, (k_PHSC, v_PHSC), out=out_TQC)
    return out_TQC
