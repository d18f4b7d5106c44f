"""Products of very few rows with block FP8 weights, without the tensor cores: linears of one or two rows, experts of up to four tokens.

Such a product is a matter of having enough of the weights under way at once. Tensor cores want tiles, and tiles want a loop over K with a
few steps in flight; here a program takes some whole rows of the weight at once, in registers, and many programs share a processor.
Weights that are known before the rows are taken while the kernel before still runs: a linear's always, those of `down` since `up` waited
for the choice.

A dot product is made in float32 of e4m3 numbers, those of the row times both scales. Each pair of token and choice is on its own: nothing
is sorted. The program that ends a group of 128 hidden columns activates and quantizes it, and `down` adds up a token's choices itself. No
bit depends on who was last.

Shape suffixes: T rows, N columns out, K columns in; of experts T tokens, K choices of a token, D hidden, F expert width, G groups of 128.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, misc, no-any-return, no-untyped-call"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pointsman.kernels.arrange import quantize_groups
from pointsman.kernels.e4m3 import stored, widened
from pointsman.kernels.triton_support import launch_options
from pointsman.kernels.weight import FP8, Weight

GROUP = tl.constexpr(128)
MOST_ROWS = 2  # of a linear
MOST_TOKENS = 4  # of experts


# numbers of the weight that a program takes: 256 for each of its 128 threads
MOST_NUMBERS = 32768


@dataclass(frozen=True)
class Cut:
    """Rows of the weight that a program takes (of `down`, of each expert), and its warps."""

    rows: int = 8
    warps: int = 4


@triton.jit
def scaled_row(x_ptr, xs_ptr, ws_ptr, block, k, K: tl.constexpr):
    """A quantized row [blocks, 128] times its scales and those of the weights' blocks, in float32."""
    real = block < (K + 127) // 128
    x = widened(tl.load(x_ptr + k, mask=k < K, other=0.0)).to(tl.float32)
    scale = tl.load(xs_ptr + block, mask=real, other=0.0) * tl.load(ws_ptr + block, mask=real, other=0.0)
    return x * scale[:, None]


@triton.jit
def dot_rows(w, x, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """The products [ROWS] of w [ROWS, blocks, 128] with x [blocks, 128]."""
    return tl.sum(tl.reshape(widened(w).to(tl.float32) * x[None, :, :], (ROWS, SIZE)), axis=1)


@triton.jit
def vector_linear_kernel(
    x_ptr, xs_ptr, w_ptr, ws_ptr, out_ptr,
    N: tl.constexpr, K: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[t, n] = x[t] . w[n] for ROWS of N."""
    first = tl.program_id(0) * ROWS
    row = first + tl.arange(0, ROWS)
    block = tl.arange(0, BLOCKS)
    k = block[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    w_ptrs = w_ptr + row[:, None, None].to(tl.int64) * K + k[None, :, :]
    w = tl.load(w_ptrs, mask=(row < N)[:, None, None] & (k < K)[None, :, :], other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    SCALES: tl.constexpr = (K + 127) // 128
    for t in tl.static_range(T):
        x = scaled_row(x_ptr + t * K, xs_ptr + t * SCALES, ws_ptr + first // GROUP * SCALES, block, k, K)
        y = dot_rows(w, x, ROWS, BLOCKS * GROUP)
        tl.store(out_ptr + t * N + row, y.to(out_ptr.dtype.element_ty), mask=row < N)


@triton.jit
def vector_up_kernel(
    x_ptr, xs_ptr, ids_ptr, w_ptr, ws_ptr, sums_ptr, h_ptr, hs_ptr, arrivals_ptr,
    D: tl.constexpr, F: tl.constexpr, TOP_K: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """ROWS of gate or of up of a pair; the last of a group makes its hidden columns."""
    PARTS: tl.constexpr = 2 * GROUP // ROWS
    unit, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    pair, group = unit // (F // GROUP), unit % (F // GROUP)
    half, within = part // (PARTS // 2), part % (PARTS // 2) * ROWS
    block = tl.arange(0, BLOCKS)
    k = block[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    expert = tl.load(ids_ptr + pair).to(tl.int64)
    if expert >= 0:
        of = expert * (2 * (F // GROUP)) + half * (F // GROUP) + group
        w_ptrs = w_ptr + (of * GROUP + within + tl.arange(0, ROWS))[:, None, None] * D + k[None, :, :]
        w = tl.load(w_ptrs, mask=(k < D)[None, :, :], other=0.0)
        token = pair // TOP_K
        x = scaled_row(x_ptr + token * D, xs_ptr + token * (D // GROUP), ws_ptr + of * (D // GROUP), block, k, D)
        y = dot_rows(w, x, ROWS, BLOCKS * GROUP)
        sums_ptr += unit * (2 * GROUP)
        tl.store(sums_ptr + half * GROUP + within + tl.arange(0, ROWS), y)
        # all of this program's stores come before its arrival, and all arrivals before the loads of the last
        tl.debug_barrier()
        if tl.atomic_add(arrivals_ptr + unit, 1, sem="acq_rel") == PARTS - 1:
            column = tl.arange(0, GROUP)
            gate = tl.load(sums_ptr + column, cache_modifier=".cg")
            up = tl.load(sums_ptr + GROUP + column, cache_modifier=".cg")
            h = (gate / (1.0 + tl.exp(-gate)) * up).to(tl.bfloat16).to(tl.float32)
            q, scale = quantize_groups(h[None, :])
            one = tl.arange(0, 1)
            tl.store(h_ptr + pair * F + group * GROUP + column[None, :], q)
            tl.store(hs_ptr + unit + one, scale)


@triton.jit
def vector_down_kernel(
    h_ptr, hs_ptr, ids_ptr, weights_ptr, w_ptr, ws_ptr, out_ptr,
    D: tl.constexpr, F: tl.constexpr, TOP_K: tl.constexpr, K_PADDED: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """ROWS of a token's weighted sum. The choice must be older than the kernel before."""
    token, first = tl.program_id(0) // (D // ROWS), tl.program_id(0) % (D // ROWS) * ROWS
    choice = tl.arange(0, K_PADDED)
    row = first + tl.arange(0, ROWS)
    block = tl.arange(0, BLOCKS)
    f = block[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    pair = token * TOP_K + choice
    expert = tl.load(ids_ptr + pair, mask=choice < TOP_K, other=-1).to(tl.int64)
    weight = tl.load(weights_ptr + pair, mask=choice < TOP_K, other=0.0)
    there = (expert >= 0)[:, None] & (block < F // GROUP)[None, :]
    inside = there[:, :, None] & (f < F)[None, :, :]
    w_ptrs = w_ptr + expert[:, None, None, None] * (D * F) + row[None, :, None, None] * F + f[None, None, :, :]
    w = tl.load(w_ptrs, mask=inside[:, None, :, :], other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    h = tl.load(h_ptr + pair[:, None, None] * F + f[None, :, :], mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(hs_ptr + pair[:, None] * (F // GROUP) + block[None, :], mask=there, other=0.0)
    of = expert * (D // GROUP) + first // GROUP
    scale *= tl.load(ws_ptr + of[:, None] * (F // GROUP) + block[None, :], mask=there, other=0.0)
    h *= scale[:, :, None]
    y = tl.sum(tl.reshape(w.to(tl.float32) * h[:, None, :, :], (K_PADDED, ROWS, BLOCKS * GROUP)), axis=2)
    total = tl.sum(y * weight[:, None], axis=0)
    tl.store(out_ptr + token * D + row, total.to(out_ptr.dtype.element_ty))


def vector_linear(
    x_TK: Tensor, scale_TB: Tensor, data_NK: Tensor, scale_RB: Tensor, *, cut: Cut | None = None, pdl: bool = False
) -> Tensor:
    """x @ w.T in bfloat16, [T, N], of up to `MOST_ROWS` rows.

    Args:
        x_TK, scale_TB: e4m3 and float32, quantized rows.
        data_NK, scale_RB: e4m3 and float32, row n of the one with row n // 128 of the other.
    """
    (num_rows, width), height = x_TK.shape, len(data_NK)
    assert takes_linear(num_rows, width)
    cut = cut or Cut(rows=_rows(width, 8 if num_rows == 1 else 4))
    out_TN = torch.empty(num_rows, height, dtype=torch.bfloat16, device=x_TK.device)
    vector_linear_kernel[(triton.cdiv(height, cut.rows),)](
        stored(x_TK),
        scale_TB,
        stored(data_NK),
        scale_RB,
        out_TN,
        N=height,
        K=width,
        T=num_rows,
        ROWS=cut.rows,
        BLOCKS=triton.next_power_of_2(triton.cdiv(width, GROUP.value)),
        PDL=pdl,
        num_warps=cut.warps,
        **launch_options(pdl),
    )
    return out_TN


def _rows(columns: int, most: int, at_once: int = 1) -> int:
    """How many rows of so many columns, of so many matrices at once, a program takes; 0 where one is too much."""
    size = triton.next_power_of_2(at_once) * triton.next_power_of_2(triton.cdiv(columns, GROUP.value)) * GROUP.value
    return min(most, MOST_NUMBERS // size)


def takes_linear(num_rows: int, width: int) -> bool:
    """Whether `vector_linear` is made for rows like these."""
    return 0 < num_rows <= MOST_ROWS and _rows(width, 1) > 0


def takes_experts(num_tokens: int, top_k: int, hidden: int, width: int) -> bool:
    """Whether `experts` is made for tokens and experts like these."""
    return 0 < num_tokens <= MOST_TOKENS and _rows(hidden, 1) > 0 and _rows(width, 1, top_k) > 0


def num_arrivals(num_pairs: int, width: int) -> int:
    """Zeros that `experts` needs for so many pairs."""
    return num_pairs * (width // GROUP.value)


def experts(
    q_TD: Tensor,
    scale_TG: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    gate_up: Weight,
    down: Weight,
    arrivals: Tensor,
    *,
    up_cut: Cut | None = None,
    down_cut: Cut | None = None,
    pdl: bool = False,
) -> Tensor:
    """The weighted sum of each token's experts, bfloat16 [T, D], of up to `MOST_TOKENS` tokens.

    Args:
        q_TD, scale_TG: the tokens quantized.
        ids_TK: int32, below zero for none; written by the kernel before the first of these, or earlier.
        gate_up, down: block FP8, [E, 2F, D] and [E, D, F].
        arrivals: zeros, `num_arrivals` of them; used up.
    """
    (num_tokens, top_k), hidden, width = ids_TK.shape, q_TD.shape[1], down.data.shape[2]
    up_cut = up_cut or Cut(rows=_rows(hidden, 8))
    down_cut, num_pairs, device = down_cut or Cut(rows=_rows(width, 4, top_k)), ids_TK.numel(), q_TD.device
    assert takes_experts(num_tokens, top_k, hidden, width) and gate_up.scale is not None and down.scale is not None
    assert len(arrivals) == num_arrivals(num_pairs, width) and GROUP.value % up_cut.rows == GROUP.value % down_cut.rows == 0
    groups = num_pairs * (width // GROUP.value)
    sums = torch.empty(groups * 2 * GROUP.value, device=device)
    h_PF = torch.empty(num_pairs, width, dtype=FP8, device=device)
    scale_PG = torch.empty(num_pairs, width // GROUP.value, device=device)
    out_TD = torch.empty(num_tokens, hidden, dtype=torch.bfloat16, device=device)
    vector_up_kernel[(groups * (2 * GROUP.value // up_cut.rows),)](
        q_TD,
        scale_TG,
        ids_TK,
        gate_up.data,
        gate_up.scale,
        sums,
        h_PF,
        scale_PG,
        arrivals,
        D=hidden,
        F=width,
        TOP_K=top_k,
        ROWS=up_cut.rows,
        BLOCKS=triton.next_power_of_2(hidden // GROUP.value),
        PDL=pdl,
        num_warps=up_cut.warps,
        **launch_options(pdl),
    )
    vector_down_kernel[(num_tokens * (hidden // down_cut.rows),)](
        h_PF,
        scale_PG,
        ids_TK,
        weights_TK,
        down.data,
        down.scale,
        out_TD,
        D=hidden,
        F=width,
        TOP_K=top_k,
        K_PADDED=triton.next_power_of_2(top_k),
        ROWS=down_cut.rows,
        BLOCKS=triton.next_power_of_2(width // GROUP.value),
        PDL=pdl,
        num_warps=down_cut.warps,
        **launch_options(pdl),
    )
    return out_TD
