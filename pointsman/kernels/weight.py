"""A matrix as its checkpoint stores it: plain numbers, or FP8 with a scale for each block.

The scales stay beside the bytes until whoever computes decides what to make of them: the reference multiplies FP8 by FP8, a CPU
runner dequantizes once, the compiled step packs bytes and scales as they are. Matrices that are always used together (q, k and
v; gate and up) are joined along their rows. Each of them was quantized on its own, so a joined matrix whose parts are no
multiple of the block has more rows of scales than its height alone would give: `parts` says where each begins.

Shape suffixes: E experts, N rows (outputs), K columns (inputs), R rows of scales, B blocks along K, P parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


def num_blocks(size: int, block: int) -> int:
    """Blocks that cover `size`; the last may be ragged."""
    return -(-size // block)


class Quantized(NamedTuple):
    """Activations as FP8 linears multiply them: e4m3 [T, K] and float32 scales [T, B] of each row's blocks of columns."""

    data: Tensor
    scale: Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Weight:
    """One matrix [N, K], or a stack of them [E, N, K].

    Attributes:
        data: bfloat16, float32, or e4m3 when `scale` is given.
        scale: float32 [..., R, B]; an element's value is its e4m3 number times its block's scale.
        block: rows and columns of a block.
        parts: rows of each of the matrices that were joined along N; they sum to N.
        input_scale: float32 [..., P], where the checkpoint has a scale for what each of these matrices multiplies.
    """

    data: Tensor
    scale: Tensor | None = None
    block: tuple[int, int] = (128, 128)
    parts: tuple[int, ...] = ()
    input_scale: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.parts:
            object.__setattr__(self, "parts", (self.data.shape[-2],))
        assert sum(self.parts) == self.data.shape[-2]
        if self.scale is not None:
            assert self.data.dtype == FP8 and self.scale.dtype == torch.float32
            assert self.scale.shape == (*self.data.shape[:-2], *scale_shape(self.parts, self.data.shape[-1], self.block))
        if self.input_scale is not None:
            assert self.input_scale.shape == (*self.data.shape[:-2], len(self.parts)) and self.input_scale.dtype == torch.float32

    @property
    def quantized(self) -> bool:
        return self.scale is not None

    def __getitem__(self, expert: int) -> Weight:
        """One matrix of a stack, without a copy."""
        scale, inputs = (None if part is None else part[expert] for part in (self.scale, self.input_scale))
        return Weight(self.data[expert], scale, self.block, self.parts, inputs)

    def scale_row_N(self) -> Tensor:
        """For each row, the row of `scale` that holds its blocks."""
        rows, first = [], 0
        for part in self.parts:
            rows.append(first + torch.arange(part, device=self.data.device) // self.block[0])
            first += num_blocks(part, self.block[0])
        return torch.cat(rows)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The values, computed in float32 and rounded once to `dtype`."""
        if self.scale is None:
            return self.data.to(dtype)
        if self.data.dim() == 2:
            return self._dequantize_matrix(dtype)
        values = torch.empty(self.data.shape, dtype=dtype, device=self.data.device)
        for expert in range(len(values)):
            values[expert] = self[expert]._dequantize_matrix(dtype)
        return values

    def _dequantize_matrix(self, dtype: torch.dtype) -> Tensor:
        assert self.scale is not None
        scale_NB = self.scale[self.scale_row_N()]
        scale_NK = scale_NB.repeat_interleave(self.block[1], dim=-1)[:, : self.data.shape[-1]]
        return (self.data.float() * scale_NK).to(dtype)


def scale_shape(parts: tuple[int, ...], columns: int, block: tuple[int, int]) -> tuple[int, int]:
    """Shape of the scales of matrices of these heights joined along their rows."""
    return sum(num_blocks(part, block[0]) for part in parts), num_blocks(columns, block[1])
