"""Copies between host and device that nobody waits for.

What a step needs goes to the device in one copy: the arrays are laid one behind the other in pinned memory, sent, and seen there as
tensors again. What comes back is marked by an event, and only who reads it waits. Pinned buffers are used in turn, since a copy may
still run when the next step is written. On a CPU "device" the same code copies at once.

Where an array lies follows from the types and shapes before it alone, so for arrays of the same sizes a captured graph finds
its inputs where they were.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

ALIGNMENT = 16
NUM_BUFFERS = 2

Array = npt.NDArray[Any]


class Event(Protocol):
    """A point in the work of a device."""

    def synchronize(self) -> None:
        """Wait until the device has come there."""


class _Past:
    def synchronize(self) -> None:
        pass


def mark(device: torch.device) -> Event:
    """An event behind all that was asked of the device so far."""
    if device.type != "cuda":
        return _Past()
    event: Event = torch.cuda.current_stream(device).record_event()
    return event


def lay_out(arrays: Sequence[Array]) -> tuple[list[int], int]:
    """Where each array begins, in bytes, and where the last one ends; each is aligned."""
    offsets, end = [], 0
    for array in arrays:
        offsets.append(math.ceil(end / ALIGNMENT) * ALIGNMENT)
        end = offsets[-1] + array.nbytes
    return offsets, end


class Upload:
    """Arrays on their way to a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers = [self._host(0) for _ in range(NUM_BUFFERS)]
        self._sent: list[Event] = [_Past() for _ in range(NUM_BUFFERS)]
        self._turn = 0

    def __call__(self, arrays: Sequence[Array], into: Tensor | None = None) -> list[Tensor]:
        """Send arrays in one copy; the answer is what they are on the device.

        Args:
            into: uint8, device memory that keeps its place, of which what lies behind the arrays stays as it is; None takes new memory.
        """
        offsets, size = lay_out(arrays)
        buffer = self._room(size)
        host = buffer.numpy()
        for array, offset in zip(arrays, offsets, strict=True):
            host[offset : offset + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        target = torch.empty(size, dtype=torch.uint8, device=self._device) if into is None else into[:size]
        target.copy_(buffer[:size], non_blocking=True)
        self._sent[self._turn] = mark(self._device)
        return [_view(target, array, offset) for array, offset in zip(arrays, offsets, strict=True)]

    def _room(self, size: int) -> Tensor:
        """The next buffer in turn, once its last copy is through."""
        self._turn = (self._turn + 1) % NUM_BUFFERS
        self._sent[self._turn].synchronize()
        if len(self._buffers[self._turn]) < size:
            self._buffers[self._turn] = self._host(2 * size)
        return self._buffers[self._turn]

    def _host(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=self._device.type == "cuda")


def _view(memory: Tensor, array: Array, offset: int) -> Tensor:
    dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
    return memory[offset : offset + array.nbytes].view(dtype).view(array.shape)


class Download:
    """A tensor on its way to the host."""

    def __init__(self, tensor: Tensor) -> None:
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
        self._host.copy_(tensor, non_blocking=True)
        self._there = mark(tensor.device)

    def array(self) -> Array:
        """What has come; waits for it."""
        self._there.synchronize()
        array: Array = self._host.numpy()
        return array
