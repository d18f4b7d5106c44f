"""Regular expressions of JSON schemas, as grammars of the JSON strings whose contents they match.

A pattern speaks of a string's characters; a grammar must speak of how JSON writes them: a quote is `\\"`, a line end is `\\n`. So a pattern
is read here, character sets and all, and written in GBNF. It is searched for, as the standard has it: without anchors anything may be
around it. The dialect is ECMAScript's, where `\\w` and `\\d` are ASCII, without what is no regular expression: looking around and back.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise

Ranges = list[tuple[int, int]]

MAX_PATTERN = 8192
MAX_DEPTH = 64
MAX_REPEAT = 1_000_000

_LAST = 0x10FFFF
_SURROGATES = (0xD800, 0xDFFF)
_DIGITS: Ranges = [(0x30, 0x39)]
_WORD: Ranges = [(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)]
_BLANKS: Ranges = [(0x09, 0x0D), (0x20, 0x20), (0xA0, 0xA0), (0x2028, 0x2029), (0xFEFF, 0xFEFF)]
_LINE_ENDS: Ranges = [(0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029)]
_SETS = {"d": _DIGITS, "w": _WORD, "s": _BLANKS}
_CONTROLS = {"t": 9, "n": 10, "v": 11, "f": 12, "r": 13, "0": 0}
_REPEAT = re.compile(r"\{(\d+)(?:(,)(\d*))?\}")
_CODES = (re.compile(r"x([0-9A-Fa-f]{2})"), re.compile(r"u([0-9A-Fa-f]{4})"), re.compile(r"u\{([0-9A-Fa-f]{1,6})\}"))
_GROUP = re.compile(r"\((\?:|\?P?<[A-Za-z_]\w*>)?(?!\?)")
# How JSON writes what it does not write as it is; other control characters are written as \u00XX.
_SHORT = {0x22: '\\"', 0x5C: "\\\\", 8: "\\b", 9: "\\t", 10: "\\n", 12: "\\f", 13: "\\r"}


def string_of_length(least: int, most: int | None) -> str:
    """GBNF of the JSON strings of so many characters."""
    return f'"\\"" ({_characters(_complement([]))}){{{least},{"" if most is None else most}}} "\\""'


def string_of_pattern(pattern: str) -> str:
    """GBNF of the JSON strings that a pattern is found in.

    Raises:
        ValueError: the pattern has something that cannot be kept to; the message says what, and where.
    """
    if len(pattern) > MAX_PATTERN:
        raise ValueError(f"has {len(pattern)} characters; at most {MAX_PATTERN} are allowed")
    return f'"\\"" ({_Reader(pattern).whole()}) "\\""'


class _Reader:
    """Reads a pattern from its first character to its last."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._at = 0
        self._depth = 0

    def whole(self) -> str:
        branches = [self._branch()]
        while self._take("|"):
            branches.append(self._branch())
        if self._at < len(self._pattern):
            self._refuse("a parenthesis that closes nothing")
        return " | ".join(branches)

    def _branch(self) -> str:
        """An alternative of the whole pattern, which may be anchored at either end."""
        anything = f"({_characters(_complement([]))})*"
        start = "" if self._take("^") else anything
        items = self._items()
        return f"{start} {items} {'' if self._take('$') else anything}"

    def _items(self) -> str:
        items = []
        while self._peek() not in ("", "|", ")") and self._peek(2) not in ("$", "$|"):
            items.append(self._atom() + self._quantifier())
        return " ".join(items) or '""'

    def _atom(self) -> str:
        here = self._pattern[self._at]
        if here == "(":
            return self._group()
        if here == "[":
            return f"({_characters(self._class())})"
        if here in "*+?{":
            self._refuse("a quantifier with nothing before it")
        if here in "^$":
            self._refuse("an anchor that is not at an end")
        self._at += 1
        if here == ".":
            return f"({_characters(_complement(_LINE_ENDS))})"
        return f"({_characters(self._escape() if here == chr(92) else _one(ord(here)))})"

    def _group(self) -> str:
        opened = _GROUP.match(self._pattern, self._at)
        if opened is None:
            self._refuse("a group that looks around, or sets flags")
        assert opened is not None
        self._at, self._depth = opened.end(), self._depth + 1
        if self._depth > MAX_DEPTH:
            self._refuse(f"groups nested more than {MAX_DEPTH} deep")
        branches = [self._items()]
        while self._take("|"):
            branches.append(self._items())
        if not self._take(")"):
            self._refuse("an anchor within a group, or a group that is not closed")
        self._depth -= 1
        return f"({' | '.join(branches)})"

    def _quantifier(self) -> str:
        found = ""
        if self._peek() in ("*", "+", "?"):
            found = self._peek()
            self._at += 1
        elif counts := _REPEAT.match(self._pattern, self._at):
            least, most = int(counts[1]), int(counts[3]) if counts[3] else None
            if max(least, most or 0) > MAX_REPEAT or (most is not None and most < least):
                self._refuse(f"a repetition that is empty, or above {MAX_REPEAT}")
            found = f"{{{least}}}" if not counts[2] else f"{{{least},{'' if most is None else most}}}"
            self._at = counts.end()
        if found and not self._take("?") and self._peek() in ("*", "+", "{"):
            self._refuse("a quantifier behind a quantifier")
        return found

    def _class(self) -> Ranges:
        """A set in brackets."""
        start = self._at
        self._at += 1
        negated = self._take("^")
        ranges: Ranges = []
        while not self._take("]"):
            low = self._member(start)
            if self._peek() == "-" and self._peek(2) not in ("-", "-]"):
                self._at += 1
                high = self._member(start)
                if not (_is_one(low) and _is_one(high)) or low[0][0] > high[0][0]:
                    self._refuse("a range that is none")
                low = [(low[0][0], high[0][0])]
            ranges += low
        return _complement(ranges) if negated else _complement(_complement(ranges))

    def _member(self, start: int) -> Ranges:
        if self._at >= len(self._pattern):
            self._at = start
            self._refuse("a set that is not closed")
        here = self._pattern[self._at]
        self._at += 1
        if here == "\\" and self._take("b"):
            return _one(8)
        return self._escape() if here == "\\" else _one(ord(here))

    def _escape(self) -> Ranges:
        """What follows a backslash."""
        here = self._peek()
        if here.lower() in _SETS and here:
            self._at += 1
            ranges = _SETS[here.lower()]
            return ranges if here.islower() else _complement(ranges)
        for code in _CODES:
            if found := code.match(self._pattern, self._at):
                self._at = found.end()
                return _one(min(int(found[1], 16), _LAST))
        if here in _CONTROLS and here and not self._peek(2)[1:].isdigit():
            self._at += 1
            return _one(_CONTROLS[here])
        if not here or here.isalnum():
            self._refuse(f"the escape \\{here}, which is not known here")
        self._at += 1
        return _one(ord(here))

    def _peek(self, size: int = 1) -> str:
        return self._pattern[self._at : self._at + size]

    def _take(self, text: str) -> bool:
        taken = self._pattern.startswith(text, self._at)
        self._at += len(text) if taken else 0
        return taken

    def _refuse(self, what: str) -> None:
        raise ValueError(f"has, at character {self._at + 1}, {what}")


def _one(character: int) -> Ranges:
    return [(character, character)]


def _is_one(ranges: Ranges) -> bool:
    return len(ranges) == 1 and ranges[0][0] == ranges[0][1]


def _complement(ranges: Ranges) -> Ranges:
    """All other characters, in order; surrogates are none."""
    edges = sorted([*ranges, _SURROGATES])
    found: Ranges = []
    next_ = 0
    for low, high in edges:
        if low > next_:
            found.append((next_, low - 1))
        next_ = max(next_, high + 1)
    if next_ <= _LAST:
        found.append((next_, _LAST))
    return found


def _characters(ranges: Ranges) -> str:
    """GBNF of one character of a set, as JSON writes it in a string."""
    if not ranges:
        raise ValueError("has a set of no characters")
    plain: Ranges = []
    written: list[str] = []
    escaped = sorted({*range(0x20), *_SHORT})
    for low, high in ranges:
        edges = [low - 1, *[code for code in escaped if low <= code <= high], high + 1]
        plain += [(one + 1, other - 1) for one, other in pairwise(edges) if one + 1 < other]
        written += [_literal(_SHORT.get(code, f"\\u{code:04x}")) for code in edges[1:-1]]
    if plain:
        written.insert(0, "[" + "".join(_range(low, high) for low, high in plain) + "]")
    return " | ".join(_compact(written))


def _compact(written: list[str]) -> Iterable[str]:
    """All the control characters at once, where they all are there."""
    controls = [_literal(_SHORT.get(code, f"\\u{code:04x}")) for code in range(0x20)]
    if not set(controls) <= set(written):
        return written
    others = [entry for entry in written if entry not in controls]
    return [*others, '"\\\\" [bfnrt]', '"\\\\u00" [01] [0-9a-fA-F]']


def _literal(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _range(low: int, high: int) -> str:
    return _code(low) if low == high else f"{_code(low)}-{_code(high)}"


def _code(character: int) -> str:
    if chr(character).isascii() and chr(character).isalnum():
        return chr(character)
    return f"\\u{character:04x}" if character <= 0xFFFF else f"\\U{character:08x}"
