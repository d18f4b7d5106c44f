"""Where the ranks of an engine run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pointsman.engine.workers import Link

LOOPBACK = "127.0.0.1"


def _nothing() -> None:
    pass


@dataclass(frozen=True, eq=False, kw_only=True)
class Places:
    """What an executor's backend has started.

    Attributes:
        links: to the ranks past the first.
        devices: of every rank, as it calls it.
        address: of rank 0, where all reach it.
        release: gives back what ranks ran in, once they have ended.
    """

    links: Sequence[Link]
    devices: Sequence[str]
    address: str
    release: Callable[[], None] = _nothing
