"""The quotient of a kernel against numpy's division, which rounds as it should: every bit, in Triton's interpreter or on a GPU.

Numerators with few bits, as bfloat16 has them, fall upon borders between e4m3 numbers; their rows reach from denormal to huge numbers.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from pointsman.kernels.quotient import quotient
from tests.kernels.interpreter import correct

correct()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@triton.jit
def divide_kernel(x_ptr, divisor_ptr, out_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(out_ptr + at, quotient(tl.load(x_ptr + at), tl.load(divisor_ptr + row)))


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy's own, at the ends of the range
@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
def test_a_quotient_has_the_bits_of_a_division(kind: str) -> None:
    rng = np.random.default_rng(len(kind))
    rows, columns = 512, 128
    x_RC = rng.standard_normal((rows, columns)).astype(np.float32) * np.exp2(rng.integers(-120, 110, (rows, 1))).astype(np.float32)
    x_RC[rng.random(x_RC.shape) < 0.02] = -0.0
    x_RC[:8] *= np.float32(2.0**-20)  # denormal
    if kind == "bfloat16":
        x_RC = (x_RC.view(np.uint32) & 0xFFFF0000).view(np.float32)
    divisor_R = np.abs(x_RC).max(1) / np.float32(448)
    divisor_R[divisor_R == 0] = 1
    out_RC = torch.empty(rows, columns, device=DEVICE)
    divide_kernel[(rows // 16,)](
        torch.from_numpy(x_RC).to(DEVICE), torch.from_numpy(divisor_R).to(DEVICE), out_RC, ROWS=16, COLUMNS=columns
    )
    got_RC, want_RC = out_RC.cpu().numpy(), x_RC / divisor_R[:, None]
    matters = np.abs(want_RC) > 2.0**-60
    assert (got_RC.view(np.uint32) == want_RC.view(np.uint32))[matters | (x_RC == 0)].all() and matters.mean() > 0.9
