"""Replay through the engine: forced rows are used, in prefill and decode, and prefixes are shared under the same rows alone.

Hugging Face's model under hooks is the oracle of forced routing itself, in `tests/models/test_forced_routing.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pointsman import LLM, SamplingParams
from pointsman.request import Replay, Request
from pointsman.routed_experts import RoutedExperts, encode
from tests.engine.replays import ALONE, EXPERTS, LAYERS, PARAMS, PROMPT, TOP_K, model, rows, start

__all__ = ["model"]


@pytest.fixture(scope="module", params=["torch", "compiled"])
def llm(request: pytest.FixtureRequest, model: Path) -> Iterator[LLM]:
    llm = start(model, request.param, **ALONE)
    yield llm
    llm.close()


@pytest.mark.parametrize("ways", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 5, "top_p": 0.9}])
def test_its_own_record_gives_an_answer_again_bit_for_bit(llm: LLM, ways: dict[str, Any]) -> None:
    params = PARAMS.replace(**ways)
    first = llm.generate(list(PROMPT), params)[0].outputs[0]
    assert first.routing_agreement is None
    record = encode(RoutedExperts(rows_RLK=first.routed_experts, num_experts=EXPERTS, layers=(0, 1, 2)))
    for form in (first.routed_experts, record):
        again = llm.generate(list(PROMPT), params, replay_routed_experts=form)[0].outputs[0]
        assert (again.token_ids, again.logprobs) == (first.token_ids, first.logprobs)
        assert np.array_equal(again.routed_experts, first.routed_experts)
        assert again.routing_agreement == 1.0


def test_scoring_an_answer_under_its_record_gives_its_logprobs(llm: LLM) -> None:
    """Bit for bit on the compiled step; torch sums a prompt in another order than single tokens, as in `test_invariance`."""
    first = llm.generate(list(PROMPT), PARAMS)[0].outputs[0]
    scoring = SamplingParams(max_tokens=0, prompt_logprobs=1)
    tokens = [*PROMPT, *first.token_ids]
    scored = llm.generate(tokens, scoring, replay_routed_experts=first.routed_experts)[0]
    assert scored.prompt_logprobs is not None and first.logprobs is not None
    if llm.engine.step_name == "compiled":
        assert scored.prompt_logprobs[len(PROMPT) :] == first.logprobs
        assert scored.outputs[0].routing_agreement == 1.0
    for token, one, other in zip(first.token_ids, scored.prompt_logprobs[len(PROMPT) :], first.logprobs, strict=True):
        assert one is not None and one[token].logprob == pytest.approx(other[token].logprob, abs=2e-3)


def test_forced_positions_use_the_rows_and_others_route_freely(llm: LLM) -> None:
    """In prompt and output: rows 5 to 39 of 49 are given, 10 to 12 among them missing. What comes before is what it is anyway."""
    free = llm.generate(list(PROMPT), PARAMS)[0].outputs[0].routed_experts
    given_rows = rows(34, 1)
    record = RoutedExperts(rows_RLK=given_rows, num_experts=EXPERTS, start=5, layers=(0, 1, 2), missing=((5, 8),))
    output = llm.generate(list(PROMPT), PARAMS, replay_routed_experts=record)[0].outputs[0]
    got, known = output.routed_experts, record.known_R
    assert np.array_equal(got[5:39][known], given_rows[known])
    assert np.array_equal(got[:5], free[:5])
    assert not np.array_equal(got[10:13], free[10:13]), "they route freely, behind other keys and values"
    assert output.routing_agreement is not None and output.routing_agreement < 0.2


def test_the_order_of_experts_is_no_disagreement(llm: LLM) -> None:
    first = llm.generate(list(PROMPT), PARAMS)[0].outputs[0].routed_experts
    turned = llm.generate(list(PROMPT), PARAMS.replace(max_tokens=1), replay_routed_experts=first[:30, :, ::-1])[0].outputs[0]
    assert np.array_equal(turned.routed_experts, first[:30, :, ::-1])
    assert turned.routing_agreement == pytest.approx(1.0, abs=0.02), "sums in another order may tip a near tie"


def test_a_replay_without_rows_routes_freely(llm: LLM) -> None:
    first = llm.generate(list(PROMPT), PARAMS)[0].outputs[0]
    again = llm.generate(list(PROMPT), PARAMS, replay_routed_experts=rows(0))[0].outputs[0]
    assert (again.logprobs, again.routing_agreement) == (first.logprobs, None)


def test_each_prompt_has_its_own(llm: LLM) -> None:
    one, two = rows(10, 1), rows(20, 2)
    many = llm.generate([list(PROMPT)] * 3, PARAMS, replay_routed_experts=[one, None, two])
    free = llm.generate(list(PROMPT), PARAMS)[0]
    assert np.array_equal(many[0].outputs[0].routed_experts[:10], one)
    assert np.array_equal(many[2].outputs[0].routed_experts[:20], two)
    assert many[1].outputs[0].routing_agreement is None
    assert np.array_equal(many[1].outputs[0].routed_experts, free.outputs[0].routed_experts)


@pytest.mark.parametrize(
    ("value", "max_tokens", "words"),
    [
        (rows(50), 20, "has rows up to position 49; with a prompt of 30 tokens and at most 20 of output the last one that is fed is 48"),
        (rows(31), 1, "up to position 30; .* the last one that is fed is 29"),
        (rows(31), 0, "up to position 30; .* the last one that is fed is 29"),
        (rows(300), None, "up to position 299; .* the last one that is fed is 254"),
        (rows(5)[:, :2], 20, "of the layers 0 to 1; this model's are 0 to 2"),
        ([rows(5), None], 20, "has 2 entries for 1 prompts"),
        ({"version": 1}, 20, "dtype is missing from the record"),
    ],
)
def test_what_cannot_be_replayed_is_refused(llm: LLM, value: Any, max_tokens: int | None, words: str) -> None:
    with pytest.raises(ValueError, match=f"replay_routed_experts.*{words}"):
        llm.generate([list(PROMPT)], PARAMS.replace(max_tokens=max_tokens), replay_routed_experts=value)
    assert not llm.engine.has_work


def test_a_replay_as_long_as_what_is_fed_is_taken(llm: LLM) -> None:
    for max_tokens, count in ((20, 49), (1, 30), (0, 30)):
        output = llm.generate(list(PROMPT), PARAMS.replace(max_tokens=max_tokens), replay_routed_experts=rows(count))[0].outputs[0]
        assert output.routing_agreement is not None


def test_the_engine_refuses_ids_that_would_break_a_step(llm: LLM) -> None:
    """Whoever makes a `Replay` by hand."""
    wrong = Replay(shape=(1, LAYERS, TOP_K), data=bytes([EXPERTS] * LAYERS * TOP_K))
    with pytest.raises(ValueError, match="has the expert 10; ids of this model go from 0 to 9"):
        llm.engine.add(Request(rid="wrong", prompt_token_ids=PROMPT, sampling=PARAMS, replay=wrong))


def test_prefixes_are_shared_under_the_same_rows_alone(model: Path) -> None:
    """Free after forced, forced after free, and forced otherwise, each as if alone; what has the same rows shares pages."""
    llm, prompt, params = start(model, page_size=4), list(PROMPT), PARAMS.replace(max_tokens=6)
    alone = start(model, **ALONE)
    one = RoutedExperts(rows_RLK=rows(31, 1), num_experts=EXPERTS, start=2, layers=(0, 1, 2))
    other = RoutedExperts(rows_RLK=rows(31, 1), num_experts=EXPERTS, start=2, layers=(0, 1, 2), missing=((7, 8),))
    late = RoutedExperts(rows_RLK=rows(10, 1), num_experts=EXPERTS, start=18, layers=(0, 1, 2))
    longer = RoutedExperts(rows_RLK=np.concatenate([rows(31, 1), rows(2, 7)]), num_experts=EXPERTS, start=2, layers=(0, 1, 2))
    cached = []
    for replay in (one, None, other, late, None, one, longer, other, late):
        got = llm.generate(prompt, params, replay_routed_experts=replay)[0]
        want = alone.generate(prompt, params, replay_routed_experts=replay)[0].outputs[0]
        assert (got.outputs[0].logprobs, got.outputs[0].routing_agreement) == (want.logprobs, want.routing_agreement)
        assert np.array_equal(got.outputs[0].routed_experts, want.routed_experts)
        cached.append(got.num_cached_tokens)
    # `other` parts from `one` at position 9; `late` is free up to 18; all 28 tokens of the prompt's full pages are found at most
    assert cached == [0, 0, 8, 16, 28, 28, 28, 28, 28]
    llm.close()
    alone.close()


@pytest.mark.parametrize("step", ["torch", "compiled"])
def test_each_choice_has_the_same_replay(model: Path, step: str) -> None:
    llm, given_rows = start(model, step, page_size=4), rows(40, 3)
    params = PARAMS.replace(n=3, temperature=1.0, seed=2)
    outputs = llm.generate(list(PROMPT), params, replay_routed_experts=given_rows)[0].outputs
    assert len({tuple(output.token_ids) for output in outputs}) == 3
    for output in outputs:
        assert np.array_equal(output.routed_experts[:40], given_rows)
        assert output.routing_agreement is not None
    llm.close()
