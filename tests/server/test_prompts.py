"""From what is asked to what runs, without a server: defaults, room in the context, thinking, checkpoints that lack a part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pointsman.server.errors import ApiError
from pointsman.server.prompts import ServedModel
from pointsman.server.protocol import ChatRequest, CompletionRequest
from pointsman.server.reading import NO_EFFECT, convert, decode
from pointsman.server.wire import ModelInfo

CONTEXT = 64
DEFAULTS = {"temperature": 0.25, "top_k": 7, "top_p": 0.5}


def info(folder: Path | None, architecture: str = "MiniMaxM2ForCausalLM", context: int = CONTEXT) -> ModelInfo:
    return ModelInfo(
        name="m",
        architecture=architecture,
        folder=None if folder is None else str(folder),
        context_length=context,
        cache_tokens=context,
        vocab_size=300,
        layers=(0, 1, 2),
        num_experts=8,
        top_k=2,
        generation_defaults=DEFAULTS,
    )


@pytest.fixture(scope="module")
def model(folder: Path) -> ServedModel:
    return ServedModel.load(info(folder), None, None)


def parse(body: bytes, form: Any) -> Any:
    return convert(decode(body), form)


def chat(**fields: Any) -> ChatRequest:
    return parse(json.dumps({"messages": [{"role": "user", "content": "hi"}], **fields}).encode(), ChatRequest)


def completion(**fields: Any) -> CompletionRequest:
    return parse(json.dumps({"prompt": "hi", **fields}).encode(), CompletionRequest)


def test_the_checkpoint_advises_where_the_request_is_silent(model: ServedModel) -> None:
    sampling = model.chat(chat(top_k=-1, temperature=None, seed=3), "r").requests[0].sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed) == (0.25, 0, 0.5, 3)
    assert sampling.max_tokens is None
    assert model.complete(completion(temperature=1), "r").requests[0].sampling.temperature == 1


def test_every_field_reaches_the_engine(model: ServedModel) -> None:
    fields = {
        "n": 3,
        "max_tokens": 9,
        "min_tokens": 2,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": -0.3,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
    }
    request = model.complete(
        completion(**fields, stop="x", stop_token_ids=[4], logit_bias={"7": -1}, priority=-2, cache_salt="s"), "r"
    ).requests[0]
    assert {name: getattr(request.sampling, name) for name in fields} == fields
    assert (request.sampling.stop, request.sampling.stop_token_ids, request.sampling.logit_bias) == (("x",), (4,), {7: -1})
    assert (request.rid, request.priority, request.cache_salt) == ("r-0", -2, "s")
    assert model.chat(chat(max_completion_tokens=5), "r").requests[0].sampling.max_tokens == 5


def test_the_default_length_gives_way_to_the_context(model: ServedModel) -> None:
    assert model.complete(completion(prompt="x" * 60), "r").requests[0].sampling.max_tokens == 4
    assert model.complete(completion(min_tokens=30), "r").requests[0].sampling.max_tokens == 30
    for fields in ({"max_tokens": 5}, {"min_tokens": 5}):
        with pytest.raises(ApiError, match="60 tokens and asks for 5 more; the context of this model has 64"):
            model.complete(completion(prompt="x" * 60, **fields), "r")
    assert model.complete(completion(prompt="x" * 64, max_tokens=0, echo=True), "r").requests[0].sampling.max_tokens == 0


def test_texts_and_chats_become_tokens(model: ServedModel) -> None:
    assert model.tokenizer is not None
    ids = model.chat(chat(messages=[{"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]), "r")
    assert model.tokenizer.decode(ids.requests[0].prompt_token_ids, skip_special_tokens=False) == "]~b]system\nab[e~[\n]~b]ai\n<think>\n"


@pytest.mark.parametrize(
    ("architecture", "parser", "splits"),
    [
        ("MiniMaxM2ForCausalLM", None, "minimax"),
        ("Other", None, None),
        ("Other", "minimax", "minimax"),
        ("MiniMaxM2ForCausalLM", "minimax-append-think", "minimax-append-think"),
        ("MiniMaxM2ForCausalLM", "none", None),
    ],
)
def test_who_splits_thinking(folder: Path, architecture: str, parser: str | None, splits: str | None) -> None:
    assert ServedModel.load(info(folder, architecture), parser, None).reasoning == splits


@pytest.mark.parametrize(
    ("architecture", "parser", "reads"),
    [("MiniMaxM2ForCausalLM", None, True), ("Other", None, False), ("Other", "minimax-m2", True), ("MiniMaxM2ForCausalLM", "none", False)],
)
def test_who_reads_calls(folder: Path, architecture: str, parser: str | None, reads: bool) -> None:
    model = ServedModel.load(info(folder, architecture, 200), None, parser)
    assert model.reads_calls is reads
    request = chat(tools=[{"type": "function", "function": {"name": "f"}}])
    if reads:
        model.chat(request, "r")
    else:
        with pytest.raises(ApiError, match="--tool-call-parser"):
            model.chat(request, "r")


def test_a_checkpoint_without_a_tokenizer_takes_token_ids() -> None:
    model = ServedModel.load(info(None), None, None)
    assert model.complete(completion(prompt=[1, 2]), "r").requests[0].prompt_token_ids == (1, 2)
    for request in (completion(), completion(prompt=[1], echo=True), completion(prompt=[1], logprobs=1)):
        with pytest.raises(ApiError, match="no tokenizer"):
            model.complete(request, "r")
    with pytest.raises(ApiError, match="no chat template"):
        model.chat(chat(), "r")


def test_values_that_change_nothing_are_accepted() -> None:
    for name, values in NO_EFFECT.items():
        for value in values:
            chat(**{name: value})
            completion(**{name: value})
        with pytest.raises(ApiError, match=f"{name} is not supported"):
            chat(**{name: "something"})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
PLAUSIBLE = (
    st.sampled_from([None, True, False, 0, 1, 2, -1, 0.5, "", "x", [], [1], ["x"], [[1, 2]], [0, 299], {}, {"1": 1}])
    | st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": st.sampled_from(["", "hi", None])})
    )
    | JSON
)


@pytest.mark.parametrize("form", [ChatRequest, CompletionRequest])
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_request_breaks_this_side(model: ServedModel, form: Any, data: st.DataObject) -> None:
    """Whatever the fields hold, the outcome is requests that can run or an ApiError with a status below 500."""
    names = st.sampled_from(sorted(form.__struct_fields__) + sorted(NO_EFFECT))
    fields = data.draw(st.dictionaries(names, PLAUSIBLE, max_size=4))
    fields.setdefault("messages" if form is ChatRequest else "prompt", [{"role": "user", "content": "hi"}] if form is ChatRequest else "hi")
    try:
        request = parse(json.dumps(fields).encode(), form)
        answer = model.chat(request, "r") if form is ChatRequest else model.complete(request, "r")
    except ApiError as error:
        assert 400 <= error.status < 500 and str(error)
        return
    for run in answer.requests:
        assert len(run.prompt_token_ids) + (run.sampling.max_tokens or 0) <= CONTEXT
