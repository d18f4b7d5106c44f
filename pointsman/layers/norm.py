"""Root-mean-square norm over the last axis: of the hidden state, or of all heads of q or k in one row (a full-width q/k norm)."""

from __future__ import annotations

from torch import Tensor

from pointsman.kernels import reference


class RMSNorm:
    """x / sqrt(mean(x^2) + epsilon) * weight, computed in float32."""

    def __init__(self, weight_D: Tensor, epsilon: float) -> None:
        self.weight_D = weight_D
        self.epsilon = epsilon

    def __call__(self, x_TD: Tensor) -> Tensor:
        return reference.rms_norm(x_TD, self.weight_D, self.epsilon)
