"""The pool against counts kept in a dictionary."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pointsman.cache.pages import PagePool


class Log:
    """A watcher that writes down what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []

    def shared(self, page: int) -> None:
        self.events.append(("shared", page))

    def left_alone(self, page: int) -> None:
        self.events.append(("left alone", page))


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 8), st.lists(st.tuples(st.sampled_from(["allocate", "share", "release"]), st.integers(0, 9)), max_size=60))
def test_pool_counts_as_a_dictionary_does(num_pages: int, actions: list[tuple[str, int]]) -> None:
    pool, log = PagePool(num_pages), Log()
    pool.watch(log)
    counts: dict[int, int] = {}
    taken: list[int] = []
    for action, number in actions:
        expected: list[tuple[str, int]] = []
        if action == "allocate":
            pages = pool.allocate(number)
            assert (pages is None) == (number > num_pages - len(counts))
            assert pages is None or (len(set(pages)) == number and not set(pages) & set(counts))
            counts |= dict.fromkeys(pages or (), 1)
            taken += pages or ()
        elif counts:
            page = sorted(counts)[number % len(counts)]
            if action == "share":
                expected = [("shared", page)] if counts[page] == 1 else []
                pool.share([page])
                counts[page] += 1
            else:
                expected = [("left alone", page)] if counts[page] == 2 else []
                pool.release([page])
                counts[page] -= 1
                counts = {page: count for page, count in counts.items() if count}
        assert log.events == expected
        log.events.clear()
        assert pool.num_free == num_pages - len(counts)
        assert [pool.count(page) for page in range(num_pages)] == [counts.get(page, 0) for page in range(num_pages)]
        assert pool.dated(range(num_pages)) == [(page, taken.count(page)) for page in range(num_pages)]


def test_free_pages_are_nobodys() -> None:
    pool = PagePool(2)
    for use in (pool.share, pool.release):
        with pytest.raises(AssertionError, match="page 1 is free"):
            use([1])


def test_a_pool_has_pages() -> None:
    with pytest.raises(ValueError, match="num_pages is 0"):
        PagePool(0)
