"""Grouped-query attention over the paged cache, with q and k normed (or not, as the model has it) and rotated, in whole or in part.

The rows of a step are flat; which sequence a row belongs to, and where its keys and values go, is in the step context. Keys
and values are stored before attending, so a row reads itself from the cache, rounded as every later row will see it.

Of several ranks each has some of the heads, and makes its part of the output. A norm over all heads at once needs the squares of all: their
float32 sums are exchanged, two numbers a row, and nothing is rounded on the way. Where there are mailboxes, and every rank has as many
heads, the kernel that norms and rotates exchanges them itself.

Shape suffixes: T rows, D hidden, Q query heads, H key/value heads, C channels of a head, R half the rotary channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pointsman.distributed import Mesh
from pointsman.kernels import reference
from pointsman.kernels.operations import Attention as Implementation
from pointsman.kernels.operations import Glue
from pointsman.layers.context import StepContext
from pointsman.layers.linear import Linear
from pointsman.layers.mailboxes import mailboxes_of
from pointsman.layers.paged_kv import PagedKV

if TYPE_CHECKING:
    from pointsman.kernels.mailbox import Mailbox

BLOCK = 128

__all__ = ["Attention", "PagedKV", "Rotation"]


class Rotation(NamedTuple):
    """Cosines and sines of a step's positions, the same for every layer."""

    cos_TR: Tensor
    sin_TR: Tensor

    @staticmethod
    def at(positions_T: Tensor, rotary_dim: int, theta: float) -> Rotation:
        return Rotation(*reference.rotary_angles(positions_T, rotary_dim, theta))


class NormedTogether(NamedTuple):
    """A norm of q and k over the heads of all ranks.

    Attributes:
        q_width, k_width: channels of all query heads and of all key heads.
        counts_keys: whether this rank's key heads count in the sum; each of them does on one rank.
        even: every rank has as many heads, and each key head is on as many ranks.
    """

    q_width: int
    k_width: int
    counts_keys: bool
    even: bool
    mesh: Mesh

    def squares(self, num_rows: int) -> Mailbox | None:
        """Where the kernel that norms so many rows exchanges the sums of their squares itself; None: it cannot."""
        found = mailboxes_of(self.mesh) if self.even else None
        return None if found is None or 2 * num_rows > found.squares.num_rows else found.squares

    def __call__(self, qkv_TN: Tensor, q_weight_Q: Tensor, k_weight_W: Tensor, epsilon: float) -> Tensor:
        """The rows of q, k and v side by side with q and k normed, as `reference.rms_norm` does it, but for the order of the sum."""
        q_TQ, k_TW, v_TW = torch.split(qkv_TN, [len(q_weight_Q), len(k_weight_W), len(k_weight_W)], dim=-1)
        q_TQ, k_TW = q_TQ.float(), k_TW.float()
        squares_T2 = torch.stack((q_TQ.square().sum(-1), k_TW.square().sum(-1) * self.counts_keys), dim=-1)
        q_T1, k_T1 = torch.split(self.mesh.all_reduce(squares_T2), 1, dim=-1)
        q_TQ = q_TQ * torch.rsqrt(q_T1 / self.q_width + epsilon) * q_weight_Q
        k_TW = k_TW * torch.rsqrt(k_T1 / self.k_width + epsilon) * k_weight_W
        return torch.cat((q_TQ.to(v_TW.dtype), k_TW.to(v_TW.dtype), v_TW), dim=-1)


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
        together: NormedTogether | None = None,
    ) -> None:
        self.layer = layer
        self.qkv, self.o = qkv, o
        self.q_weight, self.k_weight, self.epsilon = q_weight, k_weight, epsilon
        self._scale = head_dim**-0.5
        self._glue, self._together = glue, together
        self._run = implementation.run
        # a head's row is then one block of what the next linear wants quantized
        self._run_quantize = implementation.run_quantize if head_dim == BLOCK and o.takes_quantized else None

    def __call__(self, x_TD: Any, rotation: Rotation, ctx: StepContext) -> Tensor:
        """Rows in x's dtype; x may be `Quantized` where the joined projection takes it."""
        k_pages, v_pages = ctx.kv.k[self.layer], ctx.kv.v[self.layer]
        qkv_TN, q_weight, k_weight = self.qkv(x_TD), self.q_weight, self.k_weight
        mailbox = None if self._together is None or not self._glue.takes_mailbox else self._together.squares(len(qkv_TN))
        if self._together is not None and mailbox is None:
            assert q_weight is not None and k_weight is not None
            qkv_TN, q_weight, k_weight = self._together(qkv_TN, q_weight, k_weight, self.epsilon), None, None
        summing = () if mailbox is None else (mailbox,)
        q_TQC = self._glue.qkv_post(qkv_TN, q_weight, k_weight, self.epsilon, *rotation, k_pages, v_pages, ctx.slots_T, *summing)
        cache = (k_pages, v_pages, ctx.attention_plan, ctx.positions_T, ctx.page_table_LP)
        if self._run_quantize is not None:
            return self.o(self._run_quantize(q_TQC, *cache, self._scale))
        return self.o(self._run(q_TQC, *cache, self._scale).flatten(1))
