"""Random JSON schemas, of what `pointsman.grammar` keeps answers to."""

from __future__ import annotations

import random
from typing import Any

NAMES = ["a", "b", "long name", "ü", 'q"q', "x\\y"]
PATTERNS = ["^[a-c]{2,4}$", "^x|y$", "[0-9]+$", "^(ab)*$", '^[^"]\n?"$', r"^\\\w\s$", "", "^(\t|\\d){1,3}$", "^[^\x00-~]$"]
VALUES: list[Any] = [None, True, 0, -3, 2.5, "", "red", 'q"', [1, "a"], {"k": None}]


def random_schema(rng: random.Random, depth: int = 3) -> Any:
    """A schema that some value fits, usually."""
    kinds = [string, number, integer, simple, values, typed_list]
    if depth:
        kinds += [array, array, structure, structure, structure, union, whole]
    schema = rng.choice(kinds)(rng, depth)
    if rng.random() < 0.1 and isinstance(schema, dict):
        schema["description"] = "what it is"
    return schema


def string(rng: random.Random, depth: int) -> Any:
    schema: dict[str, Any] = {"type": "string"}
    if rng.random() < 0.3:
        return schema | {"pattern": rng.choice(PATTERNS)}
    if rng.random() < 0.3:
        schema["minLength"] = rng.randint(0, 5)
    if rng.random() < 0.3:
        schema["maxLength"] = schema.get("minLength", 0) + rng.randint(0, 5)
    return schema


def bounds(rng: random.Random, schema: dict[str, Any], scale: float) -> dict[str, Any]:
    low = round(rng.uniform(-scale, scale), 0 if schema["type"] == "integer" else 2)
    low = int(low) if schema["type"] == "integer" else low
    if rng.random() < 0.4:
        schema[rng.choice(["minimum", "exclusiveMinimum"])] = low
    if rng.random() < 0.4:
        schema[rng.choice(["maximum", "exclusiveMaximum"])] = low + rng.randint(3, 1000)
    return schema


def number(rng: random.Random, depth: int) -> Any:
    return bounds(rng, {"type": "number"}, rng.choice([3, 1000]))


def integer(rng: random.Random, depth: int) -> Any:
    if rng.random() < 0.2:
        return {"type": "integer", "multipleOf": rng.randint(1, 12)}
    return bounds(rng, {"type": "integer"}, rng.choice([3, 1000, 10**9]))


def simple(rng: random.Random, depth: int) -> Any:
    return rng.choice([{"type": "boolean"}, {"type": "null"}, {"type": "string", "nullable": True}, True, {}])


def values(rng: random.Random, depth: int) -> Any:
    if rng.random() < 0.3:
        return {"const": rng.choice(VALUES)}
    return {"enum": rng.sample(VALUES, rng.randint(1, 5))}


def typed_list(rng: random.Random, depth: int) -> Any:
    return {"type": rng.sample(["string", "integer", "null", "boolean"], 2), "minLength": 2, "minimum": 5}


def array(rng: random.Random, depth: int) -> Any:
    schema: dict[str, Any] = {"type": "array"} if rng.random() < 0.9 else {}
    if rng.random() < 0.2:
        schema["prefixItems"] = [random_schema(rng, depth - 1) for _ in range(rng.randint(1, 2))]
    if rng.random() < 0.8 or not schema:
        schema["items"] = random_schema(rng, depth - 1)
    if rng.random() < 0.4:
        schema["minItems"] = rng.randint(0, 3)
    if rng.random() < 0.4:
        schema["maxItems"] = schema.get("minItems", 0) + rng.randint(0 if schema.get("minItems") else 1, 3)
    return schema


def structure(rng: random.Random, depth: int) -> Any:
    schema: dict[str, Any] = {"type": "object"} if rng.random() < 0.9 else {}
    kind = rng.random()
    if kind < 0.1:
        return {"type": "object", "patternProperties": {"^[ab]+$": random_schema(rng, depth - 1)}}
    if kind < 0.2:
        return {"type": "object", "propertyNames": {"type": "string", "pattern": "^[ab]+$"}}
    if kind < 0.9 or not schema:
        names = rng.sample(NAMES, rng.randint(1, 4))
        schema["properties"] = {name: random_schema(rng, depth - 1) for name in names}
        schema["required"] = rng.sample(names, rng.randint(0, len(names))) + (["extra"] if rng.random() < 0.1 else [])
    if rng.random() < 0.3:
        others = rng.choice([False, True, {"type": "integer"}])
        if others is not False or "extra" not in schema.get("required", ()):
            schema["additionalProperties"] = others
    if rng.random() < 0.2:
        schema["minProperties"] = rng.randint(0, 2)
    if rng.random() < 0.2:
        schema["maxProperties"] = rng.randint(4, 6)
    return schema


def union(rng: random.Random, depth: int) -> Any:
    return {rng.choice(["anyOf", "oneOf"]): [random_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}


def whole(rng: random.Random, depth: int) -> Any:
    one = {"type": "object", "properties": {"a": random_schema(rng, depth - 1)}, "required": ["a"]}
    other = {"properties": {"b": random_schema(rng, depth - 1)}, "required": ["b"]}
    return {"allOf": [one, other]} if rng.random() < 0.5 else {**one, "anyOf": [other, {"properties": {"c": {"type": "null"}}}]}
