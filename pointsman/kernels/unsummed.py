"""What experts made of rows, before the sum: the kernel that norms the sum next can make it on the way.

Shape suffixes: T rows, K experts per row, R pairs (row * K + choice), D hidden.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pointsman.kernels.capability import chains


class Unsummed(NamedTuple):
    """Rows [T, D] as a weighted sum yet to be made: over a row's choices in their order, in float32, rounded once. Attributes:

    y_RD: float32 or bfloat16, by pair; anything where a pair has no expert.
    ids_TK: int32, below zero where a pair has none.
    weights_TK: float32.
    dtype: of the sum.
    """

    y_RD: Tensor
    ids_TK: Tensor
    weights_TK: Tensor
    dtype: torch.dtype

    def total(self) -> Tensor:
        """The sum [T, D]."""
        rows: Any = importlib.import_module("pointsman.kernels.expert_rows")
        out_TD: Tensor = rows.combine(self.y_RD, self.ids_TK, self.weights_TK, self.dtype, pdl=chains(self.y_RD.device))
        return out_TD


def summed(rows: Tensor | Unsummed) -> Tensor:
    """The rows [T, D], whichever way they came."""
    return rows.total() if isinstance(rows, Unsummed) else rows
