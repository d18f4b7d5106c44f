"""SGLang's own form: /generate."""

from __future__ import annotations

import itertools
from typing import Any

import httpx
import pytest

from tests.server.asking import events, fault, generate
from tests.server.fake_engine import REPLY


def test_one_text(client: httpx.Client) -> None:
    answer = generate(client, text="SAY abc", rid="mine").json()
    latency = answer["meta_info"].pop("e2e_latency")
    assert 0 < latency < 60
    tokens = client.post("/tokenize", json={"prompt": "abc"}).json()["tokens"]
    [end] = set(answer["output_ids"]) - set(tokens)
    assert answer == {
        "text": "abc",
        "output_ids": [*tokens, end],
        "meta_info": {
            "id": "mine",
            "finish_reason": {"type": "stop", "matched": end},
            "prompt_tokens": 7,
            "completion_tokens": 4,
            "cached_tokens": 3,
            "weight_version": "0",
        },
    }


def test_spaces_that_no_byte_level_tokenizer_puts(client: httpx.Client) -> None:
    for value in (True, False, None):
        answer = generate(client, text="x", sampling_params={"spaces_between_special_tokens": value}).json()
        assert answer["text"] == REPLY


def test_limits(client: httpx.Client) -> None:
    answer = generate(client, text="ENDLESS").json()
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 128}
    answer = generate(client, text="x", sampling_params={"max_new_tokens": 3, "temperature": 0}).json()
    assert (answer["text"], answer["meta_info"]["finish_reason"]) == (REPLY[:3], {"type": "length", "length": 3})


def test_a_stream_has_the_whole_answer_each_time(client: httpx.Client) -> None:
    seen = events(generate(client, input_ids=[1, 2, 3], stream=True))
    assert all(later["text"].startswith(earlier["text"]) for earlier, later in itertools.pairwise(seen))
    assert [event["meta_info"]["finish_reason"] is None for event in seen] == [True] * (len(seen) - 1) + [False]
    assert seen[-1]["text"] == REPLY and "index" not in seen[-1]


@pytest.mark.parametrize("stream", [False, True])
def test_batches(client: httpx.Client, stream: bool) -> None:
    fields: dict[str, Any] = {"sampling_params": [{"n": 2}, {"max_new_tokens": 1}], "rid": "many", "stream": stream}
    response = generate(client, text=["SAY ab", "SAY cd"], **fields)
    if stream:
        last = {event["index"]: event for event in events(response)}
        answers = [last[index] for index in range(3)]
    else:
        answers = response.json()
    assert [answer["text"] for answer in answers] == ["ab", "ab", "c"]
    assert [answer["meta_info"]["id"] for answer in answers] == ["many_0", "many_0", "many_1"]


def test_several_answers_to_one_text(client: httpx.Client) -> None:
    answers = generate(client, text="SAY ab", sampling_params={"n": 2}).json()
    assert [answer["text"] for answer in answers] == ["ab", "ab"]
    assert [answer["text"] for answer in generate(client, input_ids=[[1]], sampling_params={"max_new_tokens": 2}).json()] == [REPLY[:2]]


def test_logprobs(client: httpx.Client) -> None:
    fields: dict[str, Any] = {"return_logprob": True, "top_logprobs_num": 1, "return_text_in_logprobs": True}
    information = generate(client, text="SAY a", **fields).json()["meta_info"]
    assert information["input_token_logprobs"] == [] and information["input_top_logprobs"] == []
    assert [entry[2] for entry in information["output_token_logprobs"]] == ["a", "[e~["]
    assert information["output_token_logprobs"][0][0] == -1.5
    assert [entry[2] for entry in information["output_top_logprobs"][0]] == ["b"]
    information = generate(client, text="SAY a", logprob_start_len=0, **fields).json()["meta_info"]
    assert [entry[2] for entry in information["input_token_logprobs"]] == list("SAY a")
    assert [entry[0] for entry in information["input_token_logprobs"]] == [None, -1.5, -1.5, -1.5, -1.5]
    assert information["input_top_logprobs"][0] is None and information["input_top_logprobs"][1][0][2] == "B"
    information = generate(client, text="SAY a", logprob_start_len=3, return_logprob=True).json()["meta_info"]
    assert [entry[2] for entry in information["input_token_logprobs"]] == [None, None]
    assert "input_top_logprobs" not in information
    plain, listed = generate(client, text=["x", "y"], return_logprob=[False, True]).json()
    assert "output_token_logprobs" not in plain["meta_info"] and listed["meta_info"]["output_token_logprobs"]


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({}, "text", "text or input_ids"),
    ({"text": "x", "input_ids": [1]}, "input_ids", "not both"),
    ({"text": []}, "text", "at least 1"),
    ({"text": [1]}, "text[0]", "must be str"),
    ({"input_ids": ["x"]}, "input_ids", "token ids"),
    ({"input_ids": [[1], [400]]}, "input_ids", "token id 400"),
    ({"input_ids": [[]]}, "input_ids", "not empty"),
    ({"text": "x", "sampling_params": {"max_tokens": 5}}, "sampling_params", "no field `max_tokens`"),
    ({"text": "x", "sampling_params": {"temperature": -1}}, "sampling_params.temperature", "at least 0"),
    ({"text": "x", "sampling_params": {"max_new_tokens": 4, "min_new_tokens": 5}}, "sampling_params.min_tokens", "from 0 to 4"),
    ({"text": "x", "sampling_params": {"max_new_tokens": 9000}}, "text", "9000 more"),
    ({"text": ["x", "y"], "sampling_params": [{}]}, "sampling_params", "1 entries for 2 prompts"),
    ({"text": ["x"] * 10, "sampling_params": {"n": 128}}, "sampling_params", "more than 1024"),
    ({"text": ["x", "y"], "rid": ["a", "a"]}, "rid", "1 different names"),
    ({"text": "x", "return_hidden_states": True}, "return_hidden_states", "not supported"),
    ({"text": "x", "image_data": "file"}, "image_data", "not supported"),
    ({"text": "x", "input_embeds": []}, "input_embeds", "not supported"),
    ({"text": "x", "max_tokens": 5}, "max_tokens", "unknown field"),
    ({"text": "REFUSE"}, None, "this prompt is refused"),
]


@pytest.mark.parametrize(("fields", "param", "words"), [pytest.param(*case, id=f"{case[1]}: {case[2]}") for case in REFUSED])
def test_refuses(client: httpx.Client, fields: dict[str, Any], param: str | None, words: str) -> None:
    error = fault(generate(client, **fields), 400)
    assert error["param"] == param and words in error["message"]
