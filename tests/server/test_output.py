"""The parser of answers: docs/parsing.md row by row, and one rule over all of them: cutting a text differently changes nothing."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pydantic_core
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pointsman.request import FinishReason
from pointsman.server.events import Event, Message, ToolArgumentsDelta, ToolCall, join, merge
from pointsman.server.output import OutputParser, Reasoning, parse_output, parse_tool_calls
from pointsman.server.tags import MAX_HELD, Tag
from pointsman.text.template import ChatTemplate
from tests.server.parsing_cases import PARSING_CASES, TOOLS, Case, block, invoke
from tests.server.value_cases import VALUE_CASES

CASES = PARSING_CASES | VALUE_CASES
ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "parsing.md"
TEMPLATE = ROOT / "pointsman" / "tiny" / "chat_template.jinja"
WAYS: list[tuple[Reasoning | None, bool]] = [("minimax", True), ("minimax", False), ("minimax-append-think", True), (None, True)]
REASONS = list(FinishReason)


def read(pieces: Iterable[str], case: Case) -> list[Event]:
    """The events of a text in pieces. What is kept back between them is bounded."""
    parser = OutputParser(case.reasoning, case.tools, opened=case.opened)
    events: list[Event] = []
    for piece in pieces:
        events += parser.push(piece)
        assert parser.num_held <= MAX_HELD
    return merge([*events, *parser.finish(case.reason)])


def cuts(text: str, places: Iterable[int]) -> list[str]:
    edges = sorted({0, len(text), *(place for place in places if place < len(text))})
    return [text[start:end] for start, end in itertools.pairwise(edges)]


@pytest.mark.parametrize(("name", "case"), [pytest.param(name, case, id=name) for name, cases in CASES.items() for case in cases])
def test_case(name: str, case: Case) -> None:
    """Whole, letter by letter, in pairs, and in two at every place."""
    events = read([case.text], case)
    assert join(events) == case.message
    for tool_call in case.message.tool_calls:
        assert isinstance(json.loads(tool_call.arguments, parse_constant=pytest.fail), dict)
    assert read(case.text, case) == events
    assert read(cuts(case.text, range(0, len(case.text), 2)), case) == events
    for place in range(min(len(case.text), 200)):
        assert read(cuts(case.text, [place]), case) == events


def test_the_document_has_every_case_and_only_these() -> None:
    rows = re.findall(r"^\| `([^`]+)` \|", DOCUMENT.read_text(), re.MULTILINE)
    assert len(rows) == len(set(rows))
    assert set(rows) == set(CASES)


# Texts at random: of tags and halves of tags, in and out of order.
TAGS = [
    *Tag,
    "<think>",
    '<invoke name="f">',
    '<parameter name="text">',
    '<parameter name="count">',
    '<parameter name="maybe">',
    "<invoke name=",
]
NOISE = ["<", ">", '"', "\n", " ", "\r\n", "a", "é", "5", "nul", "null", "{", "</", "\\", '<invoke name="', "<parameter", "\n\n"]
CLOSED = ["</parameter>\n", "</invoke>\n", "</parameter>\n</invoke>\n</minimax:tool_call>", block(invoke("f", ("items", "[1, 2]")))]
OPENED = ['<minimax:tool_call>\n<invoke name="f">\n', '<minimax:tool_call>\n<invoke name="g">\n<parameter name="x">']
TEXTS = st.lists(st.sampled_from([*TAGS, *NOISE, *CLOSED, *OPENED]), max_size=24).map("".join)


@settings(deadline=None, max_examples=400)
@given(text=TEXTS, places=st.lists(st.integers(0, 200), max_size=8), way=st.sampled_from(WAYS), reason=st.sampled_from(REASONS))
def test_any_cut_gives_the_same_events(text: str, places: list[int], way: tuple[Reasoning | None, bool], reason: FinishReason) -> None:
    case = Case(text=text, message=Message(), reasoning=way[0], opened=way[1], tools=TOOLS, reason=reason)
    events = read([text], case)
    assert read(text, case) == events
    assert read(cuts(text, places), case) == events
    for tool_call in join(events).tool_calls:
        assert isinstance(json.loads(tool_call.arguments), dict)


# Texts at random whose every other piece is a word of its own, so that what became of each word can be told.
WORDY = st.lists(st.sampled_from([*TAGS, *NOISE, *CLOSED, *OPENED]), max_size=24)


@settings(deadline=None, max_examples=400)
@given(pieces=WORDY, way=st.sampled_from(WAYS))
def test_every_word_is_said_once(pieces: list[str], way: tuple[Reasoning | None, bool]) -> None:
    text = "".join(f"{piece}«{index}»" for index, piece in enumerate(pieces))
    message = parse_output(text, way[0], TOOLS, opened=way[1])
    names = [tool_call.name for tool_call in message.tool_calls]
    arguments = [tool_call.arguments for tool_call in message.tool_calls]
    said = " ".join([message.reasoning, message.content, *names, *arguments])
    for index in range(len(pieces)):
        assert said.count(f"«{index}»") == 1


@settings(deadline=None, max_examples=200)
@given(text=TEXTS, end=st.integers(0, 400), way=st.sampled_from(WAYS))
def test_what_is_cut_off_is_the_beginning_of_the_whole(text: str, end: int, way: tuple[Reasoning | None, bool]) -> None:
    """What a client has seen before the end stays true, whatever comes."""
    part, whole = OutputParser(way[0], TOOLS, opened=way[1]), parse_output(text, way[0], TOOLS, opened=way[1])
    seen = part.push(text[:end])
    calls = dict.fromkeys(range(part.num_calls), "")
    for event in seen:
        if isinstance(event, ToolArgumentsDelta):
            calls[event.index] += event.text
    for index, arguments in calls.items():
        assert whole.tool_calls[index].arguments.startswith(arguments)
        pydantic_core.from_json(arguments or "{", allow_partial="trailing-strings")
    begun = join([*seen, *part.finish(FinishReason.LENGTH)])
    assert len(begun.tool_calls) <= len(whole.tool_calls)


# Messages at random, written as the chat template writes them, and read back.
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
TYPED: dict[str, st.SearchStrategy[Any]] = {
    "string": st.text(max_size=20) | st.sampled_from([*NOISE, "</parameter> x", "</invoke>", "null", "5"]),
    "integer": st.integers(),
    "number": st.floats(allow_nan=False, allow_infinity=False),
    "boolean": st.booleans(),
    "array": st.lists(JSON, max_size=3),
    "object": st.dictionaries(st.text(max_size=3), JSON, max_size=3),
    "null": st.none(),
}
PROSE = st.text(alphabet="ab <é\n", max_size=12).map(lambda text: text.strip("\n"))


@st.composite
def messages(draw: st.DrawFn) -> tuple[str, str, list[tuple[str, dict[str, Any]]], list[dict[str, Any]]]:
    """Thinking, answer, calls and the tools that they are of."""
    kinds = draw(st.lists(st.sampled_from(sorted(TYPED)), max_size=5))
    properties = {f"p{index}": {"type": kind} for index, kind in enumerate(kinds)}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": properties}}}]
    calls = draw(st.lists(st.fixed_dictionaries({f"p{index}": TYPED[kind] for index, kind in enumerate(kinds)}), max_size=3))
    return draw(PROSE), draw(PROSE), [("f", arguments) for arguments in calls], tools


def write(content: str, calls: list[tuple[str, dict[str, Any]]]) -> str:
    if not calls:
        return content
    texts = [
        invoke(
            name, *((key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)) for key, value in arguments.items())
        )
        for name, arguments in calls
    ]
    return ("\n" if content else "").join([content, block(*texts)])


@settings(deadline=None, max_examples=300)
@given(drawn=messages(), places=st.lists(st.integers(0, 300), max_size=6))
def test_what_a_template_writes_is_read_back(
    drawn: tuple[str, str, list[tuple[str, dict[str, Any]]], list[dict[str, Any]]], places: list[int]
) -> None:
    reasoning, content, calls, tools = drawn
    text = f"{reasoning}\n</think>\n\n{write(content, calls)}"
    case = Case(text=text, message=Message(), reasoning="minimax", tools=tools)
    message = join(read(cuts(text, places), case))
    assert (message.reasoning, message.content) == (reasoning, content)
    assert all(tool_call.complete for tool_call in message.tool_calls)
    found = [(tool_call.name, json.loads(tool_call.arguments)) for tool_call in message.tool_calls]
    assert [(name, json.dumps(arguments)) for name, arguments in found] == [(name, json.dumps(arguments)) for name, arguments in calls]


def test_what_the_bundled_template_writes_is_read_back() -> None:
    """Its own form of a call is the one that its model has learnt."""
    arguments = {"city": 'Q "<b>"\n', "count": 3, "flag": True, "items": [1, {"é": None}], "size": 2.5, "maybe": None}
    calls = [{"type": "function", "function": {"name": "f", "arguments": json.dumps(arguments)}}] * 2
    turn = {"role": "assistant", "content": "Let me see.", "reasoning_content": "I need\n\nf.", "tool_calls": calls}
    prompt = ChatTemplate(TEMPLATE.read_text()).render([{"role": "user", "content": "hi"}, turn], TOOLS, add_generation_prompt=False)
    text = prompt.rpartition("]~b]ai\n")[2].removesuffix("[e~[\n")
    message = parse_output(text, "minimax", TOOLS, opened=False)
    assert message == Message("I need\n\nf.", "Let me see.", (ToolCall("f", json.dumps(arguments, ensure_ascii=False)),) * 2)


def test_what_is_certain_is_not_held_back() -> None:
    parser = OutputParser("minimax", TOOLS)
    steps: list[tuple[str, Message]] = [
        ("\n2 + 2", Message("2 + 2")),
        (" = 4 <", Message(" = 4 ")),
        ("b\n", Message("<b")),
        ("</think>\n\nFour", Message("", "Four")),
    ]
    for text, added in steps:
        assert join(parser.push(text)) == added
    assert parser.answered
    assert not parser.thinking
    assert parser.push('\n<minimax:tool_call>\n<invoke name="f">')
    assert parser.num_calls == 1
    texts = ['<parameter name="text">', "so ", "1 <", "/b>", "</parameter>", "\n</invoke>"]
    pieces = [[event.text for event in parser.push(text) if isinstance(event, ToolArgumentsDelta)] for text in texts]
    assert pieces == [['{"text": "'], ["so "], ["1 "], ["</b>"], [], ['"}']]


def test_an_answer_without_tools_holds_no_line_ends() -> None:
    parser = OutputParser(None, None)
    assert join(parser.push("a\n\n<minimax:tool_call>\n")).content == "a\n\n<minimax:tool_call>\n"


def test_reading_a_whole_text() -> None:
    text = f"a\n{block(invoke('f', ('count', '1')))}\nb"
    assert parse_tool_calls(text, TOOLS) == Message("", "a\nb", (ToolCall("f", '{"count": 1}'),))
    assert parse_output(f"so</think>{text}", "minimax", TOOLS).reasoning == "so"


def test_a_reasoning_parser_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'deepseek'.*minimax, minimax-append-think"):
        OutputParser("deepseek", None)  # type: ignore[arg-type]


REPEATED = [
    *TAGS,
    *NOISE,
    "x",
    "</parameter> ",
    "<parameter name=x>",
    '<invoke name="x"',
    "<minimax:tool_call> <",
    '"\\"',
    "<invoke >",
    '<invoke " ',
]


@pytest.mark.parametrize("start", ["", *OPENED, '<minimax:tool_call>\n<invoke name="f">\n<parameter name="items">["'])
@pytest.mark.parametrize("piece", REPEATED)
def test_what_is_read_again_is_bounded(start: str, piece: str) -> None:
    """The work of a push is linear in what is held and what is new; so is that of a text if what is held is bounded."""
    text = start + piece * (6000 // len(piece))
    case = Case(text=text, message=Message(), reasoning="minimax", tools=TOOLS)
    assert read(text, case) == read([text], case)
