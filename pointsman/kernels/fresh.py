"""Rows that are yet to be summed and normed, for a reader that does so by itself.

Shape suffixes: T rows, D columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Fresh(NamedTuple):
    """What `norm_quant.norm` would make of these: x + delta, which goes to `sum_TD`, and its norm."""

    x_TD: Tensor
    delta_TD: Tensor
    weight_D: Tensor
    epsilon: float
    sum_TD: Tensor


def fresh(x_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, epsilon: float) -> Fresh:
    """With memory for the sum."""
    return Fresh(x_TD, delta_TD, weight_D, epsilon, torch.empty_like(x_TD))
