"""Routing records over HTTP: every route, streamed and whole, each choice its own, in every form; what is aborted; what is refused.

The fake engine's experts tell which token they belong to, so that a row out of place is seen.
"""

from __future__ import annotations

import concurrent.futures
import subprocess
import sys
import time
from typing import Any

import httpx
import numpy as np
import pytest

from pointsman.routed_experts import RoutedExperts, decode_int32, decode_npy, decode_record
from tests.server.asking import HELLO, chat, complete, events, fault, generate
from tests.server.conftest import Server, start_server
from tests.server.fake_engine import EXPERTS, LAYERS, TOP_K, routes_of

ASK = {"return_routed_experts": True}


def rows_of(tokens: list[int]) -> np.ndarray:
    return np.array([routes_of(token) for token in tokens], np.uint8).reshape(-1, LAYERS, TOP_K)


def decode(value: Any, form: str, start: int = 0) -> RoutedExperts:
    if form == "record":
        return decode_record(value)
    if form == "npy":
        return decode_npy(value, num_experts=EXPERTS, start=start)
    return decode_int32(value, num_layers=LAYERS, top_k=TOP_K, num_experts=EXPERTS, start=start)


def choices(response: httpx.Response, *, stream: bool) -> dict[int, dict[str, Any]]:
    """By index: the tokens of each choice, its prompt's, and what its last piece has of routing. No other piece has any."""
    assert response.status_code == 200, response.text
    found: dict[int, dict[str, Any]] = {}
    prompt = None
    for part in events(response) if stream else [response.json()]:
        prompt = part.get("prompt_token_ids", prompt)
        for piece in part["choices"]:
            choice = found.setdefault(piece["index"], {"tokens": [], "ended": False, "prompt": None})
            choice["tokens"] += piece["token_ids"]
            choice["prompt"] = piece.get("prompt_token_ids", choice["prompt"]) or prompt
            assert ("routed_experts" in piece) == (piece["finish_reason"] is not None)
            choice["routing"] = piece.get("routed_experts")
    return found


@pytest.mark.parametrize("form", ["record", "npy", "int32"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ask", [chat, complete])
def test_each_choice_has_its_rows(client: httpx.Client, ask: Any, stream: bool, form: str) -> None:
    prompts = {} if ask is chat else {"prompt": ["SAY a different answer", "hello"]}
    fields = ASK | {"routed_experts_format": form, "return_token_ids": True, "max_tokens": 60, "stream": stream}
    found = choices(ask(client, n=2, **prompts, **fields), stream=stream)
    assert set(found) == set(range(2 if ask is chat else 4))
    for choice in found.values():
        record = decode(choice["routing"], form)
        assert np.array_equal(record.rows_RLK, rows_of([*choice["prompt"], *choice["tokens"]][:-1]))
        assert not record.missing and record.layers == tuple(range(LAYERS))
        if form == "record":
            assert record.weight_versions == ((0, record.num_rows, "0"),)


@pytest.mark.parametrize("name", ["routed_experts_start", "routed_experts_start_len", "routed_experts_prompt_start"])
def test_rows_from_a_start(client: httpx.Client, name: str) -> None:
    prompt = list(range(50, 70))
    for start in (0, 7, 20):
        answer = complete(client, prompt=prompt, max_tokens=5, return_token_ids=True, **ASK, **{name: start}).json()["choices"][0]
        record = decode_record(answer["routed_experts"])
        assert record.start == start
        assert np.array_equal(record.rows_RLK, rows_of([*prompt, *answer["token_ids"]][start:-1]))


def test_one_token_has_no_row(client: httpx.Client) -> None:
    answer = complete(client, prompt=[65], max_tokens=0, **ASK).json()["choices"][0]
    record = decode_record(answer["routed_experts"])
    assert record.num_rows == 0 and record.weight_versions == ()


@pytest.mark.parametrize("stream", [False, True])
def test_generate_has_int32_unless_told(client: httpx.Client, stream: bool) -> None:
    fields = ASK | {"input_ids": [[65, 66, 67], [70, 71]], "sampling_params": {"max_new_tokens": 6, "n": 2}, "stream": stream}
    for form in (None, "record"):
        response = generate(client, **fields, routed_experts_start=1, **({} if form is None else {"routed_experts_format": form}))
        items = events(response) if stream else response.json()
        ended = [item for item in items if item["meta_info"]["finish_reason"] is not None]
        assert len(ended) == 4
        assert all("routed_experts" not in item["meta_info"] for item in items if item not in ended)
        for index, item in enumerate(sorted(ended, key=lambda item: item.get("index", 0)) if stream else ended):
            record = decode(item["meta_info"]["routed_experts"], form or "int32", start=1)
            assert np.array_equal(record.rows_RLK, rows_of([*fields["input_ids"][index // 2], *item["output_ids"]][1:-1]))


def test_nobody_gets_what_nobody_asked_for(client: httpx.Client) -> None:
    for response in (chat(client), complete(client), generate(client, text="hello"), chat(client, return_routed_experts=False)):
        assert response.status_code == 200 and "routed_experts" not in response.text
    assert "routed_experts" not in chat(client, stream=True).text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("asks", [False, True])
def test_an_aborted_choice_has_the_rows_that_are_known(client: httpx.Client, server: Server, stream: bool, asks: bool) -> None:
    """The fake engine never knows the last two rows of what is aborted."""
    name = f"aborted-{stream}-{asks}"
    fields = {"n": 2, "rid": name, "return_token_ids": True, "max_tokens": 8000, "stream": stream, "return_routed_experts": asks}

    def abort() -> int:
        with server.client() as other:
            for _ in range(100):
                time.sleep(0.02)
                if aborted := other.post("/abort_request", json={"rid": name}).json()["aborted"]:
                    return int(aborted)
        raise AssertionError("the request never began")

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        aborting = pool.submit(abort)
        response = complete(client, prompt="ENDLESS", **fields)
        assert aborting.result() == 1
    assert response.status_code == 200, response.text
    if not asks:
        assert "routed_experts" not in response.text
        return
    found = choices(response, stream=stream)
    assert set(found) == {0, 1}
    for choice in found.values():
        record = decode_record(choice["routing"])
        expected = rows_of([*choice["prompt"], *choice["tokens"]][:-1])
        assert record.num_rows >= len(expected)  # what the engine had computed when it heard of the abort
        assert record.missing == ((record.num_rows - 2, record.num_rows),)
        known = min(len(expected), record.num_rows - 2)
        assert np.array_equal(record.rows_RLK[:known], expected[:known])


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        (ASK | {"routed_experts_format": "parquet"}, "routed_experts_format", 'is \'parquet\'; it must be "int32" or "npy" or "record"'),
        (ASK | {"routed_experts_start": -1}, "routed_experts_start", "at least 0"),
        (ASK | {"routed_experts_start": 100_000}, "routed_experts_start", "at most"),
        (ASK | {"routed_experts_start": 1, "routed_experts_start_len": 2}, "routed_experts_start_len", "differ"),
        ({"routed_experts_start": 1}, "routed_experts_start", "needs return_routed_experts"),
        ({"routed_experts_format": "npy", "return_routed_experts": False}, "routed_experts_format", "needs return_routed_experts"),
        ({"return_routed_experts": "yes"}, "return_routed_experts", "bool"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/generate"])
def test_what_makes_no_sense_is_refused_by_name(
    client: httpx.Client, path: str, fields: dict[str, Any], param: str | None, words: str
) -> None:
    prompt = {"/v1/completions": {"prompt": "hello"}, "/generate": {"text": "hello"}}.get(path, {"messages": HELLO})
    error = fault(client.post(path, json=prompt | fields), 400)
    assert words in error["message"]
    assert param is None or error["param"] == param


def test_one_call_and_a_record_do_not_go_together(client: httpx.Client) -> None:
    """The turn would end before the engine does, and its last rows never come."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    error = fault(chat(client, tools=tools, parallel_tool_calls=False, **ASK), 400)
    assert error["param"] == "parallel_tool_calls"
    assert chat(client, tools=tools, **ASK).status_code == 200


def test_the_load_of_the_experts_is_told(folder: Any) -> None:
    with start_server({"model_path": str(folder), "enable_return_routed_experts": True}) as server:
        server.wait_ready()
        with server.client() as client:
            assert client.get("/routing_load").json()["counts"] == [[0] * EXPERTS] * LAYERS
            answer = complete(client, prompt=[65, 66], max_tokens=9, return_token_ids=True).json()["choices"][0]
            rows = rows_of([65, 66, *answer["token_ids"]][:-1])
            expected = [np.bincount(rows[:, layer].ravel(), minlength=EXPERTS).tolist() for layer in range(LAYERS)]
            load: dict[str, Any] = {}
            for _ in range(100):
                load = client.get("/routing_load").json()
                if load["num_tokens"]:
                    break
                time.sleep(0.02)
    assert load == {"layers": list(range(LAYERS)), "num_experts": EXPERTS, "num_tokens": len(rows), "counts": expected}


def test_a_server_starts_without_numpy() -> None:
    source = "import sys, pointsman.server.run; print('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True).stdout.strip() == "False"
