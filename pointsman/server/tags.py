"""The tags that MiniMax writes, found in a text that is still growing.

    <minimax:tool_call>
    <invoke name="f">
    <parameter name="p">value</parameter>
    </invoke>
    </minimax:tool_call>

Nothing in a value is escaped, and prose may speak of tags, so two tags count only where the text goes on as it must: the block's first
before an `<invoke`, and a value's last before the next parameter or the end of its call. A text that ends too early to tell is undecided.
What has been decided stays so however the text goes on, and at most MAX_HELD characters are ever undecided: time is linear, whatever
the model writes.

A name ends at the first quote before a `>`, so it may itself have quotes or a `>`. Where no such end comes on the same line, or a tag
comes before it, a quote is missing and the name ends at the first `>`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

MAX_GAP = 256
MAX_HEADER = 1024
MAX_HELD = MAX_HEADER + 32
THINK_OPEN = "<think>"


class Tag(StrEnum):
    """All but those that open thinking. An opening tag that has a name is listed up to its name."""

    THINK_CLOSE = "</think>"
    BLOCK_OPEN = "<minimax:tool_call>"
    BLOCK_CLOSE = "</minimax:tool_call>"
    CALL_OPEN = "<invoke"
    CALL_CLOSE = "</invoke>"
    VALUE_OPEN = "<parameter"
    VALUE_CLOSE = "</parameter>"


@dataclass(frozen=True, slots=True)
class Match:
    """A place in a text.

    Attributes:
        start: the place of the `<`.
        tag: None where the text ends inside it, so that it may be several.
        end: the place after the tag; None where more text must decide whether it is one.
        name: of a tag that has one; empty where it should have one.
    """

    start: int
    tag: Tag | None = None
    end: int | None = None
    name: str = ""


_AFTER_NAME = " \t>"
_NAMED = (Tag.CALL_OPEN, Tag.VALUE_OPEN)
_FOLLOWERS = {
    Tag.BLOCK_OPEN: tuple(Tag.CALL_OPEN + end for end in _AFTER_NAME),
    Tag.VALUE_CLOSE: (*(tag + end for tag in _NAMED for end in _AFTER_NAME), str(Tag.CALL_CLOSE), str(Tag.BLOCK_CLOSE)),
}
_GAP = re.compile(f"[ \\t\\r\\n]{{0,{MAX_GAP}}}")
_QUOTED_NAME = re.compile(r"""[ \t]+name[ \t]*=[ \t]*(["'])([^\r\n]*?)\1[ \t]?>""")
_LINE_END = re.compile(r"[\r\n]")


def skip_gap(text: str, at: int) -> int:
    """The place after the blanks that are here, MAX_GAP at most."""
    found = _GAP.match(text, at)
    assert found is not None
    return found.end()


class Finder:
    """Finds some of the tags."""

    def __init__(self, tags: Iterable[Tag]) -> None:
        self.tags = tuple(tags)
        self._pattern = re.compile("|".join(re.escape(tag) for tag in self.tags))
        self._beginnings = frozenset(tag[:size] for tag in self.tags for size in range(1, len(tag)))
        self._longest = max(map(len, self.tags))

    def find(self, text: str, at: int = 0) -> Match | None:
        """The first of the tags from here on, or the first place that is undecided."""
        while found := self._pattern.search(text, at):
            match = _decide(text, found.start(), Tag(found[0]))
            if match is not None:
                return match
            at = found.end()
        start = text.rfind("<", max(at, len(text) - self._longest + 1))
        return Match(start) if start >= 0 and text[start:] in self._beginnings else None


def settle(text: str, match: Match) -> Match | None:
    """What an undecided place is, now that the text has ended there."""
    if match.tag is Tag.VALUE_CLOSE:
        return Match(match.start, match.tag, match.start + len(match.tag))
    return _unquoted(text, match.start, match.tag, len(text)) if match.tag in _NAMED else None


def _decide(text: str, start: int, tag: Tag) -> Match | None:
    """Whether the letters of a tag are one: None says no."""
    after = start + len(tag)
    if tag in _NAMED:
        return _header(text, start, tag)
    if tag not in _FOLLOWERS:
        return Match(start, tag, after)
    ahead = skip_gap(text, after)
    if text.startswith(_FOLLOWERS[tag], ahead):
        return Match(start, tag, after)
    rest = text[ahead : ahead + len(Tag.BLOCK_CLOSE)]
    return Match(start, tag) if any(follower.startswith(rest) for follower in _FOLLOWERS[tag]) else None


def _header(text: str, start: int, tag: Tag) -> Match | None:
    """An opening tag with its name."""
    after = start + len(tag)
    if after == len(text):
        return Match(start, tag)
    if text[after] not in _AFTER_NAME:
        return None
    stop = _hopeless(text, after)
    quoted = _QUOTED_NAME.match(text, after, after + MAX_HEADER)
    if quoted and (stop is None or quoted.end() <= stop):
        return _named(start, tag, quoted.end(), quoted[2])
    return Match(start, tag) if stop is None else _unquoted(text, start, tag, stop)


def _hopeless(text: str, after: int) -> int | None:
    """Where it is certain that no quote before a `>` ends the name: a line's end, a tag after a `>`, or too long a name."""
    limit = after + MAX_HEADER
    line_end = _LINE_END.search(text, after, limit)
    stop = line_end.start() if line_end else limit
    close = text.find(">", after, stop)
    tag = text.find("<", close, stop) if close >= 0 else -1
    if tag >= 0:
        return tag
    return stop if line_end or len(text) >= limit else None


def _unquoted(text: str, start: int, tag: Tag, stop: int) -> Match | None:
    """An opening tag up to its first `>`; the name has what quotes it has."""
    after = start + len(tag)
    close = text.find(">", after, stop)
    if close < 0:
        return None
    name = text[after:close].strip(" \t")
    label, equals, value = name.partition("=")
    if equals and label.rstrip(" \t") == "name":
        name = value.strip(" \t")
    return _named(start, tag, close + 1, name.strip("\"'"))


def _named(start: int, tag: Tag, end: int, name: str) -> Match | None:
    """A call without a name is none; a parameter without one is still worth its value."""
    return Match(start, tag, end, name) if name or tag is not Tag.CALL_OPEN else None
