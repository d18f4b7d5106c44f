"""Grammars as data: what is refused before anything expensive looks at it, and that they cross between processes as they are."""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pointsman import SamplingParams
from pointsman.grammar import MAX_NESTING, MAX_TEXT, Grammar


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        ({"kind": "lark", "text": "x"}, "must be one of json_schema"),
        ({"kind": "regex", "text": ""}, "must have a text"),
        ({"kind": "json_object", "text": "{}"}, "must have no text"),
        ({"kind": "regex", "text": "x" * (MAX_TEXT + 1)}, f"at most {MAX_TEXT}"),
        ({"kind": "regex", "text": "ü" * (MAX_TEXT // 2 + 1)}, f"at most {MAX_TEXT}"),
        ({"kind": "regex", "text": "a\0"}, "null character at 1"),
        ({"kind": "ebnf", "text": "a\ud800"}, "lone surrogate at 1"),
        ({"kind": "regex", "text": "(" * 65 + ")" * 65}, "nested 65 deep"),
        ({"kind": "ebnf", "text": "root ::= " + "(" * 99 + '"a"'}, "nested 99 deep"),
        ({"kind": "json_schema", "text": '{"items":' * 70 + "{}" + "}" * 70}, "nested 71 deep"),
        ({"kind": "regex", "text": "a", "after": ""}, "after is ''"),
        ({"kind": "regex", "text": "a", "after": "x" * 65}, "1 to 64 characters"),
        ({"kind": "regex", "text": "a", "after": "\ud800"}, "text of after"),
    ],
)
def test_what_is_refused(grammar: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        Grammar(**grammar)


@pytest.mark.parametrize("text", ["[" * 5000, '"' * 5001, "[\\" * 4000, "(" * MAX_NESTING + ")" * MAX_NESTING, r"\(" * 500, "[(((]" * 100])
def test_brackets_are_counted_where_they_are_brackets_and_in_linear_time(text: str) -> None:
    assert Grammar.regex(text).text == text


@pytest.mark.parametrize("schema", ["{", "[" * 100_000, '{"a": ' * 1000 + "1" + "}" * 1000, "x" * (MAX_TEXT + 1)])
def test_a_schema_that_is_no_json(schema: str) -> None:
    with pytest.raises(ValueError, match="json_schema"):
        Grammar.json_schema(schema)


def test_a_schema_nested_deeper_than_python_goes() -> None:
    schema: dict[str, Any] = {}
    for _ in range(3000):
        schema = {"items": schema}
    with pytest.raises(ValueError, match="nested too deep"):
        Grammar.json_schema(schema)


def test_a_schema_may_come_as_text_or_as_what_it_says() -> None:
    schema = {"type": "object", "properties": {"ü": {"type": "string"}}}
    assert Grammar.json_schema(json.dumps(schema)) == Grammar.json_schema(schema)
    assert list(json.loads(Grammar.json_schema({"type": "object", "properties": {"z": {}, "a": {}}}).text)["properties"]) == ["z", "a"]


@given(st.text(min_size=1, max_size=50), st.none() | st.text(min_size=1, max_size=20))
@settings(deadline=None, max_examples=60)
def test_a_grammar_crosses_between_processes_or_is_refused(text: str, after: str | None) -> None:
    try:
        grammar = Grammar.regex(text, after=after)
    except ValueError:
        return
    params = SamplingParams(grammar=grammar)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


def test_sampling_parameters_take_grammars_alone() -> None:
    with pytest.raises(ValueError, match=r"must be a pointsman\.grammar\.Grammar"):
        SamplingParams(grammar={"kind": "regex"})  # type: ignore[arg-type]
