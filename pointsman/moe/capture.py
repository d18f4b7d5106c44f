"""Which experts each token used, stored by KV slot beside its keys and values.

A row lives, is shared and dies with its slot: a prefix hit brings its routing, and nothing has to follow requests around. One
byte an expert id up to 256 experts, two beyond; there is no room for a sentinel, so who reads must know which slots were fed.

Shape suffixes: S slots, L layers, K experts per token, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class RouteStore:
    """Routing rows `rows_SLK` (uint8, or uint16 for more than 256 experts), written layer by layer as a step runs.

    Of a token that was forced to use some experts, `alike_S` (int16) counts the layers whose free choice would have been the same set.
    """

    def __init__(self, num_slots: int, num_layers: int, top_k: int, num_experts: int, device: torch.device | str = "cpu") -> None:
        dtype = torch.uint8 if num_experts <= 256 else torch.uint16
        self.rows_SLK = torch.empty(num_slots, num_layers, top_k, dtype=dtype, device=device)
        self.alike_S = torch.empty(num_slots, dtype=torch.int16, device=device)

    def record(self, layer: int, slots_T: Tensor, ids_TK: Tensor) -> None:
        """Store the experts that the tokens in these slots used in this layer."""
        self._writable()[slots_T, layer] = ids_TK.to(torch.int16 if self.rows_SLK.dtype == torch.uint16 else torch.uint8)

    def compare(self, layer: int, slots_T: Tensor, alike_T: Tensor) -> None:
        """Count, for the forced tokens in these slots, whether their free choice in this layer would have been alike; layer 0 begins."""
        alike_T = alike_T.to(torch.int16)
        self.alike_S[slots_T] = alike_T if layer == 0 else self.alike_S[slots_T] + alike_T

    def gather(self, slots: Sequence[int] | Tensor) -> Tensor:
        """The rows of these slots, in their order: [len(slots), L, K]."""
        index = torch.as_tensor(slots, dtype=torch.int64)
        rows = self._writable()
        if rows.device.type == "cpu":  # numpy stays in this thread; torch would wait for others, on cores that a step is using
            return torch.from_numpy(rows.numpy()[index.numpy()]).view(self.rows_SLK.dtype)
        return rows[index].view(self.rows_SLK.dtype)

    def _writable(self) -> Tensor:
        # torch indexes int16 everywhere and uint16 only in places; the bits are the same
        return self.rows_SLK.view(torch.int16) if self.rows_SLK.dtype == torch.uint16 else self.rows_SLK
