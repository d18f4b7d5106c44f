"""Linear layers of many rows in block FP8, for Hopper, in Gluon: tiles of 128 rows and 128 or 256 columns.

`block_gemm` asks for blocks of x and W with the threads that multiply, and these wait for the tensor cores after each 128 of K. Here one
warp does nothing but ask, and two groups of four warps take turns at the tensor cores: what one group's sums cost is hidden by the other.
Every sum is made in the same order as there, so both give the same bits.

Shape suffixes: T rows, N columns out, K columns in, R rows of scales, B blocks along K.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, misc, no-any-return, no-untyped-call, attr-defined, import-untyped"

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from pointsman.kernels.wide_gemm import descriptor
from pointsman.kernels.wide_tiles import load_tile

ROWS = 128
STAGES = {128: 6, 256: 4}
BAND = 16  # tiles of rows that run side by side, so that they share W in the cache
ACCUMULATOR = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32]))


@gluon.jit
def place_of(tile, tiles_down, ACROSS: gl.constexpr, BAND: gl.constexpr):
    """Which tile of rows, and which of columns."""
    band = tile // (BAND * ACROSS)
    height = gl.minimum(tiles_down - band * BAND, BAND)
    within = tile % (BAND * ACROSS)
    return band * BAND + within % height, within // height


@gluon.jit
def fetch(x_desc, w_desc, ready, empty, x_s, first_s, second_s, tiles_down, COLUMNS: gl.constexpr, ACROSS: gl.constexpr,
          STEPS: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr):  # fmt: skip
    """What the one warp does that asks for blocks."""
    BOTH: gl.constexpr = COLUMNS == 256
    count = 0
    for tile in range(gl.program_id(0), tiles_down * ACROSS, gl.num_programs(0)):
        down, across = place_of(tile, tiles_down, ACROSS, BAND)
        for k in range(STEPS):
            stage = count % STAGES
            mbarrier.wait(empty.index(stage), (count // STAGES & 1) ^ 1)
            mbarrier.expect(ready.index(stage), (2 if BOTH else 1) * w_desc.block_type.nbytes + 2 * x_desc.block_type.nbytes)
            load_tile(x_desc, [down * 128, k * 128], ready.index(stage), x_s.index(2 * stage))
            load_tile(x_desc, [down * 128 + 64, k * 128], ready.index(stage), x_s.index(2 * stage + 1))
            load_tile(w_desc, [across * COLUMNS, k * 128], ready.index(stage), first_s.index(stage))
            if BOTH:
                load_tile(w_desc, [across * COLUMNS + 128, k * 128], ready.index(stage), second_s.index(stage))
            count += 1


@gluon.jit
def sums(HALF: gl.constexpr, count, ready, empty, x_s, first_s, second_s, xs_ptrs, xs_step, first_scale_ptr, second_scale_ptr,
         STEPS: gl.constexpr, STAGES: gl.constexpr, BOTH: gl.constexpr):  # fmt: skip
    """A group's 64 rows times one or, if BOTH, two blocks of 128 columns: the sums over all of K, and how many stages have been used.

    `xs_ptrs` are where the rows' scales of the first step are, `xs_step` apart from those of the next."""
    first = gl.zeros((64, 128), gl.float32, ACCUMULATOR)
    second = gl.zeros((64, 128), gl.float32, ACCUMULATOR)
    # where every product is made: the assembler would take other registers for the next one, and has none left
    product = gl.zeros((64, 128), gl.float32, ACCUMULATOR)
    x_scale = gl.load(xs_ptrs)
    first_scale = gl.load(first_scale_ptr)
    second_scale = gl.load(second_scale_ptr)
    for k in range(STEPS):
        stage = count % STAGES
        mbarrier.wait(ready.index(stage), count // STAGES & 1)
        x = x_s.index(2 * stage + HALF)
        product = warpgroup_mma(x, first_s.index(stage).permute((1, 0)), product, is_async=True, use_acc=False)
        # the scales of the next step are on their way while this one is multiplied
        later = gl.minimum(k + 1, STEPS - 1)
        x_scale_next = gl.load(xs_ptrs + later * xs_step)
        first_scale_next = gl.load(first_scale_ptr + later)
        second_scale_next = gl.load(second_scale_ptr + later)
        product = warpgroup_mma_wait(num_outstanding=0, deps=(product,))
        if BOTH:
            first += product * (x_scale * first_scale)[:, None]
            product = warpgroup_mma(x, second_s.index(stage).permute((1, 0)), product, is_async=True, use_acc=False)
            product = warpgroup_mma_wait(num_outstanding=0, deps=(product,))
            mbarrier.arrive(empty.index(stage), count=1)
            second += product * (x_scale * second_scale)[:, None]
        else:
            mbarrier.arrive(empty.index(stage), count=1)
            first += product * (x_scale * first_scale)[:, None]
        x_scale, first_scale, second_scale = x_scale_next, first_scale_next, second_scale_next
        count += 1
    return first, second, count


@gluon.jit
def multiply(HALF: gl.constexpr, xs_ptr, ws_ptr, out_ptr, ready, empty, x_s, first_s, second_s, num_rows, tiles_down, N: gl.constexpr,
             COLUMNS: gl.constexpr, ACROSS: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr,
             BAND: gl.constexpr):  # fmt: skip
    """What a group of four warps does with its 64 rows of each tile."""
    BOTH: gl.constexpr = COLUMNS == 256
    count = 0
    for tile in range(gl.program_id(0), tiles_down * ACROSS, gl.num_programs(0)):
        down, across = place_of(tile, tiles_down, ACROSS, BAND)
        row = down * 128 + HALF * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, ACCUMULATOR))
        # rows past the end are multiplied with any scale and not stored
        scales = xs_ptr + gl.minimum(row, num_rows - 1) * STEPS
        first_scale = ws_ptr + across * (COLUMNS // 128) * STEPS
        second_scale = ws_ptr + gl.minimum(across * (COLUMNS // 128) + 1, (N + 127) // 128 - 1) * STEPS
        first, second, count = sums(
            HALF, count, ready, empty, x_s, first_s, second_s, scales, 1, first_scale, second_scale, STEPS, STAGES, BOTH
        )
        store(first, out_ptr, down * 128 + HALF * 64, across * COLUMNS, num_rows, N)
        if BOTH:
            store(second, out_ptr, down * 128 + HALF * 64, across * COLUMNS + 128, num_rows, N)


@gluon.jit
def store(y, out_ptr, start, first_column, num_rows, N: gl.constexpr):
    """64 rows of 128 columns."""
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    row = start + gl.arange(0, 64, layout=gl.SliceLayout(1, wide))
    column = first_column + gl.arange(0, 128, layout=gl.SliceLayout(0, wide))
    y = gl.convert_layout(y.to(out_ptr.dtype.element_ty), wide)
    inside = (row < num_rows)[:, None] & (column < N)[None, :]
    gl.store(out_ptr + row.to(gl.int64)[:, None] * N + column[None, :], y, mask=inside)


@gluon.jit(do_not_specialize=["num_rows"])
def dense_kernel(x_desc, w_desc, xs_ptr, ws_ptr, out_ptr, num_rows, N: gl.constexpr, COLUMNS: gl.constexpr, STEPS: gl.constexpr,
                 STAGES: gl.constexpr, BAND: gl.constexpr):  # fmt: skip
    BOTH: gl.constexpr = COLUMNS == 256
    ACROSS: gl.constexpr = (N + COLUMNS - 1) // COLUMNS
    x_s = gl.allocate_shared_memory(gl.float8e4nv, [2 * STAGES, 64, 128], x_desc.layout)
    first_s = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 128, 128], w_desc.layout)
    second_s = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 128, 128], w_desc.layout) if BOTH else first_s
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    tiles_down = gl.cdiv(num_rows, 128)
    gl.warp_specialize(
        [
            (multiply, (0, xs_ptr, ws_ptr, out_ptr, ready, empty, x_s, first_s, second_s, num_rows, tiles_down,
                        N, COLUMNS, ACROSS, STEPS, STAGES, BAND)),
            (multiply, (1, xs_ptr, ws_ptr, out_ptr, ready, empty, x_s, first_s, second_s, num_rows, tiles_down,
                        N, COLUMNS, ACROSS, STEPS, STAGES, BAND)),
            (fetch, (x_desc, w_desc, ready, empty, x_s, first_s, second_s, tiles_down, COLUMNS, ACROSS, STEPS, STAGES, BAND)),
        ],
        worker_num_warps=[4, 1],
        worker_num_regs=[232, 40],
    )  # fmt: skip


def product(x_TK: Tensor, scale_TB: Tensor, weight_NK: Tensor, scale_RB: Tensor, columns: int, processors: int) -> Tensor:
    """x @ weight.T in bfloat16 [T, N].

    Args:
        x_TK, scale_TB: e4m3, K a multiple of 128, and float32 scales.
        weight_NK, scale_RB: the same of blocks of 128 x 128: row n's is n // 128.
        columns: of a tile, 128 or 256.
        processors: programs there are at most, one on each.
    """
    (num_rows, width), height = x_TK.shape, len(weight_NK)
    assert width % 128 == 0
    out_TN = torch.empty(num_rows, height, dtype=torch.bfloat16, device=x_TK.device)
    tiles = -(-num_rows // ROWS) * -(-height // columns)
    dense_kernel[(min(tiles, processors),)](
        descriptor(x_TK, ROWS // 2),
        descriptor(weight_NK, 128),
        scale_TB,
        scale_RB,
        out_TN,
        num_rows,
        N=height,
        COLUMNS=columns,
        STEPS=width // 128,
        STAGES=STAGES[columns],
        BAND=BAND,
        num_warps=4,
        maxnreg=168,
    )
    return out_TN
