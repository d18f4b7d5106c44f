"""Who waits: larger priority first, in order of arrival within.

The choices of a request beyond the first are not in the line yet while the first computes their prompt. They stand behind it,
and join the line, at the place that their arrival gives them, when it has finished the prompt or ended.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from operator import attrgetter

from pointsman.scheduler.sequence import Sequence

order = attrgetter("order")


class Queue:
    """The waiting sequences. `head` is the first in line, or None."""

    def __init__(self) -> None:
        self._line: list[Sequence] = []  # sorted by order
        self._followers: dict[int, list[Sequence]] = {}  # by number of the choice that they wait for

    def __len__(self) -> int:
        return len(self._line) + sum(map(len, self._followers.values()))

    def __bool__(self) -> bool:
        return bool(self._line or self._followers)

    @property
    def head(self) -> Sequence | None:
        return self._line[0] if self._line else None

    def join(self, sequence: Sequence) -> None:
        """Stand in line; a preempted sequence is ahead of all that arrived after it."""
        insort(self._line, sequence, key=order)

    def follow(self, followers: list[Sequence], first: Sequence) -> None:
        """Wait for the first choice of the same request."""
        self._followers[first.number] = list(followers)

    def release(self, first: Sequence) -> None:
        """Those who wait for this sequence, if any, join the line."""
        for sequence in self._followers.pop(first.number, ()):
            self.join(sequence)

    def remove(self, sequence: Sequence) -> None:
        followers = self._followers.get(sequence.number - sequence.index, [])
        if sequence in followers:
            followers.remove(sequence)
            return
        position = bisect_left(self._line, sequence.order, key=order)
        assert self._line[position] is sequence
        del self._line[position]
