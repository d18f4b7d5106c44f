"""Which tiles there are in a product of many rows (`wide_gemm`), and the warp that asks for what they are made of.

A tile is two blocks of 64 rows of an expert, or the last of an odd number alone, and 256 columns, of rows that are alone two times 256.
Tiles of the same columns follow one another, and programs take them from a counter, in this order: so the weights of an expert are
multiplied with all its rows while they are in the cache. Were each program's tiles known beforehand, programs would drift apart, and
weights would come from memory once for each tile.

Two steps of K are asked for together, so that 256 bytes of each row are read at a time: the memory gives more then than for 128.
Everything a tile is made of comes through the copy engine (TMA) into a ring of stages, scales too: a load of the multiplying warps' own
would wait behind all that has been asked for ahead. The engine reads from multiples of 16 bytes on, and so a weight's scale comes with
its neighbours.

Shape suffixes: as in `wide_gemm`.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, misc, no-any-return, no-untyped-call, attr-defined, import-untyped"

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

load_tile = getattr(tma, "async_load", tma.async_copy_global_to_shared)  # newer versions have another name for it


@gluon.jit
def tile_at(tile, expert_ptr, first_ptr, ACROSS: gl.constexpr, TURNS: gl.constexpr):
    """What the tile is that comes so-manieth: its expert, first row and turn across, and whether its 64 rows are alone.

    An expert's tiles of the same columns follow one another, whatever their rows, so that weights are read while they are in the cache.
    A turn of rows in pairs is two tiles, a turn of rows that are alone one."""
    expert = gl.load(expert_ptr + tile // TURNS)
    first = gl.load(first_ptr + expert)
    blocks = gl.load(first_ptr + expert + 1) - first
    pairs = blocks // 2
    within = tile - first * TURNS
    turn = within // blocks
    place = within % blocks
    second = (place >= pairs) & (place < 2 * pairs)
    alone = place == 2 * pairs
    row = first + gl.where(alone, 2 * pairs, 2 * gl.where(second, place - pairs, place))
    return expert, row * 64, turn + gl.where(second, TURNS, 0), alone.to(gl.int32)


@gluon.jit
def following(counter_ptr):
    """The next tile that no program has begun: so they begin in their order, however long each takes."""
    return gl.atomic_add(counter_ptr, 1, sem="relaxed")


@gluon.jit
def tell(info_s, stage, row, across, alone, expert):
    """Leave with a tile's first stage what the tile is."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    info_s.index(4 * stage).store(gl.full((1,), row, gl.int32, one))
    info_s.index(4 * stage + 1).store(gl.full((1,), across, gl.int32, one))
    info_s.index(4 * stage + 2).store(gl.full((1,), alone, gl.int32, one))
    info_s.index(4 * stage + 3).store(gl.full((1,), expert, gl.int32, one))


@gluon.jit
def told(stores, count, STAGES: gl.constexpr):
    """What the tile is whose first stage is this one; a negative row: there are no more."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    ready, _empty, _x_s, _first_s, _second_s, _xs_s, _ws_s, info_s = stores
    stage = count % STAGES
    mbarrier.wait(ready.index(stage), count // STAGES & 1)
    row = gl.max(info_s.index(4 * stage).load(one), axis=0)
    across = gl.max(info_s.index(4 * stage + 1).load(one), axis=0)
    alone = gl.max(info_s.index(4 * stage + 2).load(one), axis=0)
    expert = gl.max(info_s.index(4 * stage + 3).load(one), axis=0)
    return row, across, alone, expert


@gluon.jit
def pass_by(stores, count, STAGES: gl.constexpr, TOGETHER: gl.constexpr):
    """The stages of some steps that are the other group's."""
    ready, empty, _x_s, _first_s, _second_s, _xs_s, _ws_s, _info_s = stores
    for _step in gl.static_range(TOGETHER):
        stage = count % STAGES
        mbarrier.wait(ready.index(stage), count // STAGES & 1)
        mbarrier.arrive(empty.index(stage), count=1)
        count += 1
    return count


@gluon.jit
def fill(descs, stores, count, row, across, expert, w_row, s_row, k, alone, num_rows,
         APART: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    """Ask for what a stage holds: rows and weights of one step of K, and their scales."""
    x_desc, w_desc, xs_desc, ws_desc = descs
    ready, empty, x_s, first_s, second_s, xs_s, ws_s, info_s = stores
    stage = count % STAGES
    mbarrier.wait(empty.index(stage), (count // STAGES & 1) ^ 1)
    whole: gl.constexpr = 2 * (w_desc.block_type.nbytes + ws_desc.block_type.nbytes)
    half: gl.constexpr = x_desc.block_type.nbytes + xs_desc.block_type.nbytes
    full = ready.index(stage)
    if k == 0:
        tell(info_s, stage, row, across, alone, expert)
    if alone == 0:
        mbarrier.expect(full, whole + 2 * half)
    else:
        mbarrier.expect(full, whole + half)
    load_tile(w_desc, [w_row, k * 128], full, first_s.index(stage))
    load_tile(w_desc, [w_row + APART, k * 128], full, second_s.index(stage))
    load_tile(ws_desc, [(s_row + k) // 4 * 4], full, ws_s.index(2 * stage))
    load_tile(ws_desc, [(s_row + APART // 128 * STEPS + k) // 4 * 4], full, ws_s.index(2 * stage + 1))
    if PDL and count == 0:  # weights and arrangement are older than the kernel before, whose rows are not
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    load_tile(x_desc, [row, k * 128], full, x_s.index(2 * stage))
    load_tile(xs_desc, [k * num_rows + row], full, xs_s.index(2 * stage))
    if alone == 0:
        load_tile(x_desc, [row + 64, k * 128], full, x_s.index(2 * stage + 1))
        load_tile(xs_desc, [k * num_rows + row + 64], full, xs_s.index(2 * stage + 1))


@gluon.jit
def fill_some(descs, stores, count, row, across, expert, w_row, s_row, k, alone, num_rows, APART: gl.constexpr, STEPS: gl.constexpr,
              STAGES: gl.constexpr, TOGETHER: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    """`fill` the stages of some steps, when all of them are free: how many stages have been used then."""
    empty = stores[1]
    last = count + TOGETHER - 1
    mbarrier.wait(empty.index(last % STAGES), (last // STAGES & 1) ^ 1)
    for step in gl.static_range(TOGETHER):
        fill(descs, stores, count, row, across, expert, w_row, s_row, k + step, alone, num_rows, APART, STEPS, STAGES, PDL)
        count += 1
    return count


@gluon.jit
def fetch(descs, stores, expert_ptr, first_ptr, counter_ptr, num_tiles, num_rows, N: gl.constexpr, STEP: gl.constexpr,
          APART: gl.constexpr, ACROSS: gl.constexpr, TURNS: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr,
          TOGETHER: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    """What the one warp does that asks for blocks. Rows that are alone take two stages a step: one for each group's columns."""
    ready, empty, _x_s, _first_s, _second_s, _xs_s, _ws_s, info_s = stores
    count = 0
    tile = following(counter_ptr)
    while tile < num_tiles:
        expert, row, across, alone = tile_at(tile, expert_ptr, first_ptr, ACROSS, TURNS)
        if across >= ACROSS:  # the second half of an odd number of turns
            tile = following(counter_ptr)
        else:
            w_row = expert * N + across * STEP
            s_row = w_row // 128 * STEPS
            for some in range(STEPS // TOGETHER):
                if some == STEPS // TOGETHER // 2:  # where there is time to wait for it
                    tile = following(counter_ptr)
                k = some * TOGETHER
                count = fill_some(descs, stores, count, row, across, expert, w_row, s_row, k, alone, num_rows, APART, STEPS, STAGES,
                                  TOGETHER, PDL)  # fmt: skip
                if alone == 1:
                    count = fill_some(descs, stores, count, row, across, expert, w_row + TURNS * STEP,
                                      s_row + TURNS * STEP // 128 * STEPS, k, alone, num_rows, APART, STEPS, STAGES,
                                      TOGETHER, PDL)  # fmt: skip
    if PDL and count == 0:
        tl.extra.cuda.gdc_wait()
    if tile == num_tiles + gl.num_programs(0) - 1:  # all have asked in vain: the next product counts from zero
        gl.store(counter_ptr, 0)
    stage = count % STAGES
    mbarrier.wait(empty.index(stage), (count // STAGES & 1) ^ 1)
    tell(info_s, stage, -1, 0, 0, 0)
    mbarrier.arrive(ready.index(stage), count=1)
