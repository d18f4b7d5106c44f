"""The experts' products of many tokens in block FP8, for Hopper, in Gluon: tiles of 128 rows and 256 columns (`wide_tiles`).

A program stays on its processor and goes from tile to tile. One of its warps does nothing but ask the copy engine (TMA) for what comes
next; two groups of four warps multiply, each its 64 rows. A tile's columns are two times 128: gate and up of the same hidden columns,
which leave activated and quantized, or columns of `down` that follow one another. Of rows that are alone the two groups take different
columns, and a step then takes two stages of the ring.

A product's sums are taken out and scaled after each 128 of K. So that the tensor cores have work meanwhile, a group multiplies 64
columns at a time and has two such products under way, in registers of their own. Its rows it takes into registers, once for the four
products of a step: with both operands in shared memory, products of 64 columns would be limited by reading them.

The copy engine reads rows that lie together, so the rows of all pairs are laid out by expert first (`spread`).

Shape suffixes: T tokens, K experts per token, P padded pairs, D hidden, F expert width, G groups of 128 columns.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, misc, no-any-return, no-untyped-call, attr-defined, import-untyped"

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from pointsman.kernels.arrange import Spread
from pointsman.kernels.triton_support import launch_options
from pointsman.kernels.weight import FP8, Weight
from pointsman.kernels.wide_store import STORED, store_hidden, store_rows
from pointsman.kernels.wide_tiles import fetch, pass_by, told

ROWS = 64  # of a block of the arrangement
STAGES = 4
ACCUMULATOR = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 32]))
LEFT = gl.constexpr(gl.DotOperandLayout(operand_index=0, parent=ACCUMULATOR, k_width=4))
ROW = gl.constexpr(gl.SliceLayout(1, ACCUMULATOR))
NAMED = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))  # in older versions with an underscore


@gluon.jit
def begin(x, w_s, COLUMN: gl.constexpr, product):
    """Ask for the product of a step's rows with 64 of a block's 128 columns, in these registers."""
    return warpgroup_mma(x, w_s.slice(COLUMN, 64).permute((1, 0)), product, is_async=True, use_acc=False)


@gluon.jit
def add(total, product, scale):
    """A sum and a scaled product, computed by here: if the next product began before, it would need other registers, and none are left."""
    return gl.inline_asm_elementwise("", "=f,0", [total + product * scale[:, None]], gl.float32, False, 1)


@gluon.jit
def sums(HALF: gl.constexpr, count, s_row, stores, alone, APART: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr,
         TOGETHER: gl.constexpr):  # fmt: skip
    """A group's 64 rows times four blocks of 64 columns: the sums over all of K, and how many stages have been used."""
    ready, empty, x_s, first_s, second_s, xs_s, ws_s, _info_s = stores
    first = gl.zeros((64, 64), gl.float32, ACCUMULATOR)
    second = gl.zeros((64, 64), gl.float32, ACCUMULATOR)
    third = gl.zeros((64, 64), gl.float32, ACCUMULATOR)
    fourth = gl.zeros((64, 64), gl.float32, ACCUMULATOR)
    odd = gl.zeros((64, 64), gl.float32, ACCUMULATOR)
    even = gl.zeros((64, 64), gl.float32, ACCUMULATOR)
    if NAMED:
        numbers_s = ws_s.reinterpret(gl.float32, [STAGES * 64, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    else:
        numbers_s = ws_s._reinterpret(gl.float32, [STAGES * 64, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    for k in range(STEPS):
        if (alone * (HALF + k) > 0) & (k % TOGETHER == 0):
            count = pass_by(stores, count, STAGES, TOGETHER)
        stage = count % STAGES
        half = 2 * stage + HALF * (1 - alone)
        mbarrier.wait(ready.index(stage), count // STAGES & 1)
        x = x_s.index(half).load(LEFT)
        odd = begin(x, first_s.index(stage), 0, odd)
        even = begin(x, first_s.index(stage), 64, even)
        x_scale = xs_s.index(half).load(ROW)
        first_scale = x_scale * numbers_s.index(64 * stage + (s_row + k) % 4).load(ROW)
        second_scale = x_scale * numbers_s.index(64 * stage + 32 + (s_row + APART // 128 * STEPS + k) % 4).load(ROW)
        odd = warpgroup_mma_wait(num_outstanding=1, deps=(odd,))
        first = add(first, odd, first_scale)
        odd = begin(x, second_s.index(stage), 0, odd)
        even = warpgroup_mma_wait(num_outstanding=1, deps=(even,))
        second = add(second, even, first_scale)
        even = begin(x, second_s.index(stage), 64, even)
        odd = warpgroup_mma_wait(num_outstanding=1, deps=(odd,))
        third = add(third, odd, second_scale)
        even = warpgroup_mma_wait(num_outstanding=0, deps=(even,))
        mbarrier.arrive(empty.index(stage), count=1)
        fourth = add(fourth, even, second_scale)
        count += 1
    if alone * (1 - HALF) > 0:
        count = pass_by(stores, count, STAGES, TOGETHER)
    return first, second, third, fourth, count


@gluon.jit
def multiply(HALF: gl.constexpr, out_ptr, out_scale_ptr, pairs_ptr, stores, num_pairs, num_rows, N: gl.constexpr, STEP: gl.constexpr,
             APART: gl.constexpr, ACROSS: gl.constexpr, TURNS: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr,
             TOGETHER: gl.constexpr, ACTIVATE: gl.constexpr):  # fmt: skip
    """What a group of four warps does: the half of a tile's rows that is its own or, of rows that are alone, its columns."""
    count = 0
    row, across, alone, expert = told(stores, count, STAGES)
    while row >= 0:
        row += 64 * HALF * (1 - alone)
        own = across + TURNS * HALF * alone
        s_row = (expert * N + own * STEP) // 128 * STEPS
        if ACTIVATE:
            first, second, third, fourth, count = sums(HALF, count, s_row, stores, alone, APART, STEPS, STAGES, TOGETHER)
            if own < ACROSS:
                store_hidden(first, second, third, fourth, out_ptr, out_scale_ptr, row, own, num_rows, ACROSS)
        else:
            pair = gl.load(pairs_ptr + row + gl.arange(0, 64, layout=gl.SliceLayout(1, STORED)))
            first, second, third, fourth, count = sums(HALF, count, s_row, stores, alone, APART, STEPS, STAGES, TOGETHER)
            if own < ACROSS:
                store_rows(first, out_ptr, pair, own * 256, num_pairs, N)
                store_rows(second, out_ptr, pair, own * 256 + 64, num_pairs, N)
                store_rows(third, out_ptr, pair, own * 256 + 128, num_pairs, N)
                store_rows(fourth, out_ptr, pair, own * 256 + 192, num_pairs, N)
        row, across, alone, expert = told(stores, count, STAGES)


@gluon.jit(do_not_specialize=["num_pairs", "num_rows"])
def wide_kernel(x_desc, w_desc, xs_desc, ws_desc, out_ptr, out_scale_ptr, pairs_ptr, expert_ptr, num_blocks_ptr, first_ptr, counter_ptr,
                num_pairs, num_rows, N: gl.constexpr, STEP: gl.constexpr, APART: gl.constexpr, ACROSS: gl.constexpr, STEPS: gl.constexpr,
                STAGES: gl.constexpr, ACTIVATE: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    TURNS: gl.constexpr = (ACROSS + 1) // 2
    TOGETHER: gl.constexpr = 2 if STEPS % 2 == 0 else 1
    x_s = gl.allocate_shared_memory(gl.float8e4nv, [2 * STAGES, 64, 128], x_desc.layout)
    first_s = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 128, 128], w_desc.layout)
    second_s = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 128, 128], w_desc.layout)
    xs_s = gl.allocate_shared_memory(gl.float32, [2 * STAGES, 64], xs_desc.layout)
    ws_s = gl.allocate_shared_memory(gl.float32, [2 * STAGES, 32], ws_desc.layout)
    info_s = gl.allocate_shared_memory(gl.int32, [4 * STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    num_tiles = gl.load(num_blocks_ptr) * TURNS
    stores = (ready, empty, x_s, first_s, second_s, xs_s, ws_s, info_s)
    descs = (x_desc, w_desc, xs_desc, ws_desc)
    gl.warp_specialize(
        [
            (multiply, (0, out_ptr, out_scale_ptr, pairs_ptr, stores, num_pairs, num_rows, N, STEP, APART, ACROSS, TURNS, STEPS, STAGES,
                        TOGETHER, ACTIVATE)),
            (multiply, (1, out_ptr, out_scale_ptr, pairs_ptr, stores, num_pairs, num_rows, N, STEP, APART, ACROSS, TURNS, STEPS, STAGES,
                        TOGETHER, ACTIVATE)),
            (fetch, (descs, stores, expert_ptr, first_ptr, counter_ptr, num_tiles, num_rows, N, STEP, APART, ACROSS, TURNS, STEPS, STAGES,
                     TOGETHER, PDL)),
        ],
        worker_num_warps=[4, 1],
        worker_num_regs=[240, 24],
    )  # fmt: skip


def numbers(vector: Tensor, count: int) -> TensorDescriptor:
    """So many float32 that follow one another, as the copy engine reads them."""
    flat = vector.view(-1)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    return TensorDescriptor.from_tensor(flat, [count], layout)


def descriptor(matrix: Tensor, rows: int) -> TensorDescriptor:
    """Blocks of so many rows and 128 columns of an e4m3 matrix, as the copy engine reads them."""
    return TensorDescriptor.from_tensor(matrix, [rows, 128], gl.NVMMASharedLayout.get_default_for([rows, 128], gl.float8e4nv))


def up(
    x_PD: Tensor, scale_GP: Tensor, weight: Weight, order: Spread, num_pairs: int, *, processors: int, pdl: bool = False
) -> tuple[Tensor, Tensor]:
    """Hidden rows e4m3 [P, F] and their float32 scales, groups first, [G, P].

    Args:
        x_PD: e4m3, the rows of the arranged pairs, with `scale_GP`; what padding has may be anything.
        weight: gate and up of all experts, block FP8 [E, 2F, D].
        order: in blocks of `ROWS`; older than the kernel before, if `pdl`.
    """
    num_rows, hidden = x_PD.shape
    both = weight.data.shape[1]
    h_PF = torch.empty(num_rows, both // 2, dtype=FP8, device=x_PD.device)
    hs_GP = torch.empty(both // 256, num_rows, device=x_PD.device)
    sizes = {"N": both, "STEP": 128, "APART": both // 2, "ACROSS": both // 256, "STEPS": hidden // 128, "ACTIVATE": True}
    launch(x_PD, scale_GP, weight, order, order.counters, num_pairs, h_PF, hs_GP, sizes, processors=processors, pdl=pdl)
    return h_PF, hs_GP


def down(
    h_PF: Tensor, scale_GP: Tensor, weight: Weight, order: Spread, num_pairs: int, out_RD: Tensor, *, processors: int, pdl: bool = False
) -> Tensor:
    """Hidden rows times the experts' `down` [E, D, F], D a multiple of 256, into the rows of their pairs."""
    hidden, width = weight.data.shape[1:]
    sizes = {"N": hidden, "STEP": 256, "APART": 128, "ACROSS": hidden // 256, "STEPS": width // 128, "ACTIVATE": False}
    launch(h_PF, scale_GP, weight, order, order.counters[4:], num_pairs, out_RD, scale_GP, sizes, processors=processors, pdl=pdl)
    return out_RD


def launch(
    x_PD: Tensor,
    scale_GP: Tensor,
    weight: Weight,
    order: Spread,
    counter: Tensor,
    num_pairs: int,
    out: Tensor,
    out_scale: Tensor,
    sizes: dict[str, int],
    *,
    processors: int,
    pdl: bool,
) -> None:
    """One program for each processor."""
    assert weight.scale is not None
    wide_kernel[(processors,)](
        descriptor(x_PD, ROWS),
        descriptor(weight.data.flatten(0, 1), 128),
        numbers(scale_GP, ROWS),
        numbers(weight.scale, 32),
        out,
        out_scale,
        order.pairs_P,
        order.expert_B,
        order.num_blocks,
        order.first_E,
        counter,
        num_pairs,
        len(x_PD),
        STAGES=STAGES,
        PDL=pdl,
        num_warps=4,
        maxnreg=168,
        **sizes,
        **launch_options(pdl),
    )
