"""The prefix cache: which pages hold the keys and values of which prompts.

A tree of whole pages. A node is a page, and the edge to it is the page's tokens, so that a path from the root spells a prefix;
each salt has a root of its own, and prompts under different salts never meet. There are no node objects: an edge is one
entry of a dictionary, (parent, tokens) to page, and what else is known of a node stands in lists by page number. That is one
lookup a page to match, and no objects for the garbage collector to follow when a hundred thousand pages are cached.

The tree holds each of its pages once, beside the sequences that read it. A leaf that it alone holds can be evicted, the least
recently used first. These leaves stand in a heap by the tick of their last use. A use only writes the tick, and only that of
the deepest page used: an entry whose tick is out of date goes back into the heap when it comes up, and a page that loses its
last child inherits the child's tick, for to use the child was to use it. So eviction is logarithmic and nothing is searched.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from pointsman.cache.pages import PagePool

Edge = tuple[int | str, tuple[int, ...]]
"""The parent, a page or the salt of a root, and the tokens of the page that the edge leads to."""


class RadixCache:
    """A tree over the pages of a pool, each of page_size tokens; a pool has at most one."""

    def __init__(self, pool: PagePool, page_size: int) -> None:
        assert page_size > 0
        self._pool = pool
        self._page_size = page_size
        self._edges: dict[Edge, int] = {}
        self._edge_to: list[Edge | None] = [None] * pool.num_pages  # None: not in the tree
        self._num_children = [0] * pool.num_pages
        self._ticks = [0] * pool.num_pages
        self._now = 0
        self._leaves: list[tuple[int, int]] = []  # heap of (tick, page)
        self._is_queued = bytearray(pool.num_pages)
        self._num_alone = 0
        pool.watch(self)

    @property
    def num_cached_pages(self) -> int:
        return len(self._edges)

    @property
    def num_evictable(self) -> int:
        """How many pages `evict` could free now.

        Exact as long as whoever holds a page of the tree holds those above it too. `match` and `extend` keep to that, and
        `insert` does once its caller has released the pages.
        """
        return self._num_alone

    def match(self, tokens: Sequence[int], salt: str) -> list[int]:
        """The pages of the longest cached prefix of the tokens, a use of them; the caller shares what it means to read."""
        size = self._page_size
        parent: int | str = salt
        pages: list[int] = []
        for start in range(0, len(tokens) - size + 1, size):
            page = self._edges.get((parent, tuple(tokens[start : start + size])))
            if page is None:
                break
            pages.append(page)
            parent = page
        if pages:
            self._touch(pages[-1])
        return pages

    def insert(self, tokens: Sequence[int], pages: Sequence[int], salt: str, start: int = 0) -> None:
        """Cache the pages of a sequence that is about to release them all.

        Where the tree has a page for the same prefix it keeps its own, and adopts the deeper ones below that.

        Args:
            tokens: at least as many as the pages hold.
            pages: held by the caller; the tree holds those that it adopts once more.
            start: this many of the first pages are known to be the tree's own.
        """
        parent: int | str = pages[start - 1] if start else salt
        assert isinstance(parent, str) or self._edge_to[parent] is not None
        for index in range(start, len(pages)):
            parent = self._follow(parent, tokens, pages, index)
        if isinstance(parent, int):
            self._touch(parent)

    def extend(self, tokens: Sequence[int], pages: Sequence[int], salt: str, start: int) -> int:
        """Cache the pages of a sequence that goes on using them, and return how many of the first are now the tree's own.

        Arguments as in `insert`. It stops where the tree has another page for the same prefix: a page adopted below one that
        the caller does not hold would keep that one from being evicted for as long as the caller runs.
        """
        parent: int | str = pages[start - 1] if start else salt
        assert isinstance(parent, str) or self._edge_to[parent] is not None
        for index in range(start, len(pages)):
            parent = self._follow(parent, tokens, pages, index)
            if parent != pages[index]:
                return index
        return len(pages)

    def _follow(self, parent: int | str, tokens: Sequence[int], pages: Sequence[int], index: int) -> int:
        """The page for the next tokens below the parent; where there is none, the given one is adopted."""
        size = self._page_size
        edge = (parent, tuple(tokens[index * size : (index + 1) * size]))
        found = self._edges.get(edge)
        if found is not None:
            return found
        page = pages[index]
        assert self._edge_to[page] is None and len(edge[1]) == size
        self._pool.share((page,))
        self._edges[edge] = page
        self._edge_to[page] = edge
        if isinstance(parent, int):
            self._num_children[parent] += 1
        self._touch(page)
        return page

    def evict(self, num_pages: int) -> int:
        """Free so many pages, or as many as can be, least recently used leaves first; returns how many."""
        num_freed = 0
        while num_freed < num_pages and self._leaves:
            tick, page = self._leaves[0]
            if tick != self._ticks[page]:
                heapq.heapreplace(self._leaves, (self._ticks[page], page))
                continue
            heapq.heappop(self._leaves)
            self._is_queued[page] = False
            if not self._num_children[page] and self._pool.count(page) == 1:
                self._remove(page)
                num_freed += 1
        return num_freed

    def _remove(self, page: int) -> None:
        edge = self._edge_to[page]
        assert edge is not None
        del self._edges[edge]
        self._edge_to[page] = None
        self._num_alone -= 1
        self._pool.release((page,))
        parent = edge[0]
        if isinstance(parent, int):
            self._num_children[parent] -= 1
            self._ticks[parent] = max(self._ticks[parent], self._ticks[page])
            self._queue(parent)

    def reset(self) -> None:
        """Forget every prefix. Pages that sequences still read stay theirs."""
        pages = list(self._edges.values())
        self._edges.clear()
        self._leaves.clear()
        self._num_alone = 0
        for page in pages:
            self._edge_to[page] = None
            self._num_children[page] = 0
            self._is_queued[page] = False
        self._pool.release(pages)

    def shared(self, page: int) -> None:
        """The pool's word that a page with one holder got a second."""
        if self._edge_to[page] is not None:
            self._num_alone -= 1

    def left_alone(self, page: int) -> None:
        """The pool's word that a page has one holder left: the tree, if it is in the tree."""
        if self._edge_to[page] is not None:
            self._num_alone += 1
            self._queue(page)

    def _queue(self, page: int) -> None:
        """Put the page among the leaves to evict if it is one, and not there already."""
        if not self._num_children[page] and not self._is_queued[page] and self._pool.count(page) == 1:
            self._is_queued[page] = True
            heapq.heappush(self._leaves, (self._ticks[page], page))

    def _touch(self, page: int) -> None:
        self._now += 1
        self._ticks[page] = self._now
