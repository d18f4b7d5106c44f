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

from pointsman.kernels.e4m3 import narrowed, stored
from pointsman.kernels.quotient import quotient
from pointsman.kernels.triton_support import launch_options
from pointsman.kernels.weight import FP8

GROUP = tl.constexpr(128)
FP8_MAX = tl.constexpr(448.0)
CHUNKS = (128, 1024, 4096)  # pairs looked at together
SPREAD_CHUNK = 256  # pairs of a program
NUM_COUNTERS = tl.constexpr(8)


class Arrangement(NamedTuple):
    """Where each expert's pairs are. Attributes:

    pairs_P: int32, pair (token * K + choice) of each row of a block; T * K where the row is padding.
    expert_B: int32, the expert of a block.
    num_blocks: int32 [1].
    """

    pairs_P: Tensor
    expert_B: Tensor
    num_blocks: Tensor


class Spread(NamedTuple):
    """An `Arrangement`, with what tells a product its tiles in any order. Further attributes:

    first_E: int32 [E + 1], the first block of each expert and, last, the number of blocks.
    counters: int32 zeros [8], of which a product counts in one the tiles that have begun.
    """

    pairs_P: Tensor
    expert_B: Tensor
    num_blocks: Tensor
    first_E: Tensor
    counters: Tensor


@triton.jit
def quantize_groups(x, TYPE: tl.constexpr = tl.float8e4nv):
    """e4m3 numbers (or their bytes) and the scale of each group in the last axis: scale = amax / 448, as in the reference bit by bit."""
    scale = tl.div_rn(tl.max(tl.abs(x), axis=1), FP8_MAX)
    q = quotient(x, tl.where(scale == 0, 1.0, scale))
    return narrowed(tl.clamp(q, -FP8_MAX, FP8_MAX), TYPE), scale


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
    q, scale = quantize_groups(x, q_ptr.dtype.element_ty)
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
        ids_TK if q_TD is None else stored(q_TD),
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


@triton.jit(do_not_specialize=["num_pairs"])
def count_kernel(ids_ptr, counts_ptr, num_pairs, E_PADDED: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr):
    """counts[c, e]: choices of expert e in the c-th CHUNK of pairs."""
    pair = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    ids = tl.load(ids_ptr + pair, mask=pair < num_pairs, other=-1).to(tl.int32)
    counts = tl.histogram(tl.maximum(ids, 0), E_PADDED, mask=ids >= 0)
    tl.store(counts_ptr + tl.program_id(0) * E_PADDED + tl.arange(0, E_PADDED), counts)


@triton.jit(do_not_specialize=["num_pairs"])
def place_kernel(
    ids_ptr,
    counts_ptr,
    pairs_ptr,
    expert_ptr,
    num_blocks_ptr,
    place_ptr,
    first_ptr,
    counters_ptr,
    num_pairs,
    E: tl.constexpr,
    E_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS_AT_ONCE: tl.constexpr,
    OTHERS: tl.constexpr,
    PDL: tl.constexpr,
):
    """The places of a chunk of pairs, and the padding of the experts that fall to this program."""
    own, num_chunks = tl.program_id(0), tl.num_programs(0)
    experts = tl.arange(0, E_PADDED)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    totals = tl.zeros((E_PADDED,), tl.int32)
    before = tl.zeros((E_PADDED,), tl.int32)
    for start in range(0, num_chunks, CHUNKS_AT_ONCE):
        chunk = start + tl.arange(0, CHUNKS_AT_ONCE)
        counts = tl.load(counts_ptr + chunk[:, None] * E_PADDED + experts[None, :], mask=(chunk < num_chunks)[:, None], other=0)
        totals += tl.sum(counts, axis=0)
        before += tl.sum(tl.where((chunk < own)[:, None], counts, 0), axis=0)
    blocks = (totals + BLOCK_M - 1) // BLOCK_M
    first = tl.cumsum(blocks, axis=0) - blocks
    pair = own * CHUNK + tl.arange(0, CHUNK)
    ids = tl.load(ids_ptr + pair, mask=pair < num_pairs, other=-1).to(tl.int32)
    rank = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, CHUNK, OTHERS):
        other = own * CHUNK + start + tl.arange(0, OTHERS)
        other_ids = tl.load(ids_ptr + other, mask=other < num_pairs, other=-1).to(tl.int32)
        rank += tl.sum(((other_ids[None, :] == ids[:, None]) & (other[None, :] < pair[:, None])).to(tl.int32), axis=1)
    place = tl.gather(first * BLOCK_M + before, tl.maximum(ids, 0), 0) + rank
    tl.store(pairs_ptr + place, pair, mask=ids >= 0)
    tl.store(place_ptr + pair, tl.where(ids >= 0, place, -1), mask=pair < num_pairs)
    if own == 0:
        tl.store(num_blocks_ptr, tl.sum(blocks, axis=0))
        tl.store(first_ptr + experts, first, mask=experts < E)
        tl.store(first_ptr + E, tl.sum(blocks, axis=0))
        tl.store(counters_ptr + tl.arange(0, NUM_COUNTERS), tl.zeros((NUM_COUNTERS,), tl.int32))
    for expert in range(own, E, num_chunks):
        start = tl.sum(tl.where(experts == expert, first, 0), axis=0)
        num = tl.sum(tl.where(experts == expert, blocks, 0), axis=0)
        tail = start * BLOCK_M + tl.sum(tl.where(experts == expert, totals, 0), axis=0) + tl.arange(0, BLOCK_M)
        tl.store(pairs_ptr + tail, tl.zeros((BLOCK_M,), tl.int32) + num_pairs, mask=tail < (start + num) * BLOCK_M)
        for block in range(num):
            tl.store(expert_ptr + start + block, expert)


@triton.jit
def spread_kernel(
    x_ptr, place_ptr, q_ptr, scale_ptr, num_rows, D: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """A token quantized, to the places of its pairs; scales lie group by group."""
    token = tl.program_id(0)
    group = tl.arange(0, GROUPS)
    inside = group < D // GROUP
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(x_ptr + token.to(tl.int64) * D + column, mask=inside[:, None], other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    q, scale = quantize_groups(x.to(tl.float32), q_ptr.dtype.element_ty)
    for k in tl.static_range(K):
        place = tl.load(place_ptr + token * K + k + group * 0).to(tl.int64)
        there = inside & (place >= 0)
        tl.store(q_ptr + place[:, None] * D + column, q, mask=there[:, None])
        tl.store(scale_ptr + group.to(tl.int64) * num_rows + place, scale, mask=there)


def spread(ids_TK: Tensor, num_experts: int, block: int, x_TD: Tensor, *, pdl: bool = False) -> tuple[Spread, Tensor, Tensor]:
    """The same arrangement, made for many tokens, and the rows of all pairs in its order.

    Three launches in the place of one, so that no program has to read all choices. The choices must be older than the launch before.

    Returns:
        The arrangement; e4m3 [P, D] and float32 [G, P], of which padding has no values.
    """
    num_tokens, top_k = ids_TK.shape
    num_pairs, hidden = num_tokens * top_k, x_TD.shape[1]
    device, padded = ids_TK.device, triton.next_power_of_2(num_experts)
    blocks = most_blocks(num_pairs, num_experts, block)
    chunks = triton.cdiv(num_pairs, SPREAD_CHUNK)
    num_rows = blocks * block
    sizes = (num_rows, triton.cdiv(blocks, 4) * 4, 4, num_experts // 4 * 4 + 4, NUM_COUNTERS.value, chunks * padded, num_pairs)
    buffers = torch.empty(sum(sizes), dtype=torch.int32, device=device).split(sizes)
    pairs_P, expert_B, num_blocks, first_E, counters, counts, place = buffers
    q_PD = torch.empty(num_rows, hidden, dtype=FP8, device=device)
    scale_GP = torch.empty(hidden // 128, num_rows, device=device)
    options = launch_options(pdl)
    count_kernel[(chunks,)](ids_TK, counts, num_pairs, E_PADDED=padded, CHUNK=SPREAD_CHUNK, PDL=pdl, num_warps=4, **options)
    place_kernel[(chunks,)](
        ids_TK,
        counts,
        pairs_P,
        expert_B,
        num_blocks,
        place,
        first_E,
        counters,
        num_pairs,
        E=num_experts,
        E_PADDED=padded,
        BLOCK_M=block,
        CHUNK=SPREAD_CHUNK,
        CHUNKS_AT_ONCE=16,
        OTHERS=32,
        PDL=pdl,
        num_warps=8,
        **options,
    )
    groups = triton.next_power_of_2(hidden // 128)
    spread_kernel[(num_tokens,)](
        x_TD, place, stored(q_PD), scale_GP, num_rows, D=hidden, K=top_k, GROUPS=groups, PDL=pdl, num_warps=4, **options
    )
    return Spread(pairs_P, expert_B, num_blocks[:1], first_E[: num_experts + 1], counters), q_PD, scale_GP
