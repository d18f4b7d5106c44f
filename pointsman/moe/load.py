"""How often each expert was used, counted from the rows that the steps have stored.

Counting a step's rows when it ends would cost as much for one row as for hundreds, most of it in calls. So the slots of several
steps are only noted, and counted together: when there are many, or before one of them may get another token. Pages are given
away only after a sequence has left, so whoever sees one leave says `settle`, and the next step counts before it writes. Every
row is counted once, as it was stored; rows computed for nothing, as overlap does now and then, are counted too, for the experts ran.

On a device there is no such cost: a step counts its rows as part of itself.

Shape suffixes: L layers, E experts, T tokens, K experts a token.
"""

from __future__ import annotations

import threading
from collections import deque

import numpy as np
import numpy.typing as npt
import torch

from pointsman.moe.capture import RouteStore

MAX_NOTES = 256
PIECE = 2048

Ints = npt.NDArray[np.int64]


class ExpertLoad:
    """Counts of one rank. Steps note in one thread; another may read."""

    def __init__(self, routes: RouteStore, num_experts: int) -> None:
        self._routes = routes
        num_layers = routes.rows_SLK.shape[1]
        self._counts_LE: Ints = np.zeros((num_layers, num_experts), np.int64)
        self._first_L1: Ints = (np.arange(num_layers) * num_experts)[:, None]
        self._notes: deque[Ints] = deque()
        self._num_settled = 0  # two counters and no flag: a word given while a step begins is not lost
        self._num_seen = 0
        self._counting = threading.Lock()

    def settle(self) -> None:
        """What has been noted may be overwritten by the next step that is planned: count before it runs."""
        self._num_settled += 1

    def before_step(self) -> None:
        told = self._num_settled
        if told != self._num_seen or len(self._notes) >= MAX_NOTES:
            self._num_seen = told
            self._count()

    def after_step(self, slots_T: Ints) -> None:
        """Note the slots that a step has written."""
        self._notes.append(slots_T)

    def counts_LE(self) -> Ints:
        """How many tokens used each expert so far, in each layer."""
        self._count()
        with self._counting:
            return self._counts_LE.copy()

    def _count(self) -> None:
        """Count what has been noted, some thousand rows at a time."""
        with self._counting:
            while notes := self._take():
                rows_TLK = self._routes.gather(torch.from_numpy(np.concatenate(notes))).numpy()
                size = self._counts_LE.size
                self._counts_LE += np.bincount((rows_TLK + self._first_L1).ravel(), minlength=size).reshape(self._counts_LE.shape)

    def _take(self) -> list[Ints]:
        notes: list[Ints] = []
        num_rows = 0
        while self._notes and num_rows < PIECE:
            notes.append(self._notes.popleft())
            num_rows += len(notes[-1])
        return notes


class DeviceExpertLoad:
    """Counts of a rank whose steps run on a device: each step counts its own rows there, and the counts are copied when asked for."""

    def __init__(self, routes: RouteStore, num_experts: int) -> None:
        num_layers = routes.rows_SLK.shape[1]
        device = routes.rows_SLK.device
        self._routes = routes
        self._counts_LE = torch.zeros(num_layers, num_experts, dtype=torch.int64, device=device)
        self._first_L1 = (torch.arange(num_layers, device=device) * num_experts).unsqueeze(-1)

    def count(self, slots_T: torch.Tensor) -> None:
        """Count the rows that a step has just stored; a slot below zero is padding."""
        real_TLK = (slots_T >= 0).long()[:, None, None].expand(-1, *self._routes.rows_SLK.shape[1:])
        place_TLK = self._routes.ids(slots_T) * real_TLK + self._first_L1  # what is stored for padding need not be an expert
        self._counts_LE.view(-1).index_add_(0, place_TLK.flatten(), real_TLK.flatten())

    def settle(self) -> None:
        """Nothing is left to be counted."""

    def before_step(self) -> None:
        """Nothing is left to be counted."""

    def after_step(self, slots_T: Ints) -> None:
        """The step has counted its rows."""

    def counts_LE(self) -> Ints:
        """How many tokens used each expert so far, in each layer; waits for the steps that were launched."""
        counts_LE: Ints = self._counts_LE.cpu().numpy()
        return counts_LE
