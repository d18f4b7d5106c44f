"""Tools that must be called, as structures: names, choices and what a schema asks of a value. Their texts are tried in tests/sampling."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pointsman.grammar import Grammar, call_or_answer, tool_call_grammar

LOOK = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {"q": {"type": "string"}}}}}


def tool(name: str = "f", strict: bool | None = None, **schema: Any) -> dict[str, Any]:
    return {"name": name, "parameters": schema or None, "strict": strict}


@pytest.mark.parametrize(
    ("tools", "choice", "reason"),
    [
        ([], "required", "there are 0 tools"),
        ([tool(str(index)) for index in range(129)], "required", "there are 129 tools"),
        ([LOOK], "see", "'see' must be called, but is not among the tools"),
        ([tool('a"b')], "required", "none of them a quote or a bracket"),
        ([{"parameters": {}}], "required", "has the name None"),
        ([tool(strict=True, type="object", properties={"a": {"not": {}}})], "f", r"f\.parameters\.properties\.a has 'not'"),
        ([tool(strict=True, type="object", properties={}, propertyNames={})], "f", "a call can be kept to properties"),
        ([tool(strict=True, type="string")], "f", "must be the schema of an object"),
        ([tool(strict=True, type="object", properties={"<": {}})], "f", "a quote or a bracket"),
    ],
)
def test_what_is_refused(tools: list[dict[str, Any]], choice: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        tool_call_grammar(tools, choice)


def calls(grammar: Grammar) -> Any:
    return json.loads(grammar.text)["elements"][1]


@pytest.mark.parametrize(("choice", "parallel", "once"), [("required", True, False), ("required", False, True), ("look", True, True)])
def test_how_many_calls(choice: str, parallel: bool, once: bool) -> None:
    block = calls(tool_call_grammar([LOOK, tool()], choice, parallel=parallel))
    assert block["at_least_one"] and block["stop_after_first"] == once
    assert [tag["begin"] for tag in block["tags"]] == [
        f'<invoke name="{name}">\n' for name in (["look", "f"] if choice == "required" else ["look"])
    ]


@pytest.mark.parametrize("bad", [{"not": {}}, {"type": "array", "uniqueItems": True}, {"$ref": "elsewhere"}])
def test_without_strict_what_cannot_be_kept_to_is_free(bad: dict[str, Any]) -> None:
    free = calls(tool_call_grammar([tool(type="object", properties={"a": bad, "n": {"type": "integer"}})], "f"))
    plain = calls(tool_call_grammar([tool(type="object", properties={"a": {"type": "string"}, "n": {"type": "integer"}})], "f"))
    assert free == plain
    everything = calls(tool_call_grammar([tool(type="object", **{"not": {}})], "f"))
    assert everything["tags"][0]["content"]["type"] == "star"


def test_calls_or_an_answer() -> None:
    either = call_or_answer(tool_call_grammar([LOOK], "required"), Grammar.json_object(after="</think>"))
    assert [part["type"] for part in json.loads(either.text)["elements"]] == ["sequence", "json_schema"] and either.after == "</think>"
