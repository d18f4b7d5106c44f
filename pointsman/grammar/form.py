"""A constraint on the text of an answer.

    Grammar.json_schema({"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}, after="</think>")

With `after`, what comes before that text is free (the model thinks), and what comes behind it, up to two line ends aside, is constrained.
The answer cannot end before the constrained text is complete.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pointsman.grammar.schema import checked_schema

MAX_TEXT = 1 << 17
MAX_NESTING = 64
MAX_AFTER = 64
MAX_BLANKS = 20

Kind = Literal["json_schema", "json_object", "regex", "ebnf", "structural"]
_KINDS = get_args(Kind)
# What is no bracket though it looks like one. Each runs to the end of the text where it is not closed: so the search is linear.
_CLASS = r"\[(?:[^\]\\]|\\.)*+\]?"
_STRING = r'"(?:[^"\\]|\\.)*+"?'
_NO_BRACKETS = {
    kind: re.compile(form, re.DOTALL)
    for kind, form in (
        ("json_schema", _STRING),
        ("structural", _STRING),
        ("regex", rf"\\.|{_CLASS}"),
        ("ebnf", f"{_STRING}|{_CLASS}"),
    )
}


@dataclass(frozen=True, slots=True)
class Grammar:
    """A constraint. Make one with the methods below: they check more than the constructor does.

    Attributes:
        kind: what the text is.
        text: a JSON schema, nothing (`json_object`), a regular expression, a grammar whose root is `root`, or the structure of a text
            as JSON (`structural`; see `tool_call_grammar`).
        after: constrain only what follows the first occurrence of this text in the output; None constrains all of it.

    Raises:
        ValueError: it is too large, nested too deep, or not text.
    """

    kind: Kind
    text: str = ""
    after: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"the kind of a grammar is {self.kind!r}; it must be one of {', '.join(_KINDS)}")
        if (self.kind == "json_object") == bool(self.text):
            raise ValueError(f"a grammar of kind {self.kind} must have {'no' if self.text else 'a'} text")
        _check_size(self.kind, self.text)
        if self.after is not None and not 0 < len(self.after) <= MAX_AFTER:
            raise ValueError(f"after is {self.after!r:.80}; it must be a text of 1 to {MAX_AFTER} characters")
        _check_characters(self.kind, self.text)
        _check_characters("text of after", self.after or "")
        if (depth := _nesting(self.kind, self.text)) > MAX_NESTING:
            raise ValueError(f"the {self.kind} is nested {depth} deep; at most {MAX_NESTING} is allowed")

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool | str, *, after: str | None = None) -> Grammar:
        """JSON that a schema accepts; its properties come in the schema's order, and no others unless it allows them.

        Args:
            schema: the schema, or its JSON.
            after: see the class.

        Raises:
            ValueError: the schema has something that could not be kept to; the message says where, and what.
        """
        if isinstance(schema, str):
            _check_size("json_schema", schema)
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"the json_schema is not JSON: {error}") from None
        try:
            text = json.dumps(checked_schema(schema), ensure_ascii=False)
        except RecursionError:
            raise ValueError(f"the json_schema is nested too deep; at most {MAX_NESTING} is allowed") from None
        return cls("json_schema", text, after)

    @classmethod
    def json_object(cls, *, after: str | None = None) -> Grammar:
        """Any JSON object."""
        return cls("json_object", "", after)

    @classmethod
    def regex(cls, pattern: str, *, after: str | None = None) -> Grammar:
        """Text that a regular expression matches from its first character to its last."""
        return cls("regex", pattern, after)

    @classmethod
    def ebnf(cls, text: str, *, after: str | None = None) -> Grammar:
        """Text of a grammar in GBNF, llama.cpp's dialect of EBNF: rules are written `name ::= ...`, and `root` is the first."""
        return cls("ebnf", text, after)

    def structure(self) -> dict[str, Any]:
        """The constraint as a structure, for `structural`; `after` is left out."""
        match self.kind:
            case "regex":
                return {"type": "regex", "pattern": self.text}
            case "ebnf":
                return {"type": "grammar", "grammar": self.text}
            case "structural":
                structure: dict[str, Any] = json.loads(self.text)
                return structure
            case _:
                schema = {"type": "object", "additionalProperties": True} if self.kind == "json_object" else json.loads(self.text)
                return {"type": "json_schema", "json_schema": schema, "max_whitespace_cnt": MAX_BLANKS}


def _check_size(what: str, text: str) -> None:
    if len(text) > MAX_TEXT:
        raise ValueError(f"the {what} has {len(text)} characters; at most {MAX_TEXT} bytes are allowed")


def _check_characters(what: str, text: str) -> None:
    if "\0" in text:
        raise ValueError(f"the {what} has a null character at {text.index(chr(0))}")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise ValueError(f"the {what} has a lone surrogate at {error.start}, which is no character") from None
    if size > MAX_TEXT:
        raise ValueError(f"the {what} has {size} bytes; at most {MAX_TEXT} are allowed")


def _nesting(kind: str, text: str) -> int:
    """How deep brackets are nested, those within strings and character classes aside."""
    if not text:
        return 0
    bare = _NO_BRACKETS[kind].sub("", text)
    depth = deepest = 0
    for bracket in re.findall(r"[()]" if kind in ("regex", "ebnf") else r"[\[\]{}]", bare):
        depth += 1 if bracket in "[{(" else -1
        deepest = max(deepest, depth)
    return deepest
