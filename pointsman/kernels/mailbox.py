"""Sums over the GPUs of one host, made inside of whatever kernel needs them: each rank writes its numbers into the others' memory.

NCCL takes longer to begin than the numbers of a decode step take to travel. Here a program that has a row's numbers stores them straight
into every other rank's mailbox and waits until theirs have come into its own; what follows (a norm, say) goes on in the same program.

A mailbox needs no flags and no barrier. An empty place holds -0.0, which nobody sends (it is sent as 0.0), so a number is its own sign of
having come. Each row has two places for each sender, used in turn. The reader empties a place when it has read it, and the sender
cannot be two turns ahead: between them it had to hear from this reader once. Turns are counted by row in the rank's own memory, so a
captured graph may be replayed in any order with other launches, as long as all ranks launch alike.

The sum is made in float32 in the order of the ranks and rounded once: it is bitwise the same on all of them.

Programs wait for programs of the same number on other GPUs, which begin in ascending order and send before they wait.

Shape suffixes: R ranks, P rows of a mailbox, T rows, D columns.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, misc, no-any-return, no-untyped-call, no-redef"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

LETTERS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}


@dataclass(frozen=True, eq=False, kw_only=True)
class Mailbox:
    """One rank's view of everybody's mailboxes, all of one size.

    Attributes:
        rank, num_ranks: whose view it is, and of how many.
        width: numbers in a row.
        dtype: bfloat16 or float32, of those numbers.
        boxes_R: int64, the addresses of the boxes as this device sees them; each is `letters` numbers of `LETTERS[dtype]`, emptied.
        turns_P: int32 zeros, one for each row a mailbox has.
    """

    rank: int
    num_ranks: int
    width: int
    dtype: torch.dtype
    boxes_R: Tensor
    turns_P: Tensor

    @property
    def num_rows(self) -> int:
        return len(self.turns_P)

    def takes(self, x_TD: Tensor) -> bool:
        """Whether these rows are of its kind and not too many."""
        return x_TD.dim() == 2 and x_TD.shape[1] == self.width and len(x_TD) <= self.num_rows and x_TD.dtype == self.dtype


def letters(num_ranks: int, num_rows: int, width: int) -> int:
    """How many numbers a mailbox holds: two turns of each row from each other rank."""
    return num_rows * 2 * (num_ranks - 1) * width


def empty(box: Tensor) -> None:
    """Make a mailbox of `LETTERS`' dtype empty; every rank does so before any of them sends."""
    box.fill_(torch.iinfo(box.dtype).min)


@triton.jit
def sum_over_ranks(x, boxes_ptr, turns_ptr, row, at, inside, WIDTH: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr):
    """The float32 sum over all ranks of their blocks x; `at` says which of the row's WIDTH numbers these are, `inside` which are meant.

    A row belongs to one program, which calls this once.
    """
    if x.dtype.primitive_bitwidth == 16:
        letter: tl.constexpr = tl.int16
        nothing: tl.constexpr = -32768
    else:
        letter: tl.constexpr = tl.int32
        nothing: tl.constexpr = -2147483648
    mine = x.to(letter, bitcast=True)
    mine = tl.where(mine == nothing, 0, mine).to(letter)
    turn = tl.load(turns_ptr + row)
    place = (row * 2 + (turn & 1)) * (RANKS - 1)
    for ahead in tl.static_range(1, RANKS):
        # a box has the places of its senders in the order in which they follow its owner
        box = tl.load(boxes_ptr + (RANK + ahead) % RANKS).to(tl.pointer_type(letter))
        tl.store(tl.multiple_of(box, 16) + (place + RANKS - 1 - ahead) * WIDTH + at, mine, mask=inside)
    own = tl.multiple_of(tl.load(boxes_ptr + RANK).to(tl.pointer_type(letter)), 16)
    total = tl.zeros_like(x).to(tl.float32)
    for source in tl.static_range(RANKS):
        if source == RANK:
            came = mine
        else:
            from_ptr = own + (place + (source - RANK - 1 + RANKS) % RANKS) * WIDTH + at
            came = tl.load(from_ptr, mask=inside, other=0, volatile=True)
            while tl.max((came == nothing).to(tl.int32).reshape(came.numel)) != 0:
                came = tl.load(from_ptr, mask=inside, other=0, volatile=True)
        total += came.to(x.dtype, bitcast=True).to(tl.float32)
    tl.debug_barrier()  # every thread has seen its numbers, and the turn
    for source in tl.static_range(RANKS):
        if source != RANK:
            tl.store(own + (place + (source - RANK - 1 + RANKS) % RANKS) * WIDTH + at, tl.full(x.shape, nothing, letter), mask=inside)
    tl.store(turns_ptr + row, turn + 1)
    return total


@triton.jit
def all_reduce_kernel(
    x_ptr, out_ptr, boxes_ptr, turns_ptr, D: tl.constexpr, BLOCK_D: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = column < D
    x = tl.load(x_ptr + row * D + column, mask=inside, other=0.0)
    total = sum_over_ranks(x, boxes_ptr, turns_ptr, row, column, inside, D, RANK, RANKS)
    tl.store(out_ptr + row * D + column, total.to(x.dtype), mask=inside)


def all_reduce(x_TD: Tensor, mailbox: Mailbox) -> Tensor:
    """The sum [T, D] of all ranks' rows, in float32 by rank, rounded to their dtype."""
    assert mailbox.takes(x_TD) and x_TD.is_contiguous()
    out_TD = torch.empty_like(x_TD)
    if len(x_TD):
        block = triton.next_power_of_2(mailbox.width)
        all_reduce_kernel[(len(x_TD),)](
            x_TD,
            out_TD,
            mailbox.boxes_R,
            mailbox.turns_P,
            D=mailbox.width,
            BLOCK_D=block,
            RANK=mailbox.rank,
            RANKS=mailbox.num_ranks,
            num_warps=max(1, min(16, block // 512)),
        )
    return out_TD
