"""What a client writes stays text: no word of it becomes a control token.

A chat template puts clients' texts between control tokens, and the tokenizer that reads the result cannot tell one from the other: a
user who writes the text of the token that ends a turn ends it. So before the template runs, one character of each such text is
replaced by a mark, a private character that nothing else in the conversation has; after it has run, a control token with no mark in
it is the template's own.

Marked is the first character of every control token's text, and also what could become one at the border to the template's words: the
beginning of one at the end of a text, the end of one at its start. Everything else stays as it is, so that a template which looks
into its messages sees what was written. This is sound for templates that put texts into the prompt as they are, trimmed, or cut to
pieces, as all known ones do; one that deletes from the middle of a text, or spells it differently, could make a control token out of
parts that are none.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

_PRIVATE = re.compile("[\U000f0000-\U000ffffd]")
_FIRST_PRIVATE = 0xF0000
_LAST_PRIVATE = 0xFFFFD


class Marks:
    """The marks of one conversation.

    Args:
        control: the texts of the control tokens.
    """

    def __init__(self, control: Collection[str]) -> None:
        self._control = tuple(sorted((text for text in control if text), key=len, reverse=True))
        self._beginnings = tuple({text[:size] for text in self._control for size in range(1, len(text))})
        self._ends = tuple({text[size:] for text in self._control for size in range(1, len(text))})
        self._anywhere = re.compile("(?=" + "|".join(map(re.escape, self._control)) + ")") if self._control else None
        self._marks: dict[str, str] = {}
        self._free = _FIRST_PRIVATE
        self._taken: set[str] = set()

    def marked(self, value: Any) -> Any:
        """The same JSON value with every text in it marked, keys too. Raises ValueError where no private character is left for it."""
        texts = list(_texts(value))
        if not any(self._suspect(text) for text in texts):
            return value
        for text in texts:
            self._taken.update(_PRIVATE.findall(text))
        return self._walk(value)

    @property
    def used(self) -> bool:
        """Whether anything was marked."""
        return bool(self._marks)

    def plain(self, text: str) -> str:
        """A text with the characters that the marks stand for."""
        for character, mark in self._marks.items():
            text = text.replace(mark, character)
        return text

    def places(self, text: str) -> list[int]:
        """Where in a text a control token's text begins, also within another."""
        return [] if self._anywhere is None else [found.start() for found in self._anywhere.finditer(text)]

    def split(self, text: str) -> list[str]:
        """A text cut around its control tokens: every second piece is one."""
        return re.split("(" + "|".join(map(re.escape, self._control)) + ")", text)

    def _suspect(self, text: str) -> bool:
        bare = text.strip()
        return bare.endswith(self._beginnings) or bare.startswith(self._ends) or any(control in text for control in self._control)

    def _walk(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._mark(value)
        if isinstance(value, Mapping):
            return {self._mark(key) if isinstance(key, str) else key: self._walk(entry) for key, entry in value.items()}
        return [self._walk(entry) for entry in value] if isinstance(value, list | tuple) else value

    def _mark(self, text: str) -> str:
        if not self._suspect(text):
            return text
        places = set(self.places(text))
        bare, begin = text.strip(), len(text) - len(text.lstrip())
        if bare.startswith(self._ends):
            places.add(begin)
        places.update(begin + len(bare) - len(part) for part in self._beginnings if bare.endswith(part))
        characters = list(text)
        for place in places:
            characters[place] = self._mark_of(characters[place])
        return "".join(characters)

    def _mark_of(self, character: str) -> str:
        if character not in self._marks:
            while chr(self._free) in self._taken:
                self._free += 1
            if self._free > _LAST_PRIVATE:
                raise ValueError("the conversation has every character of a private plane; one of them is needed to mark control tokens")
            self._marks[character] = chr(self._free)
            self._free += 1
        return self._marks[character]


def _texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _texts(key)
            yield from _texts(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _texts(entry)
