"""The memory of the cache, which can be freed and had again: keys and values, and the routing rows beside them.

What is freed are the tensors. Whoever took their addresses (a compiled step, a graph) has to go first and be made anew; what only holds
`PagedKV` or `RouteStore` finds them empty, and later as large as before.
"""

from __future__ import annotations

from pointsman.kernels.apart import apart
from pointsman.layers.paged_kv import PagedKV
from pointsman.moe.capture import RouteStore


class CacheStorage:
    """That of one engine."""

    def __init__(self, kv: PagedKV, routes: RouteStore) -> None:
        self._kv, self._routes = kv, routes
        self._num_pages = kv.num_pages

    @property
    def released(self) -> bool:
        return self._kv.num_pages == 0

    def release(self) -> None:
        """Free it. Nothing of what it held is had again."""
        self._resize(0)

    def restore(self) -> None:
        """As large as it was, and not cleared; all or nothing. Raises what the allocator raises."""
        try:
            self._resize(self._num_pages)
        except BaseException:
            self._resize(0)
            raise

    def _resize(self, num_pages: int) -> None:
        with apart(self._kv.k.device):
            self._kv.resize(num_pages)
            self._routes.resize(self._kv.num_slots)
