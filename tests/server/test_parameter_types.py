"""Schemas and values: whatever a client or a model has written, the value is JSON, and of the type where it can be."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pointsman.server.parameter_types import ANY, TEXT, Parameters, ValueType, json_string, json_value

KINDS = ["string", "integer", "number", "boolean", "object", "array", "null"]
READ = {str: "string", bool: "boolean", int: "integer", float: "number", dict: "object", list: "array", type(None): "null"}


def accepts(schema: Any, **root: Any) -> ValueType:
    return Parameters({"properties": {"p": schema}, **root}).type_of("p")


def kinds(*names: str) -> ValueType:
    return ValueType(frozenset(names))


@pytest.mark.parametrize(
    ("schema", "accepted"),
    [
        ({}, ANY),
        (True, ANY),
        ("string", ANY),
        (None, ANY),
        ({"type": "string"}, TEXT),
        ({"type": []}, ANY),
        ({"type": ["integer", "null"]}, kinds("integer", "null")),
        ({"type": {"type": "string"}}, TEXT),
        ({"type": "number"}, kinds("integer", "number")),
        ({"enum": []}, ANY),
        ({"enum": ["a", "b"]}, ValueType(TEXT.kinds, frozenset("ab"))),
        ({"enum": ["a", "b"], "const": "a"}, ValueType(TEXT.kinds, frozenset("a"))),
        ({"enum": [True, 2.5, {}, []]}, kinds("boolean", "integer", "number", "object", "array")),
        ({"type": "integer", "enum": [1, 2]}, kinds("integer")),
        ({"anyOf": [{"enum": ["a"]}, {"enum": ["b", None]}]}, ValueType(frozenset({"string", "null"}), frozenset("ab"))),
        ({"anyOf": [{"enum": ["a"]}, {"type": "string"}]}, TEXT),
        ({"anyOf": [{"type": "integer"}], "oneOf": [{"type": "number"}]}, kinds("integer")),
        ({"anyOf": "integer", "allOf": {}}, ANY),
        ({"allOf": [{"type": "string"}, {"enum": ["a"]}]}, ValueType(TEXT.kinds, frozenset("a"))),
        ({"type": "string", "enum": ["a"], "nullable": True}, ValueType(frozenset({"string", "null"}), frozenset("a"))),
        ({"type": "string", "const": 5}, TEXT),
        ({"$ref": "#/$defs/a~1b%20c"}, kinds("boolean")),
        ({"$ref": "#"}, ANY),
        ({"$ref": "#/$defs/loop"}, ANY),
        ({"$ref": "#/$defs/list/0"}, ANY),
        ({"$ref": "elsewhere#/$defs/a"}, ANY),
        ({"$ref": 5}, ANY),
        ({"$ref": "#/properties/p", "type": "integer"}, kinds("integer")),
    ],
)
def test_what_a_schema_accepts(schema: Any, accepted: ValueType) -> None:
    definitions = {"a/b c": {"type": "boolean"}, "loop": {"$ref": "#/$defs/loop"}, "list": [{"type": "string"}]}
    assert accepts(schema, **{"$defs": definitions}) == accepted


def test_schemas_that_double_at_every_step_are_read_once() -> None:
    definitions: dict[str, Any] = {f"a{index}": {"anyOf": [{"$ref": f"#/$defs/a{index + 1}"}] * 2} for index in range(30)}
    definitions["a30"] = {"type": "integer"}
    assert accepts({"$ref": "#/$defs/a15"}, **{"$defs": definitions}) == kinds("integer")


def test_a_schema_too_deep_says_nothing() -> None:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(5000):
        schema = {"anyOf": [schema]}
    assert accepts(schema) == ANY


@pytest.mark.parametrize("schema", [None, True, [], "x", {"properties": []}, {"properties": {"q": {}}}, {"additionalProperties": False}])
def test_what_the_schema_does_not_know_is_text(schema: Any) -> None:
    assert Parameters(schema).type_of("p") == TEXT


def test_parameters_in_branches_of_the_root() -> None:
    root = {
        "$ref": "#/$defs/Root",
        "$defs": {"Root": {"$ref": "#", "anyOf": [{"properties": {"p": {"type": "integer"}}}, {"properties": {"p": {"type": "null"}}}]}},
        "allOf": [{"properties": {"q": {"type": "boolean"}}, "additionalProperties": {"type": "array"}}],
    }
    found = Parameters(root)
    assert found.type_of("p") == kinds("integer", "null")
    assert found.type_of("q") == kinds("boolean")
    assert found.type_of("r") == kinds("array")


SCHEMAS = st.recursive(
    st.sampled_from([{}, True, None, 5, {"$ref": "#"}, {"$ref": "#/properties/p"}, {"enum": ["a", "null", 1]}, {"const": None}])
    | st.builds(lambda name: {"type": name}, st.sampled_from([*KINDS, "odd", 5, []]) | st.lists(st.sampled_from(KINDS), max_size=3)),
    lambda inner: st.dictionaries(st.sampled_from(["anyOf", "oneOf", "allOf"]), st.lists(inner, max_size=3), max_size=3),
    max_leaves=8,
)
TEXTS = st.text(max_size=12) | st.sampled_from(
    ["null", "1", "-0", "1.5", "1e400", "NaN", "true", "None", " [1] ", '{"a": 1}', '["\\"', "a", "[NaN]"]
)


@settings(deadline=None, max_examples=500)
@given(schema=SCHEMAS, text=TEXTS)
def test_a_value_is_json_of_an_accepted_kind_or_the_text(schema: Any, text: str) -> None:
    accepted = accepts(schema)
    written = json_value(text, accepted)
    value = json.loads(written, parse_constant=pytest.fail)
    kind = READ[type(value)]
    assert value in (text, text.strip()) if isinstance(value, str) else kind in accepted.kinds
    assert written in (json_string(text), json_string(text.strip()), text.strip(), text.strip().lower(), "null") or kind == "integer"


@settings(deadline=None, max_examples=200)
@given(value=st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False), st.lists))
def test_what_json_writes_is_read_back(value: Any) -> None:
    text = json.dumps(value)
    assert json_value(f"\n{text} ", ANY) == text
    assert json.loads(json_value(text, kinds(READ[type(value)]))) == value
    assert json_value(text, TEXT) == json_string(text)


def test_a_listed_string_comes_before_all() -> None:
    accepted = accepts({"enum": ["5", 5, 6, "true", None]})
    assert [json_value(text, accepted) for text in ("5", " 5", "6", "true", "null")] == ['"5"', "5", "6", '"true"', "null"]


def test_long_and_deep_values_are_no_trouble() -> None:
    for text in (
        "[" * 100_000,
        '["' + '\\"' * 100_000,
        "9" * 100_000,
        "[" + "9" * 100_000 + "]",
        '{"a":' * 100_000,
        '"' * 100_001,
        "[" + '"' * 100_000,
    ):
        assert json.loads(json_value(text, ANY)) == text
