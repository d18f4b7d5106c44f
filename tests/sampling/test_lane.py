"""Penalties, bias and suppression against loops over the tokens; a resumed lane against one that was never interrupted."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pointsman.request import SamplingParams
from pointsman.sampling import LaneSampling, check_vocabulary
from pointsman.step import LaneStart

VOCAB, EOS = 20, (3, 4)

tokens = st.lists(st.integers(0, VOCAB - 1), max_size=30)
edits = st.builds(
    SamplingParams,
    temperature=st.just(0.0),
    repetition_penalty=st.sampled_from([1.0, 0.5, 1.3, 10.0]),
    presence_penalty=st.sampled_from([0.0, -2.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, 2.0, -0.3]),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-100.0, 0.1, 7.0]), max_size=4),
    min_tokens=st.integers(0, 40),
    stop_token_ids=st.lists(st.integers(0, VOCAB - 1), max_size=2),
    ignore_eos=st.booleans(),
)


def start(sampling: SamplingParams, prompt=(0,), output=(), seed=0) -> LaneSampling:
    return LaneSampling(LaneStart(0, 0, tuple(prompt), tuple(output), sampling, seed), VOCAB, EOS)


def brute(logits_V, sampling: SamplingParams, prompt: list[int], output: list[int]):
    edited = [np.float32(logit) for logit in logits_V]
    ending = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else EOS)}
    for token in range(VOCAB):
        edited[token] += np.float32(sampling.logit_bias.get(token, 0.0))
        if token in prompt or token in output:
            penalty = np.float32(sampling.repetition_penalty)
            edited[token] = edited[token] / penalty if edited[token] > 0 else edited[token] * penalty
        edited[token] -= np.float32(sampling.presence_penalty) * np.float32(token in output)
        edited[token] -= np.float32(sampling.frequency_penalty) * np.float32(output.count(token))
        if token in ending and len(output) < sampling.min_tokens:
            edited[token] = np.float32(-np.inf)
    return np.array(edited)


@settings(deadline=None, max_examples=300)
@given(edits, tokens.filter(len), tokens, tokens, st.integers(0, 1 << 30))
def test_edits(sampling, prompt, output, more, seed) -> None:
    logits_V = np.random.default_rng(seed).normal(0, 3, VOCAB).astype(np.float32)
    before = logits_V.copy()
    lane = start(sampling, prompt, output)
    for token in more:
        lane.commit(token)
    resumed = start(sampling, prompt, output + more)
    expected = brute(logits_V, sampling, prompt, output + more)
    np.testing.assert_array_equal(lane.edit(logits_V), expected)
    np.testing.assert_array_equal(resumed.edit(logits_V), expected)
    np.testing.assert_array_equal(logits_V, before)
    assert lane.edited or np.array_equal(expected, before)
    assert lane.num_output == resumed.num_output == len(output + more)
    assert lane.uniform() == resumed.uniform()


def test_many_distinct_tokens() -> None:
    lane = LaneSampling(LaneStart(0, 0, (0,), (), SamplingParams(frequency_penalty=1.0), 0), 5000, ())
    drawn = np.random.default_rng(0).integers(0, 5000, 7000)
    for token in drawn.tolist():
        lane.commit(token)
    np.testing.assert_array_equal(lane.edit(np.zeros(5000, np.float32)), -np.bincount(drawn, minlength=5000).astype(np.float32))


def test_plain() -> None:
    assert start(SamplingParams(temperature=0.0)).plain and start(SamplingParams(top_k=1)).plain
    for sampling in (SamplingParams(), SamplingParams(temperature=0.0, logit_bias={1: 1.0}), SamplingParams(temperature=0, min_tokens=1)):
        assert not start(sampling).plain
    lane = start(SamplingParams(temperature=0.0, min_tokens=1))
    lane.commit(5)
    assert lane.plain


def test_tokens_outside_the_vocabulary_are_refused() -> None:
    for name, value in (("logit_bias", {VOCAB: 1.0}), ("stop_token_ids", (VOCAB,))):
        with pytest.raises(ValueError, match=f"{name} names token 20; the vocabulary has tokens 0 to 19"):
            check_vocabulary(SamplingParams(**{name: value}), VOCAB)
        with pytest.raises(ValueError, match=name):
            start(SamplingParams(**{name: value}))
