"""Attention over the paged cache, for decode and prefill in one call that a CUDA graph can hold.

The work is a list of tiles, and the list is data. A tile is a few consecutive rows of one lane; the host writes (first row, number of
rows, lane) of each into an int32 array before the step, and everything else (how long a sequence is, which pages it has) is read on
the device. The grids depend on the room in the lists alone, so a captured graph serves any step that fits. A tile of no rows does
nothing. A tile of lane -1 writes zeros: rows that pad a step are covered by such tiles, so no row is left as memory was.

A tile's matrix has one row for each (row, query head) pair of a key/value head: six query heads of MiniMax-M2 and ten rows make 60 of
64. Tiles of `decode_D3` have one row and use the smallest matrix; where there are few, each sequence is cut into `num_splits` parts of
its blocks of positions, and a second kernel joins them in their order, so a step gives the same bits whenever it is run. Tiles of
`prefill_P3` walk their sequence from its first position in blocks of the same size. In a captured step of `FEW_ROWS` rows all tiles are
of decode, for a launch that has nothing to do costs as much as one that has little. A row's result there does not depend on the other
rows of its tile: blocks past its own position change nothing, not even a bit. `uniform` puts every row into such tiles: slower to
decode, but then no bit of a row depends on the batch, on chunk borders, or on whether it is decoded or computed again after a
preemption.

Shape suffixes: T rows, Q query heads, H key/value heads, G query heads per key/value head, C channels of a head, P pages or prefill
tiles, S slots of a page, L lanes, D decode tiles, B blocks of 128 columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from pointsman.kernels.capability import chains
from pointsman.kernels.e4m3 import narrowed, stored, widened
from pointsman.kernels.quotient import quotient
from pointsman.kernels.reference import Span
from pointsman.kernels.triton_support import launch_options
from pointsman.kernels.weight import FP8, Quantized


class Shape(Protocol):
    """Sizes of the heads, as `kernels.AttentionShape`."""

    @property
    def num_heads(self) -> int: ...

    @property
    def num_kv_heads(self) -> int: ...


Tiles = npt.NDArray[np.int32]

DECODE_M = 16
PREFILL_M = 64
MOST_SPLITS = 32
# programs of decode that keep an H100 or H200 busy: four on each of 132 multiprocessors
PROGRAMS = 528
ZERO_LANE = -1
# in a step of so few rows each row is a tile of decode
FEW_ROWS = 16


@triton.jit
def _store_rows(o, out_ptr, scale_ptr, row, head, valid, Q: tl.constexpr, C: tl.constexpr, QUANTIZE: tl.constexpr):
    """Write rows o [M, C] of the output, rounded to bfloat16 and then, if asked, quantized with one scale for each head's row."""
    channel = tl.arange(0, C)
    at = (row.to(tl.int64) * Q + head)[:, None] * C + channel[None, :]
    if QUANTIZE:
        o = o.to(tl.bfloat16).to(tl.float32)
        scale = tl.div_rn(tl.max(tl.abs(o), axis=1), 448.0)
        o = quotient(o, tl.where(scale == 0.0, 1.0, scale))
        o = tl.minimum(tl.maximum(o, -448.0), 448.0)
        tl.store(scale_ptr + row.to(tl.int64) * Q + head, scale, mask=valid)
    tl.store(out_ptr + at, narrowed(o, out_ptr.dtype.element_ty), mask=valid[:, None])


@triton.jit
def attend_kernel(
    q_ptr, k_ptr, v_ptr, tiles_ptr, positions_ptr, table_ptr, table_stride, out_ptr, scale_ptr, part_ptr, lse_ptr, scale_log2,
    num_splits,
    H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, PAGE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    PARTIAL: tl.constexpr, QUANTIZE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = tl.load(tiles_ptr + tile * 3)
    num_rows = tl.load(tiles_ptr + tile * 3 + 1)
    lane = tl.load(tiles_ptr + tile * 3 + 2)
    if num_rows == 0:
        if PDL:
            tl.extra.cuda.gdc_wait()
        return
    pair = tl.arange(0, M)
    channel = tl.arange(0, C)
    valid = pair < num_rows * G
    row = first + tl.where(valid, pair // G, 0)
    head = kv_head * G + pair % G
    if lane < 0:
        if PDL:
            tl.extra.cuda.gdc_wait()
        if not PARTIAL:
            _store_rows(tl.zeros((M, C), tl.float32), out_ptr, scale_ptr, row, head, valid, H * G, C, QUANTIZE)
        return
    position = tl.load(positions_ptr + row)
    length = tl.load(positions_ptr + first + num_rows - 1).to(tl.int32) + 1
    blocks = tl.cdiv(length, N)
    per_split = tl.cdiv(blocks, num_splits)
    low = split * per_split
    high = tl.minimum(low + per_split, blocks)
    if PDL:
        # tiles and positions are older than the step's first kernel
        tl.extra.cuda.gdc_wait()
    q = tl.load(q_ptr + (row.to(tl.int64) * (H * G) + head)[:, None] * C + channel[None, :], mask=valid[:, None], other=0.0)
    if k_ptr.dtype.element_ty.primitive_bitwidth == 8:
        # float16 holds every e4m3 number, and a GPU has an instruction for that; bfloat16 would take three
        q = tl.minimum(tl.maximum(q.to(tl.float32), -65504.0), 65504.0).to(tl.float16)
    highest = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    o = tl.zeros((M, C), tl.float32)
    pages_ptr = table_ptr + lane.to(tl.int64) * table_stride
    for block in range(low, high):
        at = block * N + tl.arange(0, N)
        exists = at < length
        page = tl.load(pages_ptr + at // PAGE, mask=exists, other=0).to(tl.int64)
        slot = ((page * H + kv_head) * PAGE + at % PAGE)[:, None] * C + channel[None, :]
        k = widened(tl.load(k_ptr + slot, mask=exists[:, None], other=0.0)).to(q.dtype)
        scores = tl.dot(q, k.T) * scale_log2
        scores = tl.where(at[None, :] <= position[:, None], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        # a row that has seen nothing yet stays at nothing: -inf - -inf would be NaN
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(highest - base)
        total = total * shrink + tl.sum(weights, axis=1)
        v = widened(tl.load(v_ptr + slot, mask=exists[:, None], other=0.0)).to(q.dtype)
        o = tl.dot(weights.to(q.dtype), v, o * shrink[:, None])
        highest = higher
    # a part without positions, and rows of the matrix that stand for none
    divisor = tl.where(total > 0.0, total, 1.0)
    o = o / divisor[:, None]
    if PARTIAL:
        # part [tile, split, head, channel] is normed within itself; a part without positions has no weight
        at = (tile.to(tl.int64) * num_splits + split) * (H * G) + head
        tl.store(lse_ptr + at, tl.where(total > 0.0, highest + tl.log2(divisor), float("-inf")), mask=valid)
        tl.store(part_ptr + at[:, None] * C + channel[None, :], o, mask=valid[:, None])
    else:
        _store_rows(o, out_ptr, scale_ptr, row, head, valid, H * G, C, QUANTIZE)


@triton.jit
def join_kernel(
    part_ptr, lse_ptr, tiles_ptr, out_ptr, scale_ptr, num_splits,
    Q: tl.constexpr, C: tl.constexpr, SPLITS: tl.constexpr, QUANTIZE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tile, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(tiles_ptr + tile * 3)
    num_rows = tl.load(tiles_ptr + tile * 3 + 1)
    lane = tl.load(tiles_ptr + tile * 3 + 2)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if num_rows == 0:
        return
    split = tl.arange(0, SPLITS)
    channel = tl.arange(0, C)
    at = (tile.to(tl.int64) * num_splits + split) * Q + head
    made = split < tl.where(lane >= 0, num_splits, 0)
    lse = tl.load(lse_ptr + at, mask=made, other=float("-inf"))
    used = lse > float("-inf")
    weight = tl.where(used, tl.exp2(lse - tl.maximum(tl.max(lse, axis=0), -1e30)), 0.0)
    part = tl.load(part_ptr + at[:, None] * C + channel[None, :], mask=made[:, None], other=0.0)
    o = tl.sum(part * weight[:, None], axis=0) / tl.maximum(tl.sum(weight, axis=0), 1e-30)
    one = tl.arange(0, 1)
    _store_rows(o[None, :], out_ptr, scale_ptr, row + one, head + one, one == 0, Q, C, QUANTIZE)


@dataclass(frozen=True, eq=False, kw_only=True)
class TilePlan:
    """A step's tiles on the device; a captured graph keeps the tensors and the host writes new tiles into them.

    Attributes:
        decode_D3, prefill_P3: int32 (first row, number of rows, lane).
        num_splits: parts that a decoding sequence is cut into.
    """

    decode_D3: Tensor
    prefill_P3: Tensor
    num_splits: int


def rows_per_tile(num_heads: int, num_kv_heads: int) -> int:
    """Rows of a tile of prefill."""
    return PREFILL_M // (num_heads // num_kv_heads)


def num_splits(num_decode_tiles: int, num_kv_heads: int) -> int:
    """Parts that fill the device, of each of this many sequences."""
    return max(1, min(MOST_SPLITS, PROGRAMS // max(1, num_decode_tiles * num_kv_heads)))


def most_prefill_tiles(num_rows: int, num_lanes: int, per_tile: int) -> int:
    """Tiles that suffice for any step of this many rows in at most this many runs of rows, padding included."""
    return min(num_rows, num_rows // per_tile + num_lanes + 1)


def lay_out_tiles(spans: Sequence[Span], num_rows: int, per_tile: int, *, uniform: bool = False) -> tuple[list[Span], list[Span]]:
    """The tiles (lane, first row, number of rows) of decode and of prefill that together cover rows 0 to num_rows once.

    Rows behind the last span are padding; they are covered with tiles of `ZERO_LANE`.
    """
    decode: list[Span] = []
    prefill: list[Span] = []
    end = 0
    for lane, start, length in spans:
        end = start + length
        if length == 1 and not uniform:
            decode.append(Span(lane, start, 1))
        else:
            prefill += _cut(lane, start, end, per_tile)
    if prefill or uniform:
        prefill += _cut(ZERO_LANE, end, num_rows, per_tile)
    else:
        decode += _cut(ZERO_LANE, end, num_rows, 1)
    return decode, prefill


def _cut(lane: int, start: int, end: int, size: int) -> list[Span]:
    return [Span(lane, at, min(size, end - at)) for at in range(start, end, size)]


def write_tiles(into_N3: Tiles, tiles: Sequence[Span]) -> None:
    """Write tiles in the device's order (first row, number of rows, lane); the room behind them becomes empty tiles."""
    assert len(tiles) <= len(into_N3), f"{len(tiles)} tiles in room for {len(into_N3)}"
    into_N3[len(tiles) :] = 0
    if tiles:
        into_N3[: len(tiles)] = [(start, length, lane) for lane, start, length in tiles]


def plan(spans: Sequence[Span], num_rows: int, shape: Shape, device: torch.device, *, uniform: bool = False) -> TilePlan:
    """A plan with exactly the tiles of one step, for a step that is not captured."""
    tiles = []
    for found in lay_out_tiles(spans, num_rows, rows_per_tile(shape.num_heads, shape.num_kv_heads), uniform=uniform):
        array = np.empty((len(found), 3), np.int32)
        write_tiles(array, found)
        tiles.append(torch.from_numpy(array).to(device))
    return TilePlan(decode_D3=tiles[0], prefill_P3=tiles[1], num_splits=num_splits(len(tiles[0]), shape.num_kv_heads))


def fixed_tiles(spans: Sequence[Span], num_rows: int, num_lanes: int, shape: Shape, *, uniform: bool = False) -> list[Tiles]:
    """Arrays for `plan_of`, of sizes that depend on the numbers of rows and lanes alone; rows behind the last span are padding."""
    per_tile = rows_per_tile(shape.num_heads, shape.num_kv_heads)
    end = spans[-1].start + spans[-1].length if spans else 0
    if num_rows <= FEW_ROWS and not uniform:
        decode = [Span(lane, row, 1) for lane, start, length in spans for row in range(start, start + length)]
        decode += _cut(ZERO_LANE, end, num_rows, 1)
        decode_D3, prefill_P3 = np.empty((num_rows, 3), np.int32), np.empty((0, 3), np.int32)
        write_tiles(decode_D3, decode)
        return [decode_D3, prefill_P3]
    decode, prefill = lay_out_tiles(spans, end, per_tile, uniform=uniform)
    prefill += _cut(ZERO_LANE, end, num_rows, per_tile)
    decode_D3 = np.empty((0 if uniform else min(num_rows, num_lanes), 3), np.int32)
    prefill_P3 = np.empty((most_prefill_tiles(num_rows, num_lanes, per_tile), 3), np.int32)
    write_tiles(decode_D3, decode)
    write_tiles(prefill_P3, prefill)
    return [decode_D3, prefill_P3]


def plan_of(tiles: Sequence[Tensor], shape: Shape) -> TilePlan:
    """The plan of `fixed_tiles` that are on the device."""
    decode_D3, prefill_P3 = tiles
    return TilePlan(decode_D3=decode_D3, prefill_P3=prefill_P3, num_splits=num_splits(len(decode_D3), shape.num_kv_heads))


def attention(
    q_TQC: Tensor,
    k_PHSC: Tensor,
    v_PHSC: Tensor,
    tiles: TilePlan,
    positions_T: Tensor,
    page_table_LP: Tensor,
    scale: float,
    *,
    pdl: bool | None = None,
) -> Tensor:
    """`reference.attention` of the rows that the tiles cover: [T, Q, C] in q's dtype; rows that no tile covers are not written.

    Args:
        q_TQC: bfloat16; C a power of two of at least 16, at most 16 query heads per key/value head.
        k_PHSC, v_PHSC: one layer's pages in bfloat16 or float32, multiplied as bfloat16, or e4m3, multiplied as float16.
        positions_T: int32 or int64.
        page_table_LP: int32 or int64.
        pdl: the kernels may be launched while the one before runs; None: where the device can.
    """
    out_TQC = torch.empty_like(q_TQC)
    _attend(q_TQC, k_PHSC, v_PHSC, tiles, positions_T, page_table_LP, scale, out_TQC, None, pdl)
    return out_TQC


def attention_quantize(
    q_TQC: Tensor,
    k_PHSC: Tensor,
    v_PHSC: Tensor,
    tiles: TilePlan,
    positions_T: Tensor,
    page_table_LP: Tensor,
    scale: float,
    *,
    pdl: bool | None = None,
) -> Quantized:
    """The rows of `attention` as the next linear wants them: e4m3 [T, Q * C] and a scale for each head's row; C must be 128."""
    num_rows, heads, channels = q_TQC.shape
    assert channels == 128, "a block of 128 columns must be one head's row"
    out_TQC = torch.empty_like(q_TQC, dtype=FP8)
    scale_TQ = torch.empty(num_rows, heads, dtype=torch.float32, device=q_TQC.device)
    _attend(q_TQC, k_PHSC, v_PHSC, tiles, positions_T, page_table_LP, scale, out_TQC, scale_TQ, pdl)
    return Quantized(out_TQC.flatten(1), scale_TQ)


def _attend(
    q_TQC: Tensor,
    k_PHSC: Tensor,
    v_PHSC: Tensor,
    tiles: TilePlan,
    positions_T: Tensor,
    page_table_LP: Tensor,
    scale: float,
    out_TQC: Tensor,
    scale_TQ: Tensor | None,
    pdl: bool | None,
) -> None:
    heads, channels = q_TQC.shape[1:]
    kv_heads, page_size = k_PHSC.shape[1:3]
    assert q_TQC.is_contiguous() and k_PHSC.is_contiguous() and v_PHSC.is_contiguous() and page_table_LP.stride(1) == 1
    num_decode = len(tiles.decode_D3)
    k_PHSC, v_PHSC, out_TQC = stored(k_PHSC), stored(v_PHSC), stored(out_TQC)
    small = k_PHSC.dtype == FP8  # bytes are decoded in registers, of which twice as many positions would take too many
    splits = tiles.num_splits
    pdl = chains(q_TQC.device) if pdl is None else pdl
    part = lse = out_TQC
    if splits > 1:
        part = torch.empty(num_decode, splits, heads, channels, dtype=torch.float32, device=q_TQC.device)
        lse = torch.empty(num_decode, splits, heads, dtype=torch.float32, device=q_TQC.device)
    for tiles_N3, rows, parts in ((tiles.decode_D3, DECODE_M, splits), (tiles.prefill_P3, PREFILL_M, 1)):
        if len(tiles_N3):
            attend_kernel[(len(tiles_N3), kv_heads, parts)](
                q_TQC,
                k_PHSC,
                v_PHSC,
                tiles_N3,
                positions_T,
                page_table_LP,
                page_table_LP.stride(0),
                out_TQC,
                out_TQC if scale_TQ is None else scale_TQ,
                part,
                lse,
                scale * math.log2(math.e),
                parts,
                H=kv_heads,
                G=heads // kv_heads,
                C=channels,
                PAGE=page_size,
                M=rows,
                N=128 if small else 64,
                PARTIAL=parts > 1,
                QUANTIZE=scale_TQ is not None,
                PDL=pdl,
                num_warps=4,
                num_stages=2 if small else 3,
                **launch_options(pdl),
            )
    if splits > 1 and num_decode:
        join_kernel[(num_decode, heads)](
            part,
            lse,
            tiles.decode_D3,
            out_TQC,
            out_TQC if scale_TQ is None else scale_TQ,
            splits,
            Q=heads,
            C=channels,
            SPLITS=triton.next_power_of_2(splits),
            QUANTIZE=scale_TQ is not None,
            PDL=pdl,
            num_warps=1,
            **launch_options(pdl),
        )
