"""The whole way: a client, both processes, and the real engine on random weights in the bundled checkpoint's shape."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from pointsman import tiny
from pointsman.routed_experts import decode_int32, decode_record, encode
from tests.server.conftest import start_server

TURNS = [{"role": "user", "content": "Ann has 3 apples and buys 4. How many are there?"}]


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with start_server({"model_path": str(tiny.path()), "load_format": "dummy"}, program=None) as server:
        server.wait_ready()
        with server.client() as client:
            yield client


def ask(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = client.post("/v1/chat/completions", json={"messages": TURNS, "max_tokens": 12, "temperature": 0} | fields)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_streamed_and_whole_alone_and_together(client: httpx.Client) -> None:
    alone = ask(client)["choices"][0]["message"]
    assert alone["content"] is None and alone["reasoning_content"]
    with client.stream(
        "POST", "/v1/chat/completions", json={"messages": TURNS, "max_tokens": 12, "temperature": 0, "stream": True}
    ) as lines:
        chunks = [json.loads(line[6:]) for line in lines.iter_lines() if line.startswith("data: {")]
    streamed = "".join(chunk["choices"][0]["delta"].get("reasoning_content", "") for chunk in chunks)
    assert streamed == alone["reasoning_content"]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda _: ask(client), range(8)))
    assert all(answer["choices"][0]["message"] == alone for answer in together)
    assert together[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_a_seed_fixes_the_answer(client: httpx.Client) -> None:
    first, second, other = (ask(client, temperature=1, n=2, seed=seed)["choices"] for seed in (5, 5, 6))
    assert first == second != other
    assert first[0]["message"] != first[1]["message"]


def test_a_score_is_what_generating_gave(client: httpx.Client) -> None:
    """A token that the bias forces has the log-probability that scoring it as a part of the prompt gives, to fp32 rounding."""

    def complete(**fields: Any) -> dict[str, Any]:
        choice: dict[str, Any] = client.post("/v1/completions", json={"temperature": 0, "logprobs": 0, **fields}).json()["choices"][0]
        return choice

    prompt, forced = list(range(100, 130)), 77
    grown = complete(prompt=prompt, max_tokens=1, logit_bias={str(forced): 100})
    scored = complete(prompt=[*prompt, forced], max_tokens=0, echo=True)
    assert scored["finish_reason"] == "length" and scored["logprobs"]["token_logprobs"][0] is None
    assert scored["logprobs"]["tokens"][-1:] == grown["logprobs"]["tokens"]
    assert scored["logprobs"]["token_logprobs"][-1:] == pytest.approx(grown["logprobs"]["token_logprobs"], abs=1e-4)


SCHEMA = {
    "type": "object",
    "properties": {"size": {"enum": ["small", "large"]}, "ready": {"type": "boolean"}},
    "required": ["size", "ready"],
}
TOOLS = [
    {"type": "function", "function": {"name": "order", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "leave", "parameters": {"type": "object", "properties": {}}}},
]


def closed(text: str) -> list[dict[str, Any]]:
    """A conversation in which the model has thought already: on random weights it would not end."""
    return [*TURNS, {"role": "assistant", "content": f"<think>\n{text}</think>\n\n"}]


@pytest.mark.parametrize("seed", range(3))
def test_the_form_of_an_answer_is_kept_to(client: httpx.Client, seed: int) -> None:
    """By random weights."""
    free = {"temperature": 1, "max_tokens": 60, "seed": seed}

    def complete(**fields: Any) -> str:
        choice = client.post("/v1/completions", json={"prompt": "x", **free, **fields}).json()["choices"][0]
        assert choice["finish_reason"] == "stop"
        text: str = choice["text"]
        return text

    assert re.fullmatch("[0-9]{4}", complete(regex="[0-9]{4}"))
    assert complete(ebnf='root ::= "yes" | "no"') in ("yes", "no")
    answer = json.loads(complete(response_format={"type": "json_schema", "json_schema": {"schema": SCHEMA}}))
    assert answer["size"] in ("small", "large") and isinstance(answer["ready"], bool)
    fields = {"messages": closed("so"), "continue_final_message": True, "chat_template_kwargs": {}, **free}
    choice = ask(client, **fields, response_format={"type": "json_schema", "json_schema": {"schema": SCHEMA}})["choices"][0]
    assert json.loads(choice["message"]["content"]).keys() == {"size", "ready"}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "order"}}])
def test_a_call_that_must_be_made(client: httpx.Client, seed: int, choice: Any) -> None:
    """By random weights: thinking is ended for them."""
    fields = {"messages": closed("so"), "continue_final_message": True, "temperature": 1, "seed": seed, "max_tokens": 120}
    [answer] = ask(client, **fields, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False)["choices"]
    assert (answer["finish_reason"], answer["message"]["content"]) == ("tool_calls", None)
    [call] = answer["message"]["tool_calls"]
    arguments = json.loads(call["function"]["arguments"])
    if choice != "required" or call["function"]["name"] == "order":
        assert arguments["size"] in ("small", "large") and isinstance(arguments["ready"], bool)
    else:
        assert arguments == {}


@pytest.mark.parametrize("seed", range(4))
def test_a_call_or_an_answer_of_a_form(client: httpx.Client, seed: int) -> None:
    fields = {"messages": closed("so"), "continue_final_message": True, "temperature": 1, "seed": seed, "max_tokens": 120}
    [answer] = ask(client, **fields, tools=TOOLS, json_schema=SCHEMA, parallel_tool_calls=False)["choices"]
    message = answer["message"]
    if answer["finish_reason"] == "tool_calls":
        assert message["content"] is None and message["tool_calls"]
    else:
        assert answer["finish_reason"] == "stop" and json.loads(message["content"]).keys() == {"size", "ready"}


def test_a_form_that_cannot_be_used(client: httpx.Client) -> None:
    """It is refused by whoever compiles it, and the others go on."""
    response = client.post("/v1/completions", json={"prompt": "x", "ebnf": "root ::= ("})
    assert response.status_code == 400 and "ebnf" in response.json()["error"]["message"]
    assert client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200


def test_routing_is_the_same_streamed_whole_and_found_in_the_cache(client: httpx.Client) -> None:
    """And what one answer's prompt used, all answers to it used: the rows of a prefix come with the prefix."""
    fields = {"return_routed_experts": True, "n": 2, "temperature": 1, "seed": 3}
    whole = [decode_record(choice["routed_experts"]) for choice in ask(client, **fields)["choices"]]
    again = ask(client, **fields, routed_experts_format="int32")
    num_layers, top_k = whole[0].rows_RLK.shape[1:]
    for choice, record in zip(again["choices"], whole, strict=True):
        shape = {"num_layers": num_layers, "top_k": top_k, "num_experts": record.num_experts}
        assert np.array_equal(decode_int32(choice["routed_experts"], **shape).rows_RLK, record.rows_RLK)
    body = {"messages": TURNS, "max_tokens": 12, "stream": True, **fields}
    with client.stream("POST", "/v1/chat/completions", json=body) as lines:
        chunks = [json.loads(line[6:]) for line in lines.iter_lines() if line.startswith("data: {")]
    ended = {choice["index"]: choice for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"] is not None}
    for index, record in enumerate(whole):
        assert np.array_equal(decode_record(ended[index]["routed_experts"]).rows_RLK, record.rows_RLK)
    num_prompt = again["usage"]["prompt_tokens"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert np.array_equal(whole[0].rows_RLK[:num_prompt], whole[1].rows_RLK[:num_prompt])
    assert not np.array_equal(whole[0].rows_RLK[num_prompt:], whole[1].rows_RLK[num_prompt:])


def test_a_record_sent_back_gives_the_answer_again(client: httpx.Client) -> None:
    """With the same log-probabilities; one of random rows gives another, and is returned as it was given."""
    fields = {"return_routed_experts": True, "n": 2, "temperature": 1, "seed": 3, "logprobs": True}
    first = ask(client, **fields)["choices"][0]
    again = ask(client, **fields, replay_routed_experts=first["routed_experts"])["choices"][0]
    assert again["routing_agreement"] == 1.0 and "routing_agreement" not in first
    for name in ("message", "logprobs"):
        assert again[name] == first[name]
    record = decode_record(first["routed_experts"])
    generator = np.random.default_rng(1)
    rows = np.argsort(generator.random((*record.rows_RLK.shape[:2], record.num_experts)), -1)[..., : record.rows_RLK.shape[2]]
    other = encode(dataclasses.replace(record, rows_RLK=rows.astype(np.uint8)))
    forced = ask(client, **fields, replay_routed_experts=other)["choices"][1]
    assert np.array_equal(decode_record(forced["routed_experts"]).rows_RLK, rows)
    assert forced["routing_agreement"] < 0.1 and forced["logprobs"] != first["logprobs"]


def test_a_replay_of_more_than_is_fed(client: httpx.Client) -> None:
    """Only the engine knows, and says it to the client."""
    record = ask(client, return_routed_experts=True)["choices"][0]["routed_experts"]
    response = client.post("/v1/completions", json={"prompt": [5, 6], "max_tokens": 3, "replay_routed_experts": record})
    assert response.status_code == 400 and "the last one that is fed is 3" in response.json()["error"]["message"]


@pytest.mark.skipif(not (tiny.path() / "model.safetensors").is_file(), reason="the bundled checkpoint has no weights yet")
def test_the_bundled_checkpoint_thinks_and_answers() -> None:
    with start_server({}, program=None) as server:
        server.wait_ready()
        with server.client() as client:
            question = {"role": "user", "content": "What is 17 + 25?"}
            choice = ask(client, messages=[question], max_tokens=400)["choices"][0]
            called = ask(client, messages=[question], max_tokens=400, tools=TOOLS, tool_choice="required")["choices"][0]
            formed = ask(client, messages=[question], max_tokens=400, json_schema=SCHEMA)["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert "17 + 25" in choice["message"]["reasoning_content"] and "42" in choice["message"]["content"]
    assert called["finish_reason"] == "tool_calls" and called["message"]["reasoning_content"]
    assert {call["function"]["name"] for call in called["message"]["tool_calls"]} <= {"order", "leave"}
    assert formed["message"]["reasoning_content"] and json.loads(formed["message"]["content"]).keys() == {"size", "ready"}
