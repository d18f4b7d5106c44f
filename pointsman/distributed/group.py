"""A process group at an explicit address, over which a trainer broadcasts weights: rank 0 sends, all others receive.

Tensors cross as uint8. A peer that has died ends the operation with an error, and after one the group is of no more use, because nobody
can tell which broadcast comes next.

With NCCL the host waits, not a stream: steps share the stream of whoever receives, and would stand still with it. And what fails there
is an error here and not, as torch would have it, the end of the process.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pointsman.distributed.rendezvous import BACKENDS, first_line, meet, reason_against

POLL_SECONDS = 0.001
WATCHDOG = timedelta(seconds=60)
MOST_WAITING = 32  # broadcasts; a device's queue is finite, and who launches into one that is full waits without a limit


class Group:
    """One member of a group; `join` meets the others.

    Args:
        rank: 0 is the trainer, who also holds the store.
        timeout: seconds that joining, and the broadcasts of one call, may take.
        device: with NCCL, where this member's tensors are; None is the CUDA device that is current now.

    Raises:
        ValueError: a value is out of range, or this installation does not have the backend.
    """

    def __init__(
        self,
        *,
        master_address: str,
        master_port: int,
        rank: int,
        world_size: int,
        name: str,
        backend: str = "gloo",
        timeout: float = 60.0,
        device: torch.device | None = None,
    ) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"backend is {backend!r:.80}; it must be one of {', '.join(map(repr, BACKENDS))}")
        if reason := reason_against(backend):
            raise ValueError(f"backend is {backend!r}, {reason}")
        if not 2 <= world_size <= 1024 or not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of world_size {world_size}; the size goes from 2 to 1024, and ranks are below it")
        self.name, self.address = name, (master_address, master_port)
        self.rank, self.world_size, self.backend = rank, world_size, backend
        self.timeout = timedelta(seconds=timeout)
        self._device = torch.device("cpu")
        if backend == "nccl":
            self._device = torch.device("cuda", torch.cuda.current_device()) if device is None else device
        self._group: Any = None
        self._store: Any = None

    def join(self, listener: socket.socket | None = None) -> None:
        """Meet the others. Raises ValueError where they do not all come in time.

        Args:
            listener: rank 0's socket that listens at the address already (`listen`), so that nobody else can; it is taken over.
        """
        try:
            self._store, self._group = meet(
                self.address,
                rank=self.rank,
                size=self.world_size,
                name=self.name,
                backend=self.backend,
                timeout=self.timeout,
                watched=self.timeout + WATCHDOG,  # `_wait` keeps the limit
                listener=listener,
            )
            if self.backend == "nccl":  # which connects with the first broadcast
                self._broadcast([torch.zeros(1, dtype=torch.uint8, device=self._device)])
        except (RuntimeError, OSError) as error:
            where = "{}:{}".format(*self.address)
            raise ValueError(f"the group {self.name!r} at {where} did not come together: {first_line(error)}") from error

    def send(self, tensors: Sequence[Tensor]) -> None:
        """Broadcast their bytes, one after the other, as rank 0. Raises ValueError where that fails."""
        assert self.rank == 0
        if wrong := [tensor.device for tensor in tensors if self.backend == "nccl" and tensor.device != self._device]:
            raise ValueError(f"a tensor is on {wrong[0]}; this member of the group {self.name!r} broadcasts from {self._device}")
        self._broadcast([tensor.detach().contiguous() for tensor in tensors])

    def receive(self, tensors: Sequence[Tensor]) -> None:
        """Fill them with what rank 0 broadcasts; all members must know their sizes. Raises ValueError where that fails."""
        assert self.rank != 0 and all(tensor.is_contiguous() for tensor in tensors)
        self._broadcast(tensors)

    def _broadcast(self, tensors: Sequence[Tensor]) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.timeout = self.timeout + (WATCHDOG if self.backend == "nccl" else timedelta())
        flat = [tensor.view(-1).view(torch.uint8) for tensor in tensors if tensor.numel()]
        try:
            if self.backend == "nccl":
                limit = time.monotonic() + self.timeout.total_seconds()
                for first in range(0, len(flat), MOST_WAITING):
                    self._wait([self._group.broadcast([bytes_B], options) for bytes_B in flat[first : first + MOST_WAITING]], limit)
            else:
                for bytes_B in flat:
                    self._group.broadcast([bytes_B], options).wait(self.timeout)
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"a broadcast in the group {self.name!r} failed, and the group is of no more use: {first_line(error)}"
            ) from error

    def _wait(self, works: Sequence[Any], limit: float) -> None:
        """Until these are through on the device, while its other streams go on. Raises RuntimeError where that takes too long.

        Args:
            limit: of `time.monotonic`.
        """
        aside = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(aside):
            for work in works:
                work.wait()
            through = aside.record_event()
        while not through.query():
            if time.monotonic() > limit:
                self._group.abort()  # what waits on the device ends with it
                raise RuntimeError(f"nothing came for {self.timeout.total_seconds():g} s")
            time.sleep(POLL_SECONDS)
