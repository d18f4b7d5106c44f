"""How the threads of a compiled step share its work, wait and sleep.

A step is a sequence of phases, and a phase a number of items. One word holds which phase is open and how many of its items nobody
has taken yet; a thread takes some by comparing and swapping that word, and who finishes a phase's last item opens the next. So no thread
waits for another as such, only for items in hand: one that the machine has put to sleep, or that was never woken, leaves its
share to the others and later finds the phases it missed closed. A thread that finds nothing to take spins, and after a while
gives its core away between looks (sched_yield), so more threads than cores cost time and nothing else.

Between steps the helping threads look for the next step in the same way for a while, then sleep in a read of a pipe, into which
the next step writes a byte for each sleeper. There is no lock, and Python's interpreter lock is not held. A sleeper announces
itself before it looks for the last time, and the step is announced before sleepers are counted; so one of the two sees the other.
A byte too many in the pipe only ends some later sleep early.
"""

# Numba types what it compiles, from calls; annotations would say nothing to it.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, misc, no-any-return"

from __future__ import annotations

import os
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pointsman.kernels.cpu_table import ITEM_BITS, MOST_ITEMS, SLEEPERS, STEPS, THREADS, UNDONE, WORK
from pointsman.kernels.instruction import INT8, INT32, INT64, call
from pointsman.kernels.vector import kernel

SPINS = 2000
YIELDS = 2000
CONTROL = types.CPointer(types.int64)


def _atomic(operation: str) -> Any:
    @intrinsic
    def atomic(context: Any, control: Any, index: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            place = builder.gep(arguments[0], [arguments[1]])
            return builder.atomic_rmw(operation, place, arguments[2], "seq_cst")

        return types.int64(CONTROL, types.int64, types.int64), generate

    return atomic


atomic_add = _atomic("add")
atomic_swap = _atomic("xchg")


@intrinsic
def compare_and_swap(context: Any, control: Any, index: Any, expected: Any, value: Any) -> Any:
    """Replace the word if it is as expected; whether it was."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.gep(arguments[0], [arguments[1]])
        return builder.extract_value(builder.cmpxchg(place, arguments[2], arguments[3], "seq_cst", "seq_cst"), 1)

    return types.boolean(CONTROL, types.int64, types.int64, types.int64), generate


@intrinsic
def atomic_read(context: Any, control: Any, index: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(builder.gep(arguments[0], [arguments[1]]), "seq_cst", 8)

    return types.int64(CONTROL, types.int64), generate


@intrinsic
def breathe(context: Any) -> Any:
    """Tell the core that this is a spin loop, where it can be told."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        machine = context.codegen().magic_tuple()[0].split("-")[0]
        if machine in ("x86_64", "i686"):
            call(builder, "llvm.x86.sse2.pause", ir.VoidType())
        elif machine in ("aarch64", "arm64"):
            call(builder, "llvm.aarch64.hint", ir.VoidType(), ir.Constant(INT32, 1))
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def give_way(context: Any) -> Any:
    """Let another thread have the core."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if os.name == "posix":
            call(builder, "sched_yield", INT32)
        return context.get_dummy_value()

    return types.void(), generate


def _through_pipe(function: str) -> Any:
    @intrinsic
    def move_byte(context: Any, pipe: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            if os.name == "posix":
                byte = cgutils.alloca_once_value(builder, ir.Constant(INT8, 0))
                call(builder, function, INT64, builder.trunc(arguments[0], INT32), byte, ir.Constant(INT64, 1))
            return context.get_dummy_value()

        return types.void(types.int64), generate

    return move_byte


read_byte = _through_pipe("read")
write_byte = _through_pipe("write")


@kernel
def take(control, phase, most):
    """Take items of a phase: (first, count), once it is open; count is 0 when none are left or the phase is past.

    Everyone takes a share of what is left, so that nobody holds much when the phase runs out, and at most `most`.
    """
    spins = 0
    while True:
        word = atomic_read(control, WORK)
        if word >> ITEM_BITS < phase:
            spins += 1
            if spins < SPINS:
                breathe()
            else:
                give_way()
            continue
        left = word & MOST_ITEMS
        if word >> ITEM_BITS > phase or left == 0:
            return 0, 0
        count = min((left + control[THREADS] - 1) // control[THREADS], most)
        if compare_and_swap(control, WORK, word, word - count):
            return left - count, count


@kernel
def put(control, phase, items):
    """Open a phase; everything written before is visible to who takes its items."""
    control[UNDONE] = items
    atomic_swap(control, WORK, phase << ITEM_BITS | items)


@kernel
def finish(control, count):
    """Hand in taken items; true for whoever hands in the last of the phase, who then sees what all others wrote."""
    return atomic_add(control, UNDONE, -count) == count


@kernel
def announce(control, pipe):
    """Start a step: what the caller wrote before is visible to every thread that sees the new step."""
    atomic_add(control, STEPS, 1)
    for _ in range(atomic_swap(control, SLEEPERS, 0)):
        write_byte(pipe)


@kernel
def await_step(control, pipe, seen):
    """Wait until other than `seen` steps were announced; returns their number."""
    spins = 0
    while atomic_read(control, STEPS) == seen:
        spins += 1
        if spins < SPINS:
            breathe()
        elif spins < SPINS + YIELDS:
            give_way()
        else:
            atomic_add(control, SLEEPERS, 1)
            if atomic_read(control, STEPS) == seen:
                read_byte(pipe)
            spins = 0
    return atomic_read(control, STEPS)
