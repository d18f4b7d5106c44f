"""A whole decoder step as one compiled region.

A step is a sequence of phases: those of each layer, in the order below, and the two of the end. Every thread goes through the same
sequence and takes what items of a phase it can get (cpu_threads); whoever ends a phase opens the next. Between matrix phases lie
row phases (norms, rotary, router, sums of experts), whose items are rows; with very few rows, whoever would open them does
them on the spot. What is computed depends on none of this.

This module is numba source: it is imported only where the step is compiled (cpu_object), and what is compiled never comes back to
Python.
"""

# Numba types what it compiles, from calls; annotations would say nothing to it.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, misc, no-any-return"

from __future__ import annotations

from typing import Any

from pointsman.kernels.cpu_attention import attend, fetch_first, group_rows, prepare
from pointsman.kernels.cpu_phases import add, combine, contract, embed, expand, judge, norm, panels, project, route, sort_pairs
from pointsman.kernels.cpu_record import RecordType, reader
from pointsman.kernels.cpu_table import ALONE, NUM_GROUPS, NUM_LOGITS, NUM_ROWS, STEPS, STOPPED, step_fields
from pointsman.kernels.cpu_threads import announce, atomic_read, await_step, finish, put, take
from pointsman.kernels.vector import at, kernel, whole

# The phases of a layer; after the last layer LEAVE and HEAD.
ENTER, QKV, PREPARE, ATTEND, OUTPUT, ROUTE, EXPAND, CONTRACT = range(8)
LAYER_PHASES = 8
LEAVE, HEAD, END = 8, 9, 10

# Most items a thread takes at once: enough that taking costs little, few enough that the end of a phase finds all threads busy.
MOST_ROWS_TAKEN = 8
MOST_TAKEN = 4


@kernel
def check(step):
    """Find each row's cache slot and what rows attend together; returns 0, or 1 + the number of a row that names what does not exist."""
    for row in range(step.control[NUM_ROWS]):
        step.wanted[row] = 0
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
            size = step.routed_layers * step.top_k
            for i in range(step.slots[row] * size, (step.slots[row] + 1) * size):
                if (step.routes16[i] if step.wide_routes else step.routes8[i]) >= step.experts:
                    return row + 1
    for i in range(step.control[NUM_LOGITS]):
        if not 0 <= step.logit_rows[i] < step.control[NUM_ROWS]:
            return i + 1
        step.wanted[step.logit_rows[i]] = 1
    step.control[NUM_GROUPS] = group_rows(step, step.control[NUM_ROWS])
    return 0


@kernel
def by_rows(kind):
    return kind in (ENTER, PREPARE, ROUTE, LEAVE)


@kernel
def work_on_rows(step, thread, kind, layer, first, count):
    """Items of a row phase; those of LEAVE are the rows of logits."""
    stride, hidden, epsilon = step.hidden_stride, step.hidden, step.epsilon
    for row in range(first, first + count):
        x, h = at(step.x, row * stride), at(step.h, row * stride)
        if kind == ENTER:
            if layer == 0:
                embed(step, step.tokens[row], row)
            else:
                combine(step, layer - 1, row, x)
            norm(x, at(step.input_norm, layer * stride), h, hidden, stride, epsilon, step.lift_attention)
        elif kind == PREPARE:
            prepare(step, thread, layer, row)
        elif kind == ROUTE:
            add(x, at(step.projected, row * stride), stride)
            norm(x, at(step.post_norm, layer * stride), h, hidden, stride, epsilon, step.lift_experts)
        else:
            combine(step, layer, step.logit_rows[row], h)
            norm(h, step.final_norm, h, hidden, stride, epsilon, step.lift_head)
    if kind == ROUTE:
        if step.route_of[layer] >= 0:
            judge(step, layer, first, count)
        for row in range(first, first + count):
            route(step, layer, row, step.slots[row], step.forced[row])


@kernel
def work_on_panels(step, thread, kind, layer, num_rows, first, count):
    """Items of a matrix phase, or of attention, whose items are a group of rows and a key head each."""
    stride = step.hidden_stride
    if kind == ATTEND:
        fetch_first(step, layer, first)
    for item in range(first, first + count):
        if kind == QKV:
            project(step, step.qkv, layer, item, step.h, stride, step.qkv_out, step.qkv_stride, num_rows)
        elif kind == ATTEND:
            if item + 1 < first + count:
                fetch_first(step, layer, item + 1)
            attend(step, thread, layer, item)
        elif kind == OUTPUT:
            project(step, step.o, layer, item, step.attended, step.attended_stride, step.projected, stride, num_rows)
        elif kind == EXPAND:
            expand(step, thread, layer, item)
        elif kind == CONTRACT:
            contract(step, layer, item)
        else:
            project(step, step.head, whole(0), item, step.h, stride, step.logits, step.logits_stride, num_rows)


@kernel
def items_of(step, kind, num_rows, num_logits, num_active):
    """How many items a phase has."""
    if kind == QKV:
        return panels(step.qkv, num_rows)
    if kind == ATTEND:
        return step.control[NUM_GROUPS] * step.kv_heads
    if kind == OUTPUT:
        return panels(step.o, num_rows)
    if kind == EXPAND:
        return num_active * step.gate_up.panels
    if kind == CONTRACT:
        return num_active * step.down.panels
    if kind == HEAD:
        return panels(step.head, num_logits)
    return num_logits if kind == LEAVE else num_rows


@kernel
def after(step, kind, layer):
    """The kind and layer of the phase that follows."""
    if kind == CONTRACT:
        return (LEAVE, layer) if layer + 1 == step.layers else (ENTER, layer + 1)
    return kind + 1, layer


@kernel
def open_next(step, thread, phase, kind, layer, num_rows, num_logits):
    """Open the first phase after this one that has items, having done the row phases that need nobody else."""
    while True:
        if kind == ROUTE:
            step.active[step.most_matrices] = sort_pairs(step, layer, num_rows, layer + 1 == step.layers)
        kind, layer = after(step, kind, layer)
        phase += 1
        if kind == END:
            put(step.control, phase, whole(0))
            return
        items = items_of(step, kind, num_rows, num_logits, step.active[step.most_matrices])
        if by_rows(kind) and items <= ALONE:
            work_on_rows(step, thread, kind, layer, whole(0), items)
        elif items > 0:
            put(step.control, phase, items)
            return


@kernel
def run_step(step, thread, phase, num_rows, num_logits):
    """One thread's part of a step, whose phases are numbered from `phase` on."""
    control, kind, layer = step.control, whole(ENTER), whole(0)
    while kind != END:
        first, count = take(control, phase, MOST_ROWS_TAKEN if by_rows(kind) else MOST_TAKEN)
        while count > 0:
            if by_rows(kind):
                work_on_rows(step, thread, kind, layer, first, count)
            else:
                work_on_panels(step, thread, kind, layer, num_logits if kind == HEAD else num_rows, first, count)
            if finish(control, count):
                open_next(step, thread, phase, kind, layer, num_rows, num_logits)
            first, count = take(control, phase, MOST_ROWS_TAKEN if by_rows(kind) else MOST_TAKEN)
        kind, layer = after(step, kind, layer)
        phase += 1
    take(control, phase, whole(1))


@kernel
def lead(step, thread):
    """Run a step from end to end, with what help comes."""
    control, number = step.control, step.control[STEPS] + 1
    num_rows, num_logits, phase = control[NUM_ROWS], control[NUM_LOGITS], number * (step.layers * LAYER_PHASES + 3)
    control[NUM_ROWS + 1 + number % 2], control[NUM_LOGITS + 1 + number % 2] = num_rows, num_logits
    announce(control, step.pipe_in)
    if num_rows <= ALONE:
        work_on_rows(step, thread, whole(ENTER), whole(0), whole(0), num_rows)
        open_next(step, thread, phase, whole(ENTER), whole(0), num_rows, num_logits)
    else:
        put(control, phase, num_rows)
    run_step(step, thread, phase, num_rows, num_logits)


@kernel
def help_out(step, thread):
    """Take part in steps until told to stop."""
    control, number = step.control, whole(0)
    while True:
        number = await_step(control, step.pipe_out, number)
        if control[STOPPED]:
            return
        num_rows, num_logits = atomic_read(control, NUM_ROWS + 1 + number % 2), atomic_read(control, NUM_LOGITS + 1 + number % 2)
        if atomic_read(control, STEPS) == number:
            run_step(step, thread, number * (step.layers * LAYER_PHASES + 3), num_rows, num_logits)


def entry(kinds: tuple[str, str, str, str]) -> Any:
    """The function to compile: (thread, address of the record) -> 0, or 1 + the row that `check` refuses.

    Thread 0 runs one step and returns. Those from 1 on run steps as they are announced, until a call for thread -1 ends them.
    """
    record_at = reader(RecordType(step_fields(*kinds)))

    def step_thread(thread: int, address: int) -> int:
        step = record_at(address)
        if thread > 0:
            help_out(step, thread)
        elif thread < 0:
            step.control[STOPPED] = 1
            announce(step.control, step.pipe_in)
        else:
            refused = check(step)
            if refused == 0:
                lead(step, thread)
            return refused
        return 0

    return step_thread
