"""Which experts each token used, stored by KV slot beside its keys and values.

A row lives, is shared and dies with its slot: a prefix hit brings its routing, and nothing has to follow requests around. One
byte an expert id up to 256 experts, two beyond; there is no room for a sentinel, so who reads must know which slots were fed.

A step on a device pads its rows; those have the slot -1. The last slot of a store is that of padding where there is any, as indices
below zero count from the end: nobody reads it.

From a device rows are read on a stream beside the step that runs. Its work goes first where a processor has room, and whoever reads for
several sequences begins with all of them before it waits for one.

Shape suffixes: S slots, L layers, K experts per token, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Fetch:
    """Rows on their way to the host."""

    def __init__(self, host: Tensor, through: torch.cuda.Event | None = None) -> None:
        self._host, self._through = host, through

    def result(self) -> Tensor:
        """The rows, once they are there."""
        if self._through is None:
            return self._host
        self._through.synchronize()
        return torch.from_numpy(self._host.numpy().copy())  # who keeps an answer shall not keep pinned memory


class RouteStore:
    """Routing rows `rows_SLK` (uint8, or uint16 for more than 256 experts), written layer by layer as a step runs.

    Of a token that was forced to use some experts, `alike_S` (int16) counts the layers whose free choice would have been the same set.
    """

    def __init__(self, num_slots: int, num_layers: int, top_k: int, num_experts: int, device: torch.device | str = "cpu") -> None:
        dtype = torch.uint8 if num_experts <= 256 else torch.uint16
        self.rows_SLK = torch.empty(num_slots, num_layers, top_k, dtype=dtype, device=device)
        self.alike_S = torch.empty(num_slots, dtype=torch.int16, device=device)
        on_device = self.rows_SLK.device.type == "cuda"
        self._side = torch.cuda.Stream(self.rows_SLK.device, priority=-1) if on_device else None  # type: ignore[no-untyped-call]

    @property
    def num_slots(self) -> int:
        return len(self.rows_SLK)

    def resize(self, num_slots: int) -> None:
        """Other tensors, for so many slots, in place of these. What they held is lost; who holds them keeps their memory."""
        self.rows_SLK = self.rows_SLK.new_empty(num_slots, *self.rows_SLK.shape[1:])
        self.alike_S = self.alike_S.new_empty(num_slots)

    def record(self, layer: int, slots_T: Tensor, ids_TK: Tensor) -> None:
        """Store the experts that the tokens in these slots used in this layer."""
        self._writable()[slots_T, layer] = ids_TK.to(torch.int16 if self.rows_SLK.dtype == torch.uint16 else torch.uint8)

    def compare(self, layer: int, slots_T: Tensor, alike_T: Tensor) -> None:
        """Count whether the free choice of the tokens in these slots was alike in this layer; layer 0 begins. It means nothing where
        they were not forced, and costs no wait for the device to learn which were."""
        alike_T = alike_T.to(torch.int16)
        self.alike_S[slots_T] = alike_T if layer == 0 else self.alike_S[slots_T] + alike_T

    def fetch(self, slots: Sequence[int] | Tensor) -> Fetch:
        """The rows of these slots, in their order: [len(slots), L, K]. The steps that fed them are through, and none that feeds them anew
        may begin before they have come."""
        return self._fetch(self.rows_SLK, torch.as_tensor(slots, dtype=torch.int64))

    def gather(self, slots: Sequence[int] | Tensor) -> Tensor:
        """The same, waited for."""
        return self.fetch(slots).result()

    def alike(self, slots: Tensor) -> Tensor:
        """What `compare` counted of these slots, int16, on the host."""
        return self._fetch(self.alike_S, slots).result()

    def _fetch(self, stored: Tensor, index: Tensor) -> Fetch:
        if self._side is None:  # numpy stays in this thread; torch would wait for others, on cores that a step is using
            return Fetch(torch.from_numpy(stored.numpy()[index.numpy()]))
        with torch.cuda.stream(self._side):  # beside the step that runs, which writes other slots
            bits = stored.view(torch.int16) if stored.dtype == torch.uint16 else stored
            found = bits[index.pin_memory().to(stored.device, non_blocking=True)]
            host = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
            host.copy_(found, non_blocking=True)
            return Fetch(host.view(stored.dtype), self._side.record_event())

    def ids(self, slots_T: Tensor) -> Tensor:
        """The experts of these slots as int64 [T, L, K], where they are stored."""
        return self._writable()[slots_T].long() & (0xFFFF if self.rows_SLK.dtype == torch.uint16 else 0xFF)

    def _writable(self) -> Tensor:
        # torch indexes int16 everywhere and uint16 only in places; the bits are the same
        return self.rows_SLK.view(torch.int16) if self.rows_SLK.dtype == torch.uint16 else self.rows_SLK
