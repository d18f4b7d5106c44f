"""What a tool's parameter accepts, and the JSON value that a text stands for.

A model writes every value as bare text, the string `5` and the number 5 alike; only the tool's JSON schema tells them apart. A
schema is read for one thing, which of JSON's kinds of value it accepts, and never to validate: `oneOf` reads as `anyOf`, and ranges,
lengths and patterns mean nothing here.

What a text stands for, the first that applies (docs/parsing.md has the cases):

1. one of the strings that the schema lists, exactly: that string;
2. the JSON literal of a kind that is accepted, blanks around it left out unless it is null beside a string: the literal as it is written;
3. where no string is accepted, a slip: `True`, `FALSE`, `None`, and for an integer `5.0` or `1e3`: what was meant;
4. otherwise the text itself as a string, which is all that can be done with a value that does not fit: nothing is lost.

So a union prefers everything to a string, and a parameter of any type takes what looks like JSON as JSON. A number that is no finite
double (`NaN`, `1e999`, also within an array) is no JSON literal: readers would refuse it, or see infinity.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

BLANKS = " \t\r\n"
MAX_SCHEMA_DEPTH = 32
MAX_NESTING = 128
MAX_NUMBER = 1024
MAX_EXACT = 2**53

_KINDS = {name: frozenset({name}) for name in ("string", "integer", "boolean", "object", "array", "null")} | {
    "number": frozenset({"number", "integer"})
}
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*+"?', re.DOTALL)
_UNIONS = ("anyOf", "oneOf")


@dataclass(frozen=True, slots=True)
class ValueType:
    """What a schema accepts.

    Attributes:
        kinds: of JSON, with `integer` beside `number`, which has the other numbers.
        words: the only strings accepted; None where any string is.
    """

    kinds: frozenset[str]
    words: frozenset[str] | None = None

    @property
    def streams(self) -> bool:
        """Whether a value is known to be a string, or null, before it has ended."""
        return "string" in self.kinds and self.kinds <= {"string", "null"} and self.words is None

    def both(self, other: ValueType) -> ValueType:
        """What this and the other accept."""
        if self.words is None or other.words is None:
            words = other.words if self.words is None else self.words
        else:
            words = self.words & other.words
        return ValueType(self.kinds & other.kinds, words)

    def either(self, other: ValueType) -> ValueType:
        """What this or the other accepts."""
        lists = [kind.words for kind in (self, other) if "string" in kind.kinds]
        words = None if None in lists else frozenset[str]().union(*(listed for listed in lists if listed is not None))
        return ValueType(self.kinds | other.kinds, words if lists else None)


ANY = ValueType(frozenset[str]().union(*_KINDS.values()))
TEXT = ValueType(_KINDS["string"])
_NOTHING = ValueType(frozenset())


class Parameters:
    """The parameters of one tool.

    Args:
        schema: the tool's `parameters`, whatever a client has put there.
    """

    def __init__(self, schema: Any) -> None:
        self._schema = schema
        self._known: dict[str, ValueType] = {}

    def type_of(self, name: str) -> ValueType:
        """What a parameter accepts: any string, where the schema does not know it or contradicts itself."""
        schemas = self._properties.get(name)
        if schemas is None:
            return self._others
        if name not in self._known:
            self._known[name] = self._read(schemas)
        return self._known[name]

    @functools.cached_property
    def _properties(self) -> dict[str, list[Any]]:
        """The schemas of every declared parameter, in whatever branch of the root they are."""
        found: dict[str, list[Any]] = {}
        for branch in self._branches(self._schema, set(), 0):
            declared = branch.get("properties")
            for name, schema in declared.items() if isinstance(declared, Mapping) else ():
                found.setdefault(name, []).append(schema)
        return found

    @functools.cached_property
    def _others(self) -> ValueType:
        branches = self._branches(self._schema, set(), 0)
        others = [branch["additionalProperties"] for branch in branches if isinstance(branch.get("additionalProperties"), Mapping)]
        return self._read(others) if others else TEXT

    def _branches(self, schema: Any, seen: set[str], depth: int) -> Iterator[Mapping[str, Any]]:
        """A schema and those it is made of."""
        if not isinstance(schema, Mapping) or depth > MAX_SCHEMA_DEPTH:
            return
        yield schema
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference not in seen:
            seen.add(reference)
            yield from self._branches(self._follow(reference), seen, depth + 1)
        for word in (*_UNIONS, "allOf"):
            for member in _listed(schema.get(word)):
                yield from self._branches(member, seen, depth + 1)

    def _read(self, schemas: Sequence[Any]) -> ValueType:
        found = functools.reduce(ValueType.either, [self._accepts(schema, {}, 0) for schema in schemas])
        return found if found.kinds else TEXT

    def _accepts(self, schema: Any, references: dict[str, ValueType], depth: int) -> ValueType:
        """What a schema accepts. What cannot be understood says nothing, and so does a reference within itself."""
        if not isinstance(schema, Mapping) or depth > MAX_SCHEMA_DEPTH:
            return ANY
        found = _of_type(schema.get("type"))
        if "const" in schema:
            found = found.both(_of_values([schema["const"]]))
        if members := _listed(schema.get("enum")):
            found = found.both(_of_values(members))
        for word in _UNIONS:
            if members := _listed(schema.get(word)):
                accepted = [self._accepts(member, references, depth + 1) for member in members]
                found = found.both(functools.reduce(ValueType.either, accepted))
        for member in _listed(schema.get("allOf")):
            found = found.both(self._accepts(member, references, depth + 1))
        reference = schema.get("$ref")
        if isinstance(reference, str):
            if reference not in references:
                references[reference] = ANY
                references[reference] = self._accepts(self._follow(reference), references, depth + 1)
            found = found.both(references[reference])
        return found.either(ValueType(_KINDS["null"])) if schema.get("nullable") is True else found

    def _follow(self, reference: str) -> Any:
        """What a reference into the same schema points to; None where it leads nowhere."""
        root, *keys = unquote(reference).split("/")
        found = self._schema if root == "#" else None
        for key in keys:
            key = key.replace("~1", "/").replace("~0", "~")
            found = found.get(key) if isinstance(found, Mapping) else None
        return found


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else ()


def _of_type(name: Any) -> ValueType:
    """The kinds of a `type`. A type that JSON schema does not have is read as string: that converts nothing."""
    names = name if isinstance(name, list) else [] if name is None else [name]
    if not names:
        return ANY
    return ValueType(frozenset[str]().union(*(_KINDS.get(entry, TEXT.kinds) if isinstance(entry, str) else TEXT.kinds for entry in names)))


def _of_values(values: Sequence[Any]) -> ValueType:
    return functools.reduce(ValueType.either, [_of_value(value) for value in values])


def _of_value(value: Any) -> ValueType:
    if isinstance(value, str):
        return ValueType(TEXT.kinds, frozenset({value}))
    for kind, form in (("null", type(None)), ("boolean", bool), ("integer", int), ("number", float), ("array", list), ("object", dict)):
        if isinstance(value, form):
            return ValueType(_KINDS[kind])
    return _NOTHING


def json_string(text: str) -> str:
    """A text as a JSON string. Each character is escaped by itself, so pieces of a text are pieces of its string."""
    return json.dumps(text, ensure_ascii=False)


def json_value(text: str, accepted: ValueType) -> str:
    """The JSON value that a whole text stands for, by the rule at the top."""
    bare = text.strip(BLANKS)
    if accepted.words and text in accepted.words:
        return json_string(text)
    # a string or null is sent as it comes, so that blanks before or behind make it a string
    literal = _literal(text if accepted.streams else bare, accepted.kinds)
    if literal is None and "string" not in accepted.kinds:
        literal = _slip(bare, accepted.kinds)
    if literal is not None:
        return literal
    return json_string(bare if accepted.words and bare in accepted.words else text)


def _literal(bare: str, kinds: frozenset[str]) -> str | None:
    """The text, if it is JSON of one of these kinds."""
    if bare in ("null", "true", "false"):
        fits = ("null" if bare == "null" else "boolean") in kinds
    elif bare[:1] in ("{", "["):
        fits = ("object" if bare[0] == "{" else "array") in kinds and _is_json(bare)
    else:
        number = _NUMBER.fullmatch(bare)
        fits = number is not None and ("number" if number[1] or number[2] else "integer") in kinds and _is_finite(bare)
    return bare if fits else None


def _slip(bare: str, kinds: frozenset[str]) -> str | None:
    """What was meant by a text that is not quite JSON of one of these kinds."""
    word = bare.lower()
    if word in ("true", "false") and "boolean" in kinds:
        return word
    if word in ("null", "none") and "null" in kinds:
        return "null"
    if "integer" in kinds and _NUMBER.fullmatch(bare) and len(bare) <= MAX_NUMBER:
        number = float(bare)
        if number.is_integer() and abs(number) <= MAX_EXACT:
            return str(int(number))
    return None


def _is_finite(number: str) -> bool:
    """Whether a JSON number is a finite double, or near one: beyond that readers see infinity, or raise."""
    return len(number) <= MAX_NUMBER and math.isfinite(float(number))


def _is_json(text: str) -> bool:
    """Whether a text is JSON that every reader can read: finite numbers, nested no deeper than readers go."""
    depth = 0
    for bracket in re.findall(r"[\[\]{}]", _QUOTED.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        if depth > MAX_NESTING:
            return False
    try:
        json.loads(text, parse_int=_finite, parse_float=_finite, parse_constant=_finite)
    except ValueError:
        return False
    return True


def _finite(number: str) -> str:
    """For the JSON reader: raises ValueError at a number that is not finite, `NaN` among them."""
    if not _is_finite(number):
        raise ValueError(f"{number[:80]} is not finite")
    return number
