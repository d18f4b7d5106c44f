"""Grouped-query attention over the paged cache, with q and k normed (or not, as the model has it) and rotated, in whole or in part.

The rows of a step are flat; which sequence a row belongs to, and where its keys and values go, is in the step context. Keys
and values are stored before attending, so a row reads itself from the cache, rounded as every later row will see it.

Shape suffixes: T rows, D hidden, Q query heads, H key/value heads, C channels of a head, R half the rotary channels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from pointsman.kernels import Attention as Implementation
from pointsman.kernels import Glue, reference
from pointsman.layers.context import StepContext
from pointsman.layers.linear import Linear
from pointsman.layers.paged_kv import PagedKV

BLOCK = 128

__all__ = ["Attention", "PagedKV", "Rotation"]


class Rotation(NamedTuple):
    """Cosines and sines of a step's positions, the same for every layer."""

    cos_TR: Tensor
    sin_TR: Tensor

    @staticmethod
    def at(positions_T: Tensor, rotary_dim: int, theta: float) -> Rotation:
        return Rotation(*reference.rotary_angles(positions_T, rotary_dim, theta))


class Attention:
    """The attention of one layer; `qkv` is the joined projection, whose parts are the widths of q, k and v."""

    def __init__(
        self,
        layer: int,
        qkv: Linear,
        o: Linear,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        epsilon: float,
        head_dim: int,
        implementation: Implementation,
        glue: Glue,
    ) -> None:
        self.layer = layer
        self.qkv, self.o = qkv, o
        self.q_weight, self.k_weight, self.epsilon = q_weight, k_weight, epsilon
        self._scale = head_dim**-0.5
        self._glue = glue
        self._run = implementation.run
        # a head's row is then one block of what the next linear wants quantized
        self._run_quantize = implementation.run_quantize if head_dim == BLOCK and o.takes_quantized else None

    def __call__(self, x_TD: Any, rotation: Rotation, ctx: StepContext) -> Tensor:
        """Rows in x's dtype; x may be `Quantized` where the joined projection takes it."""
        k_pages, v_pages = ctx.kv.k[self.layer], ctx.kv.v[self.layer]
        q_TQC = self._glue.qkv_post(self.qkv(x_TD), self.q_weight, self.k_weight, self.epsilon, *rotation, k_pages, v_pages, ctx.slots_T)
        cache = (k_pages, v_pages, ctx.attention_plan, ctx.positions_T, ctx.page_table_LP)
        if self._run_quantize is not None:
            return self.o(self._run_quantize(q_TQC, *cache, self._scale))
        return self.o(self._run(q_TQC, *cache, self._scale).flatten(1))
