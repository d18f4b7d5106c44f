"""Whether a JSON value fits a schema, by the standard's words: the oracle of the tests. Only keywords that the tests use."""

from __future__ import annotations

import json
import re
from typing import Any


def fits(schema: Any, value: Any, root: Any = None) -> bool:
    """Draft 2020-12, with `pattern` searched for and `format` an annotation."""
    root = schema if root is None else root
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema and not fits(target(schema["$ref"], root), value, root):
        return False
    if "const" in schema and not same(schema["const"], value):
        return False
    if "enum" in schema and not any(same(entry, value) for entry in schema["enum"]):
        return False
    types = schema.get("type", [])
    types = [types] if isinstance(types, str) else types
    if types and not any(is_type(name, value) for name in types):
        return schema.get("nullable") is True and value is None
    branches = {form: [fits(branch, value, root) for branch in schema[form]] for form in ("anyOf", "oneOf", "allOf") if form in schema}
    if not (any(branches.get("anyOf", [True])) and any(branches.get("oneOf", [True])) and all(branches.get("allOf", [True]))):
        return False
    if isinstance(value, str):
        return fits_string(schema, value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return fits_number(schema, value)
    if isinstance(value, list):
        return fits_array(schema, value, root)
    return not isinstance(value, dict) or fits_object(schema, value, root)


def target(reference: str, root: Any) -> Any:
    for key in filter(None, reference.removeprefix("#").split("/")):
        root = root[int(key) if isinstance(root, list) else key]
    return root


def same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def is_type(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    if isinstance(value, int | float):
        return name == "number" or (name == "integer" and float(value).is_integer())
    return {"string": str, "null": type(None), "array": list, "object": dict}.get(name, type(...)) is type(value)


def found_in(pattern: str, text: str) -> bool:
    """As ECMAScript has it."""
    return re.search(pattern.replace(r"\s", r"[\t-\r \xa0\u2028\u2029\ufeff]"), text, re.ASCII) is not None


def fits_string(schema: Any, value: str) -> bool:
    if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
        return False
    return "pattern" not in schema or found_in(schema["pattern"], value)


def fits_number(schema: Any, value: float) -> bool:
    return (
        schema.get("minimum", value) <= value <= schema.get("maximum", value)
        and ("exclusiveMinimum" not in schema or value > schema["exclusiveMinimum"])
        and ("exclusiveMaximum" not in schema or value < schema["exclusiveMaximum"])
        and ("multipleOf" not in schema or value % schema["multipleOf"] == 0)
    )


def fits_array(schema: Any, value: list[Any], root: Any) -> bool:
    if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
        return False
    first = schema.get("prefixItems", [])
    return all(fits(part, item, root) for part, item in zip(first, value, strict=False)) and all(
        fits(schema.get("items", True), item, root) for item in value[len(first) :]
    )


def fits_object(schema: Any, value: dict[str, Any], root: Any) -> bool:
    if not schema.get("minProperties", 0) <= len(value) <= schema.get("maxProperties", len(value)):
        return False
    if any(name not in value for name in schema.get("required", ())):
        return False
    if any(not fits(schema.get("propertyNames", True), name, root) for name in value):
        return False
    for name, entry in value.items():
        patterns = [part for pattern, part in schema.get("patternProperties", {}).items() if found_in(pattern, name)]
        own = [schema["properties"][name]] if name in schema.get("properties", {}) else []
        parts = patterns + own or [schema.get("additionalProperties", True)]
        if not all(fits(part, entry, root) for part in parts):
            return False
    return True
