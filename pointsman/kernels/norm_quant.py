"""RMSNorm with the residual sum before it and FP8 quantization behind it, one program a row; and quantization alone.

The definition is `reference.rms_norm` and `reference.quantize_activation` one after the other, roundings included: the sum is rounded
to the activations' dtype before it is normed, and the normed row before it is quantized, so a step that fuses them gives the bits of
one that does not. Divisions are IEEE divisions for the same reason.

Shape suffixes: T rows, D columns, B blocks of 128 columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pointsman.kernels.capability import chains
from pointsman.kernels.e4m3 import narrowed, stored
from pointsman.kernels.expert_rows import weighted_sum
from pointsman.kernels.mailbox import Mailbox, sum_over_ranks
from pointsman.kernels.quotient import quotient
from pointsman.kernels.triton_support import launch_options
from pointsman.kernels.unsummed import Unsummed
from pointsman.kernels.weight import FP8, Quantized, num_blocks

BLOCK = 128
MOST_COLUMNS = 16384


@triton.jit
def store_quantized(x, q_ptr, scale_ptr, row, group, column, inside, D, NUM_BLOCKS):
    """Quantize the blocks of one row that x [groups, 128] holds."""
    amax = tl.max(tl.abs(x), axis=1)
    scale = tl.div_rn(amax, 448.0)
    q = quotient(x, tl.where(scale == 0.0, 1.0, scale))
    q = narrowed(tl.minimum(tl.maximum(q, -448.0), 448.0), q_ptr.dtype.element_ty)
    tl.store(q_ptr + row * D + column, q, mask=inside)
    tl.store(scale_ptr + row * NUM_BLOCKS + group, scale, mask=group < NUM_BLOCKS)


@triton.jit
def norm_kernel(
    x_ptr,
    delta_ptr,
    ids_ptr,
    weights_ptr,
    weight_ptr,
    sum_ptr,
    normed_ptr,
    q_ptr,
    scale_ptr,
    boxes_ptr,
    turns_ptr,
    epsilon,
    D: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr,
    CHOICES: tl.constexpr,
    ADD: tl.constexpr,
    NORM: tl.constexpr,
    WRITE: tl.constexpr,
    QUANTIZE: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    column = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = column < D
    if NORM:
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        # what comes next may ask for its weights while rows are still being added up
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    x = tl.load(x_ptr + row * D + column, mask=inside, other=0.0)
    dtype = x.dtype
    x = x.to(tl.float32)
    if ADD:
        if CHOICES > 0:
            delta = weighted_sum(delta_ptr, ids_ptr, weights_ptr, row, column, inside, D, CHOICES).to(dtype)
        else:
            delta = tl.load(delta_ptr + row * D + column, mask=inside, other=0.0)
        if RANKS > 1:
            delta = sum_over_ranks(delta, boxes_ptr, turns_ptr, row, column, inside, D, RANK, RANKS).to(dtype)
        x = (x + delta.to(tl.float32)).to(dtype)
        tl.store(sum_ptr + row * D + column, x, mask=inside)
        x = x.to(tl.float32)
    if NORM:
        mean = tl.sum(tl.sum(x * x, axis=1), axis=0) / D
        x = (x * tl.rsqrt(mean + epsilon) * weight).to(dtype)
        if WRITE:
            tl.store(normed_ptr + row * D + column, x, mask=inside)
        x = x.to(tl.float32)
    if QUANTIZE:
        store_quantized(x, q_ptr, scale_ptr, row, group, column, inside, D, NUM_BLOCKS)


def norm(
    x_TD: Tensor,
    delta_TD: Tensor | Unsummed | None,
    weight_D: Tensor,
    epsilon: float,
    quantize: bool = False,
    mailbox: Mailbox | None = None,
    *,
    pdl: bool | None = None,
) -> tuple[Tensor, Tensor | Quantized]:
    """(sum, normed): x + delta, or x itself where there is no delta, in x's dtype; and its norm, in x's dtype or quantized.

    A delta that is not summed yet is summed, and rounded to x's dtype, as `Unsummed.total` does it.

    With a mailbox, what is added is the sum of all ranks' deltas, as `mailbox.all_reduce` makes it. The kernel may be launched while
    the one before runs (`pdl`; None: where the device can).
    """
    normed_TD = None if quantize else torch.empty_like(x_TD)
    sum_TD, quantized = _launch(x_TD, delta_TD, weight_D, epsilon, normed_TD=normed_TD, quantize=quantize, mailbox=mailbox, pdl=pdl)
    normed = quantized if normed_TD is None else normed_TD
    assert normed is not None
    return sum_TD, normed


def quantize(x_TD: Tensor) -> Quantized:
    """e4m3 [T, D] and float32 scales [T, B], as `reference.quantize_activation`."""
    _, quantized = _launch(x_TD, None, None, 0.0, quantize=True)
    assert quantized is not None
    return quantized


def _launch(
    x_TD: Tensor,
    delta_TD: Tensor | Unsummed | None,
    weight_D: Tensor | None,
    epsilon: float,
    *,
    normed_TD: Tensor | None = None,
    quantize: bool = False,
    mailbox: Mailbox | None = None,
    pdl: bool | None = None,
) -> tuple[Tensor, Quantized | None]:
    num_rows, width = x_TD.shape
    unsummed = delta_TD if isinstance(delta_TD, Unsummed) else None
    top_k = 0 if unsummed is None else unsummed.ids_TK.shape[1]
    added = delta_TD.y_RD if isinstance(delta_TD, Unsummed) else delta_TD
    assert mailbox is None or (added is not None and mailbox.takes(x_TD))
    assert unsummed is None or unsummed.dtype == x_TD.dtype
    assert x_TD.is_contiguous() and (added is None or (added.is_contiguous() and added.shape == (num_rows * max(top_k, 1), width)))
    if width > MOST_COLUMNS:
        raise ValueError(f"rows of {width} columns; this kernel holds a row in one program and takes up to {MOST_COLUMNS}")
    blocks = num_blocks(width, BLOCK)
    sum_TD = x_TD if added is None else torch.empty_like(x_TD)
    quantized = None
    if quantize:
        scale_TB = torch.empty(num_rows, blocks, dtype=torch.float32, device=x_TD.device)
        quantized = Quantized(torch.empty_like(x_TD, dtype=FP8), scale_TB)
    if num_rows:
        groups = triton.next_power_of_2(blocks)
        pdl = chains(x_TD.device) if pdl is None else pdl
        norm_kernel[(num_rows,)](
            x_TD,
            x_TD if added is None else added,
            x_TD if unsummed is None else unsummed.ids_TK,
            x_TD if unsummed is None else unsummed.weights_TK,
            x_TD if weight_D is None else weight_D,
            sum_TD,
            x_TD if normed_TD is None else normed_TD,
            x_TD if quantized is None else stored(quantized.data),
            x_TD if quantized is None else quantized.scale,
            x_TD if mailbox is None else mailbox.boxes_R,
            x_TD if mailbox is None else mailbox.turns_P,
            epsilon,
            D=width,
            NUM_BLOCKS=blocks,
            GROUPS=groups,
            CHOICES=top_k,
            ADD=added is not None,
            NORM=weight_D is not None,
            WRITE=normed_TD is not None,
            QUANTIZE=quantize,
            RANK=0 if mailbox is None else mailbox.rank,
            RANKS=1 if mailbox is None else mailbox.num_ranks,
            PDL=pdl,
            num_warps=num_warps(groups, quantize=quantize),
            **launch_options(pdl),
        )
    return sum_TD, quantized


def num_warps(groups: int, *, quantize: bool) -> int:
    """Warps of a program that holds this many blocks of 128: about 16 numbers a thread, and half as many where they are divided."""
    return max(1, min(16, groups // (2 if quantize else 4)))
