"""(Token, choice) pairs in the order of their experts, each expert's padded to whole blocks; and the tokens quantized.

Both have to be done before the first product, and neither needs the other: one launch does both, the first programs the one and
the rest the other. The program of an expert reads all choices, counts them by expert to learn where its own begin, and writes its
own in their order: nothing is exchanged between programs, so the order is always the same and a launch suffices. Choices below
zero are padding and belong to no expert.

Sizes are known on the device alone. Grids and buffers are for the most blocks that so many pairs can need; who comes too much
reads the number of blocks and leaves.

Shape suffixes: T tokens, K experts per token (of `ids_TK`), D columns, G groups of 128 columns, P padded pairs, B blocks of pairs.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, misc, no-any-return, no-untyped-call"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pointsman.kernels.triton_support import launch_options
from pointsman.kernels.weight import FP8

GROUP = tl.constexpr(128)
FP8_MAX = tl.constexpr(448.0)
CHUNKS = (128, 1024, 4096)  # pairs looked at together


class Arrangement(NamedTuple):
    """Where each expert's pairs are. Attributes:

    pairs_P: int32, pair (token * K + choice) of each row of a block; T * K where the row is padding.
    expert_B: int32, the expert of a block.
    num_blocks: int32 [1].
    """

    pairs_P: Tensor
    expert_B: Tensor
    num_blocks: Tensor


@triton.jit
def quantize_groups(x):
    """e4m3 numbers and the scale of each group in the last axis: scale = amax / 448, as in the reference bit by bit."""
    scale = tl.div_rn(tl.max(tl.abs(x), axis=1), FP8_MAX)
    divisor = tl.where(scale == 0, 1.0, scale)
    q = tl.div_rn(x, tl.broadcast_to(divisor[:, None], x.shape))
    return tl.clamp(q, -FP8_MAX, FP8_MAX).to(tl.float8e4nv), scale


@triton.jit(do_not_specialize=["num_pairs", "num_tokens"])
def arrange_kernel(
    ids_ptr,
    pairs_ptr,
    expert_ptr,
    num_blocks_ptr,
    x_ptr,
    q_ptr,
    scale_ptr,
    num_pairs,
    num_tokens,
    E: tl.constexpr,
    E_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    D: tl.constexpr,
    GROUPS_AT_ONCE: tl.constexpr,
    QUANTIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    pid = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if pid < E:
        arrange_expert(ids_ptr, pairs_ptr, expert_ptr, num_blocks_ptr, num_pairs, pid, E, E_PADDED, BLOCK_M, CHUNK)
    elif QUANTIZE:
        quantize_some(x_ptr, q_ptr, scale_ptr, num_tokens * (D // GROUP), pid - E, GROUPS_AT_ONCE)


@triton.jit
def arrange_expert(
    ids_ptr,
    pairs_ptr,
    expert_ptr,
    num_blocks_ptr,
    num_pairs,
    own,
    E: tl.constexpr,
    E_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
):
    experts = tl.arange(0, E_PADDED)
    place = tl.arange(0, CHUNK)
    counts = tl.zeros((E_PADDED,), tl.int32)
    for start in range(0, num_pairs, CHUNK):
        ids = tl.load(ids_ptr + start + place, mask=start + place < num_pairs, other=-1).to(tl.int32)
        counts += tl.histogram(tl.where(ids < 0, 0, ids), E_PADDED, mask=ids >= 0)
    blocks = (counts + BLOCK_M - 1) // BLOCK_M
    first = tl.sum(tl.where(experts < own, blocks, 0), axis=0)
    own_blocks = tl.sum(tl.where(experts == own, blocks, 0), axis=0)
    if own == E - 1:
        tl.store(num_blocks_ptr, first + own_blocks)
    if own_blocks > 0:
        row = first * BLOCK_M
        for start in range(0, num_pairs, CHUNK):
            pair = start + place
            ids = tl.load(ids_ptr + pair, mask=pair < num_pairs, other=-1).to(tl.int32)
            mine = (ids == own).to(tl.int32)
            rank = tl.cumsum(mine, axis=0) - mine
            tl.store(pairs_ptr + row + rank, pair, mask=mine != 0)
            row += tl.sum(mine, axis=0)
        tail = row + tl.arange(0, BLOCK_M)
        tl.store(pairs_ptr + tail, tl.zeros((BLOCK_M,), tl.int32) + num_pairs, mask=tail < (first + own_blocks) * BLOCK_M)
        for block in range(own_blocks):
            tl.store(expert_ptr + first + block, own)


@triton.jit
def quantize_some(x_ptr, q_ptr, scale_ptr, num_groups, pid, GROUPS_AT_ONCE: tl.constexpr):
    group = pid * GROUPS_AT_ONCE + tl.arange(0, GROUPS_AT_ONCE)
    inside = group < num_groups
    offset = group[:, None].to(tl.int64) * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(x_ptr + offset, mask=inside[:, None], other=0.0).to(tl.float32)
    q, scale = quantize_groups(x)
    tl.store(q_ptr + offset, q, mask=inside[:, None])
    tl.store(scale_ptr + group, scale, mask=inside)


def most_blocks(num_pairs: int, num_experts: int, block: int) -> int:
    """The most blocks that so many pairs can need, whatever their experts are."""
    used = min(num_pairs, num_experts)
    return min(num_pairs, (num_pairs + used * (block - 1)) // block)


def arrange(
    ids_TK: Tensor, num_experts: int, block: int, x_TD: Tensor | None = None, *, pdl: bool = False
) -> tuple[Arrangement, Tensor | None, Tensor | None]:
    """Sort the pairs by expert, and quantize x if it is given.

    Args:
        ids_TK: int32 or int64; below zero is no expert.
        block: rows of a block, a power of two.
        x_TD: bfloat16, D a multiple of 128.

    Returns:
        The arrangement; e4m3 [T, D] and float32 [T, G], or None twice.
    """
    num_tokens, top_k = ids_TK.shape
    num_pairs = num_tokens * top_k
    device = ids_TK.device
    blocks = most_blocks(num_pairs, num_experts, block)
    # one buffer for all three, each part aligned to 16 bytes whatever the sizes are: Triton compiles anew for other alignments
    sizes = (blocks * block, triton.cdiv(blocks, 4) * 4, 1)
    pairs_P, expert_B, num_blocks = torch.empty(sum(sizes), dtype=torch.int32, device=device).split(sizes)
    q_TD = scale_TG = None
    chunk = next((size for size in CHUNKS if num_pairs <= size), CHUNKS[-1])
    warps, groups = (4, 8) if chunk <= 1024 else (16, 32)
    hidden, extra = 128, 0
    if x_TD is not None:
        hidden = x_TD.shape[1]
        q_TD = torch.empty(num_tokens, hidden, dtype=FP8, device=device)
        scale_TG = torch.empty(num_tokens, hidden // 128, device=device)
        extra = triton.cdiv(num_tokens * (hidden // 128), groups)
    arrange_kernel[(num_experts + extra,)](
        ids_TK,
        pairs_P,
        expert_B,
        num_blocks,
        ids_TK if x_TD is None else x_TD,
        ids_TK if q_TD is None else q_TD,
        ids_TK if scale_TG is None else scale_TG,
        num_pairs,
        num_tokens,
        E=num_experts,
        E_PADDED=triton.next_power_of_2(num_experts),
        BLOCK_M=block,
        CHUNK=chunk,
        D=hidden,
        GROUPS_AT_ONCE=groups,
        QUANTIZE=x_TD is not None,
        PDL=pdl,
        num_warps=warps,
        **launch_options(pdl),
    )
    return Arrangement(pairs_P, expert_B, num_blocks), q_TD, scale_TG
