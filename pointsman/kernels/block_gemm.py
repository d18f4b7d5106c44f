"""Linear layers on Hopper's tensor cores: block FP8, and bfloat16 where every bit must stay the same in any batch.

y = x @ W.T as `reference.linear` defines it: e4m3 times e4m3 over 128 of K at a time, each partial sum scaled and added in float32,
one rounding at the end. Decoding is a matter of reading W once with the whole chip, so for few rows W takes the side of the product that
must be wide (64 of its rows against 16 or 32 tokens), and K is cut into splits until every multiprocessor has work. Splits are written
as float32 and whoever finishes a tile last adds them, in their order: no bit depends on who that was.

One row goes through the tensor cores more slowly than through a sum in registers (`vector_products`).

For many rows tiles are large, and the tiles of one band of rows run side by side so that they share W in the cache. On Hopper
`dense_gemm` multiplies them.

With `invariant` nothing is split, and few rows have the tiles of more: a row's bits then do not depend on the batch, at the price of
idle multiprocessors for few rows. bfloat16 weights take this kernel only then; else torch's own product (cuBLAS) is as good.

Shape suffixes: T rows, N columns out, K columns in, R rows of scales, B blocks along K, S splits.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from pointsman.kernels.capability import chains, is_hopper
from pointsman.kernels.e4m3 import stored, widened
from pointsman.kernels.norm_quant import quantize
from pointsman.kernels.prefetch import fetch_line
from pointsman.kernels.triton_support import GLUON, launch_options, version
from pointsman.kernels.vector_products import takes_linear, vector_linear
from pointsman.kernels.weight import Quantized, Weight

BLOCK = 128
# programs that keep an H100 or H200 busy: three on each of 132 multiprocessors
PROGRAMS = 396
MOST_SPLITS = 16
SWAP_ROWS = 32  # up to which W is the left operand
# tiles of rows, one below the other, of a product that is split: of more, splits would cost more to write and read than idle processors
MOST_SPLIT_TILES = 4
BAND = 8
# a product of so few rows asks for its weights before the rows are there
AHEAD_ROWS = 64
# so few rows go without tensor cores: one was measured so on an H100
VECTOR_ROWS = 1


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a product is cut: rows and columns of y in a tile, splits of K, whether W is the left operand, and whether `dense_gemm`
    multiplies, which has its own warps and stages."""

    rows: int
    columns: int
    splits: int = 1
    swap: bool = False
    num_warps: int = 4
    num_stages: int = 4
    wide: bool = False


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class BlockWeight:
    """A weight as this kernel multiplies with it.

    Attributes:
        data: [N, K] in e4m3, or bfloat16 without `scale`.
        scale: float32 [R, B].
        scale_row_N: int32, the row of `scale` of each row of data.
        aligned: row n's is n // 128.
        arrivals: zeros, one for each tile whose K is split; a product leaves them as it found them. Two streams must not share them.
        invariant: one tiling for every number of rows.
    """

    data: Tensor
    scale: Tensor | None
    scale_row_N: Tensor
    aligned: bool
    arrivals: Tensor
    invariant: bool


def prepare(weight: Weight, dtype: torch.dtype = torch.bfloat16, *, invariant: bool = False) -> BlockWeight:
    """Raises ValueError for blocks of another size than 128 x 128."""
    assert dtype == torch.bfloat16
    if weight.quantized and weight.block != (BLOCK, BLOCK):
        raise ValueError(f"a weight with blocks of {weight.block[0]} x {weight.block[1]}; this linear takes blocks of 128 x 128")
    num_rows = weight.data.shape[0]
    row_N = weight.scale_row_N().int()
    device = weight.data.device
    return BlockWeight(
        data=(weight.data if weight.quantized else weight.data.bfloat16()).contiguous(),
        scale=None if weight.scale is None else weight.scale.contiguous(),
        scale_row_N=row_N,
        aligned=torch.equal(row_N, torch.arange(num_rows, dtype=torch.int32, device=device) // BLOCK),
        arrivals=torch.zeros(triton.cdiv(num_rows, 64) * MOST_SPLIT_TILES, dtype=torch.int32, device=device),
        invariant=invariant,
    )


def tiling(num_rows: int, columns_out: int, columns_in: int, *, invariant: bool, aligned: bool = True, wide: bool = False) -> Tiling:
    """The tiling for a product of these sizes: what was quickest on an H100, of the tilings tried.

    Args:
        wide: `dense_gemm` can multiply; its bits are those of tiles that are not split.
    """
    if num_rows <= SWAP_ROWS and not invariant:
        rows = 16 if num_rows <= 16 else 32
        return Tiling(rows, 64, _splits(columns_out, columns_in), True, num_warps=4, num_stages=5 if rows == 16 else 4)
    narrow, broad = (triton.cdiv(num_rows, 128) * triton.cdiv(columns_out, columns) for columns in (128, 256))
    if wide and (num_rows > 256 or (num_rows > 128 and narrow > 100)):
        # turns of all processors at tiles of 128 and of 256 columns, and what one takes in microseconds a step along K
        columns = 128 if triton.cdiv(narrow, 132) * 0.42 <= triton.cdiv(broad, 132) * 0.72 else 256
        return Tiling(128, columns, wide=True)
    tiles = triton.cdiv(num_rows, 64) * triton.cdiv(columns_out, 64)
    if invariant or num_rows <= 256:
        splits = 2 if not invariant and columns_in >= 8 * BLOCK and (tiles <= 100 or num_rows <= 64) else 1
        return Tiling(64, 64, splits, num_stages=6 if wide else 4)
    # a scale for each column takes registers that the largest tiles have not
    if not aligned or narrow < 132:
        return Tiling(64, 128)
    return Tiling(128, 128, num_warps=8)


def _splits(columns_out: int, columns_in: int) -> int:
    """Splits that give about `PROGRAMS` programs, each with at least two steps of 128 along K."""
    wanted = int(triton.cdiv(PROGRAMS, triton.cdiv(columns_out, 64)))
    return max(1, min(wanted, MOST_SPLITS, columns_in // (2 * BLOCK)))


@triton.jit(do_not_specialize=["num_rows"])
def multiply_kernel(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    w_scale_ptr,
    w_row_ptr,
    out_ptr,
    part_ptr,
    arrivals_ptr,
    num_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    SPLITS: tl.constexpr,
    BAND: tl.constexpr,
    SWAP: tl.constexpr,
    QUANTIZED: tl.constexpr,
    ALIGNED: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    tile, split = tl.program_id(0), tl.program_id(1)
    tiles_across: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    tiles_down = tl.cdiv(num_rows, ROWS)
    band = tile // (BAND * tiles_across)
    height = tl.minimum(tiles_down - band * BAND, BAND)
    within = tile % (BAND * tiles_across)
    row = (band * BAND + within % height) * ROWS + tl.arange(0, ROWS)
    first_column = within // height * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)
    # Columns past the end repeat others and are not stored. Rows must not: many programs would read one row of x from one place of the
    # second-level cache, and wait for it.
    x_inside = row < num_rows
    x_row, w_row = row.to(tl.int64), (column % N).to(tl.int64)
    inner = tl.arange(0, STEP)
    x_ptr += x_row[:, None] * K + inner[None, :]
    w_ptrs = w_ptr + w_row[:, None] * K + inner[None, :]
    BLOCKS: tl.constexpr = (K + STEP - 1) // STEP
    per_split: tl.constexpr = (BLOCKS + SPLITS - 1) // SPLITS
    x_scale_ptr += x_row * BLOCKS
    if ALIGNED:
        w_scale_ptr += first_column // 128 * BLOCKS
    else:
        w_scale_ptr += tl.load(w_row_ptr + w_row) * BLOCKS
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if AHEAD:
            line: tl.constexpr = 128 // (w_ptr.dtype.element_ty.primitive_bitwidth // 8)
            lines_ptr = w_ptr + w_row * K
            for block in tl.static_range(per_split * STEP // line):
                at = split * per_split * STEP + block * line
                if at < K:
                    fetch_line(lines_ptr + at)
        tl.extra.cuda.gdc_wait()
    y = tl.zeros((COLUMNS, ROWS), tl.float32) if SWAP else tl.zeros((ROWS, COLUMNS), tl.float32)
    for block in range(split * per_split, tl.minimum((split + 1) * per_split, BLOCKS)):
        if K % STEP == 0:
            x = tl.load(x_ptr + block * STEP, mask=x_inside[:, None], other=0.0)
            w = tl.load(w_ptrs + block * STEP)
        else:
            inside = inner[None, :] < K - block * STEP
            x = tl.load(x_ptr + block * STEP, mask=inside & x_inside[:, None], other=0.0)
            w = tl.load(w_ptrs + block * STEP, mask=inside, other=0.0)
        x, w = widened(x), widened(w)
        product = tl.dot(w, x.T) if SWAP else tl.dot(x, w.T)
        if QUANTIZED:
            x_scale = tl.load(x_scale_ptr + block, mask=x_inside, other=0.0)
            w_scale = tl.load(w_scale_ptr + block)
            if ALIGNED:
                scale = x_scale * w_scale
                product *= scale[None, :] if SWAP else scale[:, None]
            elif SWAP:
                product *= x_scale[None, :] * w_scale[:, None]
            else:
                product *= x_scale[:, None] * w_scale[None, :]
        y += product
    row = row.to(tl.int64)
    if SWAP:
        at = row[None, :] * N + column[:, None]
        inside = (row[None, :] < num_rows) & (column[:, None] < N)
    else:
        at = row[:, None] * N + column[None, :]
        inside = (row[:, None] < num_rows) & (column[None, :] < N)
    if SPLITS == 1:
        tl.store(out_ptr + at, y.to(tl.bfloat16), mask=inside)
    else:
        size = tl.full((), N, tl.int64) * num_rows
        tl.store(part_ptr + split * size + at, y, mask=inside)
        # all of this program's stores come before its arrival, and all arrivals before the loads of the last
        tl.debug_barrier()
        if tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel") == SPLITS - 1:
            y = tl.load(part_ptr + at, mask=inside, other=0.0, cache_modifier=".cg")
            for other in range(1, SPLITS):
                y += tl.load(part_ptr + other * size + at, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(out_ptr + at, y.to(tl.bfloat16), mask=inside)
            tl.store(arrivals_ptr + tile, 0)


def linear(x: Tensor | Quantized, weight: BlockWeight, cut: Tiling | None = None, *, pdl: bool | None = None) -> Tensor:
    """x @ weight.T in bfloat16, [T, N].

    Args:
        x: bfloat16 [T, K], or what a kernel before has quantized; an FP8 weight quantizes the first itself.
        cut: the tiling; None chooses by the sizes.
        pdl: the kernel may be launched while the one before runs; None: where the device can.
    """
    if weight.scale is None:
        assert isinstance(x, Tensor), "a bfloat16 weight multiplies bfloat16 rows"
        data, scale = x, x
    else:
        data, scale = quantize(x) if isinstance(x, Tensor) else x
    num_rows, width = data.shape
    height = weight.data.shape[0]
    assert data.is_contiguous() and scale.is_contiguous() and width == weight.data.shape[1]
    pdl = chains(data.device) if pdl is None else pdl
    few = num_rows <= VECTOR_ROWS and takes_linear(num_rows, width)
    if cut is None and few and weight.scale is not None and weight.aligned and not weight.invariant:
        return vector_linear(data, scale, weight.data, weight.scale, pdl=pdl)
    out_TN = torch.empty(num_rows, height, dtype=torch.bfloat16, device=data.device)
    if num_rows == 0:
        return out_TN
    cut = cut or tiling(num_rows, height, width, invariant=weight.invariant, aligned=weight.aligned, wide=takes_wide(weight))
    if cut.wide:
        return wide_product(data, scale, weight, cut.columns)
    tiles = triton.cdiv(num_rows, cut.rows) * triton.cdiv(height, cut.columns)
    part_STN = out_TN
    if cut.splits > 1:
        assert num_rows <= cut.rows * MOST_SPLIT_TILES, (
            f"{cut} splits products of up to {MOST_SPLIT_TILES} tiles of rows; there are {num_rows} rows"
        )
        part_STN = torch.empty(cut.splits, num_rows, height, dtype=torch.float32, device=data.device)
    multiply_kernel[(tiles, cut.splits)](
        stored(data),
        scale,
        stored(weight.data),
        weight.data if weight.scale is None else weight.scale,
        weight.scale_row_N,
        out_TN,
        part_STN,
        weight.arrivals,
        num_rows,
        N=height,
        K=width,
        ROWS=cut.rows,
        COLUMNS=cut.columns,
        STEP=BLOCK if weight.scale is not None else BLOCK // 2,
        SPLITS=cut.splits,
        BAND=BAND,
        SWAP=cut.swap,
        QUANTIZED=weight.scale is not None,
        ALIGNED=weight.aligned,
        AHEAD=num_rows <= AHEAD_ROWS,
        PDL=pdl,
        num_warps=cut.num_warps,
        num_stages=cut.num_stages,
        **launch_options(pdl),
    )
    return out_TN


def takes_wide(weight: BlockWeight) -> bool:
    """Whether `dense_gemm` can multiply with the weight where it is."""
    fits = weight.scale is not None and weight.aligned and weight.data.shape[1] % BLOCK == 0
    return fits and is_hopper(weight.data.device) and (version() or (0, 0)) >= GLUON


def wide_product(data: Tensor, scale: Tensor, weight: BlockWeight, columns: int) -> Tensor:
    """The product of many rows, one program on each processor."""
    assert weight.scale is not None and weight.aligned
    processors = torch.cuda.get_device_properties(data.device).multi_processor_count
    dense: Any = importlib.import_module("pointsman.kernels.dense_gemm")
    out_TN: Tensor = dense.product(data, scale, weight.data, weight.scale, columns, processors)
    return out_TN


def linear_or_torch(x: Tensor | Quantized, weight: BlockWeight) -> Tensor:
    """The same, with torch's product for a bfloat16 weight that may differ in the last bit from batch to batch."""
    if weight.scale is None and not weight.invariant:
        assert isinstance(x, Tensor)
        return F.linear(x, weight.data)
    return linear(x, weight)
