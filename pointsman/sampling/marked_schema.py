"""Strings of a length or a pattern, which the grammar compiler's own reading of a JSON schema gets wrong.

It lets control characters into strings of a length, which no reader of JSON accepts, and where a pattern asks for a quote or a line end it
writes that as it is, or leads to where nothing can follow. So such strings are taken out of a schema before it is read, with constants that
nothing else can be in their places, and in the grammar that comes of it these give way to rules of ours (`pointsman.grammar.pattern`).
"""

from __future__ import annotations

import json
from typing import Any

from pointsman.grammar.pattern import string_of_length, string_of_pattern

_OF_STRINGS = ("pattern", "minLength", "maxLength")
_MAPS = ("properties", "$defs", "definitions")
_LISTS = ("anyOf", "oneOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "propertyNames")


class MarkedSchema:
    """A schema that was checked, with marks for strings.

    Attributes:
        schema: for the compiler to read.
        any: whether there are marks.
    """

    def __init__(self, schema: Any) -> None:
        text = json.dumps(schema)
        self._name = next(name for size in range(len(text) + 1) if (name := "string" + "s" * size) not in text)
        self._rules: dict[str, int] = {}
        self.schema = self._marked(schema)
        self.any = bool(self._rules)

    def spelled(self, gbnf: str) -> str:
        """The grammar of the schema with the strings in the places of the marks."""
        for rule, number in self._rules.items():
            gbnf = gbnf.replace(f'"\\"@{self._name}{number}@\\""', f"({self._name}_{number})") + f"\n{self._name}_{number} ::= {rule}\n"
        assert "@" + self._name not in gbnf, "a mark is not where it can be replaced"
        return gbnf

    def _marked(self, node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        marked = dict(node)
        for word, value in node.items():
            if word in _MAPS:
                marked[word] = {name: self._marked(entry) for name, entry in value.items()}
            elif word in _LISTS:
                marked[word] = [self._marked(entry) for entry in value]
            elif word in _SINGLE:
                marked[word] = self._marked(value)
        bound = any(word in marked for word in _OF_STRINGS) and "string" in marked["type"]
        return self._mark(marked) if bound else marked

    def _mark(self, node: dict[str, Any]) -> dict[str, Any]:
        least, most, pattern = node.pop("minLength", 0), node.pop("maxLength", None), node.pop("pattern", None)
        types = node.pop("type")
        rule = string_of_length(least, most) if pattern is None else string_of_pattern(pattern)
        mark = {"const": f"@{self._name}{self._rules.setdefault(rule, len(self._rules))}@"}
        others = [name for name in ([types] if isinstance(types, str) else types) if name != "string"]
        if not others:
            return node | mark
        return {"anyOf": [mark, node | {"type": others}]}
