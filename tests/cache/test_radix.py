"""The prefix tree against a dictionary of prefixes, searched by force.

The model keeps every cached prefix (salt, tokens) with its page and the time of its last use, a use being one of any prefix that
continues it. Readers come and go in both ways that the scheduler has: those that leave a page at every stage of the prompt
(`extend`) and those that hand in everything at the end (`insert`).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from pointsman.cache.pages import PagePool
from pointsman.cache.radix import RadixCache

Prefix = tuple[str, tuple[int, ...]]


@dataclass
class Reader:
    """A sequence that holds pages; `num_own` of the first are the tree's."""

    salt: str
    tokens: list[int]
    pages: list[int]
    num_own: int


@dataclass
class Model:
    """Cached prefixes, by force."""

    page_size: int
    pages: dict[Prefix, int] = field(default_factory=dict)
    last_use: dict[Prefix, int] = field(default_factory=dict)
    now: int = 0

    def prefixes(self, salt: str, tokens: list[int]) -> list[Prefix]:
        return [(salt, tuple(tokens[:end])) for end in range(self.page_size, len(tokens) + 1, self.page_size)]

    def use(self, prefixes: list[Prefix]) -> None:
        self.now += 1
        for prefix in prefixes:
            self.last_use[prefix] = self.now

    def match(self, salt: str, tokens: list[int]) -> list[int]:
        hit = list(itertools.takewhile(self.pages.__contains__, self.prefixes(salt, tokens)))
        self.use(hit)
        return [self.pages[prefix] for prefix in hit]

    def insert(self, salt: str, tokens: list[int], pages: list[int]) -> None:
        prefixes = self.prefixes(salt, tokens)[: len(pages)]
        for prefix, page in zip(prefixes, pages, strict=True):
            self.pages.setdefault(prefix, page)
        self.use(prefixes)

    def extend(self, salt: str, tokens: list[int], pages: list[int], start: int) -> int:
        prefixes = self.prefixes(salt, tokens)[: len(pages)]
        for index in range(start, len(pages)):
            if self.pages.get(prefixes[index], pages[index]) != pages[index]:
                return index
            self.pages[prefixes[index]] = pages[index]
            self.use(prefixes[: index + 1])
        return len(pages)

    def evict(self, held: set[int]) -> int | None:
        """The page that must go first, or None."""
        parents = {(salt, tokens[: -self.page_size]) for salt, tokens in self.pages}
        leaves = [prefix for prefix, page in self.pages.items() if prefix not in parents and page not in held]
        if not leaves:
            return None
        oldest = min(leaves, key=lambda prefix: self.last_use[prefix])
        return self.pages.pop(oldest)

    def num_evictable(self, held: set[int]) -> int:
        return sum(page not in held for page in self.pages.values())


class Scene:
    """The tree, the model and the readers, all doing the same."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.pool = PagePool(num_pages)
        self.tree = RadixCache(self.pool, page_size)
        self.model = Model(page_size)
        self.readers: list[Reader] = []

    @property
    def held(self) -> set[int]:
        return {page for reader in self.readers for page in reader.pages}

    def arrive(self, salt: str, tokens: list[int]) -> None:
        hit = self.tree.match(tokens, salt)
        assert hit == self.model.match(salt, tokens)
        self.pool.share(hit)
        self.readers.append(Reader(salt, tokens, hit, len(hit)))
        rest = self.pool.allocate(len(tokens) // self.model.page_size - len(hit))
        if rest is None:
            self.pool.release(self.readers.pop().pages)
        else:
            self.readers[-1].pages = hit + rest

    def extend(self, reader: Reader, num_pages: int) -> None:
        pages = reader.pages[: max(num_pages, reader.num_own)]
        start = reader.num_own
        reader.num_own = self.tree.extend(reader.tokens, pages, reader.salt, start)
        assert reader.num_own == self.model.extend(reader.salt, reader.tokens, pages, start)

    def leave(self, reader: Reader, num_pages: int, *, from_start: bool) -> None:
        pages = reader.pages[: max(num_pages, reader.num_own)]
        self.tree.insert(reader.tokens, pages, reader.salt, 0 if from_start else reader.num_own)
        self.model.insert(reader.salt, reader.tokens, pages)
        self.readers.remove(reader)
        self.pool.release(reader.pages)

    def evict(self, num_pages: int) -> None:
        gone = [page for _ in range(num_pages) if (page := self.model.evict(self.held)) is not None]
        free = self.pool.num_free
        assert self.tree.evict(num_pages) == len(gone)
        assert self.pool.num_free == free + len(gone)
        assert all(self.pool.count(page) == 0 for page in gone)

    def reset(self) -> None:
        self.tree.reset()
        self.model.pages.clear()
        for reader in self.readers:
            reader.num_own = 0

    def check(self) -> None:
        assert self.tree.num_cached_pages == len(self.model.pages)
        assert self.tree.num_evictable == self.model.num_evictable(self.held)
        counts = [0] * self.pool.num_pages
        for page in (*self.model.pages.values(), *(page for reader in self.readers for page in reader.pages)):
            counts[page] += 1
        assert counts == [self.pool.count(page) for page in range(self.pool.num_pages)]


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_tree_does_as_the_dictionary(data: st.DataObject) -> None:
    page_size = data.draw(st.integers(1, 3))
    scene = Scene(data.draw(st.integers(1, 24)), page_size)
    for _ in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["arrive", "arrive", "extend", "leave", "leave", "evict", "reset"]))
        if action == "arrive":
            scene.arrive(data.draw(st.sampled_from(["", "a"])), data.draw(st.lists(st.integers(0, 1), max_size=6 * page_size)))
        elif action == "evict":
            scene.evict(data.draw(st.integers(0, 5)))
        elif action == "reset" and data.draw(st.integers(0, 3)) == 0:
            scene.reset()
        elif scene.readers:
            reader = data.draw(st.sampled_from(scene.readers))
            num_pages = data.draw(st.integers(0, len(reader.pages)))
            if action == "extend":
                scene.extend(reader, num_pages)
            else:
                scene.leave(reader, num_pages, from_start=data.draw(st.booleans()))
        scene.check()
    for reader in list(scene.readers):
        scene.leave(reader, len(reader.pages), from_start=True)
    scene.check()
    scene.evict(scene.pool.num_pages)
    assert scene.pool.num_free == scene.pool.num_pages


def cache(tree: RadixCache, pool: PagePool, tokens: list[int], salt: str = "") -> list[int]:
    pages = pool.allocate(len(tokens) // 2)
    assert pages is not None
    tree.insert(tokens, pages, salt)
    pool.release(pages)
    return pages


def test_least_recently_used_prefix_goes_first() -> None:
    pool = PagePool(8)
    tree = RadixCache(pool, 2)
    old = cache(tree, pool, [1, 1, 2, 2])
    new = cache(tree, pool, [3, 3, 4, 4])
    assert tree.match([1, 1, 2, 2, 9], "") == old
    assert tree.evict(1) == 1
    assert pool.count(new[1]) == 0 and pool.count(new[0]) == 1
    assert tree.evict(2) == 2
    assert tree.match([3, 3], "") == [] and tree.match([1, 1, 2, 2], "") == old[:1]


def test_a_page_was_used_when_its_children_were() -> None:
    """The other page is held while the leaf of the stem goes, so that it competes with the rest of the stem."""
    pool = PagePool(8)
    tree = RadixCache(pool, 2)
    stem = cache(tree, pool, [1, 1, 2, 2])
    other = cache(tree, pool, [3, 3])
    pool.share(other)
    assert tree.match([1, 1, 2, 2], "") == stem
    assert tree.evict(1) == 1 and pool.count(stem[1]) == 0
    pool.release(other)
    assert tree.evict(1) == 1 and pool.count(other[0]) == 0 and pool.count(stem[0]) == 1


def test_what_is_computed_again_was_used() -> None:
    pool = PagePool(8)
    tree = RadixCache(pool, 2)
    first, second = cache(tree, pool, [1, 1]), cache(tree, pool, [2, 2])
    again = cache(tree, pool, [1, 1])
    assert pool.count(again[0]) == 0, "the tree keeps its own page"
    assert tree.evict(1) == 1 and pool.count(second[0]) == 0 and pool.count(first[0]) == 1


def test_pages_in_use_stay() -> None:
    pool = PagePool(4)
    tree = RadixCache(pool, 2)
    pages = cache(tree, pool, [1, 1, 2, 2])
    pool.share(pages)
    assert tree.num_evictable == 0 and tree.evict(4) == 0
    pool.release(pages)
    assert tree.num_evictable == 2 and tree.evict(4) == 2


def test_salts_do_not_meet_and_parts_of_pages_do_not_match() -> None:
    pool = PagePool(4)
    tree = RadixCache(pool, 2)
    pages = cache(tree, pool, [1, 1, 2, 2], "a")
    assert tree.match([1, 1, 2, 2], "") == []
    assert tree.match([1, 1, 2], "a") == pages[:1]


def test_a_hundred_thousand_pages_are_evicted_one_by_one() -> None:
    """Not timed: if one eviction searched the leaves, this would take hours."""
    num_pages = 100_000
    pool = PagePool(num_pages)
    tree = RadixCache(pool, 1)
    pages = pool.allocate(num_pages)
    assert pages is not None
    for index in range(0, num_pages, 10):
        tree.insert([index, *range(9)], pages[index : index + 10], "")
    pool.release(pages)
    assert tree.num_evictable == num_pages
    for count in range(num_pages):
        assert tree.evict(1) == 1 and pool.num_free == count + 1
