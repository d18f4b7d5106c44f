"""Two matrices that every token takes: a layer without experts, or the expert that all tokens share.

Shape suffixes: T rows, D hidden, F width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pointsman.kernels.operations import Glue
from pointsman.layers.linear import Linear


class MLP:
    """down(silu(gate) * up), with gate and up joined along their rows."""

    def __init__(self, gate_up: Linear, down: Linear, glue: Glue) -> None:
        self.gate_up, self.down, self._glue = gate_up, down, glue

    def __call__(self, x_TD: Any) -> Tensor:
        """Rows in the dtype of computing; x may be `Quantized` where gate and up take it."""
        return self.down(self._glue.activate(self.gate_up(x_TD), self.down.takes_quantized))
