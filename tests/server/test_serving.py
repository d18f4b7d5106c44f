"""A running server, asked over HTTP: answers, streams, and what it refuses."""

from __future__ import annotations

import concurrent.futures
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from pointsman.server.protocol import MAX_BODY_BYTES
from tests.server.conftest import Server, start_server
from tests.server.fake_engine import CONTEXT, REPLY, SENTENCE, THOUGHT, VOCABULARY

HELLO = [{"role": "user", "content": "hello"}]


def chat(client: httpx.Client, **fields: Any) -> httpx.Response:
    return client.post("/v1/chat/completions", json={"messages": HELLO, **fields})


def complete(client: httpx.Client, **fields: Any) -> httpx.Response:
    return client.post("/v1/completions", json={"prompt": "hello", **fields})


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream that ended as it should."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def fault(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of an answer, in OpenAI's shape."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "secret" not in response.text
    return error


def test_chat(client: httpx.Client) -> None:
    answer = chat(client, model="fake", user="me", tools=[], response_format={"type": "text"}).json()
    [choice] = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": SENTENCE, "reasoning_content": THOUGHT}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    assert answer["object"] == "chat.completion" and answer["model"] == "fake" and answer["id"].startswith("chatcmpl-")
    prompt = len("]user\nhello]\n]ai\n<\n")  # each tag is one token
    thought = len(f"{THOUGHT}\n".encode()) + 1
    total = thought + len(f"\n\n{SENTENCE}") + 1
    assert answer["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": total,
        "total_tokens": prompt + total,
        "prompt_tokens_details": {"cached_tokens": prompt // 2},
        "completion_tokens_details": {"reasoning_tokens": thought},
    }


def test_a_stream_is_the_same_answer(client: httpx.Client) -> None:
    whole = chat(client, n=3, logprobs=True, top_logprobs=2).json()
    chunks = events(chat(client, n=3, logprobs=True, top_logprobs=2, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    assert all(chunk["usage"] is None and chunk["object"] == "chat.completion.chunk" for chunk in chunks[:-1])
    for expected in whole["choices"]:
        pieces = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == expected["index"]]
        deltas = [piece["delta"] for piece in pieces]
        assert deltas[0]["role"] == "assistant" and not any("role" in delta for delta in deltas[1:])
        assert "".join(delta.get("content", "") for delta in deltas) == expected["message"]["content"]
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == expected["message"]["reasoning_content"]
        tokens = [token for piece in pieces if piece["logprobs"] for token in piece["logprobs"]["content"]]
        assert tokens == expected["logprobs"]["content"]
        assert [piece["finish_reason"] for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]


def test_characters_stream_whole(client: httpx.Client) -> None:
    text = "héllo – 漢字 🚂"
    chunks = events(complete(client, prompt=f"SAY {text}", max_tokens=100, stream=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text


def test_chat_logprobs(client: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "SAY ab"}], "separate_reasoning": False, "logprobs": True, "top_logprobs": 2}
    answer = client.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert "reasoning_content" not in answer["message"]
    assert answer["message"]["content"] == "ab"
    first = answer["logprobs"]["content"][0]
    assert (first["token"], first["bytes"], first["logprob"]) == ("a", [97], -1.5)
    assert [(entry["token"], entry["logprob"]) for entry in first["top_logprobs"]] == [("b", -0.5), ("a", -1.5)]


def test_thinking_that_does_not_end_is_no_content(client: httpx.Client) -> None:
    message = chat(client, max_completion_tokens=5).json()["choices"][0]
    assert message["finish_reason"] == "length"
    assert message["message"] == {"role": "assistant", "content": None, "reasoning_content": THOUGHT[:5]}


def test_a_turn_can_be_continued(client: httpx.Client) -> None:
    turns = [*HELLO, {"role": "assistant", "content": "It SAY so", "reasoning_content": "hm"}]
    answer = chat(client, messages=turns, continue_final_message=True).json()["choices"][0]["message"]
    assert answer == {"role": "assistant", "content": "so", "reasoning_content": None}


def test_template_variables(client: httpx.Client) -> None:
    answer = chat(client, chat_template_kwargs={"extra": "SAY x</think>y[e~["}).json()["choices"][0]["message"]
    assert answer == {"role": "assistant", "content": "y", "reasoning_content": "x"}


@pytest.mark.parametrize(
    ("prompt", "count"),
    [("hello", 1), (["hello", "you"], 2), ([1, 2, 3], 1), ([[1, 2, 3], [4]], 2)],
    ids=["text", "texts", "ids", "lists of ids"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_completion_prompts(client: httpx.Client, prompt: Any, count: int, stream: bool) -> None:
    response = complete(client, prompt=prompt, n=2, max_tokens=100, stream=stream)
    choices = [choice for chunk in events(response) for choice in chunk["choices"]] if stream else response.json()["choices"]
    for index in range(2 * count):
        mine = [choice for choice in choices if choice["index"] == index]
        assert "".join(choice["text"] for choice in mine) == REPLY
        assert mine[-1]["finish_reason"] == "stop"
    assert {choice["index"] for choice in choices} == set(range(2 * count))


def test_completions_default_to_16_tokens(client: httpx.Client) -> None:
    answer = complete(client).json()
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-")
    assert answer["choices"] == [{"index": 0, "text": REPLY.encode()[:16].decode(), "logprobs": None, "finish_reason": "length"}]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs(client: httpx.Client, stream: bool) -> None:
    response = complete(client, prompt="é SAY –b", echo=True, logprobs=1, max_tokens=4, stream=stream)
    choices = [choice for chunk in events(response) for choice in chunk["choices"]] if stream else response.json()["choices"]
    assert "".join(choice["text"] for choice in choices) == "é SAY –b–b"
    parts = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    joined = {name: [entry for part in parts for entry in part[name]] for name in parts[0]}
    assert joined["tokens"][:4] == ["bytes:\\xc3", "bytes:\\xa9", " ", "S"]
    assert joined["tokens"][-4:] == ["bytes:\\xe2", "bytes:\\x80", "bytes:\\x93", "b"]
    assert joined["text_offset"][:4] == [0, 0, 1, 2]
    assert joined["text_offset"][-4:] == [8, 8, 8, 9]
    assert joined["token_logprobs"] == [None] + [-1.5] * (len(joined["tokens"]) - 1)
    assert joined["top_logprobs"][0] is None and joined["top_logprobs"][3] == {"T": -0.5}


def test_scoring_without_generating(client: httpx.Client) -> None:
    answer = complete(client, prompt="abc", echo=True, logprobs=0, max_tokens=0).json()["choices"][0]
    assert (answer["text"], answer["finish_reason"]) == ("abc", "length")
    assert answer["logprobs"]["tokens"] == ["a", "b", "c"]


def test_models_and_information(client: httpx.Client) -> None:
    [card] = client.get("/v1/models").json()["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == ("fake", "model", CONTEXT)
    assert client.get("/v1/models/fake").json() == card
    assert fault(client.get("/v1/models/other/one"), 404)["code"] == "model_not_found"
    assert client.get("/health").status_code == 200
    assert client.get("/ready").status_code == 200
    info = client.get("/server_info").json()
    assert info["model"]["architecture"] == "MiniMaxM2ForCausalLM"
    assert info["engine"]["scheduler"]["max_running_requests"] == 64


def test_openai_client(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(model="fake", messages=HELLO, seed=1, stop=["x"])
        assert answer.choices[0].message.content == SENTENCE
        text = thought = ""
        for chunk in client.chat.completions.create(model="fake", messages=HELLO, stream=True, stream_options={"include_usage": True}):
            for choice in chunk.choices:
                text += choice.delta.content or ""
                thought += getattr(choice.delta, "reasoning_content", None) or ""
        assert (thought, text) == (THOUGHT, SENTENCE)
        assert chunk.usage is not None and chunk.usage.completion_tokens == answer.usage.completion_tokens
        assert client.completions.create(model="fake", prompt="hi", max_tokens=3).choices[0].text == REPLY[:3]
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="gpt-4", prompt="hi")
        with pytest.raises(openai.BadRequestError, match="tools is not supported"):
            client.chat.completions.create(
                model="fake", messages=HELLO, tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}]
            )
        with pytest.raises(openai.APIError):
            for _ in client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "FAULT"}], stream=True):
                pass


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
    ({"tools": [{"type": "function"}]}, "tools", "not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    ({"best_of": 2}, "best_of", "not supported"),
    ({"return_routed_experts": True}, "return_routed_experts", "not supported"),
    ({"max_tokens": "5"}, "max_tokens", "Expected `int | null`"),
    ({"max_tokens": True}, "max_tokens", "Expected `int | null`"),
    ({"max_tokens": -1}, "max_tokens", "from 0"),
    ({"n": 129}, "n", "1 to 128"),
    ({"n": 10**30}, "n", "1 to 128"),
    ({"temperature": -1}, "temperature", "from 0"),
    ({"top_p": 0}, "top_p", "above 0"),
    ({"stop": ["a"] * 65}, "stop", "at most 64"),
    ({"stop": ["x" * 2000]}, "stop", "1024 characters"),
    ({"stop_token_ids": [VOCABULARY]}, "stop_token_ids", f"from 0 to {VOCABULARY - 1}"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
    ({"logit_bias": {str(VOCABULARY): 1}}, "logit_bias", f"from 0 to {VOCABULARY - 1}"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "from 0 to 4"),
    ({"seed": 2**70}, "seed", "whole number"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream true"),
    ({"stream": True, "stream_options": {"other": 1}}, "stream_options", "unknown field `other`"),
    ({"cache_salt": "x" * 257}, "cache_salt", "at most 256"),
    ({"priority": 2**40}, "priority", "must be from"),
]
CHAT_REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "messages", "1 to"),
    ({"messages": "hello"}, "messages", "Expected `array`"),
    ({"messages": [{"content": "x"}]}, "messages[0]", "role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
    ({"messages": [{"role": "wizard", "content": ""}]}, "messages[0].role", "wizard"),
    ({"messages": [*HELLO, {"role": "system", "content": ""}]}, "messages[1].role", "only the first"),
    ({"messages": [{"role": "tool", "content": ""}]}, "messages[0].role", "tools are not supported"),
    ({"messages": [{"role": "assistant", "tool_calls": []}]}, "messages[0]", "tool_calls"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type", "image_url"),
    ({"top_logprobs": 2}, "top_logprobs", "logprobs true"),
    ({"logprobs": True, "top_logprobs": 65}, "top_logprobs", "0 to 64"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens", "differ"),
    ({"continue_final_message": True}, "messages", "assistant"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "messages"),
    ({"chat_template_kwargs": {"eos_token": "x"}}, "messages", "eos_token"),
    ({"chat_template_kwargs": {"x": json.loads("[" * 30 + "]" * 30)}}, "chat_template_kwargs", "nested"),
    ({"echo": True}, "echo", "unknown field"),
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
    ({"logprobs": -1}, "logprobs", "0 to 64"),
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


def test_a_fault_in_a_stream_is_its_last_event(client: httpx.Client) -> None:
    lines = complete(client, prompt="FAULT", stream=True).text.strip().split("\n\n")
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["message"] == "the engine could not finish this request"
    assert "secret" not in "".join(lines)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_takes_its_request_with_it(client: httpx.Client, stream: bool) -> None:
    before = int(complete(client, prompt="ABORTED").json()["choices"][0]["text"])
    body = {"prompt": "ENDLESS", "max_tokens": 5000, "stream": stream}
    if stream:
        with client.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json=body, timeout=httpx.Timeout(10, read=0.2))
    for _ in range(200):
        if int(complete(client, prompt="ABORTED").json()["choices"][0]["text"]) == before + 1:
            break
        time.sleep(0.02)
    assert client.get("/server_info").json()["running"] == 0
    assert int(complete(client, prompt="ABORTED").json()["choices"][0]["text"]) == before + 1


def test_many_streams_at_once(client: httpx.Client) -> None:
    def one(number: int) -> str:
        chunks = events(complete(client, prompt=f"SAY number {number}", stream=True, max_tokens=30))
        return "".join(chunk["choices"][0]["text"] for chunk in chunks)

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        assert list(pool.map(one, range(72))) == [f"number {number}" for number in range(72)]


def test_api_key(folder: Path) -> None:
    with start_server({"model_path": str(folder)}, {"api_key": "sesam", "reasoning_parser": "none"}) as server:
        server.wait_ready()
        with server.client() as client:
            for path in ("/v1/models", "/server_info", "/nothing", "/v1/completions"):
                assert fault(client.get(path), 401)["code"] == "invalid_api_key"
            for key in ("", "sesam", "Bearer", "Bearer sesa", "Bearer sesamm", "bearer é"):
                assert fault(client.get("/v1/models", headers={"authorization": key.encode()}), 401)
            assert client.get("/health").status_code == client.get("/ready").status_code == 200
            client.headers["authorization"] = "Bearer sesam"
            assert client.get("/v1/models").status_code == 200
            assert "sesam" not in client.get("/server_info").text
            assert chat(client).json()["choices"][0]["message"] == {"role": "assistant", "content": REPLY}


def test_too_many_requests(folder: Path) -> None:
    engine = {"model_path": str(folder), "max_running_requests": 1, "max_queued_requests": 1}
    body = {"prompt": "ENDLESS", "max_tokens": 5000, "stream": True}
    with start_server(engine) as server:
        server.wait_ready()
        with server.client() as client, client.stream("POST", "/v1/completions", json=body):
            response = complete(client, prompt=["a", "b"])
            assert fault(response, 429)["code"] == "queue_full"
            assert response.headers["retry-after"]


def test_the_http_side_never_imports_the_tensor_library() -> None:
    source = "import sys, pointsman.server.run, pointsman.server.serve; print('torch' in sys.modules, 'numpy' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert result.stdout.split() == ["False", "False"]
