"""What is put to each kind of endpoint, and what its events mean."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.bench.serving.backends import BACKENDS, AnswerFault, StreamTaker, Wish, error_of
from pointsman.bench.serving.query import Outcome, Query
from tests.bench.serving.cuts import PLACES, pieces

TEXT = Query(text="hello", input_len=1, output_len=9, stop=("x",))
IDS = Query(ids=(1, 2), input_len=2, output_len=9)
TALK = Query(messages=[{"role": "user", "content": "hi"}], input_len=None, output_len=9)
WISH = Wish(model="m", ignore_eos=True, return_routed_experts=True, extra={"top_p": 0.5})


def sse(events):
    return b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n"


def taken(backend, stream, places=()):
    """The outcome of a stream, the clock counting the pieces in which it came."""
    outcome = Outcome(query=TEXT)
    ticks = iter(range(1 << 20))
    taker = StreamTaker(BACKENDS[backend], outcome, lambda: float(next(ticks)))
    for piece in pieces(stream, list(places)):
        taker(piece)
    return outcome


def test_bodies():
    shared = {"model": "m", "stream": True, "stream_options": {"include_usage": True}, "temperature": 0.0, "ignore_eos": True}
    shared |= {"return_routed_experts": True, "top_p": 0.5}
    stop = {"stop": ["x"]}
    assert BACKENDS["openai"].body(TEXT, WISH) == shared | stop | {"prompt": "hello", "max_tokens": 9}
    assert BACKENDS["openai"].body(IDS, WISH) == shared | {"prompt": [1, 2], "max_tokens": 9}
    messages = [{"role": "user", "content": "hello"}]
    assert BACKENDS["openai-chat"].body(TEXT, WISH) == shared | stop | {"messages": messages, "max_completion_tokens": 9}
    assert BACKENDS["openai-chat"].body(TALK, WISH) == shared | {"messages": TALK.messages, "max_completion_tokens": 9}
    sampling = {"max_new_tokens": 9, "temperature": 0.0, "ignore_eos": True}
    native = {"sampling_params": sampling, "stream": True, "return_routed_experts": True, "top_p": 0.5}
    assert BACKENDS["generate"].body(IDS, WISH) == native | {"input_ids": [1, 2]}
    assert BACKENDS["generate"].body(TEXT, WISH)["sampling_params"] == sampling | stop


@pytest.mark.parametrize(("backend", "query"), [("openai", TALK), ("generate", TALK), ("openai-chat", IDS)])
def test_what_an_endpoint_cannot_be_asked_is_refused(backend, query):
    with pytest.raises(ValueError, match="--backend"):
        BACKENDS[backend].body(query, WISH)


@given(st.lists(st.sampled_from(["a", "bc", ""]), max_size=8), PLACES)
def test_completions_are_the_same_however_they_are_cut(texts, places):
    events = [{"choices": [{"text": text}]} for text in texts]
    events += [{"choices": [{"text": "", "finish_reason": "stop", "routed_experts": {"a": 1}}]}]
    events += [{"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 7}}]
    outcome = taken("openai", sse(events), places)
    assert outcome.text == "".join(texts)
    assert len(outcome.piece_s) == outcome.counted == sum(map(bool, texts))
    assert (outcome.prompt_tokens, outcome.output_tokens, outcome.output_len) == (3, 7, 7)
    assert (outcome.finish_reason, outcome.routing) == ("stop", {"a": 1})


def test_thinking_and_calls_are_tokens_and_a_role_is_none():
    deltas = [{"role": "assistant", "content": ""}, {"reasoning_content": "a"}, {"reasoning": "b"}, {"content": "c"}]
    deltas += [{"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]}, {"tool_calls": []}, {"content": None}]
    outcome = taken("openai-chat", sse({"choices": [{"delta": delta}]} for delta in deltas))
    assert (outcome.text, outcome.counted, outcome.output_len) == ("abc", 4, 4)


def test_ids_count_what_a_chunk_has():
    outcome = taken("openai", sse([{"choices": [{"text": "", "token_ids": [1, 2]}]}, {"choices": [{"text": "a", "token_ids": [3]}]}]))
    assert (outcome.counted, len(outcome.piece_s)) == (3, 2)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), PLACES)
def test_native_events_have_the_whole_and_count_what_is_new(news, places):
    totals = [sum(news[: index + 1]) for index in range(len(news))]
    events = [
        {"text": "x" * total, "meta_info": {"prompt_tokens": 4, "completion_tokens": total, "finish_reason": None}} for total in totals
    ]
    events[-1]["meta_info"] |= {"finish_reason": {"type": "length"}, "routed_experts": "AAAA"}
    outcome = taken("generate", sse(events), places)
    assert outcome.text == "x" * totals[-1]
    assert (outcome.counted, outcome.output_len, outcome.prompt_tokens) == (totals[-1], totals[-1], 4)
    assert len(outcome.piece_s) == sum(map(bool, news))
    assert (outcome.finish_reason, outcome.routing) == ("length", "AAAA")


@pytest.mark.parametrize(
    ("backend", "event", "message"),
    [
        ("openai", b'{"error": {"message": "too long"}}', "too long"),
        ("generate", b'{"error": {"message": "too long"}}', "too long"),
        ("openai", b"{", "an event is not what it should be"),
        ("openai", b'{"choices": 3}', "an event is not what it should be"),
    ],
)
def test_an_error_in_the_stream_is_told(backend, event, message):
    with pytest.raises(AnswerFault, match=message):
        taken(backend, b"data: " + event + b"\n\n")


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"error": {"message": "a"}}', "a"),
        (b'{"error": "b"}', "b"),
        (b'{"detail": 1}', "{'detail': 1}"),
        (b"oops", "oops"),
        (b"", "it says nothing"),
    ],
)
def test_what_a_failed_answer_says(body, text):
    assert error_of(body) == text
