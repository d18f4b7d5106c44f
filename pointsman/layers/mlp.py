"""Two matrices that every token takes: a layer without experts, or the expert that all tokens share.

Shape suffixes: T rows, D hidden, F width.
"""

from __future__ import annotations

from torch import Tensor

from pointsman.kernels import reference
from pointsman.layers.linear import Linear


class MLP:
    """down(silu(gate) * up), with gate and up joined along their rows."""

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        self.gate_up, self.down = gate_up, down

    def __call__(self, x_TD: Tensor) -> Tensor:
        gate_up_TF = self.gate_up(x_TD)
        return self.down(reference.silu_and_mul(gate_up_TF).to(gate_up_TF.dtype))
