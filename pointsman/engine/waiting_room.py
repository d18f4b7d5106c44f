"""Where requests wait for their grammars, in front of the scheduler.

First come, first served among those whose grammars are ready. A request whose grammar is not does not hold up those behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

from pointsman.engine.grammars import Grammars
from pointsman.grammar import Grammar
from pointsman.request import Request


@dataclass(eq=False, slots=True)
class _Guest:
    """`held`: the grammar is held for it. It may not be yet, where there is no room for another grammar."""

    request: Request
    seeds: tuple[int, ...]
    held: bool = False


class WaitingRoom:
    """The requests that wait for their grammars."""

    def __init__(self, grammars: Grammars) -> None:
        self._grammars = grammars
        self._guests: dict[str, _Guest] = {}

    def __len__(self) -> int:
        """How many sequences they are."""
        return sum(len(guest.seeds) for guest in self._guests.values())

    def enter(self, request: Request, seeds: tuple[int, ...]) -> None:
        self._guests[request.rid] = _Guest(request, seeds)

    def leave(self, rid: str) -> Request | None:
        """A request that gives up; None if it is not here."""
        guest = self._guests.pop(rid, None)
        if guest is None:
            return None
        if guest.held:
            self._grammars.release(_grammar(guest))
        return guest.request

    def call(self, seconds: float) -> tuple[list[tuple[Request, tuple[int, ...]]], list[tuple[Request, str]]]:
        """Who can go in now, with its grammar held, and who never can, with the reason; wait so long for someone."""
        for guest in self._guests.values():
            guest.held = guest.held or self._grammars.hold(_grammar(guest))
        ready, refused = self._sorted()
        if len(ready) + len(refused) < len(self._guests):
            self._grammars.progress(0.0 if ready or refused else seconds)
            ready, refused = self._sorted()
        for guest in ready:
            del self._guests[guest.request.rid]
        for guest, _ in refused:
            self.leave(guest.request.rid)
        return [(guest.request, guest.seeds) for guest in ready], [(guest.request, reason) for guest, reason in refused]

    def _sorted(self) -> tuple[list[_Guest], list[tuple[_Guest, str]]]:
        ready: list[_Guest] = []
        refused: list[tuple[_Guest, str]] = []
        for guest in self._guests.values():
            try:
                if guest.held and self._grammars.ready(_grammar(guest)):
                    ready.append(guest)
            except ValueError as error:
                refused.append((guest, str(error)))
        return ready, refused


def _grammar(guest: _Guest) -> Grammar:
    grammar = guest.request.sampling.grammar
    assert grammar is not None
    return grammar
