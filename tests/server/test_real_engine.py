"""The whole way: a client, both processes, and the real engine on random weights in the bundled checkpoint's shape."""

from __future__ import annotations

import concurrent.futures
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from pointsman import tiny
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


@pytest.mark.skipif(not (tiny.path() / "model.safetensors").is_file(), reason="the bundled checkpoint has no weights yet")
def test_the_bundled_checkpoint_thinks_and_answers() -> None:
    with start_server({}, program=None) as server:
        server.wait_ready()
        with server.client() as client:
            question = {"role": "user", "content": "What is 17 + 25?"}
            choice = ask(client, messages=[question], max_tokens=400)["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert "17 + 25" in choice["message"]["reasoning_content"] and "42" in choice["message"]["content"]
