"""Tools that must be called, as a grammar of MiniMax-M2's own form of a call:

    <minimax:tool_call>
    <invoke name="f">
    <parameter name="p">value</parameter>
    </invoke>
    </minimax:tool_call>

Strings are written bare and everything else as JSON, so a parameter that may be any string is any text up to its closing tag, and one that
may not is JSON of its schema. Parameters come in the order of the schema. What a schema says that cannot be kept to is an error for a tool
with `strict`; for others, as with OpenAI, the schema is advice, and the parameter in question (or, where it is the whole schema, every
parameter) is free.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pointsman.grammar.form import Grammar
from pointsman.grammar.schema import checked_schema

MAX_TOOLS = 128
MAX_NAME = 256
MAX_PARAMETERS = 256
MAX_DEPTH = 8

Part = dict[str, Any]

_OPEN, _CLOSE = "<minimax:tool_call>\n", "</minimax:tool_call>"
_VALUE_CLOSE = "</parameter>\n"
_NAME = re.compile(r'[^\x00-\x1f"<>]+')
_DEFINITIONS = ("$defs", "definitions")


def tool_call_grammar(
    tools: Sequence[Mapping[str, Any]], choice: str, *, parallel: bool = True, after: str | None = None
) -> Grammar:  # fmt: skip
    """The answer is a call, or calls, of tools.

    Args:
        tools: as OpenAI has them, `{"type": "function", "function": {"name": ..., "parameters": ...}}`, or the functions alone.
        choice: "required": one or more calls of any of them; else the name of the tool that is called, once.
        parallel: more than one call may be made.
        after: see Grammar.

    Raises:
        ValueError: there is no such tool, or a tool with `strict` has a schema that could not be kept to.
    """
    functions = [tool["function"] if isinstance(tool.get("function"), Mapping) else tool for tool in tools]
    if not 0 < len(functions) <= MAX_TOOLS:
        raise ValueError(f"there are {len(functions)} tools; a call needs 1 to {MAX_TOOLS}")
    if choice != "required":
        functions = [function for function in functions if function.get("name") == choice]
        if not functions:
            raise ValueError(f"the tool {choice!r:.80} must be called, but is not among the tools")
    calls = [_call(function) for function in functions[: None if choice == "required" else 1]]
    once = choice != "required" or not parallel
    block = {"type": "tags_with_separator", "tags": calls, "separator": "", "at_least_one": True, "stop_after_first": once}
    return Grammar("structural", json.dumps(_sequence([_text(_OPEN), block, _text(_CLOSE)]), ensure_ascii=False), after)


def call_or_answer(calls: Grammar, answer: Grammar) -> Grammar:
    """The answer is what either grammar says, and nothing besides: tools may be called, or the form of an answer must be kept to."""
    either = {"type": "or", "elements": [calls.structure(), answer.structure()]}
    return Grammar("structural", json.dumps(either, ensure_ascii=False), answer.after)


def _call(function: Mapping[str, Any]) -> Part:
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name) > MAX_NAME:
        raise ValueError(f"a tool has the name {name!r:.80}; names have 1 to {MAX_NAME} characters, none of them a quote or a bracket")
    return {"type": "tag", "begin": f'<invoke name="{name}">\n', "content": _parameters(name, function), "end": "</invoke>\n"}


def _parameters(tool: str, function: Mapping[str, Any]) -> Part:
    schema = function.get("parameters")
    strict = function.get("strict") is True
    if not schema:
        return _text("")
    try:
        return _declared(schema, f"{tool}.parameters", strict)
    except ValueError:
        if strict:
            raise
        return {
            "type": "star",
            "content": _sequence([{"type": "regex", "pattern": '<parameter name="[^\\x00-\\x1f"<>]{1,64}">'}, _any_text()]),
        }


def _declared(schema: Any, place: str, strict: bool) -> Part:
    """The parameters that a schema names. Raises ValueError where the schema as a whole could not be kept to."""
    if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
        raise ValueError(f"{place} must be the schema of an object")
    properties, definitions = schema.get("properties", {}), {word: schema[word] for word in _DEFINITIONS if word in schema}
    if not isinstance(properties, Mapping) or len(properties) > MAX_PARAMETERS:
        raise ValueError(f"{place} must have at most {MAX_PARAMETERS} properties")
    whole = checked_schema({**schema, **definitions, "type": "object", "properties": dict.fromkeys(properties, True)}, place)
    assert isinstance(whole, dict)
    if not whole.keys() <= {"type", "properties", "required", "additionalProperties", *_DEFINITIONS}:
        raise ValueError(f"{place} has {', '.join(sorted(whole))}; a call can be kept to properties and required")
    required = whole.get("required", ())
    parts = []
    for name in whole.get("properties", {}):
        if not _NAME.fullmatch(name) or len(name) > MAX_NAME:
            raise ValueError(
                f"{place} has a property {name!r:.80}; names have 1 to {MAX_NAME} characters, none of them a quote or a bracket"
            )
        value = _value(properties.get(name, True), definitions, f"{place}.properties.{name}", strict)
        part = _sequence([_text(f'<parameter name="{name}">'), value])
        parts.append(part if name in required else {"type": "optional", "content": part})
    return _sequence(parts) if parts else _text("")


def _value(schema: Any, definitions: Mapping[str, Any], place: str, strict: bool) -> Part:
    """A value of a tool's parameter. A `format` is an annotation here."""
    try:
        checked = checked_schema(schema, place)
        known = {word: checked_schema({word: nodes}, place)[word] for word, nodes in definitions.items()}  # type: ignore[index]
    except ValueError:
        if strict:
            raise
        return _any_text()
    return _written(checked, known)


def _written(schema: Any, definitions: Mapping[str, Any]) -> Part:
    """How a value of a schema is written, and its closing tag."""
    forms: list[Part] = []
    if _collect(schema, definitions, forms, MAX_DEPTH):
        return _any_text()
    return _sequence([forms[0] if len(forms) == 1 else {"type": "or", "elements": forms}, _text(_VALUE_CLOSE)])


def _collect(schema: Any, definitions: Mapping[str, Any], forms: list[Part], depth: int) -> bool:
    """Add the ways to write a value of a schema; true where any text is one."""
    if schema is True:
        return True
    target = _target(schema, definitions)
    if target is not None and depth:
        return _collect(target, definitions, forms, depth - 1)
    members = _members(schema)
    if members and depth:
        return any(_collect(member, definitions, forms, depth - 1) for member in members)
    if isinstance(schema, dict) and "enum" in schema:
        forms += [_text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)) for value in schema["enum"]]
    elif isinstance(schema, dict) and schema.get("type") == "string":
        if not schema.keys() & {"minLength", "maxLength", "pattern"}:
            return True
        pattern = schema.get("pattern", f"[^<\\ud800-\\udfff]{{{schema.get('minLength', 0)},{schema.get('maxLength', '')}}}")
        forms.append({"type": "regex", "pattern": pattern})
    else:
        whole = {**definitions, **schema} if isinstance(schema, dict) else schema
        forms.append({"type": "json_schema", "json_schema": whole, "excludes": [_VALUE_CLOSE.strip()]})
    return False


def _target(schema: Any, definitions: Mapping[str, Any]) -> Any:
    """The definition that a schema refers to, or None."""
    if not isinstance(schema, dict) or "$ref" not in schema:
        return None
    word, _, name = schema["$ref"].removeprefix("#/").partition("/")
    return definitions.get(word, {}).get(name)


def _members(schema: Any) -> list[Any]:
    """The alternatives of a schema; none where it is not made of some."""
    if not isinstance(schema, dict):
        return []
    if isinstance(schema.get("type"), list):
        return [checked_schema({**schema, "type": name}) for name in schema["type"]]
    return list(schema.get("anyOf") or schema.get("oneOf") or ())


def _any_text() -> Part:
    """Any text up to its closing tag, with that tag."""
    return {"type": "tag", "begin": "", "content": {"type": "any_text"}, "end": _VALUE_CLOSE}


def _text(value: str) -> Part:
    return {"type": "const_string", "value": value}


def _sequence(parts: list[Part]) -> Part:
    return {"type": "sequence", "elements": parts}
