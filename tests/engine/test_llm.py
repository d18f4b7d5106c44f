"""The Python front door: forms of prompts, ends of answers, log-probabilities, errors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pointsman import LLM, FinishReason, SamplingParams
from tests.engine.conftest import EOS

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    model = LLM(str(folder), load_format="dummy", progress=False, cpu_step="torch", dtype="float32")
    yield model
    model.close()


def test_text_and_its_token_ids_are_the_same_prompt(llm: LLM) -> None:
    text = "one and two"
    by_text, by_ids = llm.generate([text, llm.engine.tokenizer.encode(text)], GREEDY)  # type: ignore[union-attr]
    assert by_text.outputs[0].token_ids == by_ids.outputs[0].token_ids
    assert by_text.prompt == text and by_ids.prompt is None
    assert by_text.prompt_token_ids == by_ids.prompt_token_ids
    assert by_text.finished and by_text.outputs[0].finish_reason is FinishReason.LENGTH
    single = llm.generate(text, GREEDY)
    assert single[0].outputs[0].text == by_text.outputs[0].text


def test_chat_goes_through_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hello"}]
    (answer,) = llm.chat(messages, GREEDY)
    assert answer.prompt_token_ids == llm.engine.tokenizer.encode("user: hello\nai: ")  # type: ignore[union-attr]
    assert len(llm.chat([messages, messages], GREEDY)) == 2


def test_text_of_the_deltas_is_the_text(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=4, max_tokens=40, n=2)
    whole = llm.generate("a", params)[0]
    texts = ["", ""]
    for delta in llm.stream("a", params):
        texts[delta.index] += delta.text
    assert texts == [choice.text for choice in whole.outputs]
    assert texts[0] != texts[1], "two choices of one seed must differ"


def test_a_closed_stream_leaves_nothing_behind(llm: LLM) -> None:
    stream = llm.stream("abc", SamplingParams(max_tokens=50, temperature=0.0))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    while llm.engine.has_work:
        assert llm.engine.step() == []
    assert llm.engine.scheduler.usage == 0.0


def test_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=9, max_tokens=60, ignore_eos=True)
    free = llm.generate("q", params)[0].outputs[0]
    at = next(
        index for index in range(8, 50) if free.text[index : index + 2].isascii() and free.text.find(free.text[index : index + 2]) == index
    )
    stop = free.text[at : at + 2]
    ended = llm.generate("q", params.replace(stop=(stop,)))[0].outputs[0]
    assert (ended.text, ended.finish_reason, ended.stop_reason) == (free.text[:at], FinishReason.STOP, stop)
    kept = llm.generate("q", params.replace(stop=(stop,), include_stop_str_in_output=True))[0].outputs[0]
    assert kept.text == free.text[: at + 2]
    later = llm.generate("q", params.replace(stop=(stop,), min_tokens=len(free.token_ids)))[0].outputs[0]
    assert later.text == free.text


def test_stop_tokens_and_end_of_text(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=30)
    free = llm.generate("q", params)[0].outputs[0]
    stop = free.token_ids[10]
    ended = llm.generate("q", params.replace(stop_token_ids=(stop,)))[0].outputs[0]
    first = free.token_ids.index(stop)
    assert ended.token_ids == free.token_ids[: first + 1]
    assert (ended.finish_reason, ended.stop_reason) == (FinishReason.STOP, stop)
    toward_the_end = params.replace(logit_bias={EOS: 100.0})
    ended = llm.generate("q", toward_the_end)[0].outputs[0]
    assert (ended.token_ids, ended.finish_reason, ended.text) == ([EOS], FinishReason.STOP, "")
    held = llm.generate("q", toward_the_end.replace(min_tokens=5))[0].outputs[0]
    assert len(held.token_ids) == 6 and held.token_ids.index(EOS) == 5
    ignored = llm.generate("q", toward_the_end.replace(ignore_eos=True))[0].outputs[0]
    assert ignored.token_ids == [EOS] * 30 and ignored.finish_reason is FinishReason.LENGTH


def test_the_context_ends_an_answer(llm: LLM) -> None:
    prompt = list(range(200))
    (result,) = llm.generate([prompt], SamplingParams(max_tokens=None, ignore_eos=True, temperature=0.0))
    assert len(result.outputs[0].token_ids) == 256 - 200
    assert result.outputs[0].finish_reason is FinishReason.LENGTH


def test_logprobs_of_an_answer_are_those_of_the_same_text_as_a_prompt(llm: LLM) -> None:
    """Scored token by token while generating, or all at once as a prompt: within 1e-4, float32 sums in another order."""
    (result,) = llm.generate("score", SamplingParams(temperature=1.0, seed=2, max_tokens=20, logprobs=3))
    answer = result.outputs[0]
    assert answer.logprobs is not None
    whole = result.prompt_token_ids + answer.token_ids
    (scored,) = llm.generate([whole], SamplingParams(max_tokens=0, prompt_logprobs=3))
    assert scored.outputs[0].token_ids == [] and scored.outputs[0].finish_reason is FinishReason.LENGTH
    rows = scored.prompt_logprobs
    assert rows is not None and rows[0] is None and len(rows) == len(whole)
    for token, mine, theirs in zip(answer.token_ids, answer.logprobs, rows[len(result.prompt_token_ids) :], strict=True):
        assert theirs is not None
        assert mine[token].logprob == pytest.approx(theirs[token].logprob, abs=1e-4)
        assert 3 <= len(mine) <= 4 and sorted(item.rank for item in mine.values())[:3] == [1, 2, 3]
    assert answer.cumulative_logprob == pytest.approx(
        sum(row[token].logprob for token, row in zip(answer.token_ids, answer.logprobs, strict=True))
    )


def test_cache_dtypes_stay_within_their_bound(folder: Path) -> None:
    """Mean absolute difference of prompt log-probabilities to a float32 cache: bf16 keeps 8 bits of every key and value, e4m3 four."""
    prompt = np.random.default_rng(3).integers(0, 256, 200).tolist()
    scores = {}
    for dtype in ("float32", "bfloat16", "fp8_e4m3"):
        llm = LLM(str(folder), load_format="dummy", progress=False, cpu_step="torch", kv_cache_dtype=dtype)
        rows = llm.generate([prompt], SamplingParams(max_tokens=0, prompt_logprobs=0))[0].prompt_logprobs
        llm.close()
        assert rows is not None
        scores[dtype] = np.array([row[token].logprob for token, row in zip(prompt[1:], rows[1:], strict=True)])  # type: ignore[index]
    assert 0 < np.abs(scores["bfloat16"] - scores["float32"]).mean() < 0.005
    assert 0 < np.abs(scores["fp8_e4m3"] - scores["float32"]).mean() < 0.08


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        ([288], "token id 288 is not in the vocabulary; ids go from 0 to 287"),
        ([-1], "token id -1"),
        (list(range(257)), "257"),
    ],
)
def test_a_prompt_that_cannot_run_is_refused(llm: LLM, prompt: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm.generate([[1, 2, 3], prompt], GREEDY)
    assert llm.generate([[1, 2, 3]], GREEDY)[0].finished, "the engine goes on"
    assert not llm.engine.has_work


def test_params_must_fit_the_prompts(llm: LLM) -> None:
    with pytest.raises(ValueError, match="2 sampling parameters for 1 prompts"):
        llm.generate(["a"], [GREEDY, GREEDY])
    assert llm.generate([], GREEDY) == []


def test_more_prompts_than_the_queue_holds(folder: Path) -> None:
    llm = LLM(str(folder), load_format="dummy", progress=False, cpu_step="torch", max_queued_requests=4, max_running_requests=2)
    results = llm.generate([[token] for token in range(30)], SamplingParams(max_tokens=2, temperature=0.0))
    llm.close()
    assert [result.prompt_token_ids for result in results] == [[token] for token in range(30)]
    assert all(len(result.outputs[0].token_ids) == 2 for result in results)


def test_no_temperature_is_lost_on_infinities(llm: LLM) -> None:
    (result,) = llm.generate("x", SamplingParams(temperature=1e-3, seed=0, max_tokens=5, logprobs=0))
    assert result.outputs[0].logprobs is not None
    assert all(math.isfinite(item.logprob) for row in result.outputs[0].logprobs for item in row.values())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"tp": 4}, "tensor_parallel_size is 4: 6 query heads and 2 key/value heads"),
        ({"tp": 2, "ep": 3}, r"expert_parallel_size is 3: groups with whole experts are made of the ranks \(2, by --tp\), as many in each"),
        ({"ep": 2}, "expert_parallel_size is 2"),
        ({"device": "cuda"}, "device is 'cuda'"),
        ({"moe_runner_backend": "flashinfer_trtllm_routed"}, "needs a CUDA device"),
        ({"attention_backend": "flashinfer"}, "'flashinfer' cannot serve here: it needs a CUDA device"),
        ({"context_length": 512}, "context_length is 512"),
        ({"max_total_token": 5}, "did you mean 'max_total_tokens'"),
        ({"page_size": 0}, "page_size is 0"),
        ({"kv_cache_dtype": "int8"}, "one of auto, bfloat16"),
        ({"cpu_step": "compiled", "moe_runner_backend": "reference"}, "reference"),
    ],
)
def test_an_option_that_cannot_be_had_is_refused(folder: Path, option: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM(str(folder), load_format="dummy", progress=False, **option)


def test_what_contradicts_is_told_before_weights_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pointsman.engine.build.load_decoder", lambda *_, **__: pytest.fail("weights were read"))
    options: dict[str, object]
    for options, message in (
        ({"cpu_step": "compiled", "moe_runner_backend": "reference"}, "compiled"),
        ({"context_length": 512}, "context_length is 512"),
        ({"attention_backend": "triton"}, "'triton' cannot serve here"),
    ):
        with pytest.raises(ValueError, match=message):
            LLM(str(folder), load_format="dummy", progress=False, **options)
