"""Root-mean-square norm of the hidden state, together with the sums that come before it.

Of several ranks each has its own part of what attention or the experts add. The norm that follows sums it over all of them, so that an
exchange and what is done with it are one operation: one kernel where there are mailboxes for so many rows, else one after the other.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pointsman.distributed import Mesh
from pointsman.kernels.operations import Glue
from pointsman.kernels.unsummed import Unsummed, summed
from pointsman.layers.mailboxes import mailboxes_of


class RMSNorm:
    """x / sqrt(mean(x^2) + epsilon) * weight, computed in float32."""

    def __init__(self, weight_D: Tensor, epsilon: float, glue: Glue, mesh: Mesh) -> None:
        self.weight_D = weight_D
        self.epsilon = epsilon
        self._glue, self._mesh = glue, mesh
        self._mailboxes = mailboxes_of(mesh) if glue.takes_mailbox else None

    def __call__(self, x_TD: Tensor, delta_TD: Tensor | Unsummed | None, *, quantize: bool = False) -> tuple[Tensor, Any]:
        """(x + delta, its norm); without a delta x itself. The norm is `Quantized` where that is asked for.

        Args:
            x_TD: the same on every rank.
            delta_TD: this rank's part of a sum over all ranks. It is used up.
        """
        mailbox = None
        if delta_TD is not None and self._mailboxes is not None and self._mailboxes.rows.takes(x_TD):
            mailbox = self._mailboxes.rows
        together = self._glue.takes_unsummed and (mailbox is not None or self._mesh.size == 1)
        if isinstance(delta_TD, Unsummed) and not together:
            delta_TD = summed(delta_TD)
        if mailbox is not None:
            return self._glue.norm(x_TD, delta_TD, self.weight_D, self.epsilon, quantize, mailbox)
        if isinstance(delta_TD, Tensor):
            delta_TD = self._mesh.all_reduce(delta_TD)
        return self._glue.norm(x_TD, delta_TD, self.weight_D, self.epsilon, quantize)
