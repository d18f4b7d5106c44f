"""What a server refuses, and that it names what is at fault."""

from __future__ import annotations

import inspect
import json
from typing import Any

import httpx
import pytest

from pointsman.server.bounds import MAX_BODY_BYTES, MAX_COUNTED_TOKENS
from pointsman.server.protocol import TEMPLATE_ARGUMENTS
from pointsman.text import chat_prompt
from tests.server.asking import HELLO, chat, complete, fault
from tests.server.fake_engine import CONTEXT, VOCABULARY

DEEP = json.loads('{"x":' * 70 + "1" + "}" * 70)


def call(arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}]}


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
    ({"response_format": {"type": "xml"}}, "response_format.type", '"text" or "json_object"'),
    ({"structural_tag": "{}"}, "structural_tag", "not supported"),
    ({"best_of": 2}, "best_of", "not supported"),
    ({"replay_routed_experts": {}}, "replay_routed_experts", "version is missing"),
    ({"replay_routed_experts": "AAAA"}, "replay_routed_experts", "object"),
    ({"max_tokens": "5"}, "max_tokens", "int | null"),
    ({"max_tokens": True}, "max_tokens", "int | null"),
    ({"max_tokens": -1}, "max_tokens", "at least 0"),
    ({"n": 129}, "n", "at most 128"),
    ({"n": 10**30}, "n", "at most 128"),
    ({"temperature": -1}, "temperature", "at least 0"),
    ({"top_p": 0}, "top_p", "more than 0"),
    ({"stop": ["a"] * 65}, "stop", "at most 64"),
    ({"stop": ["x" * 2000]}, "stop[0]", "at most 1024"),
    ({"stop_token_ids": [VOCABULARY]}, "stop_token_ids", f"from 0 to {VOCABULARY - 1}"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "key"),
    ({"logit_bias": {str(VOCABULARY): 1}}, "logit_bias", f"from 0 to {VOCABULARY - 1}"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "from 0 to 4"),
    ({"seed": 2**70}, "seed", "at most"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream true"),
    ({"stream": True, "stream_options": {"other": 1}}, "stream_options", "no field `other`"),
    ({"cache_salt": "x" * 257}, "cache_salt", "at most 256"),
    ({"priority": 2**40}, "priority", "at most"),
    ({"temperature": 10**400}, "temperature", "out of range"),
    ({"n": 10**4000}, "n", "at most 128"),
    ({"n": {"a": [[0] * 1000]}}, "n", "must be int | null, not object"),
    ({"x" * 5000: 1}, "x" * 80, "unknown field"),
]
CHAT_REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": "hello"}, "messages", "must be array"),
    ({"messages": [{"content": "x"}]}, "messages[0]", "role"),
    ({"messages": [{"role": "user"}]}, "messages[0]", "`content` is missing"),
    ({"messages": [{"role": "wizard", "content": ""}]}, "messages[0].role", "wizard"),
    ({"messages": [*HELLO, {"role": "system", "content": ""}]}, "messages[1].role", "only the first"),
    ({"messages": [{"role": "tool", "content": ""}]}, "messages[0].role", "no tool was called"),
    ({"messages": [*HELLO, {"role": "tool", "content": ""}]}, "messages[1].role", "no tool was called"),
    ({"messages": [{"role": "user", "content": "", "tool_calls": []}]}, "messages[0]", "no field `tool_calls`"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type", "image_url"),
    ({"top_logprobs": 2}, "top_logprobs", "logprobs true"),
    ({"logprobs": True, "top_logprobs": 65}, "top_logprobs", "at most 64"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens", "differ"),
    ({"continue_final_message": True}, "messages", "assistant"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "messages"),
    ({"chat_template_kwargs": {"eos_token": "x"}}, "messages", "eos_token"),
    ({"chat_template_kwargs": {"x": json.loads("[" * 70 + "]" * 70)}}, "chat_template_kwargs", "nested"),
    ({"echo": True}, "echo", "unknown field"),
    ({"tools": [{"type": "function"}]}, "tools[0]", "`function` is missing"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "must match"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}] * 2}, "tools", "'f' twice"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}] * 513}, "tools", "at most 512"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": DEEP}}]}, "tools[0]", "nested"),
    ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", "not among the tools"),
    ({"tool_choice": "sometimes"}, "tool_choice", '"auto" or "none" or "required"'),
    ({"messages": [call("[]")]}, "messages", "must be an object"),
    ({"messages": [call("{")]}, "messages", "not JSON"),
    ({"messages": [call(DEEP)]}, "messages[0].tool_calls[0].function.arguments", "nested"),
    ({"messages": [{"role": "assistant", "refusal": "no"}]}, "messages[0].refusal", "null"),
]
COMPLETION_REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": []}, "prompt", "not empty"),
    ({"prompt": ""}, "prompt", "empty"),
    ({"prompt": [[]]}, "prompt", "not empty"),
    ({"prompt": ["a", 1]}, "prompt", "texts or of token ids"),
    ({"prompt": [True]}, "prompt", "texts or of token ids"),
    ({"prompt": [0, VOCABULARY]}, "prompt", f"from 0 to {VOCABULARY - 1}"),
    ({"prompt": [-1]}, "prompt", "token id -1"),
    ({"prompt": ["a"] * 1025}, "prompt", "at most 1024"),
    ({"prompt": ["a"] * 100, "n": 100}, "n", "more than 1024"),
    ({"prompt": "x" * (CONTEXT + 7)}, "prompt", f"has {CONTEXT + 7} tokens; the context of this model has {CONTEXT}"),
    ({"prompt": "x" * CONTEXT}, "prompt", f"has {CONTEXT} tokens; the context of this model has {CONTEXT}"),
    (
        {"prompt": "x" * (CONTEXT - 10), "max_tokens": 11},
        "prompt",
        f"{CONTEXT - 10} tokens and asks for 11 more; the context of this model has {CONTEXT}",
    ),
    ({"suffix": "x"}, "suffix", "not supported"),
    ({"logprobs": -1}, "logprobs", "at least 0"),
]


def _named(cases: list[tuple[dict[str, Any], str, str]]) -> list[Any]:
    return [pytest.param(*case, id=f"{case[1]}: {case[2]}"[:40]) for case in cases]


@pytest.mark.parametrize(("fields", "param", "words"), _named(REFUSED + CHAT_REFUSED))
def test_chat_refuses(client: httpx.Client, fields: dict[str, Any], param: str, words: str) -> None:
    error = fault(chat(client, **fields), 400)
    assert error["param"] == param and words in error["message"] and error["type"] == "invalid_request_error"


@pytest.mark.parametrize(("fields", "param", "words"), _named(REFUSED + COMPLETION_REFUSED))
def test_completions_refuse(client: httpx.Client, fields: dict[str, Any], param: str, words: str) -> None:
    error = fault(complete(client, **fields), 400)
    assert error["param"] == param and words in error["message"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"1", b"\xff", b'{"messages": NaN}', b"[" * 100_000, b'{"prompt": "\\ud800"}', b'{"n": 1e999}'],
    ids=["nothing", "open", "list", "number", "not UTF-8", "NaN", "deep", "surrogate", "infinite"],
)
def test_bodies_that_are_no_request(client: httpx.Client, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    assert fault(client.post("/v1/completions", content=body, headers=headers), 400)["message"].startswith("the body")


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": "x" * 100_000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 100_000}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "[e~[" * 100_000}]}),
        ("/generate", {"text": ["x", "x" * 100_000]}),
        ("/tokenize", {"prompt": "x" * (9 * MAX_COUNTED_TOKENS)}),
    ],
)
def test_a_prompt_that_is_far_too_long(client: httpx.Client, path: str, fields: dict[str, Any]) -> None:
    error = fault(client.post(path, json=fields), 400)
    assert error["code"] == "context_length_exceeded" and "there is room for" in error["message"]


def test_variables_of_templates_have_any_name_but_ours(client: httpx.Client) -> None:
    ours = inspect.signature(chat_prompt).parameters.values()
    assert {one.name for one in ours if one.kind not in (one.POSITIONAL_ONLY, one.VAR_KEYWORD)} <= TEMPLATE_ARGUMENTS
    others = ("tokenizer", "text", "kwargs", "variables", "source", "request")
    assert chat(client, chat_template_kwargs=dict.fromkeys(others, "x")).status_code == 200
    for name in TEMPLATE_ARGUMENTS:
        assert name in fault(chat(client, chat_template_kwargs={name: "x"}), 400)["message"]


def test_other_refusals(client: httpx.Client) -> None:
    assert fault(client.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"}), 415)
    blank = b" " * (MAX_BODY_BYTES + 1)
    assert fault(client.post("/v1/completions", content=blank, headers={"content-type": "application/json"}), 413)
    assert fault(complete(client, model="other"), 404)["code"] == "model_not_found"
    assert fault(client.get("/v1/nothing"), 404)
    assert fault(client.get("/v1/completions"), 405)
    assert fault(complete(client, prompt="REFUSE"), 400)["message"] == "this prompt is refused"
    assert fault(complete(client, prompt="REFUSE", stream=True), 400)
    assert fault(complete(client, prompt=["REFUSE", "hello"]), 400)
    busy = complete(client, prompt="BUSY")
    assert fault(busy, 429)["message"] == "too much to do" and busy.headers["retry-after"]
    assert "no such luck" in fault(chat(client, chat_template_kwargs={"boom": True}), 400)["message"]
    assert fault(complete(client, prompt="FAULT"), 500)["type"] == "server_error"
    assert complete(client).status_code == 200
