"""What a request says about the form of its answer, as a grammar; the real engine keeps to it in test_real_engine."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from pointsman.grammar import Grammar, call_or_answer, tool_call_grammar
from pointsman.server import constraints
from pointsman.server.errors import ApiError
from pointsman.server.protocol import ChatRequest, offered
from pointsman.server.reading import convert
from tests.server.asking import HELLO, chat, complete, fault, generate
from tests.server.test_chat import TOOLS

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
AFTER = "</think>"
CALLED = {"type": "function", "function": {"name": "add"}}
STRICT = {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"not": {}}}}


def grammar_of(**fields: Any) -> Grammar | None:
    request = convert({"messages": HELLO, **fields}, ChatRequest)
    request.check()
    return constraints.of_chat(request, offered(request), AFTER)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Grammar.json_object(after=AFTER)),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}}, "schema"),
        ({"json_schema": SCHEMA}, "schema"),
        ({"json_schema": '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'}, "schema"),
        ({"regex": "[0-9]+"}, Grammar.regex("[0-9]+", after=AFTER)),
        ({"ebnf": 'root ::= "x"'}, Grammar.ebnf('root ::= "x"', after=AFTER)),
        ({"tools": TOOLS}, None),
        ({"tools": TOOLS, "tool_choice": "auto"}, None),
        ({"tools": TOOLS, "tool_choice": "none", "regex": "x"}, Grammar.regex("x", after=AFTER)),
        ({"tools": TOOLS, "tool_choice": "required"}, tool_call_grammar(TOOLS, "required", after=AFTER)),
        (
            {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False},
            tool_call_grammar(TOOLS, "required", parallel=False, after=AFTER),
        ),
        ({"tools": TOOLS, "tool_choice": CALLED}, tool_call_grammar(TOOLS, "add", after=AFTER)),
        (
            {"tools": TOOLS, "json_schema": SCHEMA},
            call_or_answer(tool_call_grammar(TOOLS, "required", after=AFTER), Grammar.json_schema(SCHEMA, after=AFTER)),
        ),
    ],
)
def test_what_is_asked(fields: dict[str, Any], expected: Grammar | str | None) -> None:
    assert grammar_of(**fields) == (Grammar.json_schema(SCHEMA, after=AFTER) if expected == "schema" else expected)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"regex": "x", "ebnf": "x"}, "ebnf", "regex and ebnf each say"),
        ({"response_format": {"type": "json_object"}, "json_schema": SCHEMA}, "json_schema", "each say"),
        ({"tools": TOOLS, "tool_choice": "required", "regex": "x"}, "tool_choice", "must be called"),
        ({"json_schema": "{"}, "json_schema", "is not JSON"),
        ({"json_schema": {"not": {}}}, "json_schema", "not"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "thing"}}}}, "response_format", "thing"),
        ({"regex": "(" * 100 + ")" * 100}, "regex", "nested"),
        ({"tools": [STRICT], "tool_choice": "required"}, "tools", "not"),
    ],
)
def test_what_cannot_be_kept_to(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(ApiError, match=words) as caught:
        grammar_of(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_refusals_of_all_routes(client: httpx.Client) -> None:
    assert fault(chat(client, response_format={"type": "json_schema", "json_schema": {"schema": {"not": {}}}}), 400)
    assert fault(complete(client, json_schema={"not": {}}), 400)["param"] == "json_schema"
    assert fault(generate(client, text="x", sampling_params={"json_schema": {"not": {}}}), 400)["param"] == "sampling_params.json_schema"
    assert fault(generate(client, text="x", sampling_params={"regex": "x" * (1 << 18)}), 400)["param"] == "sampling_params.regex"
    assert fault(complete(client, prompt="UNUSABLE", regex="x"), 400)["message"] == "the regex cannot be used: no text fits it"
    assert fault(complete(client, prompt="UNUSABLE", regex="x", stream=True), 400)
