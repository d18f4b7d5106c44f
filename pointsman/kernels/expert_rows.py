"""What is done to the rows of experts besides their products: the activation on its own, and the weighted sum that ends the layer.

`combine_kernel` adds a token's choices in their order, in float32, and rounds once; no sum depends on timing.

Shape suffixes: T tokens, K experts per token, P padded pairs, R rows by pair, D hidden, F expert width, G groups of 128 columns.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, misc, no-any-return, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pointsman.kernels.arrange import Arrangement, quantize_groups
from pointsman.kernels.e4m3 import stored
from pointsman.kernels.triton_support import launch_options
from pointsman.kernels.weight import FP8

GROUP = tl.constexpr(128)


@triton.jit(do_not_specialize=["num_pairs"])
def activate_kernel(
    g_ptr,
    h_ptr,
    hs_ptr,
    pairs_ptr,
    num_blocks_ptr,
    num_pairs,
    F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    QUANTIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    """h = silu(first half) * second half of bfloat16 rows [P, 2F], rounded to bfloat16 and, if QUANTIZE, quantized."""
    block, group = tl.program_id(0), tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if block < tl.load(num_blocks_ptr):
        place = block * BLOCK_M + tl.arange(0, BLOCK_M)
        real = tl.load(pairs_ptr + place) < num_pairs
        row = place.to(tl.int64)[:, None]
        column = group * GROUP + tl.arange(0, GROUP)[None, :]
        gate = tl.load(g_ptr + row * (2 * F) + column, mask=real[:, None], other=0.0).to(tl.float32)
        up = tl.load(g_ptr + row * (2 * F) + F + column, mask=real[:, None], other=0.0).to(tl.float32)
        h = (gate / (1.0 + tl.exp(-gate)) * up).to(tl.bfloat16)
        if QUANTIZE:
            q, scale = quantize_groups(h.to(tl.float32), h_ptr.dtype.element_ty)
            tl.store(h_ptr + row * F + column, q, mask=real[:, None])
            tl.store(hs_ptr + place * (F // GROUP) + group, scale, mask=real)
        else:
            tl.store(h_ptr + row * F + column, h, mask=real[:, None])


@triton.jit
def combine_kernel(y_ptr, ids_ptr, weights_ptr, out_ptr, D: tl.constexpr, K: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr):
    """out[t] = the sum over the token's choices, in their order, of weight * y."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < D
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    combine_columns(y_ptr, ids_ptr, weights_ptr, out_ptr, token, column, inside, D, K)


@triton.jit
def combine_columns(y_ptr, ids_ptr, weights_ptr, out_ptr, token, column, inside, D: tl.constexpr, K: tl.constexpr):
    """A token's sum in these columns, written."""
    total = weighted_sum(y_ptr, ids_ptr, weights_ptr, token, column, inside, D, K)
    tl.store(out_ptr + token * D + column, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def weighted_sum(y_ptr, ids_ptr, weights_ptr, token, column, inside, D: tl.constexpr, K: tl.constexpr):
    """A token's sum in these columns, float32."""
    total = tl.zeros(column.shape, tl.float32)
    for k in tl.static_range(K):
        real = tl.load(ids_ptr + token * K + k) >= 0
        weight = tl.load(weights_ptr + token * K + k)
        y = tl.load(y_ptr + (token * K + k) * D + column, mask=inside, other=0.0).to(tl.float32)
        total += tl.where(real, weight * y, 0.0)  # what a choice without an expert left in y may be anything
    return total


def activate(
    gate_up_PF: Tensor, arrangement: Arrangement, num_pairs: int, block: int, *, quantize: bool, pdl: bool = False
) -> tuple[Tensor, Tensor | None]:
    """silu(gate) * up of bfloat16 rows [P, 2F]: e4m3 [P, F] and scales [P, G], or bfloat16 and None."""
    num_rows, width = len(gate_up_PF), gate_up_PF.shape[1] // 2
    h_PF = torch.empty(num_rows, width, dtype=FP8 if quantize else torch.bfloat16, device=gate_up_PF.device)
    scale_PG = torch.empty(num_rows, width // 128, device=gate_up_PF.device) if quantize else None
    activate_kernel[(num_rows // block, width // 128)](
        gate_up_PF,
        stored(h_PF),
        h_PF if scale_PG is None else scale_PG,
        arrangement.pairs_P,
        arrangement.num_blocks,
        num_pairs,
        F=width,
        BLOCK_M=block,
        QUANTIZE=quantize,
        PDL=pdl,
        num_warps=8 if block == 128 else 4,
        **launch_options(pdl),
    )
    return h_PF, scale_PG


def combine(y_RD: Tensor, ids_TK: Tensor, weights_TK: Tensor, dtype: torch.dtype, *, pdl: bool = False) -> Tensor:
    """The weighted sum [T, D] of the rows of each token's choices, in float32, rounded once; ids below zero count nothing."""
    num_tokens, top_k = ids_TK.shape
    hidden = y_RD.shape[1]
    out_TD = torch.empty(num_tokens, hidden, dtype=dtype, device=y_RD.device)
    block = min(1024, triton.next_power_of_2(hidden))
    combine_kernel[(num_tokens, triton.cdiv(hidden, block))](
        y_RD,
        ids_TK,
        weights_TK,
        out_TD,
        D=hidden,
        K=top_k,
        BLOCK_D=block,
        PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )
    return out_TD
