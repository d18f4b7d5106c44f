"""Keys and values of past tokens, in pages: storage only; which page belongs to whom is bookkeeping of `cache`.

Layout, which compiled steps read directly: `k` and `v` are each one contiguous tensor
[layers, pages, kv_heads, page_size, head_dim], so that the positions of a head within a page lie together. A slot is
page * page_size + offset. e4m3 has scale 1 and saturates at 448: where q and k are normed, their range is safe.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KV_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "fp8_e4m3": torch.float8_e4m3fn}


@dataclass(eq=False)
class PagedKV:
    """`k` and `v`, each [layers, pages, kv_heads, page_size, head_dim], in bfloat16, float32 or float8_e4m3fn."""

    k: Tensor
    v: Tensor

    @staticmethod
    def allocate(
        *,
        num_layers: int,
        num_pages: int,
        num_kv_heads: int,
        page_size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> PagedKV:
        """Room for num_pages * page_size tokens, not cleared: memory that was never written costs nothing and is never read."""
        shape = (num_layers, num_pages, num_kv_heads, page_size, head_dim)
        return PagedKV(torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))

    @property
    def num_pages(self) -> int:
        return self.k.shape[1]

    @property
    def page_size(self) -> int:
        return self.k.shape[3]

    @property
    def num_slots(self) -> int:
        return self.k.shape[1] * self.k.shape[3]

    def resize(self, num_pages: int) -> None:
        """Other tensors, of so many pages, in place of these. What they held is lost; who holds them keeps their memory."""
        num_layers, _, *page = self.k.shape
        self.k, self.v = self.k.new_empty(num_layers, 0, *page), self.v.new_empty(num_layers, 0, *page)
        if num_pages:
            self.k, self.v = self.k.new_empty(num_layers, num_pages, *page), self.v.new_empty(num_layers, num_pages, *page)
