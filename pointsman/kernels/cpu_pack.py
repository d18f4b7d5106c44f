"""Weights in the order in which a step on a CPU reads them.

A matrix [N, K] becomes panels of 64 outputs, [N / 64][K][64], so that the inner loop reads one line of 64 weights per k and every
output has a lane of its own. Values keep their stored form: e4m3 bytes, bfloat16 bits or float32. Scales are spread to one per output and
block of K, [N / 64][blocks][64], which lets blocks have any height and matrices be joined whose parts are no multiple of it; plain
matrices have ones. Outputs that pad the last panel have zero weights.

Shape suffixes: N outputs, K inputs, R rows of block scales, B blocks along K, P panels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

PANEL = 64
FORMS: dict[str, np.dtype[Any]] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(np.uint16), "e4m3": np.dtype(np.uint8)}

# Compiled code reads e4m3 as 2**-120 of its value. Half of that is made good in the activations, before any product can leave the
# normal range of float32, half in the scales.
E4M3_LIFT = np.float32(2.0**60)


LINE = 64  # bytes; a vector that straddles two cache lines takes two loads


def aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Zeros that start on a cache line, which numpy alone does not promise."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.zeros(size + LINE, np.uint8)
    first = -memory.ctypes.data % LINE
    return memory[first : first + size].view(dtype).reshape(shape)


def form_of(array: NDArray[np.generic]) -> str:
    """The stored form that an array's dtype stands for: uint8 is e4m3, uint16 bfloat16."""
    for form, dtype in FORMS.items():
        if array.dtype == dtype:
            return form
    raise ValueError(f"an array of {array.dtype} has no stored form; it must be uint8 (e4m3), uint16 (bfloat16) or float32")


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix as its checkpoint stores it.

    Attributes:
        values: [N, K] float32, uint16 (bfloat16) or uint8 (e4m3, with scales).
        scales: float32 [R, B], one for each block; None where values need none.
        block: rows and columns of a block.
        parts: heights of the matrices joined along N, each of which has blocks of its own; empty for one.
    """

    values: NDArray[np.generic]
    scales: NDArray[np.float32] | None = None
    block: tuple[int, int] = (128, 128)
    parts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        form, (outputs, inputs) = form_of(self.values), self.values.shape
        parts = self.parts or (outputs,)
        if (form == "e4m3") != (self.scales is not None):
            raise ValueError(f"a matrix of {form} with scales {self.scales is not None}; e4m3 needs them, other forms have none")
        if sum(parts) != outputs or min(self.block) < 1:
            raise ValueError(f"parts {parts} and block {self.block} do not fit a matrix of {outputs} rows")
        right = (sum(-(-part // self.block[0]) for part in parts), -(-inputs // self.block[1]))
        if self.scales is not None and self.scales.shape != right:
            raise ValueError(
                f"scales have the shape {self.scales.shape}; for [{outputs}, {inputs}] in blocks of {self.block} it must be {right}"
            )

    def scale_NB(self) -> NDArray[np.float32]:
        """One scale for each row and block of K."""
        if self.scales is None:
            return np.ones((len(self.values), 1), np.float32)
        rows: list[NDArray[np.intp]] = []
        first = 0
        for part in self.parts or (len(self.values),):
            rows.append(first + np.arange(part) // self.block[0])
            first += -(-part // self.block[0])
        return np.asarray(self.scales, np.float32)[np.concatenate(rows)]


@dataclass(eq=False)
class PackedLinear:
    """A stack of matrices of one shape and form, filled one by one.

    Attributes:
        values_PK: [count, P, K, 64] in the stored form.
        scales_PB: [count, P, B, 64] float32, with what of 2**120 the activations do not carry.
    """

    form: str
    count: int
    outputs: int
    inputs: int
    block: int
    values_PK: NDArray[np.generic] = field(init=False)
    scales_PB: NDArray[np.float32] = field(init=False)

    def __post_init__(self) -> None:
        assert min(self.count, self.outputs, self.inputs, self.block) > 0
        panels = -(-self.outputs // PANEL)
        self.values_PK = aligned((self.count, panels, self.inputs, PANEL), FORMS[self.form])
        self.scales_PB = aligned((self.count, panels, self.blocks, PANEL), FORMS["float32"])

    @property
    def blocks(self) -> int:
        return -(-self.inputs // self.block)

    @property
    def lift(self) -> np.float32:
        """What activations are multiplied with before this matrix sees them."""
        return E4M3_LIFT if self.form == "e4m3" else np.float32(1)

    def fill(self, index: int, matrix: Matrix, order_N: NDArray[np.intp] | None = None) -> None:
        """Pack a matrix as number `index`, its rows in the given order, in which -1 is a row of zeros.

        Raises:
            ValueError: the matrix has another form, or is not finite.
        """
        values, scales = matrix.values, matrix.scale_NB()
        if form_of(values) != self.form:
            raise ValueError(f"a matrix of {form_of(values)} among ones of {self.form}; all layers must have the same form")
        if scales.shape[1] != self.blocks:
            raise ValueError(
                f"a matrix of {scales.shape[1]} blocks along its inputs among ones of {self.blocks}; all layers must have the same"
            )
        if self.form == "e4m3" and bool(((values.view(np.uint8) & 0x7F) == 0x7F).any()):
            raise ValueError("an e4m3 matrix holds NaN")
        order = np.arange(len(values)) if order_N is None else order_N
        assert len(order) <= self.values_PK.shape[1] * PANEL and values.shape[1] == self.inputs
        order = np.concatenate([order, np.full(self.values_PK.shape[1] * PANEL - len(order), -1)])
        real = order >= 0
        self.values_PK[index] = _panels(np.where(real[:, None], values[order], np.zeros((), values.dtype)))
        self.scales_PB[index] = _panels(np.where(real[:, None], scales[order], np.float32(1))) * self.lift


def _panels(rows: NDArray[Any]) -> NDArray[Any]:
    """[P * 64, X] to [P, X, 64]."""
    return rows.reshape(-1, PANEL, rows.shape[1]).transpose(0, 2, 1)


def pack_linear(matrix: Matrix) -> PackedLinear:
    """A stack of one."""
    packed = stack_like(matrix, 1, len(matrix.values))
    packed.fill(0, matrix)
    return packed


def stack_like(matrix: Matrix, count: int, outputs: int) -> PackedLinear:
    """An empty stack for matrices such as this one."""
    inputs = matrix.values.shape[1]
    return PackedLinear(form_of(matrix.values), count, outputs, inputs, inputs if matrix.scales is None else matrix.block[1])


def gate_up_order(width: int) -> NDArray[np.intp]:
    """Rows of a joined (gate, up) in panels of 32 gates and their 32 ups."""
    half = PANEL // 2
    number = np.arange(-(-width // half) * half)
    gate = np.where(number < width, number, -1).reshape(-1, half)
    up = np.where(gate < 0, -1, gate + width)
    return np.stack([gate, up], axis=1).reshape(-1)
