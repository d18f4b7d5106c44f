"""JSON schemas: what cannot be kept to is refused by name and place, and what is left means what it meant."""

from __future__ import annotations

import random
from typing import Any

import pytest

from pointsman.grammar.schema import checked_schema
from tests.grammar.schemas import random_schema
from tests.grammar.validation import fits

STRING, NUMBER = {"type": "string"}, {"type": "number"}


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        (5, "is 5; a schema must be"),
        ({"not": STRING}, "json_schema has 'not'"),
        ({"items": {"if": {}}}, r"json_schema\.items has 'if'"),
        ({"properties": {"a": {"minlength": 3}}}, r"json_schema\.properties\.a has 'minlength'"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "contains": {}}, "contains"),
        ({"dependentRequired": {}}, "dependentRequired"),
        ({"$dynamicRef": "#a"}, "dynamicRef"),
        ({"$ref": "http://example.com/s"}, "must point into the same schema"),
        ({"$ref": "#/$defs/a~1b"}, "must point into the same schema"),
        ({"$ref": "#", "minLength": 3}, r"'minLength' beside '\$ref'"),
        ({"const": 1, "enum": [1]}, "'const' and 'enum'"),
        ({"enum": [1], "minimum": 0}, "'minimum' beside 'enum'"),
        ({"enum": []}, "must be a list, and not empty"),
        ({"type": "string", "enum": [1, None]}, "no value of type string"),
        ({"type": "text"}, "type is 'text'"),
        ({"minLength": 1, "minimum": 1}, "keywords of string and of number"),
        ({"type": "string", "minLength": -1}, "whole number from 0"),
        ({"type": "string", "maxLength": True}, "whole number from 0"),
        ({"type": "string", "pattern": "a", "maxLength": 3}, "'pattern' and 'maxLength'"),
        ({"type": "string", "format": "date", "maxLength": 3}, "'format' and 'maxLength'"),
        ({"type": "string", "pattern": "a(?=b)"}, r"json_schema\.pattern has, at character 2, a group that looks around"),
        ({"type": "number", "minimum": "3"}, "must be a number"),
        ({"type": "number", "multipleOf": 0.1}, "multipleOf"),
        ({"type": "integer", "multipleOf": 2, "minimum": 3}, "multipleOf"),
        ({"type": "array", "items": [STRING]}, "called prefixItems now"),
        ({"type": "object", "required": "a"}, "must be a list of names"),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "which additionalProperties excludes"),
        ({"type": "object", "patternProperties": {"a": {}, "b": {}}}, "must have one pattern"),
        ({"type": "object", "patternProperties": {"a": {}}, "properties": {"c": {}}}, "'patternProperties' and 'properties'"),
        ({"type": "object", "minProperties": 2}, "could have one of those twice"),
        ({"allOf": [{"properties": {"a": STRING}}, {"properties": {"a": NUMBER}}]}, "properties 'a' beside another"),
        ({"allOf": [STRING, NUMBER]}, "'type' beside another"),
        ({"allOf": [{"$ref": "#/$defs/a"}, STRING], "$defs": {"a": {}}}, "beside"),
        ({"allOf": [{"properties": {"a": {}}, "additionalProperties": False}, {"properties": {"b": {}}}]}, "excludes properties"),
        ({"type": "object", "anyOf": [{"type": "string"}]}, "'type' beside another"),
        ({"anyOf": [True], "type": "string"}, "cannot be joined"),
    ],
)
def test_what_is_refused(schema: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        checked_schema(schema)


@pytest.mark.parametrize(
    ("schema", "becomes"),
    [
        ({}, True),
        ({"title": "T", "description": "d", "x-note": 1, "default": 3}, True),
        ({"minLength": 2}, {"type": "string", "minLength": 2}),
        ({"minimum": 2}, {"type": "number", "minimum": 2}),
        ({"type": "string", "minimum": 2, "format": "password"}, STRING),
        ({"type": ["string", "string"]}, STRING),
        ({"type": "array"}, {"type": "array", "items": True}),
        ({"prefixItems": [{}, {}, {}], "maxItems": 2}, {"type": "array", "maxItems": 2, "prefixItems": [{}, {}]}),
        ({"type": "object"}, {"type": "object", "additionalProperties": True}),
        ({"required": ["a"]}, {"type": "object", "properties": {"a": True}, "required": ["a"]}),
        ({"const": 3}, {"enum": [3]}),
        ({"type": "integer", "enum": [1, 2.5, 3.0, "4"]}, {"enum": [1, 3.0]}),
        ({"type": "string", "nullable": True}, {"anyOf": [STRING, {"type": "null"}]}),
        ({"allOf": [STRING]}, STRING),
        ({"allOf": [{"$ref": "#/$defs/a"}], "description": "d"}, {"$ref": "#/$defs/a"}),
        ({"type": "string", "anyOf": [{"minLength": 2}]}, {"anyOf": [{"type": "string", "minLength": 2}]}),
        (
            {"patternProperties": {"^a": NUMBER}},
            {"type": "object", "propertyNames": {"type": "string", "pattern": "^a"}, "additionalProperties": NUMBER},
        ),
        ({"$defs": {"a": {"title": "A", **STRING}}, "$ref": "#/$defs/a"}, {"$defs": {"a": STRING}, "$ref": "#/$defs/a"}),
        ({"$defs": {}, "default": 1}, {"anyOf": [True], "$defs": {}}),
    ],
)
def test_what_is_written_differently(schema: Any, becomes: Any) -> None:
    assert checked_schema(schema) == becomes
    assert checked_schema(becomes) == becomes, "reading it again changes nothing"


def random_value(rng: random.Random, depth: int = 2) -> Any:
    kinds: list[Any] = [None, True, rng.randint(-9, 9), 2.5, "", "ab", "red", "a" * rng.randint(0, 6)]
    if depth:
        kinds.append([random_value(rng, depth - 1) for _ in range(rng.randint(0, 3))])
        kinds.append({name: random_value(rng, depth - 1) for name in rng.sample(["a", "b", "ab", "extra"], rng.randint(0, 3))})
    return rng.choice(kinds)


def test_what_is_left_accepts_nothing_new() -> None:
    """Random schemas against random values: whatever fits the checked schema fits the schema that was asked for."""
    rng = random.Random(1)
    accepted = 0
    for _ in range(400):
        schema = random_schema(rng, 2)
        try:
            checked = checked_schema(schema)
        except ValueError:
            continue
        for _ in range(30):
            value = random_value(rng)
            if fits(checked, value):
                accepted += 1
                assert fits(schema, value), (schema, checked, value)
    assert accepted > 1000
