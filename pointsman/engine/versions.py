"""Which weights computed what stands in each slot of the cache.

Versions are numbered in the order in which they came into force, and a slot has the number of those that fed it last: four bytes
beside its keys, values and routing row, written once a step. So a prefix that was computed under other weights, and a request that
went on under new ones, can say so for each row.

Shape suffixes: S slots, T rows of a step.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt

from pointsman.request import FIRST_VERSION

Range = tuple[int, int, str]
"""First, after the last, version."""
Run = tuple[int, int, int]
"""The same with the number of a version."""


class SlotVersions:
    """The versions that have been in force, and that of each slot."""

    def __init__(self, num_slots: int, version: str = FIRST_VERSION) -> None:
        self._number_S = np.zeros(num_slots, np.int32)
        self._versions = [version]

    @property
    def current(self) -> str:
        """The version in force."""
        return self._versions[-1]

    def enter(self, version: str) -> None:
        """From now on slots are fed by these weights, even if they are called as others were."""
        self._versions.append(version)

    def record(self, slots_T: npt.NDArray[np.integer[Any]]) -> None:
        """These slots were fed by the weights in force."""
        self._number_S[slots_T] = self.number

    @property
    def number(self) -> int:
        """Of the version in force."""
        return len(self._versions) - 1

    def runs(self, slots: npt.NDArray[np.integer[Any]]) -> list[Run]:
        """Runs of these slots, in their order, with one number."""
        if not len(slots):
            return []
        numbers = self._number_S[slots]
        edges = [0, *(np.flatnonzero(numbers[1:] != numbers[:-1]) + 1).tolist(), len(numbers)]
        return [(first, last, int(numbers[first])) for first, last in itertools.pairwise(edges)]

    def named(self, runs: list[Run], start: int) -> list[Range]:
        """The same by their versions, counted from start; neighbours that are called alike are one."""
        joined: list[Range] = []
        for first, last, number in runs:
            version = self._versions[number]
            before = joined.pop() if joined and joined[-1][1:] == (first - start, version) else (first - start,)
            joined.append((before[0], last - start, version))
        return joined


def clip(runs: list[Run], start: int, end: int) -> list[Run]:
    """What of these runs lies between."""
    clipped = [(max(first, start), min(last, end), number) for first, last, number in runs]
    return [run for run in clipped if run[0] < run[1]]
