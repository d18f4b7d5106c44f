"""Rows of experts where a library's grouped product wants them: each expert's in blocks of their own, scales column by column.

Two layouts. *Contiguous*: the blocks of an arrangement one after the other, and for each row the expert of its block, or -1 in blocks
that are not needed. *Masked*: one block for each expert, used or not, and for each expert the number of its rows. Products are
written by others; what stands here fills their inputs and adds up what they give.

Scales of rows are stored as TMA reads them: for each group of 128 columns the rows one after the other, whose number is a multiple of 4.

Shape suffixes: T tokens, K experts per token, R pairs (token * K + choice), P rows of a layout, D columns, F expert width, G groups of
128 columns, E experts, B blocks.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, misc, no-any-return, no-untyped-call"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pointsman.kernels.arrange import Arrangement, arrange, most_blocks, quantize_groups
from pointsman.kernels.weight import FP8

GROUP = tl.constexpr(128)
ROWS = 16  # that one program moves


class Placed(NamedTuple):
    """Where each pair's row is. Attributes:

    arrangement: of the pairs in blocks.
    block: rows of a block.
    masked: which of the two layouts.
    num_rows: of the layout.
    layout: int32, for each row its expert (contiguous) or for each expert the number of its rows (masked).
    row_R: int32, the row of a pair; anything for a pair without an expert.
    """

    arrangement: Arrangement
    block: int
    masked: bool
    num_rows: int
    layout: Tensor
    row_R: Tensor


@triton.jit
def row_of(place, expert, BLOCK_M: tl.constexpr, MASKED: tl.constexpr):
    """The row of the layout for a place in the arrangement."""
    if MASKED:
        return expert * BLOCK_M + place % BLOCK_M
    else:
        return place


@triton.jit(do_not_specialize=["num_pairs", "num_rows"])
def place_kernel(
    q_ptr,
    qs_ptr,
    a_ptr,
    as_ptr,
    layout_ptr,
    row_ptr,
    pairs_ptr,
    expert_ptr,
    num_blocks_ptr,
    num_pairs,
    num_rows,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Copy quantized tokens to the rows of their pairs, and say where those are."""
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(0) * ROWS // BLOCK_M
    if block < tl.load(num_blocks_ptr):
        expert = tl.load(expert_ptr + block)
        pair = tl.load(pairs_ptr + place)
        real = pair < num_pairs
        row = row_of(place, expert, BLOCK_M, MASKED)
        tl.store(row_ptr + pair, row, mask=real)
        if MASKED:
            tl.atomic_add(layout_ptr + expert, tl.sum(real.to(tl.int32), axis=0))
        else:
            tl.store(layout_ptr + place, expert + tl.zeros((ROWS,), tl.int32))
        token = (pair // K).to(tl.int64)
        for group in range(D // GROUP):
            column = group * GROUP + tl.arange(0, GROUP)
            q = tl.load(q_ptr + token[:, None] * D + column[None, :], mask=real[:, None], other=0)
            tl.store(a_ptr + row.to(tl.int64)[:, None] * D + column[None, :], q, mask=real[:, None])
            scale = tl.load(qs_ptr + token * (D // GROUP) + group, mask=real, other=0.0)
            tl.store(as_ptr + scale_offset(row, group, expert, num_rows, D // GROUP, BLOCK_M, MASKED), scale, mask=real)
    elif not MASKED:
        tl.store(layout_ptr + place, tl.zeros((ROWS,), tl.int32) - 1)


@triton.jit
def scale_offset(row, group, expert, num_rows, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr):
    if MASKED:
        return (expert * GROUPS + group) * BLOCK_M + row % BLOCK_M
    else:
        return group * num_rows + row


@triton.jit(do_not_specialize=["num_pairs", "num_rows"])
def activate_placed_kernel(
    g_ptr,
    h_ptr,
    hs_ptr,
    pairs_ptr,
    expert_ptr,
    num_blocks_ptr,
    num_pairs,
    num_rows,
    F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """h = silu(first half) * second half of bfloat16 rows [P, 2F], rounded to bfloat16 and quantized."""
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    block = tl.program_id(0) * ROWS // BLOCK_M
    if block < tl.load(num_blocks_ptr):
        expert = tl.load(expert_ptr + block)
        real = tl.load(pairs_ptr + place) < num_pairs
        row = row_of(place, expert, BLOCK_M, MASKED)
        column = group * GROUP + tl.arange(0, GROUP)[None, :]
        both = g_ptr + row.to(tl.int64)[:, None] * (2 * F) + column
        gate = tl.load(both, mask=real[:, None], other=0.0).to(tl.float32)
        up = tl.load(both + F, mask=real[:, None], other=0.0).to(tl.float32)
        q, scale = quantize_groups((gate / (1.0 + tl.exp(-gate)) * up).to(tl.bfloat16).to(tl.float32))
        tl.store(h_ptr + row.to(tl.int64)[:, None] * F + column, q, mask=real[:, None])
        tl.store(hs_ptr + scale_offset(row, group, expert, num_rows, F // GROUP, BLOCK_M, MASKED), scale, mask=real)


@triton.jit
def combine_placed_kernel(y_ptr, row_ptr, ids_ptr, weights_ptr, out_ptr, D: tl.constexpr, K: tl.constexpr, BLOCK_D: tl.constexpr):
    """out[t] = the sum over the token's choices, in their order, of weight * y."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < D
    total = tl.zeros((BLOCK_D,), tl.float32)
    for k in tl.static_range(K):
        real = tl.load(ids_ptr + token * K + k) >= 0
        row = tl.where(real, tl.load(row_ptr + token * K + k), 0).to(tl.int64)
        y = tl.load(y_ptr + row * D + column, mask=inside, other=0.0).to(tl.float32)
        total += tl.where(real, tl.load(weights_ptr + token * K + k) * y, 0.0)
    tl.store(out_ptr + token * D + column, total.to(out_ptr.dtype.element_ty), mask=inside)


def place(x_TD: Tensor, ids_TK: Tensor, num_experts: int, block: int, *, masked: bool) -> tuple[Placed, Tensor, Tensor]:
    """Quantize tokens, and copy each to the rows of its experts.

    Args:
        x_TD: bfloat16, D a multiple of 128.
        ids_TK: int32 or int64; below zero is no expert. No token names an expert twice.
        block: rows of a block, a power of two from 16 on; where `masked`, no fewer than tokens.

    Returns:
        The places; e4m3 [P, D], or [E, block, D] where `masked`; float32 scales [P, G] or [E, block, G], rows next to each other.
        What no pair is in is not set.
    """
    (num_tokens, hidden), top_k, device = x_TD.shape, ids_TK.shape[1], x_TD.device
    assert not masked or num_tokens <= block
    num_pairs, groups = num_tokens * top_k, hidden // 128
    arrangement, q_TD, scale_TG = arrange(ids_TK, num_experts, block, x_TD)
    assert q_TD is not None and scale_TG is not None
    num_rows = block * (num_experts if masked else most_blocks(num_pairs, num_experts, block))
    layout = torch.zeros(num_experts, dtype=torch.int32, device=device)
    if not masked:
        layout = torch.empty(num_rows, dtype=torch.int32, device=device)
    placed = Placed(arrangement, block, masked, num_rows, layout, torch.empty(num_pairs, dtype=torch.int32, device=device))
    a_PD, scale_PG = _rows(placed, hidden, groups, device)
    place_kernel[(len(arrangement.pairs_P) // ROWS,)](
        q_TD.view(torch.uint8),
        scale_TG,
        a_PD.view(torch.uint8),
        scale_PG,
        placed.layout,
        placed.row_R,
        *arrangement,
        num_pairs,
        num_rows,
        D=hidden,
        K=top_k,
        BLOCK_M=block,
        MASKED=masked,
        ROWS=ROWS,
    )
    return placed, a_PD, scale_PG


def _rows(placed: Placed, columns: int, groups: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Empty e4m3 rows of a layout, and their scales."""
    if placed.masked:
        experts = placed.num_rows // placed.block
        scale = torch.empty(experts, groups, placed.block, device=device).transpose(1, 2)
        return torch.empty(experts, placed.block, columns, dtype=FP8, device=device), scale
    return torch.empty(placed.num_rows, columns, dtype=FP8, device=device), torch.empty(groups, placed.num_rows, device=device).T


def activate_placed(gate_up: Tensor, placed: Placed) -> tuple[Tensor, Tensor]:
    """silu(gate) * up of bfloat16 rows [..., 2F] of a layout, rounded to bfloat16: e4m3 [..., F] and scales as `place` has them."""
    width = gate_up.shape[-1] // 2
    h, scale = _rows(placed, width, width // 128, gate_up.device)
    arrangement = placed.arrangement
    activate_placed_kernel[(len(arrangement.pairs_P) // ROWS, width // 128)](
        gate_up,
        h,
        scale,
        *arrangement,
        len(placed.row_R),
        placed.num_rows,
        F=width,
        BLOCK_M=placed.block,
        MASKED=placed.masked,
        ROWS=ROWS,
    )
    return h, scale


def combine_placed(y: Tensor, placed: Placed, ids_TK: Tensor, weights_TK: Tensor, dtype: torch.dtype) -> Tensor:
    """The weighted sum [T, D] of the rows of each token's choices, in float32, rounded once; ids below zero count nothing."""
    (num_tokens, top_k), hidden = ids_TK.shape, y.shape[-1]
    out_TD = torch.empty(num_tokens, hidden, dtype=dtype, device=y.device)
    columns = min(1024, triton.next_power_of_2(hidden))
    combine_placed_kernel[(num_tokens, triton.cdiv(hidden, columns))](
        y, placed.row_R, ids_TK, weights_TK, out_TD, D=hidden, K=top_k, BLOCK_D=columns
    )
    return out_TD
