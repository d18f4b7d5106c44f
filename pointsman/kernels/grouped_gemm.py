"""The products of the experts over arranged pairs (`kernels.arrange`), in block FP8 or bfloat16.

`up_kernel` makes hidden rows: gate and up of the same columns in one program, silu(gate) * up rounded to bfloat16, and, where a
program has a whole group of 128 columns, quantized. `gemm_kernel` multiplies them back; hidden rows that came in bfloat16 it
quantizes as it reads them, which gives the same bits. So `up` may be cut into few columns where there are too few experts in use
to keep every processor busy. No sum depends on timing.

Weights are the left operand where a block of pairs is small (swapped): the tensor cores' left side has at least 64 rows, which
tokens would leave empty. FP8 products are scaled and added to the sums every 128 of K.

Shape suffixes: T tokens, K experts per token, P padded pairs, D hidden, F expert width, E experts, G groups of 128 columns.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, misc, no-any-return, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pointsman.kernels.arrange import Arrangement, quantize_groups
from pointsman.kernels.e4m3 import narrowed, stored, widened
from pointsman.kernels.prefetch import fetch_line
from pointsman.kernels.quotient import quotient
from pointsman.kernels.tiles import Tile
from pointsman.kernels.triton_support import launch_options
from pointsman.kernels.weight import FP8, Weight

GROUP = tl.constexpr(128)


@triton.jit
def product(a, w, SWAP: tl.constexpr):
    """a @ w.T, or its transpose."""
    a, w = widened(a), widened(w)
    return tl.dot(w, a.T) if SWAP else tl.dot(a, w.T)


@triton.jit
def scaled(x, row_scale, scale, SWAP: tl.constexpr):
    """A product times the scale of each row of pairs and of the block of weights."""
    factor = row_scale * scale
    return x * (factor[None, :] if SWAP else factor[:, None])


@triton.jit
def hidden_columns(
    x_ptr,
    xs_ptr,
    w_ptr,
    ws_ptr,
    row,
    mask,
    column,
    D: tl.constexpr,
    F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    QUANTIZED: tl.constexpr,
    SWAP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """silu(gate) * up of COLUMNS columns from `column` on, rounded to bfloat16, as float32 [BLOCK_M, COLUMNS]."""
    k = tl.arange(0, BLOCK_K)
    n = column + tl.arange(0, COLUMNS)
    x_ptrs = x_ptr + row[:, None] * D + k[None, :]
    gate_ptrs = w_ptr + n[:, None] * D + k[None, :]
    up_ptrs = gate_ptrs + F * D
    gate = tl.zeros((COLUMNS, BLOCK_M) if SWAP else (BLOCK_M, COLUMNS), tl.float32)
    up = tl.zeros((COLUMNS, BLOCK_M) if SWAP else (BLOCK_M, COLUMNS), tl.float32)
    if QUANTIZED:
        xs_ptrs = xs_ptr + row * (D // GROUP)
        gate_scale_ptr = ws_ptr + (column // GROUP) * (D // GROUP)
        up_scale_ptr = gate_scale_ptr + (F // GROUP) * (D // GROUP)
    for step in tl.range(0, D // BLOCK_K, num_stages=STAGES):
        x = tl.load(x_ptrs, mask=mask[:, None], other=0.0)
        gate_w = tl.load(gate_ptrs)
        up_w = tl.load(up_ptrs)
        if QUANTIZED:
            x_scale = tl.load(xs_ptrs + step, mask=mask, other=0.0)
            gate += scaled(product(x, gate_w, SWAP), x_scale, tl.load(gate_scale_ptr + step), SWAP)
            up += scaled(product(x, up_w, SWAP), x_scale, tl.load(up_scale_ptr + step), SWAP)
        else:
            gate += product(x, gate_w, SWAP)
            up += product(x, up_w, SWAP)
        x_ptrs += BLOCK_K
        gate_ptrs += BLOCK_K
        up_ptrs += BLOCK_K
    h = gate / (1.0 + tl.exp(-gate)) * up
    h = h.to(tl.bfloat16)
    return h.T if SWAP else h


@triton.jit(do_not_specialize=["num_pairs"])
def up_kernel(
    x_ptr,
    xs_ptr,
    w_ptr,
    ws_ptr,
    h_ptr,
    hs_ptr,
    pairs_ptr,
    expert_ptr,
    num_blocks_ptr,
    num_pairs,
    D: tl.constexpr,
    F: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    QUANTIZED: tl.constexpr,
    QUANTIZE: tl.constexpr,
    SWAP: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Hidden rows [P, F] of the pairs: e4m3 with scales [P, G] if QUANTIZE, else bfloat16."""
    TILE: tl.constexpr = 128 if QUANTIZE else COLUMNS
    block = tl.program_id(0) // (F // TILE)
    column = tl.program_id(0) % (F // TILE) * TILE
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    place = block * BLOCK_M + tl.arange(0, BLOCK_M)
    # one after the other these would be two waits more
    pair, expert = tl.load(pairs_ptr + place), tl.load(expert_ptr + block).to(tl.int64)
    if block < tl.load(num_blocks_ptr):
        mask = pair < num_pairs
        row = tl.where(mask, pair // TOP_K, 0).to(tl.int64)
        w_ptr += expert * (2 * F * D)
        ws_ptr += expert * (2 * (F // GROUP) * (D // GROUP))
        first = hidden_columns(x_ptr, xs_ptr, w_ptr, ws_ptr, row, mask, column, D, F, BLOCK_M, COLUMNS, BLOCK_K, QUANTIZED, SWAP, STAGES)
        h_ptrs = h_ptr + place.to(tl.int64)[:, None] * F + column + tl.arange(0, COLUMNS)[None, :]
        if not QUANTIZE:
            tl.store(h_ptrs, first, mask=mask[:, None])
        elif COLUMNS == 128:
            q, scale = quantize_groups(first.to(tl.float32), h_ptr.dtype.element_ty)
            tl.store(h_ptrs, q, mask=mask[:, None])
            tl.store(hs_ptr + place * (F // GROUP) + column // GROUP, scale, mask=mask)
        else:
            tl.static_assert(COLUMNS == 64)
            second = hidden_columns(
                x_ptr, xs_ptr, w_ptr, ws_ptr, row, mask, column + 64, D, F, BLOCK_M, COLUMNS, BLOCK_K, QUANTIZED, SWAP, STAGES
            )
            largest = tl.maximum(tl.max(tl.abs(first), axis=1), tl.max(tl.abs(second), axis=1)).to(tl.float32)
            scale = tl.div_rn(largest, 448.0)
            divisor = tl.where(scale == 0, 1.0, scale)
            tl.store(h_ptrs, quantized(first, divisor, h_ptr.dtype.element_ty), mask=mask[:, None])
            tl.store(h_ptrs + 64, quantized(second, divisor, h_ptr.dtype.element_ty), mask=mask[:, None])
            tl.store(hs_ptr + place * (F // GROUP) + column // GROUP, scale, mask=mask)


@triton.jit
def quantized(h, divisor, TYPE: tl.constexpr):
    return narrowed(tl.clamp(quotient(h.to(tl.float32), divisor), -448.0, 448.0), TYPE)


@triton.jit
def row_products(
    h_ptr,
    hs_ptr,
    w_ptr,
    ws_ptr,
    row,
    mask,
    F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    QUANTIZED: tl.constexpr,
    QUANTIZE: tl.constexpr,
    SWAP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """h[row] times the COLUMNS rows of weights at w_ptr, in float32, transposed if SWAP."""
    k = tl.arange(0, BLOCK_K)
    h_ptrs = h_ptr + row[:, None] * F + k[None, :]
    w_ptrs = w_ptr + tl.arange(0, COLUMNS)[:, None] * F + k[None, :]
    y = tl.zeros((COLUMNS, BLOCK_M) if SWAP else (BLOCK_M, COLUMNS), tl.float32)
    for step in tl.range(0, F // BLOCK_K, num_stages=STAGES):
        h = tl.load(h_ptrs, mask=mask[:, None], other=0.0)
        w = tl.load(w_ptrs)
        if QUANTIZED:
            if QUANTIZE:
                h, h_scale = quantize_groups(h.to(tl.float32), w_ptr.dtype.element_ty)
            else:
                h_scale = tl.load(hs_ptr + row * (F // GROUP) + step, mask=mask, other=0.0)
            y += scaled(product(h, w, SWAP), h_scale, tl.load(ws_ptr + step), SWAP)
        else:
            y += product(h, w, SWAP)
        h_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    return y


@triton.jit(do_not_specialize=["num_pairs"])
def gemm_kernel(
    h_ptr,
    hs_ptr,
    w_ptr,
    ws_ptr,
    y_ptr,
    pairs_ptr,
    expert_ptr,
    num_blocks_ptr,
    num_pairs,
    F: tl.constexpr,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    QUANTIZED: tl.constexpr,
    QUANTIZE: tl.constexpr,
    GATHER: tl.constexpr,
    ARRANGED: tl.constexpr,
    SWAP: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rows of products y with an expert's matrix [N, F].

    QUANTIZE: h is bfloat16 and is quantized here. GATHER: the row of h is pair // GATHER rather than the place among the arranged.
    ARRANGED: y keeps the arranged order [P, N] rather than that of the pairs [T * K, N].
    PREFETCH: steps of K whose weights are asked for before the kernel before is waited for. The arrangement must be older than that.
    """
    block = tl.program_id(0) // (N // COLUMNS)
    column = tl.program_id(0) % (N // COLUMNS) * COLUMNS
    if PREFETCH > 0 and block < tl.load(num_blocks_ptr):
        own = tl.load(expert_ptr + block).to(tl.int64) * (N * F)
        for step in tl.static_range(PREFETCH):
            fetch_line(w_ptr + own + (column + tl.arange(0, COLUMNS)) * F + step * BLOCK_K)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    place = block * BLOCK_M + tl.arange(0, BLOCK_M)
    pair, expert = tl.load(pairs_ptr + place), tl.load(expert_ptr + block).to(tl.int64)
    if block < tl.load(num_blocks_ptr):
        mask = pair < num_pairs
        row = place.to(tl.int64)
        if GATHER > 0:
            row = tl.where(mask, pair // GATHER, 0).to(tl.int64)
        n = column + tl.arange(0, COLUMNS)
        w_ptr += expert * (N * F) + column * F
        ws_ptr += expert * ((N // GROUP) * (F // GROUP)) + (column // GROUP) * (F // GROUP)
        y = row_products(h_ptr, hs_ptr, w_ptr, ws_ptr, row, mask, F, BLOCK_M, COLUMNS, BLOCK_K, QUANTIZED, QUANTIZE, SWAP, STAGES)
        target = (place if ARRANGED else pair).to(tl.int64)
        y = y.to(y_ptr.dtype.element_ty)
        if SWAP:
            tl.store(y_ptr + target[None, :] * N + n[:, None], y, mask=mask[None, :])
        else:
            tl.store(y_ptr + target[:, None] * N + n[None, :], y, mask=mask[:, None])


def up(
    x_TD: Tensor,
    scale_TG: Tensor | None,
    weight: Weight,
    arrangement: Arrangement,
    num_pairs: int,
    top_k: int,
    tile: Tile,
    *,
    pdl: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Hidden rows [P, F] of the arranged pairs: e4m3 with float32 scales [P, G], or bfloat16 where `tile.quantize` is off.

    Args:
        x_TD: e4m3 with `scale_TG` for a quantized weight, else bfloat16.
        weight: gate and up of all experts, [E, 2F, D].
    """
    width, hidden = weight.data.shape[1] // 2, weight.data.shape[2]
    num_rows, device = len(arrangement.pairs_P), x_TD.device
    h_PF = torch.empty(num_rows, width, dtype=FP8 if tile.quantize else torch.bfloat16, device=device)
    scale_PG = torch.empty(num_rows, width // 128, device=device) if tile.quantize else None
    columns = 128 if tile.quantize else tile.columns
    up_kernel[(num_rows // tile.block * (width // columns),)](
        stored(x_TD),
        x_TD if scale_TG is None else scale_TG,
        stored(weight.data),
        x_TD if weight.scale is None else weight.scale,
        stored(h_PF),
        h_PF if scale_PG is None else scale_PG,
        *arrangement,
        num_pairs,
        D=hidden,
        F=width,
        TOP_K=top_k,
        BLOCK_M=tile.block,
        COLUMNS=tile.columns,
        BLOCK_K=128 if weight.quantized else 64,
        QUANTIZED=weight.quantized,
        QUANTIZE=tile.quantize,
        SWAP=tile.swap,
        STAGES=tile.stages,
        PDL=pdl,
        **tile_options(tile),
        **launch_options(pdl),
    )
    return h_PF, scale_PG


def gemm(
    h_RF: Tensor,
    scale_RG: Tensor | None,
    weight: Weight,
    arrangement: Arrangement,
    num_pairs: int,
    tile: Tile,
    out_RN: Tensor,
    *,
    gather: int = 0,
    pdl: bool = False,
) -> Tensor:
    """h @ weight[expert].T for each arranged pair, into `out_RN`, which has a row for each arranged place or for each pair.

    Args:
        h_RF: rows by arranged place, or by pair // gather; e4m3 with `scale_RG`, or bfloat16, which a quantized weight quantizes.
        weight: [E, N, F].
    """
    num_columns, width = weight.data.shape[1:]
    block_k = 128 if weight.quantized else 64
    gemm_kernel[(len(arrangement.pairs_P) // tile.block * (num_columns // tile.columns),)](
        stored(h_RF),
        h_RF if scale_RG is None else scale_RG,
        stored(weight.data),
        h_RF if weight.scale is None else weight.scale,
        out_RN,
        *arrangement,
        num_pairs,
        F=width,
        N=num_columns,
        BLOCK_M=tile.block,
        COLUMNS=tile.columns,
        BLOCK_K=block_k,
        QUANTIZED=weight.quantized,
        QUANTIZE=weight.quantized and scale_RG is None,
        GATHER=gather,
        ARRANGED=len(out_RN) == len(arrangement.pairs_P) and gather > 0,
        SWAP=tile.swap,
        STAGES=tile.stages,
        PREFETCH=min(tile.prefetch, width // block_k) if pdl else 0,
        PDL=pdl,
        **tile_options(tile),
        **launch_options(pdl),
    )
    return out_RN


def tile_options(tile: Tile) -> dict[str, int]:
    """Keywords of a launch that say what a program is given."""
    return {"num_warps": tile.warps} | ({} if tile.registers is None else {"maxnreg": tile.registers})
