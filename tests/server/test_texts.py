"""Tokens of texts, texts of tokens, and what is in a model's text."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.server.asking import HELLO, fault
from tests.server.fake_engine import CONTEXT
from tests.server.test_chat import CALLS, TOOLS


def ask(client: httpx.Client, path: str, **fields: Any) -> Any:
    response = client.post(path, json=fields)
    assert response.status_code == 200, response.text
    return response.json()


def test_tokens_and_texts(client: httpx.Client) -> None:
    one = ask(client, "/tokenize", prompt="é[e~[")
    assert one["count"] == len(one["tokens"]) == 3 and one["max_model_len"] == CONTEXT
    two = ask(client, "/tokenize", prompt=["é[e~[", "x"], model="fake", add_special_tokens=False)
    assert two["tokens"][0] == one["tokens"] and two["count"] == [3, 1]
    assert ask(client, "/detokenize", tokens=one["tokens"]) == {"text": "é"}
    assert ask(client, "/detokenize", tokens=two["tokens"], skip_special_tokens=False) == {"text": ["é[e~[", "x"]}
    assert ask(client, "/detokenize", tokens=[]) == {"text": ""}


def test_tokens_of_a_conversation(client: httpx.Client) -> None:
    plain = ask(client, "/tokenize", messages=HELLO)
    text = ask(client, "/detokenize", tokens=plain["tokens"], skip_special_tokens=False)["text"]
    assert text == "]~b]user\nhello[e~[\n]~b]ai\n<think>\n"
    assert ask(client, "/tokenize", messages=HELLO, tools=TOOLS)["count"] > plain["count"]
    assert ask(client, "/tokenize", messages=HELLO, tools=TOOLS, tool_choice="none") == plain


def test_what_is_in_a_text(client: httpx.Client) -> None:
    apart = ask(client, "/separate_reasoning", text=CALLS, reasoning_parser="minimax")
    assert apart["reasoning_text"] == "hm" and apart == ask(client, "/separate_reasoning", text=CALLS)
    parsed = ask(client, "/parse_function_call", text=apart["text"], tools=TOOLS, tool_call_parser="minimax-m2")
    assert parsed == {
        "normal_text": "Now:",
        "calls": [
            {"tool_index": 0, "name": "add", "parameters": '{"a": 5}'},
            {"tool_index": 1, "name": "say", "parameters": '{"text": "5 \\"é\\""}'},
        ],
    }


REFUSED: list[tuple[str, dict[str, Any], str | None, str]] = [
    ("/tokenize", {}, "prompt", "prompt or messages"),
    ("/tokenize", {"prompt": "x", "messages": HELLO}, "messages", "not both"),
    ("/tokenize", {"messages": HELLO, "add_special_tokens": True}, "add_special_tokens", "chat template"),
    ("/tokenize", {"prompt": "x", "text": "x"}, "text", "unknown field"),
    ("/tokenize", {"prompt": ["x"] * 1025}, "prompt", "at most 1024"),
    ("/detokenize", {"tokens": ["x"]}, "tokens", "token ids"),
    ("/detokenize", {"tokens": [[1], [True]]}, "tokens", "token ids"),
    ("/detokenize", {"tokens": [300]}, "tokens", "from 0 to 299"),
    ("/detokenize", {"tokens": [[1]] * 1025}, "tokens", "at most 1024"),
    ("/parse_function_call", {"text": "x", "tools": [{}]}, "tools[0]", "function"),
    ("/parse_function_call", {"text": "x", "tools": [], "tool_call_parser": "qwen"}, "tool_call_parser", 'be "minimax-m2"'),
    ("/separate_reasoning", {"text": "x", "reasoning_parser": "qwen3"}, "reasoning_parser", '"minimax"'),
    ("/separate_reasoning", {"reasoning_parser": "minimax"}, None, "`text` is missing"),
]


@pytest.mark.parametrize(("path", "fields", "param", "words"), [pytest.param(*case, id=f"{case[0]} {case[3]}") for case in REFUSED])
def test_refuses(client: httpx.Client, path: str, fields: dict[str, Any], param: str | None, words: str) -> None:
    error = fault(client.post(path, json=fields), 400)
    assert error["param"] == param and words in error["message"]


def test_another_model(client: httpx.Client) -> None:
    assert fault(client.post("/tokenize", json={"model": "other", "prompt": "x"}), 404)["code"] == "model_not_found"
