"""Stop strings in a stream of text.

The text is read one character at a time, by one matcher of Knuth, Morris and Pratt per stop string, so the answer cannot depend on how
the stream was cut into pieces, and the work per character does not depend on what was read before. A matcher's state is the length of
the longest end of the text that begins its stop string: what has to be held back is the longest of these.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Ends a stream at the stop string that is complete first; of several complete at the same character, at the longest.

    Attributes:
        matched: the stop string that ended the stream, or None.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        assert all(stops), "an empty stop string"
        # Longest first, so that the first match at a character is the longest.
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._failures = [_failures(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """New text in; out: the text that is now certain to be before any stop string, and the stop string if one is complete.

        After a match nothing more may be pushed.
        """
        assert self.matched is None, "text after a stop string"
        if not self._stops:
            return text, None
        whole = self._held + text
        for end, character in enumerate(text, len(self._held) + 1):
            stop = self._advance(character)
            if stop is not None:
                self.matched, self._held = stop, ""
                return whole[: end if self._include else end - len(stop)], stop
        certain = len(whole) - max(self._states)
        self._held = whole[certain:]
        return whole[:certain], None

    def flush(self) -> str:
        """The text held back, when no more will come."""
        held, self._held = self._held, ""
        self._states = [0] * len(self._stops)
        return held

    def _advance(self, character: str) -> str | None:
        found = None
        for index, stop in enumerate(self._stops):
            state, failures = self._states[index], self._failures[index]
            while state and stop[state] != character:
                state = failures[state - 1]
            if stop[state] == character:
                state += 1
            if state == len(stop):
                found, state = found or stop, failures[state - 1]
            self._states[index] = state
        return found


def _failures(stop: str) -> list[int]:
    """For each beginning of the stop string, the length of its longest proper end that is also its beginning."""
    failures = [0] * len(stop)
    length = 0
    for index in range(1, len(stop)):
        while length and stop[index] != stop[length]:
            length = failures[length - 1]
        if stop[index] == stop[length]:
            length += 1
        failures[index] = length
    return failures
