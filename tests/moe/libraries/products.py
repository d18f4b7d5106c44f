"""What the emulated libraries compute with: FP8 rows times FP8 matrices, each block of 128 columns scaled as it joins a float32 sum."""

from __future__ import annotations

import torch
from torch import Tensor

from pointsman.kernels.weight import FP8

BLOCK = 128


def check(condition: bool, message: str) -> None:
    """As the libraries do: an error at the call."""
    if not condition:
        raise RuntimeError(message)


def product(rows_PN: Tensor, scale_PG: Tensor, matrix_MN: Tensor, scale_RG: Tensor) -> Tensor:
    """float32 [P, M]."""
    check(rows_PN.dtype == matrix_MN.dtype == FP8, "rows and matrix must be e4m3")
    check(scale_PG.dtype == scale_RG.dtype == torch.float32, "scales must be float32")
    out_PM = torch.zeros(len(rows_PN), len(matrix_MN), device=rows_PN.device)
    for block in range(matrix_MN.shape[1] // BLOCK):
        columns = slice(block * BLOCK, (block + 1) * BLOCK)
        scale_M = scale_RG[:, block].repeat_interleave(BLOCK)
        out_PM += rows_PN[:, columns].float() @ matrix_MN[:, columns].float().T * scale_PG[:, block, None] * scale_M
    return out_PM


def quantize(rows_PN: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 [P, N] and a scale for each 128, strictly positive as the kernels make it."""
    grouped = rows_PN.float().view(len(rows_PN), -1, BLOCK)
    scale_PG = (grouped.abs().amax(-1) / 448.0).clamp(min=torch.finfo(torch.float32).tiny)
    return (grouped / scale_PG.unsqueeze(-1)).to(FP8).view(rows_PN.shape), scale_PG


def rounded(rows_PN: Tensor) -> Tensor:
    """What quantization leaves."""
    q_PN, scale_PG = quantize(rows_PN)
    return q_PN.float() * scale_PG.repeat_interleave(BLOCK, -1)
