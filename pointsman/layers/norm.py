"""Root-mean-square norm of the hidden state, together with the sum that comes before it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pointsman.kernels import Glue


class RMSNorm:
    """x / sqrt(mean(x^2) + epsilon) * weight, computed in float32."""

    def __init__(self, weight_D: Tensor, epsilon: float, glue: Glue) -> None:
        self.weight_D = weight_D
        self.epsilon = epsilon
        self._glue = glue

    def __call__(self, x_TD: Tensor, delta_TD: Tensor | None, *, quantize: bool = False) -> tuple[Tensor, Any]:
        """(x + delta, its norm); without a delta x itself. The norm is `Quantized` where that is asked for."""
        return self._glue.norm(x_TD, delta_TD, self.weight_D, self.epsilon, quantize)
