"""A kernel that only reads: the ceiling of everything that streams weights."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, misc, no-any-return, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192
PROGRAMS_PER_PROCESSOR = 8


@triton.jit
def read_kernel(x_ptr, out_ptr, num_blocks, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for block in tl.range(tl.program_id(0), num_blocks, tl.num_programs(0), num_stages=3):
        total += tl.load(x_ptr + block.to(tl.int64) * BLOCK + place)
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, axis=0))


def read(x: Tensor) -> Tensor:
    """Read all of a float32 tensor of whole blocks of 8192, and return a sum a program."""
    programs = PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(x.device).multi_processor_count
    assert x.dtype == torch.float32 and x.numel() % BLOCK == 0
    sums = torch.empty(programs, device=x.device)
    read_kernel[(programs,)](x, sums, x.numel() // BLOCK, BLOCK=BLOCK, num_warps=8)
    return sums
