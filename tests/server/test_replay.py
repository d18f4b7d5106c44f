"""Replays over HTTP: every route, streamed and whole, one prompt or many; what they say of agreement; what is refused.

The fake engine agrees with a row of a replay, layer by layer, where it is what `routes_of` has for the token.
"""

from __future__ import annotations

import base64
import zlib
from typing import Any

import httpx
import numpy as np
import pytest

from pointsman.routed_experts import RoutedExperts, encode
from tests.server.asking import HELLO, chat, complete, events, fault, generate
from tests.server.conftest import Server
from tests.server.fake_engine import CONTEXT, EXPERTS, LAYERS, TOP_K, routes_of

PROMPT = list(range(50, 60))


def record(tokens: list[int], *, wrong: int = 0, **fields: Any) -> dict[str, Any]:
    """What the engine uses for these tokens, but for the first layer of the first rows."""
    rows = np.array([routes_of(token) for token in tokens], np.uint8).reshape(-1, LAYERS, TOP_K)
    rows[:wrong, 0] = (rows[:wrong, 0] + 1) % EXPERTS
    made = encode(RoutedExperts(rows_RLK=rows, num_experts=EXPERTS, layers=tuple(range(LAYERS)), **fields))
    assert isinstance(made, dict)
    return made


def ends(response: httpx.Response, *, stream: bool) -> dict[int, dict[str, Any]]:
    """The last piece of each choice; no other says anything of agreement."""
    assert response.status_code == 200, response.text
    pieces = [piece for part in (events(response) if stream else [response.json()]) for piece in part["choices"]]
    assert all(("routing_agreement" in piece) == (piece["finish_reason"] is not None) for piece in pieces)
    return {piece["index"]: piece for piece in pieces if piece["finish_reason"] is not None}


@pytest.mark.parametrize("stream", [False, True])
def test_completions_replay_for_every_choice(client: httpx.Client, stream: bool) -> None:
    fields = {"prompt": PROMPT, "max_tokens": 5, "n": 3, "stream": stream}
    for wrong, expected in ((0, 1.0), (5, 1 - 5 / (10 * LAYERS)), (10, 1 - 1 / LAYERS)):
        found = ends(complete(client, **fields, replay_routed_experts=record(PROMPT, wrong=wrong)), stream=stream)
        assert [found[index]["routing_agreement"] for index in range(3)] == [pytest.approx(expected)] * 3


@pytest.mark.parametrize("stream", [False, True])
def test_chat_replays(client: httpx.Client, stream: bool) -> None:
    asked = chat(client, max_tokens=9, return_routed_experts=True).json()["choices"][0]["routed_experts"]
    again = chat(client, max_tokens=9, stream=stream, return_routed_experts=True, replay_routed_experts=asked)
    assert ends(again, stream=stream)[0]["routing_agreement"] == 1.0


@pytest.mark.parametrize("stream", [False, True])
def test_a_list_has_one_for_each_prompt(client: httpx.Client, stream: bool) -> None:
    prompts, records = [PROMPT, PROMPT, PROMPT[:3]], [record(PROMPT), None, record(PROMPT[:3], wrong=3)]
    response = complete(client, prompt=prompts, max_tokens=4, n=2, stream=stream, replay_routed_experts=records)
    assert response.status_code == 200, response.text
    parts = events(response) if stream else [response.json()]
    found = {piece["index"]: piece for part in parts for piece in part["choices"] if piece["finish_reason"] is not None}
    got = [found[index].get("routing_agreement", "none") for index in range(6)]
    assert got == [1.0, 1.0, "none", "none", pytest.approx(1 - 1 / LAYERS), pytest.approx(1 - 1 / LAYERS)]
    fields = {"input_ids": prompts, "sampling_params": {"max_new_tokens": 4}, "stream": stream, "replay_routed_experts": records}
    response = generate(client, **fields)
    items = [item for item in (events(response) if stream else response.json()) if item["meta_info"]["finish_reason"] is not None]
    items = sorted(items, key=lambda item: item.get("index", 0)) if stream else items
    assert [item["meta_info"].get("routing_agreement", "none") for item in items] == [1.0, "none", pytest.approx(1 - 1 / LAYERS)]


def test_a_single_prompt_of_generate(client: httpx.Client) -> None:
    """Rows that are missing, or of other positions, say nothing of agreement."""
    base = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 4}}
    for replay, expected in (
        (record(PROMPT[2:], start=2), 1.0),
        (record(PROMPT, wrong=4, missing=((0, 4),)), 1.0),
        (record([]), None),
    ):
        for given in (replay, [replay]):
            assert generate(client, **base, replay_routed_experts=given).json()["meta_info"]["routing_agreement"] == expected


def test_null_is_no_replay(client: httpx.Client) -> None:
    for response in (complete(client, replay_routed_experts=None), chat(client, replay_routed_experts=None)):
        assert response.status_code == 200 and "routing_agreement" not in response.text


def test_an_aborted_choice_says_how_far_it_agreed(client: httpx.Client, server: Server) -> None:
    prompt = client.post("/tokenize", json={"prompt": "ENDLESS"}).json()["tokens"]
    body = {"prompt": prompt, "max_tokens": 8000, "stream": True, "rid": "agreed", "replay_routed_experts": record(prompt[:3])}
    with client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        with server.client() as other:
            assert other.post("/abort_request", json={"rid": "agreed"}).json()["aborted"] == 1
        text = "\n".join(lines)
    assert '"finish_reason":"abort","routing_agreement":1.0' in text


def changed(**fields: Any) -> dict[str, Any]:
    return record(PROMPT) | fields


def with_rows(rows: np.ndarray) -> dict[str, Any]:
    data = rows.astype(np.uint8).tobytes()
    return changed(shape=list(rows.shape), crc32=zlib.crc32(data), data=base64.b64encode(data).decode())


WRONG: list[tuple[Any, str]] = [
    ({}, "version is missing"),
    (changed(version=2), "this reads version 1"),
    (changed(crc32=5), "damaged"),
    (changed(data="AA"), "base64"),
    (changed(extra=1), "not a field"),
    (changed(num_experts=16), "layers with 16 experts; this model's have 8"),
    (changed(layers=[0, 1, 3]), "of the layers 0, 1, 3; this model's are 0 to 2"),
    (with_rows(np.tile(np.arange(3), (4, LAYERS, 1))), "3 experts a token; this model uses 2"),
    (with_rows(np.full((4, LAYERS, TOP_K), 1)), "twice in layer 0 of position 0"),
    (with_rows(np.full((4, LAYERS, TOP_K), 9)), "has the expert 9; ids go from 0 to 7"),
    (with_rows(np.tile(np.arange(TOP_K), (CONTEXT + 1, LAYERS, 1))), f"has rows up to position {CONTEXT}; with a prompt of"),
]


@pytest.mark.parametrize(("value", "words"), WRONG)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/generate"])
def test_what_does_not_fit_is_refused(client: httpx.Client, path: str, value: Any, words: str) -> None:
    prompt: dict[str, Any] = {"/v1/completions": {"prompt": PROMPT}, "/generate": {"input_ids": PROMPT}}.get(path, {"messages": HELLO})
    error = fault(client.post(path, json=prompt | {"replay_routed_experts": value}), 400)
    assert error["param"] == "replay_routed_experts" and words in error["message"]


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("/v1/completions", {"prompt": [PROMPT] * 2, "replay_routed_experts": record(PROMPT)}, "replay_routed_experts", "one record for 2"),
        ("/v1/completions", {"prompt": PROMPT, "replay_routed_experts": [None] * 2}, "replay_routed_experts", "2 entries for 1 prompts"),
        ("/generate", {"input_ids": PROMPT, "replay_routed_experts": []}, "replay_routed_experts", "0 entries for 1 prompts"),
        ("/generate", {"input_ids": [PROMPT], "replay_routed_experts": [{}]}, "replay_routed_experts[0]", "version is missing"),
        ("/generate", {"input_ids": [PROMPT], "replay_routed_experts": [7]}, "replay_routed_experts[0]", "object"),
        ("/v1/chat/completions", {"messages": HELLO, "replay_routed_experts": [None]}, "replay_routed_experts", "object"),
    ],
)
def test_lists_that_do_not_fit_are_refused(client: httpx.Client, path: str, body: Any, param: str, words: str) -> None:
    error = fault(client.post(path, json=body), 400)
    assert error["param"] == param and words in error["message"], error


def test_one_call_and_a_replay_do_not_go_together(client: httpx.Client) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    error = fault(chat(client, tools=tools, parallel_tool_calls=False, replay_routed_experts=record(PROMPT)), 400)
    assert error["param"] == "parallel_tool_calls" and "replay_routed_experts" in error["message"]


def test_the_document_has_the_record(client: httpx.Client) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    assert set(record(PROMPT)) == set(schemas["RoutingRecord"]["properties"])
    for name in ("ChatRequest", "CompletionRequest", "GenerateRequest"):
        assert "#/components/schemas/RoutingRecord" in str(schemas[name]["properties"]["replay_routed_experts"])
