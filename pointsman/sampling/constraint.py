"""A sequence that is kept to a grammar.

Like all of a lane's sampling state it is a function of the lane's start and the tokens since, so a sequence that was preempted comes
back to where it was.

With `after`, the text before it is free: nothing is asked of the grammar's process and only the end is held back. It is asked while a
beginning of `after` stands at the end of the text, because the next token might then have the rest of it and something behind.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
from numpy.typing import NDArray

from pointsman.sampling.grammar_client import Channel, ConstraintFault
from pointsman.step import LaneStart

__all__ = ["Constraint", "ConstraintFault"]


class Constraint:
    """What may follow in one sequence.

    Args:
        start: of the sequence, whose sampling has a grammar.
        channel: that grammar's process.
        eos_ids: tokens that end a text; the request's own stop tokens join them.
        token_bytes: what a token adds to the text.

    Attributes:
        ended: the text is complete and its end was chosen.
    """

    def __init__(self, start: LaneStart, channel: Channel, eos_ids: Collection[int], token_bytes: Callable[[int], bytes]) -> None:
        grammar, verdict = start.sampling.grammar, channel.verdict
        assert grammar is not None and verdict is not None
        self._row = start.lane
        self._channel = channel
        self._token_bytes = token_bytes
        self._stop_ids = sorted({*eos_ids, *start.sampling.stop_token_ids})
        self._held_back = np.array(sorted({*self._stop_ids, *verdict.crossing}), np.intp)
        self._mark = _Mark((grammar.after or "").encode())
        self._followed = False
        self.ended = False
        self._begin(list(start.output))

    def restrict(self, logits_V: NDArray[np.floating]) -> None:
        """Make all tokens impossible that may not come next. Raises ConstraintFault where that cannot be known."""
        if not self._followed:
            logits_V[self._held_back] = -np.inf
            return
        mask = self._channel.mask(self._row)
        allowed_V = np.unpackbits(mask.view(np.uint8), count=len(logits_V), bitorder="little")
        logits_V[allowed_V == 0] = -np.inf

    def commit(self, token: int) -> None:
        """The sequence goes on by this token."""
        if self.ended:
            return
        if self._mark.passed and token in self._stop_ids:
            self.ended = True
            self.close()
            return
        self._mark.push(self._token_bytes(token))
        if not self._followed:
            self._follow([])
        elif self._mark.passed or self._mark.begun:
            self._channel.accept(self._row, token)
        else:
            self.close()

    def close(self) -> None:
        """The sequence has left its lane, or needs no more masks."""
        if self._followed:
            self._followed = False
            self._channel.leave(self._row)

    def _begin(self, output: list[int]) -> None:
        """Come to where a sequence with this output is."""
        for index, token in enumerate(output):
            if self._mark.passed:
                self._follow(output[index:])
                return
            self._mark.push(self._token_bytes(token))
        self._follow([])

    def _follow(self, tokens: list[int]) -> None:
        """Let the text be followed from here, if it must be."""
        if self._mark.passed or self._mark.begun:
            self._followed = True
            self._channel.open(self._row, self._mark.begun, tokens, self._stop_ids)


class _Mark:
    """Watches for the end of the free text.

    Attributes:
        begun: the beginning of the mark that the text so far ends with; once it has passed, the mark and what the same token had behind it.
        passed: the free text is over.
    """

    def __init__(self, mark: bytes) -> None:
        self._mark = mark
        self.begun = b""
        self.passed = not mark

    def push(self, data: bytes) -> None:
        """The text goes on."""
        if self.passed or not (self.begun or self._mark[:1] in data):
            return
        text = self.begun + data
        at = text.find(self._mark)
        if at >= 0:
            self.begun, self.passed = text[at:], True
            return
        sizes = range(min(len(self._mark) - 1, len(text)), 0, -1)
        self.begun = next((self._mark[:size] for size in sizes if text.endswith(self._mark[:size])), b"")
