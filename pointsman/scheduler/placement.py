"""Which replica takes a request. Integers and lists only, and no clock.

A replica is an engine of its own, with a prefix cache of its own. Sent where its prefix is, a request need not compute that; sent where
little waits, it need not wait. Both are tokens, so they add up: the cost of a replica is what the request would have to compute there,
and what the prompts before it still have to, and `request_tokens` for each request that has not ended. The last term is what a running
request takes from the others, and what bounds how far affinity may outweigh balance: a prefix of N tokens is worth N / `request_tokens`
requests more than elsewhere. The lowest cost wins; of equal ones the fewest requests, then the lowest number.

What a replica's cache holds is not asked but guessed, from what was sent there: whole blocks of prompts, each known by a hash of itself
and of all before it, the least recently used forgotten where there are more than its cache can hold. A wrong guess costs time alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass


class _Replica:
    """What was sent to one, and what of it has not ended."""

    def __init__(self, most_blocks: int) -> None:
        self._most = most_blocks
        self._blocks: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self.num_requests = 0
        self.num_waiting_tokens = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def matched(self, keys: Sequence[int]) -> int:
        """How many of the first blocks it has."""
        for index, key in enumerate(keys):
            if key not in self._blocks:
                return index
        return len(keys)

    def use(self, keys: Sequence[int]) -> None:
        """It has these now. The first is used last, so that none outlives one before it."""
        for key in reversed(keys):
            self._blocks[key] = None
            self._blocks.move_to_end(key)
        while len(self._blocks) > self._most:
            self._blocks.popitem(last=False)

    def forget(self) -> None:
        self._blocks.clear()


@dataclass(eq=False, slots=True)
class Placed:
    """A request at its replica.

    Attributes:
        num_missing: tokens of its prompt that were not guessed to be cached there.
        waits: its prompt is not known to be computed yet.
    """

    replica: int
    num_missing: int
    _home: _Replica  # not the one that takes its number when it has left
    waits: bool = True

    def computed(self) -> None:
        """Its prompt is: the first token has come."""
        if self.waits:
            self.waits = False
            self._home.num_waiting_tokens -= self.num_missing

    def end(self) -> None:
        """It has ended, however that was. Call once."""
        self.computed()
        self._home.num_requests -= 1


class Placement:
    """Where requests are and may go.

    Args:
        block: tokens by which prefixes are compared; the page size of the replicas' caches.
        request_tokens: what a request that has not ended counts.
    """

    def __init__(self, *, block: int, request_tokens: int) -> None:
        assert block > 0 and request_tokens >= 0
        self._block = block
        self._request_tokens = request_tokens
        self._replicas: dict[int, _Replica] = {}

    @property
    def replicas(self) -> list[int]:
        """Those that take requests."""
        return sorted(self._replicas)

    @property
    def num_blocks(self) -> int:
        """Blocks that are remembered, of all replicas."""
        return sum(map(len, self._replicas.values()))

    def num_requests(self, replica: int) -> int:
        """That have not ended there; 0 for one that takes none."""
        found = self._replicas.get(replica)
        return 0 if found is None else found.num_requests

    def join(self, replica: int, cache_tokens: int) -> None:
        """It takes requests from now on, with an empty cache of so many tokens."""
        assert replica not in self._replicas, f"replica {replica} is there already"
        self._replicas[replica] = _Replica(max(cache_tokens // self._block, 1))

    def leave(self, replica: int) -> None:
        """It takes none any more, and what it held is forgotten; no error for one that is not there."""
        self._replicas.pop(replica, None)

    def forget(self) -> None:
        """All caches were flushed."""
        for replica in self._replicas.values():
            replica.forget()

    def place(self, tokens: Sequence[int], salt: object = "") -> Placed | None:
        """Send a request somewhere; None where nobody takes any.

        Args:
            tokens: its prompt.
            salt: prompts under different ones share nothing.
        """
        keys = self._keys(tokens, salt)
        best: tuple[int, int, int] | None = None
        num_missing = 0
        for number, replica in self._replicas.items():
            # of a prompt that is cached whole, the last token is computed all the same
            missing = max(len(tokens) - replica.matched(keys) * self._block, 1)
            cost = missing + replica.num_waiting_tokens + self._request_tokens * replica.num_requests
            if best is None or (cost, replica.num_requests, number) < best:
                best, num_missing = (cost, replica.num_requests, number), missing
        if best is None:
            return None
        chosen = self._replicas[best[2]]
        chosen.use(keys)
        chosen.num_requests += 1
        chosen.num_waiting_tokens += num_missing
        return Placed(best[2], num_missing, chosen)

    def _keys(self, tokens: Sequence[int], salt: object) -> list[int]:
        """A number for each whole block, that is another where anything before it is."""
        keys: list[int] = []
        key = hash(salt)
        for start in range(0, len(tokens) - self._block + 1, self._block):
            key = hash((key, *tokens[start : start + self._block]))
            keys.append(key)
        return keys
