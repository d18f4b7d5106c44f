"""OpenAI's own client, as an agent uses it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import openai
import pytest

from tests.server.asking import HELLO
from tests.server.conftest import Server
from tests.server.fake_engine import REPLY, SENTENCE, THOUGHT
from tests.server.test_chat import CALLS, TOOLS


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_answers(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=HELLO, seed=1, stop=["x"])
    assert answer.choices[0].message.content == SENTENCE
    text = thought = ""
    for chunk in client.chat.completions.create(model="fake", messages=HELLO, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            text += choice.delta.content or ""
            thought += getattr(choice.delta, "reasoning_content", None) or ""
    assert (thought, text) == (THOUGHT, SENTENCE)
    assert chunk.usage is not None and chunk.usage == answer.usage
    assert client.completions.create(model="fake", prompt="hi", max_tokens=3).choices[0].text == REPLY[:3]
    assert [model.id for model in client.models.list()] == ["fake"]


def test_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-4", prompt="hi")
    with pytest.raises(openai.BadRequestError, match="suffix is not supported") as caught:
        client.completions.create(model="fake", prompt="hi", suffix="there")
    assert (caught.value.param, caught.value.code) == ("suffix", "unsupported_parameter")
    with pytest.raises(openai.RateLimitError):
        client.completions.create(model="fake", prompt="BUSY")
    with pytest.raises(openai.APIError):
        for _ in client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "FAULT"}], stream=True):
            pass


def test_a_turn_with_tools(client: openai.OpenAI) -> None:
    """Ask, take the calls, send the answer back as it is with the results."""
    turns = [{"role": "user", "content": f"SAY {CALLS}"}]
    message = client.chat.completions.create(model="fake", messages=turns, tools=TOOLS).choices[0].message
    assert message.tool_calls is not None
    arguments = [json.loads(call.function.arguments) for call in message.tool_calls]
    assert arguments == [{"a": 5}, {"text": '5 "é"'}]
    turns.append(message)
    turns += [{"role": "tool", "tool_call_id": call.id, "content": "done"} for call in message.tool_calls]
    again = client.chat.completions.create(model="fake", messages=turns, tools=TOOLS)
    assert again.usage.prompt_tokens > 0
    turns[1] = message.model_dump()
    assert client.chat.completions.create(model="fake", messages=turns, tools=TOOLS).usage == again.usage


def test_a_stream_with_tools(client: openai.OpenAI) -> None:
    """The client adds up the pieces by itself, and finds what a whole answer has."""
    turns = [{"role": "user", "content": f"SAY {CALLS}"}]
    with client.chat.completions.stream(model="fake", messages=turns, tools=TOOLS) as stream:
        [choice] = stream.get_final_completion().choices
    whole = client.chat.completions.create(model="fake", messages=turns, tools=TOOLS).choices[0]
    assert choice.finish_reason == whole.finish_reason == "tool_calls"
    assert choice.message.content == whole.message.content
    assert choice.message.tool_calls is not None and whole.message.tool_calls is not None
    for streamed, expected in zip(choice.message.tool_calls, whole.message.tool_calls, strict=True):
        assert (streamed.type, streamed.function.name) == (expected.type, expected.function.name)
        assert streamed.function.arguments == expected.function.arguments
