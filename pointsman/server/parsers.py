"""Splitting a model's text into thinking and answer while it is still being written.

A tag may be cut anywhere between two pieces of text, so the parser keeps back the shortest end of the text that may still turn
out to be a tag, or a blank that is to be dropped, and nothing more. Whatever way a text is cut, the parts concatenate to the
same strings; an answer that is not streamed goes through the same parser in one piece.

The meaning, for MiniMax: everything before the first `</think>` is thinking, everything after it the answer. Line ends around
the tags belong to the tags. A text that ends without `</think>` is all thinking, up to its last character. Where the prompt has
not opened thinking, a `<think>` that begins the text does, and any other text is all answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

OPEN = "<think>"
CLOSE = "</think>"
_BLANKS = "\r\n"


@dataclass(frozen=True, slots=True)
class Part:
    """What a piece of text adds to the thinking and to the answer."""

    reasoning: str = ""
    content: str = ""


class _State(Enum):
    START = "the prompt has not opened thinking, and nothing but blanks has come"
    THINKING = "before the closing tag"
    ANSWER = "after it"


class ReasoningParser:
    """MiniMax's thinking, one choice.

    Args:
        opened: the prompt ends inside `<think>`.
    """

    def __init__(self, *, opened: bool) -> None:
        self._state = _State.THINKING if opened else _State.START
        self._held = ""
        self._trim = opened

    @property
    def thinking(self) -> bool:
        """Whether the closing tag is still to come."""
        return self._state is _State.THINKING

    @property
    def answered(self) -> bool:
        """Whether the answer has begun."""
        return self._state is _State.ANSWER

    def feed(self, text: str) -> Part:
        """Take the next piece of text and return what is certain by now."""
        text, self._held = self._held + text, ""
        if self._state is _State.START:
            text = self._begin(text)
        reasoning = ""
        if self._state is _State.THINKING:
            reasoning, text = self._think(text)
        if self._state is not _State.ANSWER:
            return Part(reasoning)
        return Part(reasoning, self._trimmed(text))

    def finish(self) -> Part:
        """The text has ended: return what was kept back."""
        held, self._held = self._held, ""
        if self._state is _State.THINKING:
            return Part(reasoning=held)
        self._state = _State.ANSWER
        return Part(content=held)

    def _begin(self, text: str) -> str:
        """Decide how the text starts, and return what is left of it."""
        bare = text.lstrip()
        if OPEN.startswith(bare) and bare != OPEN:
            self._held = text
            return ""
        self._trim = bare.startswith(OPEN)
        self._state = _State.THINKING if self._trim else _State.ANSWER
        return bare.removeprefix(OPEN) if self._trim else text

    def _think(self, text: str) -> tuple[str, str]:
        """Split text at the closing tag: thinking, and what follows it."""
        text = self._trimmed(text)
        reasoning, tag, rest = text.partition(CLOSE)
        if tag:
            self._state, self._trim = _State.ANSWER, True
            return reasoning.rstrip(_BLANKS), rest
        keep = _maybe_tag(text)
        keep = len(text[: len(text) - keep].rstrip(_BLANKS))
        self._held = text[keep:]
        return text[:keep], ""

    def _trimmed(self, text: str) -> str:
        """Text without the line ends that follow a tag."""
        if self._trim:
            text = text.lstrip(_BLANKS)
            self._trim = not text
        return text


def _maybe_tag(text: str) -> int:
    """How many characters at the end of a text may be the start of the closing tag."""
    return next((size for size in range(min(len(CLOSE) - 1, len(text)), 0, -1) if text.endswith(CLOSE[:size])), 0)
