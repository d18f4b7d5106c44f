"""Texts continued: prompts of every kind, echo, log-probabilities."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.server.asking import complete, events
from tests.server.fake_engine import REPLY


def test_characters_stream_whole(client: httpx.Client) -> None:
    text = "héllo – 漢字 🚂"
    chunks = events(complete(client, prompt=f"SAY {text}", max_tokens=100, stream=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text


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


def test_token_ids(client: httpx.Client) -> None:
    choices = complete(client, prompt=["ab", "c"], return_token_ids=True).json()["choices"]
    assert [choice["prompt_token_ids"] for choice in choices] == [
        client.post("/tokenize", json={"prompt": text}).json()["tokens"] for text in ("ab", "c")
    ]
    pieces = [chunk["choices"][0] for chunk in events(complete(client, prompt="ab", return_token_ids=True, stream=True))]
    assert pieces[0]["prompt_token_ids"] == choices[0]["prompt_token_ids"] and "prompt_token_ids" not in pieces[1]
    assert [token for piece in pieces for token in piece["token_ids"]] == choices[0]["token_ids"]
