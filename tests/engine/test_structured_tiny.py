"""Structured answers of a model that knows something: the bundled checkpoint thinks freely, and then answers in the form asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from pointsman import LLM, SamplingParams
from pointsman.grammar import Grammar, tool_call_grammar
from pointsman.request import FinishReason
from pointsman.server.events import Message
from pointsman.server.output import parse_output

QUESTION = [{"role": "user", "content": "Mia has 20 pens. She buys 15 more pens. How many pens does she have?"}]
SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "integer", "minimum": 0, "maximum": 999}, "sure": {"type": "boolean"}},
    "required": ["answer", "sure"],
}
PARAMETERS = {"value": {"type": "integer"}, "unit": {"enum": ["pens", "cups"]}}
TOOL = {"name": "answer", "parameters": {"type": "object", "properties": PARAMETERS, "required": ["value", "unit"]}}
GREEDY = SamplingParams(max_tokens=400, temperature=0.0)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    llm = LLM(progress=False)
    yield llm
    llm.close()


def answer(llm: LLM, grammar: Grammar | None) -> tuple[str, str]:
    """The thinking and the rest, line ends between them aside."""
    choice = llm.chat(QUESTION, GREEDY.replace(grammar=grammar))[0].outputs[0]
    assert choice.finish_reason is FinishReason.STOP
    thinking, mark, rest = choice.text.partition("</think>")
    assert mark and re.match("\n{0,2}[^\n]", rest)
    return thinking, rest.lstrip("\n")


def test_thinking_is_free_and_the_answer_is_json_of_the_schema(llm: LLM) -> None:
    thinking, text = answer(llm, Grammar.json_schema(SCHEMA, after="</think>"))
    value = json.loads(text)
    assert list(value) == ["answer", "sure"] and 0 <= value["answer"] <= 999 and isinstance(value["sure"], bool)
    assert thinking == answer(llm, None)[0], "nothing has touched it"


def test_a_form_that_suits_the_model_keeps_what_it_knows(llm: LLM) -> None:
    _, free = answer(llm, None)
    _, kept = answer(llm, Grammar.regex("(Mia|She) has [0-9]+ pens( now)?\\.", after="</think>"))
    assert re.findall("[0-9]+", free) == re.findall("[0-9]+", kept) == ["35"]


def test_a_call_that_is_required_is_read_as_one(llm: LLM) -> None:
    thinking, text = answer(llm, tool_call_grammar([TOOL], "required", after="</think>"))
    message: Message = parse_output(f"{thinking}</think>\n\n{text}", "minimax", [TOOL])
    assert not message.content and message.tool_calls
    for call in message.tool_calls:
        arguments = json.loads(call.arguments)
        assert call.name == "answer" and isinstance(arguments["value"], int) and arguments["unit"] in ("pens", "cups")
