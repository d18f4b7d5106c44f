"""Grouped-query attention over the paged cache, with q and k normed over their full width and rotated in part.

The rows of a step are flat; which sequence a row belongs to, and where its keys and values go, is in the step context. Keys
and values are stored before attending, so a row reads itself from the cache, rounded as every later row will see it.

Shape suffixes: T rows, D hidden, Q query heads, H key/value heads, C channels of a head, R half the rotary channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pointsman.kernels import Attention as Implementation
from pointsman.kernels import reference
from pointsman.layers.context import StepContext
from pointsman.layers.linear import Linear
from pointsman.layers.norm import RMSNorm
from pointsman.layers.paged_kv import PagedKV

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
        self, layer: int, qkv: Linear, o: Linear, q_norm: RMSNorm, k_norm: RMSNorm, head_dim: int, implementation: Implementation
    ) -> None:
        self.layer = layer
        self.qkv, self.o, self.q_norm, self.k_norm = qkv, o, q_norm, k_norm
        self.head_dim = head_dim
        self._run = implementation.run

    def __call__(self, x_TD: Tensor, rotation: Rotation, ctx: StepContext) -> Tensor:
        q, k, v = torch.split(self.qkv(x_TD), list(self.qkv.weight.parts), dim=-1)
        q_TQC = reference.rotate(self._heads(self.q_norm(q)), *rotation)
        k_THC = reference.rotate(self._heads(self.k_norm(k)), *rotation)
        k_pages, v_pages = ctx.kv.k[self.layer], ctx.kv.v[self.layer]
        reference.write_kv(k_pages, v_pages, k_THC, self._heads(v), ctx.slots_T)
        mixed_TQC = self._run(q_TQC, k_pages, v_pages, ctx.attention_plan, ctx.positions_T, ctx.page_table_LP, self.head_dim**-0.5)
        return self.o(mixed_TQC.flatten(1))

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1, self.head_dim)
