"""A weight matrix and what multiplies with it; the embedding and the head, whose rows may be spread over ranks.

The checkpoint's form is kept and the implementation's own form is made at first use, or by `prepare`: a step compiled as one
region packs the checkpoint's form itself and never asks for the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pointsman.distributed import Mesh
from pointsman.kernels.operations import Linear as Implementation
from pointsman.kernels.weight import Weight


class Linear:
    """y = x @ weight.T by one implementation of the op table, plus a float32 bias [N] where there is one."""

    def __init__(self, weight: Weight, implementation: Implementation, dtype: torch.dtype, bias_N: Tensor | None = None) -> None:
        self.weight, self.bias_N = weight, bias_N
        self._implementation = implementation
        self._dtype = dtype
        self._ready: Any = None

    @property
    def takes_quantized(self) -> bool:
        """Whether rows may come `Quantized`."""
        return self._implementation.takes_quantized and self.weight.quantized

    def prepare(self) -> Any:
        """The weight in the implementation's form, made once."""
        if self._ready is None:
            self._ready = self._implementation.prepare(self.weight, self._dtype)
        return self._ready

    def release(self) -> None:
        """Drop that form; it is made again at the next use."""
        self._ready = None

    def __call__(self, x_TK: Any) -> Tensor:
        y_TN = self._implementation.run(x_TK, self.prepare())
        return y_TN if self.bias_N is None else (y_TN + self.bias_N).to(y_TN.dtype)


class Embedding:
    """Rows of a table, in the dtype the model computes in; `first` is the token of a rank's first row."""

    def __init__(self, table_VD: Tensor, dtype: torch.dtype, mesh: Mesh, first: int = 0) -> None:
        self.table_VD, self._first = table_VD, first
        self._dtype, self._mesh = dtype, mesh

    def __call__(self, tokens_T: Tensor) -> Tensor:
        if self._mesh.size == 1:
            return self.table_VD[tokens_T].to(self._dtype)
        row_T = tokens_T - self._first
        there_T = (row_T >= 0) & (row_T < len(self.table_VD))
        rows_TD = self.table_VD[torch.where(there_T, row_T, 0)].to(self._dtype)
        return self._mesh.all_reduce(torch.where(there_T.unsqueeze(-1), rows_TD, 0))  # all but one rank add zeros


class Head(Linear):
    """Logits of the whole vocabulary, in the dtype computed in; `sizes`: how many of its rows each rank has."""

    def __init__(self, weight: Weight, implementation: Implementation, dtype: torch.dtype, mesh: Mesh, sizes: Sequence[int]) -> None:
        super().__init__(weight, implementation, dtype)
        self._mesh, self._sizes = mesh, sizes

    def __call__(self, x_TK: Any) -> Tensor:
        return self._mesh.all_gather(super().__call__(x_TK), 1, self._sizes)
