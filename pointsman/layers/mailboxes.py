"""The exchange of ranks whose GPUs write into each other's memory: sums of rows go by mailbox, in the kernel that needs them where there is
one (`layers.norm`, `layers.attention`); more rows than a mailbox has, and everything else, by the exchange that was there before.

How many rows that is follows from what each rank sends, all of its rows to every other: as much as two ranks do with MAILBOX_ROWS.

Shape suffixes: T rows, D hidden.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pointsman.distributed import Mesh
from pointsman.distributed.mesh import Exchange
from pointsman.kernels.candidates import MAILBOX_ROWS

if TYPE_CHECKING:
    from pointsman.kernels.mailbox import Mailbox

logger = logging.getLogger(__name__)


class Mailboxes:
    """An `Exchange`. `rows` are of the hidden state; `squares` of one float32, two for each of those."""

    def __init__(self, before: Exchange, rows: Mailbox, squares: Mailbox, memory: Any) -> None:
        self._before, self._memory = before, memory
        self.rows, self.squares = rows, squares
        self._sum = importlib.import_module("pointsman.kernels.mailbox").all_reduce

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return self._sum(tensor, self.rows) if self.rows.takes(tensor) else self._before.all_reduce(tensor)

    def all_gather(self, tensor: Tensor) -> Tensor:
        return self._before.all_gather(tensor)

    def broadcast(self, tensor: Tensor) -> None:
        self._before.broadcast(tensor)

    @property
    def store(self) -> Any:
        return self._before.store


def mailboxes_of(mesh: Mesh) -> Mailboxes | None:
    """Those that the mesh sums with, or None."""
    return mesh.exchange if isinstance(mesh.exchange, Mailboxes) else None


def with_mailboxes(mesh: Mesh, hidden: int) -> Mesh:
    """The mesh with mailboxes for bfloat16 rows of so many numbers, or as it is, with the reason in the log. All ranks call it once."""
    if mesh.size == 1 or mailboxes_of(mesh) is not None:
        return mesh
    kernels = importlib.import_module("pointsman.kernels.mailbox")
    num_rows = MAILBOX_ROWS // (mesh.size - 1)
    made, kept = [], []
    for name, rows, width, dtype in (("rows", num_rows, hidden, torch.bfloat16), ("squares", 2 * num_rows, 1, torch.float32)):
        letter = kernels.LETTERS[dtype]
        memory = mesh.share_memory(kernels.letters(mesh.size, rows, width) * letter.itemsize, f"mailbox-{name}")
        if isinstance(memory, str):
            logger.info("sums over ranks: NCCL (mailboxes: %s)", memory)
            return mesh
        kernels.empty(memory.part.view(letter))
        addresses = torch.tensor(memory.addresses, dtype=torch.int64, device=mesh.device)
        turns = torch.zeros(rows, dtype=torch.int32, device=mesh.device)
        made.append(kernels.Mailbox(rank=mesh.rank, num_ranks=mesh.size, width=width, dtype=dtype, boxes_R=addresses, turns_P=turns))
        kept.append(memory)
    mesh.all_gather(torch.zeros(1, device=mesh.device)).tolist()  # all are empty before anyone sends
    logger.info("sums over ranks: mailboxes in each other's memory, of up to %d rows; NCCL for more", num_rows)
    return mesh.carried_by(lambda before: Mailboxes(before, made[0], made[1], kept))
