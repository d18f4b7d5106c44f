"""A whole decoder step as one compiled region.

Every thread runs `run_step` from the embedding to the logits and meets the others at barriers only; see cpu_phases for what lies
between two of them. This module is numba source: it is imported only where the step is compiled (cpu_object), and what is
compiled never comes back to Python.
"""

# Numba types what it compiles, from calls; annotations would say nothing to it.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, misc, no-any-return"

from __future__ import annotations

from typing import Any

from pointsman.kernels.cpu_attention import attend, fetch_first, prepare
from pointsman.kernels.cpu_phases import add, combine, contract, embed, expand, judge, norm, project, route, sort_pairs
from pointsman.kernels.cpu_record import RecordType, reader
from pointsman.kernels.cpu_table import ALONE, NUM_LOGITS, NUM_ROWS, ROUNDS, STOPPED, step_fields
from pointsman.kernels.cpu_threads import announce, await_step, meet
from pointsman.kernels.vector import at, kernel


@kernel
def check(step):
    """Find each row's cache slot; returns 0, or 1 + the number of a row that names what does not exist."""
    for row in range(step.control[NUM_ROWS]):
        token, position, lane = step.tokens[row], step.positions[row], step.lanes[row]
        if not (0 <= token < step.vocab and 0 <= position < step.max_positions and 0 <= lane < step.num_lanes):
            return row + 1
        if position >= step.max_pages * step.page_size:
            return row + 1
        pages = at(step.page_table, lane * step.max_pages)
        for i in range(position // step.page_size + 1):
            if not 0 <= pages[i] < step.num_pages:
                return row + 1
        step.slots[row] = pages[position // step.page_size] * step.page_size + position % step.page_size
        if step.forced[row]:
            size = step.layers * step.top_k
            for i in range(step.slots[row] * size, (step.slots[row] + 1) * size):
                if (step.routes16[i] if step.wide_routes else step.routes8[i]) >= step.experts:
                    return row + 1
    for i in range(step.control[NUM_LOGITS]):
        if not 0 <= step.logit_rows[i] < step.control[NUM_ROWS]:
            return i + 1
    return 0


@kernel
def attention_half(step, thread, layer, num_rows, low, high, base, alone, round):
    """h to projected: queries, keys and values, attention, output projection."""
    threads, control, own = step.num_threads, step.control, at(step.counting, base)
    project(step, thread, step.qkv, layer, step.h, step.hidden_stride, own, step.qkv_out, step.qkv_stride, num_rows)
    round = meet(control, threads, round)
    for row in range(low, high):
        prepare(step, thread, layer, row, base + row)
    if not alone:
        round = meet(control, threads, round)
    item, items = thread, num_rows * step.kv_heads
    while item < items:
        row, group, following = item // step.kv_heads, item % step.kv_heads, item + threads
        if following < items:
            fetch_first(step, layer, following // step.kv_heads, following % step.kv_heads)
        attend(step, thread, layer, row, base + row, group)
        item = following
    round = meet(control, threads, round)
    project(step, thread, step.o, layer, step.attended, step.attended_stride, step.counting, step.projected, step.hidden_stride, num_rows)
    return meet(control, threads, round)


@kernel
def expert_half(step, thread, layer, num_rows, low, high, base, alone, round):
    """h to outputs: router and experts."""
    threads, control = step.num_threads, step.control
    judge(step, layer, base + low, high - low)
    for row in range(low, high):
        route(step, layer, base + row, step.slots[row], step.forced[row])
    if not alone:
        round = meet(control, threads, round)
    sort_pairs(step, thread, base, num_rows)
    expand(step, thread, layer)
    round = meet(control, threads, round)
    contract(step, thread, layer)
    return meet(control, threads, round)


@kernel
def run_step(step, thread, round):
    """One thread's part of a step; returns the number of the last barrier."""
    num_rows, stride, hidden = step.control[NUM_ROWS], step.hidden_stride, step.hidden
    alone = num_rows <= ALONE
    low, high, base = num_rows * thread // step.num_threads, num_rows * (thread + 1) // step.num_threads, 0
    if alone:
        low, high, base = 0, num_rows, thread * ALONE
    for row in range(low, high):
        embed(step, step.tokens[row], base + row)
    for layer in range(step.layers):
        for row in range(low, high):
            own = (base + row) * stride
            if layer > 0:
                combine(step, base, row)
            norm(at(step.x, own), at(step.input_norm, layer * stride), at(step.h, own), hidden, stride, step.epsilon, step.lift_attention)
        if not alone:
            round = meet(step.control, step.num_threads, round)
        round = attention_half(step, thread, layer, num_rows, low, high, base, alone, round)
        for row in range(low, high):
            own = (base + row) * stride
            add(at(step.x, own), at(step.projected, row * stride), stride)
            norm(at(step.x, own), at(step.post_norm, layer * stride), at(step.h, own), hidden, stride, step.epsilon, step.lift_experts)
        round = expert_half(step, thread, layer, num_rows, low, high, base, alone, round)
    for row in range(low, high):
        combine(step, base, row)
    for i in range(step.control[NUM_LOGITS]):
        row = step.logit_rows[i]
        if low <= row < high:
            x, h = at(step.x, (base + row) * stride), at(step.h, (base + i) * stride)
            norm(x, step.final_norm, h, hidden, stride, step.epsilon, step.lift_head)
    if not alone:
        round = meet(step.control, step.num_threads, round)
    own = at(step.counting, base)
    project(step, thread, step.head, 0, step.h, stride, own, step.logits, step.logits_stride, step.control[NUM_LOGITS])
    return meet(step.control, step.num_threads, round)


def entry(kinds: tuple[str, str, str, str]) -> Any:
    """The function to compile: (thread, address of the record) -> 0, or 1 + the row that `check` refuses.

    Thread 0 runs one step and returns. Those from 1 on run steps as they are announced, until a call for thread -1 ends them.
    """
    record_at = reader(RecordType(step_fields(*kinds)))

    def step_thread(thread: int, address: int) -> int:
        step = record_at(address)
        control = step.control
        if thread == 0:
            refused = check(step)
            if refused == 0:
                announce(control, step.pipe_in)
                control[ROUNDS] = run_step(step, thread, control[ROUNDS])
            return refused
        if thread < 0:
            control[STOPPED] = 1
            announce(control, step.pipe_in)
            return 0
        seen = 0
        while True:
            seen = await_step(control, step.pipe_out, seen)
            if control[STOPPED]:
                return 0
            run_step(step, thread, control[ROUNDS])

    return step_thread
