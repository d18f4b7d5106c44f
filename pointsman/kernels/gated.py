"""silu(gate) * up of rows that hold both, with FP8 quantization behind it: what stands between the two matrices that all tokens take.

The definition is `reference.silu_and_mul`, rounded to the rows' dtype, and `reference.quantize_activation`. A program has some blocks of
128 columns of one row.

Shape suffixes: T rows, F columns of the result, B blocks of 128 columns.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, misc, no-any-return, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pointsman.kernels.e4m3 import stored
from pointsman.kernels.norm_quant import BLOCK, store_quantized
from pointsman.kernels.weight import FP8, Quantized, num_blocks

GROUPS = 8  # blocks of a program


@triton.jit
def gated_kernel(x_ptr, h_ptr, q_ptr, scale_ptr, F: tl.constexpr, NUM_BLOCKS: tl.constexpr, GROUPS: tl.constexpr, QUANTIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = column < F
    gate = tl.load(x_ptr + row * 2 * F + column, mask=inside, other=0.0)
    dtype = gate.dtype
    gate = gate.to(tl.float32)
    up = tl.load(x_ptr + row * 2 * F + F + column, mask=inside, other=0.0).to(tl.float32)
    h = (gate / (1.0 + tl.exp(-gate)) * up).to(dtype)
    if QUANTIZE:
        store_quantized(h.to(tl.float32), q_ptr, scale_ptr, row, group, column, inside, F, NUM_BLOCKS)
    else:
        tl.store(h_ptr + row * F + column, h, mask=inside)


def activate(gate_up_TF: Tensor, quantize: bool = False) -> Tensor | Quantized:
    """silu of the first half of each row times the second [T, F], in the rows' dtype or quantized."""
    num_rows, width = len(gate_up_TF), gate_up_TF.shape[1] // 2
    assert gate_up_TF.is_contiguous()
    blocks, device = num_blocks(width, BLOCK), gate_up_TF.device
    h_TF = torch.empty(num_rows, width, dtype=FP8 if quantize else gate_up_TF.dtype, device=device)
    scale_TB = torch.empty(num_rows, blocks, dtype=torch.float32, device=device) if quantize else None
    if num_rows:
        gated_kernel[(num_rows, triton.cdiv(blocks, GROUPS))](
            gate_up_TF,
            stored(h_TF),
            stored(h_TF),
            gate_up_TF if scale_TB is None else scale_TB,
            F=width,
            NUM_BLOCKS=blocks,
            GROUPS=GROUPS,
            QUANTIZE=quantize,
            num_warps=4,
        )
    return h_TF if scale_TB is None else Quantized(h_TF, scale_TB)
