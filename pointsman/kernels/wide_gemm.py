"""The experts' products of many tokens in block FP8, for Hopper, in Gluon: tiles of 128 rows and 256 columns, taken turns at.

A program stays on its processor and goes from tile to tile. One of its warps does nothing but ask the copy engine (TMA) for the blocks of
rows and weights that come next; two groups of four warps multiply, each its 64 rows. A product's sums are taken out and scaled after each
128 of K, and while one group does that the tensor cores have the other's products: that is what `grouped_gemm` lacks where products and
not the memory are the limit. A tile's columns are two times 128: gate and up of the same hidden columns, which leave activated and
quantized, or columns of `down` that follow one another.

The copy engine reads rows that lie together, so the rows of all pairs are laid out by expert first (`spread`).

Shape suffixes: T tokens, K experts per token, P padded pairs, D hidden, F expert width, G groups of 128 columns.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, misc, no-any-return, no-untyped-call, attr-defined, import-untyped"

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from pointsman.kernels.arrange import Arrangement
from pointsman.kernels.weight import FP8, Weight

ROWS = 128
STAGES = 4
ACCUMULATOR = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32]))
load_tile = getattr(tma, "async_load", tma.async_copy_global_to_shared)  # newer versions have another name for it


@gluon.jit
def fetch(x_desc, w_desc, pairs_ptr, expert_ptr, ready, empty, x_s, first_s, second_s, num_tiles, num_pairs,
          N: gl.constexpr, STEP: gl.constexpr, APART: gl.constexpr, ACROSS: gl.constexpr, STEPS: gl.constexpr,
          STAGES: gl.constexpr):  # fmt: skip
    """What the one warp does that asks for blocks; not for 64 rows that are only padding."""
    count = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        block = tile // ACROSS
        row = gl.load(expert_ptr + block) * N + tile % ACROSS * STEP
        both = gl.load(pairs_ptr + block * 128 + 64) < num_pairs
        for k in range(STEPS):
            stage = count % STAGES
            mbarrier.wait(empty.index(stage), (count // STAGES & 1) ^ 1)
            if both:
                mbarrier.expect(ready.index(stage), 2 * w_desc.block_type.nbytes + 2 * x_desc.block_type.nbytes)
                load_tile(x_desc, [block * 128 + 64, k * 128], ready.index(stage), x_s.index(2 * stage + 1))
            else:
                mbarrier.expect(ready.index(stage), 2 * w_desc.block_type.nbytes + x_desc.block_type.nbytes)
            load_tile(x_desc, [block * 128, k * 128], ready.index(stage), x_s.index(2 * stage))
            load_tile(w_desc, [row, k * 128], ready.index(stage), first_s.index(stage))
            load_tile(w_desc, [row + APART, k * 128], ready.index(stage), second_s.index(stage))
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
def multiply(HALF: gl.constexpr, xs_ptr, ws_ptr, out_ptr, out_scale_ptr, pairs_ptr, expert_ptr, ready, empty, x_s, first_s, second_s,
             num_tiles, num_pairs, num_rows, N: gl.constexpr, STEP: gl.constexpr, APART: gl.constexpr, ACROSS: gl.constexpr,
             STEPS: gl.constexpr, STAGES: gl.constexpr, ACTIVATE: gl.constexpr):  # fmt: skip
    """What a group of four warps does with its 64 rows of each tile."""
    count = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        block, across = tile // ACROSS, tile % ACROSS
        start = block * 128 + HALF * 64
        if gl.load(pairs_ptr + start) < num_pairs:
            w_scale = ws_ptr + (gl.load(expert_ptr + block) * N + across * STEP) // 128 * STEPS
            row = start + gl.arange(0, 64, layout=gl.SliceLayout(1, ACCUMULATOR))
            first, second, count = sums(
                HALF, count, ready, empty, x_s, first_s, second_s, xs_ptr + row, num_rows, w_scale, w_scale + APART // 128 * STEPS,
                STEPS, STAGES, True,
            )  # fmt: skip
            if ACTIVATE:
                store_hidden(first, second, out_ptr, out_scale_ptr, start, across, num_rows, ACROSS)
            else:
                store_rows(first, out_ptr, pairs_ptr, start, across * 256, num_pairs, N)
                store_rows(second, out_ptr, pairs_ptr, start, across * 256 + 128, num_pairs, N)
        else:  # only padding
            for _k in range(STEPS):
                stage = count % STAGES
                mbarrier.wait(ready.index(stage), count // STAGES & 1)
                mbarrier.arrive(empty.index(stage), count=1)
                count += 1


@gluon.jit
def store_hidden(gate, up, h_ptr, hs_ptr, start, across, num_rows, ACROSS: gl.constexpr):
    """silu(gate) * up, rounded to bfloat16 and quantized, as 64 rows of one group of 128 columns."""
    wide: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    h = (gate / (1.0 + gl.exp(-gate)) * up).to(gl.bfloat16).to(gl.float32)
    scale = gl.div_rn(gl.max(gl.abs(h), axis=1), gl.full_like(gl.max(gl.abs(h), axis=1), 448.0))
    q = quotient(h, gl.where(scale == 0, 1.0, scale))
    q = gl.minimum(gl.maximum(q, -448.0), 448.0).to(gl.float8e4nv)
    row = start + gl.arange(0, 64, layout=gl.SliceLayout(1, wide))
    column = across * 128 + gl.arange(0, 128, layout=gl.SliceLayout(0, wide))
    gl.store(h_ptr + row.to(gl.int64)[:, None] * (ACROSS * 128) + column[None, :], gl.convert_layout(q, wide))
    gl.store(hs_ptr + across * num_rows + start + gl.arange(0, 64, layout=gl.SliceLayout(1, gate.type.layout)), scale)


@gluon.jit
def quotient(x, divisor):
    """`quotient.quotient`, in Gluon."""
    lift = gl.where(divisor < 2.0**-64, 2.0**64, 1.0)
    divisor = divisor * lift
    inverse = gl.div_rn(gl.full_like(divisor, 1.0), divisor)[:, None] + gl.zeros_like(x)
    divisor = divisor[:, None] + gl.zeros_like(x)
    x = x * lift[:, None]
    q = x * inverse
    q = gl.fma(gl.fma(-q, divisor, x), inverse, q)
    q = gl.fma(gl.fma(-q, divisor, x), inverse, q)
    return gl.where(x == 0, x, q)  # the remainder has lost the sign of a zero


@gluon.jit
def store_rows(y, y_ptr, pairs_ptr, start, column, num_pairs, N: gl.constexpr):
    """64 rows of 128 columns to the rows of their pairs."""
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    pair = gl.load(pairs_ptr + start + gl.arange(0, 64, layout=gl.SliceLayout(1, wide)))
    columns = column + gl.arange(0, 128, layout=gl.SliceLayout(0, wide))
    y = gl.convert_layout(y.to(y_ptr.dtype.element_ty), wide)
    gl.store(y_ptr + pair.to(gl.int64)[:, None] * N + columns[None, :], y, mask=(pair < num_pairs)[:, None])


@gluon.jit(do_not_specialize=["num_pairs", "num_rows"])
def wide_kernel(x_desc, w_desc, xs_ptr, ws_ptr, out_ptr, out_scale_ptr, pairs_ptr, expert_ptr, num_blocks_ptr, num_pairs, num_rows,
                N: gl.constexpr, STEP: gl.constexpr, APART: gl.constexpr, ACROSS: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr,
                ACTIVATE: gl.constexpr):  # fmt: skip
    x_s = gl.allocate_shared_memory(gl.float8e4nv, [2 * STAGES, 64, 128], x_desc.layout)
    first_s = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 128, 128], w_desc.layout)
    second_s = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 128, 128], w_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    num_tiles = gl.load(num_blocks_ptr) * ACROSS
    gl.warp_specialize(
        [
            (multiply, (0, xs_ptr, ws_ptr, out_ptr, out_scale_ptr, pairs_ptr, expert_ptr, ready, empty, x_s, first_s, second_s,
                        num_tiles, num_pairs, num_rows, N, STEP, APART, ACROSS, STEPS, STAGES, ACTIVATE)),
            (multiply, (1, xs_ptr, ws_ptr, out_ptr, out_scale_ptr, pairs_ptr, expert_ptr, ready, empty, x_s, first_s, second_s,
                        num_tiles, num_pairs, num_rows, N, STEP, APART, ACROSS, STEPS, STAGES, ACTIVATE)),
            (fetch, (x_desc, w_desc, pairs_ptr, expert_ptr, ready, empty, x_s, first_s, second_s, num_tiles, num_pairs,
                     N, STEP, APART, ACROSS, STEPS, STAGES)),
        ],
        worker_num_warps=[4, 1],
        worker_num_regs=[232, 40],
    )  # fmt: skip


def descriptor(matrix: Tensor, rows: int) -> TensorDescriptor:
    """Blocks of so many rows and 128 columns of an e4m3 matrix, as the copy engine reads them."""
    return TensorDescriptor.from_tensor(matrix, [rows, 128], gl.NVMMASharedLayout.get_default_for([rows, 128], gl.float8e4nv))


def up(
    x_PD: Tensor, scale_GP: Tensor, weight: Weight, arrangement: Arrangement, num_pairs: int, *, processors: int
) -> tuple[Tensor, Tensor]:
    """Hidden rows e4m3 [P, F] and their float32 scales, groups first, [G, P].

    Args:
        x_PD: e4m3, the rows of the arranged pairs, with `scale_GP`; what padding has may be anything.
        weight: gate and up of all experts, block FP8 [E, 2F, D].
        arrangement: in blocks of 128.
    """
    num_rows, hidden = x_PD.shape
    both = weight.data.shape[1]
    h_PF = torch.empty(num_rows, both // 2, dtype=FP8, device=x_PD.device)
    hs_GP = torch.empty(both // 256, num_rows, device=x_PD.device)
    launch(x_PD, scale_GP, weight, arrangement, num_pairs, h_PF, hs_GP, both, 128, both // 2, both // 256, hidden // 128, True, processors)
    return h_PF, hs_GP


def down(
    h_PF: Tensor, scale_GP: Tensor, weight: Weight, arrangement: Arrangement, num_pairs: int, out_RD: Tensor, *, processors: int
) -> Tensor:
    """Hidden rows times the experts' `down` [E, D, F], D a multiple of 256, into the rows of their pairs."""
    hidden, width = weight.data.shape[1:]
    launch(
        h_PF, scale_GP, weight, arrangement, num_pairs, out_RD, scale_GP, hidden, 256, 128, hidden // 256, width // 128, False, processors
    )
    return out_RD


def launch(
    x_PD: Tensor,
    scale_GP: Tensor,
    weight: Weight,
    arrangement: Arrangement,
    num_pairs: int,
    out: Tensor,
    out_scale: Tensor,
    height: int,
    step: int,
    apart: int,
    across: int,
    steps: int,
    activate: bool,
    processors: int,
) -> None:
    """One program for each processor."""
    wide_kernel[(processors,)](
        descriptor(x_PD, ROWS // 2),
        descriptor(weight.data.flatten(0, 1), 128),
        scale_GP,
        weight.scale,
        out,
        out_scale,
        *arrangement,
        num_pairs,
        len(x_PD),
        N=height,
        STEP=step,
        APART=apart,
        ACROSS=across,
        STEPS=steps,
        STAGES=STAGES,
        ACTIVATE=activate,
        num_warps=4,
        maxnreg=168,
    )
