"""The pages of the cache: which are free, and how many hold each of the others.

A page is a number, and from one time that it is taken to the next it has one generation: the same number of another generation was
written anew. Several sequences may read one page, and the prefix tree keeps pages that no sequence reads any more, so a
page has a count of its holders and is free when the last one releases it. Whoever must know when a page passes between one
holder and several (the tree: a page that it alone holds can be evicted) is told at that moment. The tree would otherwise
have to search for such pages, and with a hundred thousand cached pages it cannot afford to.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol


class Watcher(Protocol):
    """Is told when a page with one holder gets a second, and when only one is left."""

    def shared(self, page: int) -> None: ...

    def left_alone(self, page: int) -> None: ...


class PagePool:
    """Pages 0 to num_pages - 1, free at first.

    Raises:
        ValueError: the pool would have no page.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages is {num_pages}; the cache needs at least one page")
        self.num_pages = num_pages
        self._counts = [0] * num_pages
        self._generations = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._watcher: Watcher | None = None

    @property
    def num_free(self) -> int:
        return len(self._free)

    def count(self, page: int) -> int:
        """How many hold the page."""
        return self._counts[page]

    def dated(self, pages: Iterable[int]) -> list[tuple[int, int]]:
        """The pages, each with its generation: how often it has been taken."""
        return [(page, self._generations[page]) for page in pages]

    def watch(self, watcher: Watcher) -> None:
        assert self._watcher is None, "the pool has a watcher already"
        self._watcher = watcher

    def allocate(self, num_pages: int) -> list[int] | None:
        """Take free pages, each then held once; None, and nothing taken, where there are fewer."""
        assert num_pages >= 0
        rest = len(self._free) - num_pages
        if rest < 0:
            return None
        pages = self._free[rest:]
        del self._free[rest:]
        pages.reverse()
        for page in pages:
            assert self._counts[page] == 0
            self._counts[page] = 1
            self._generations[page] += 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Hold each page, which someone holds already, once more."""
        counts, watcher = self._counts, self._watcher
        for page in pages:
            count = counts[page]
            assert count > 0, f"page {page} is free and cannot be shared"
            counts[page] = count + 1
            if count == 1 and watcher is not None:
                watcher.shared(page)

    def release(self, pages: Iterable[int]) -> None:
        """Give up one hold on each page; those that nobody holds are free again."""
        counts, watcher = self._counts, self._watcher
        for page in pages:
            count = counts[page] - 1
            assert count >= 0, f"page {page} is free and cannot be released"
            counts[page] = count
            if count == 0:
                self._free.append(page)
            elif count == 1 and watcher is not None:
                watcher.left_alone(page)
