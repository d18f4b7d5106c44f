"""Against the definitions written out: sort, walk, stop. And the inverse of the cumulative weights, exactly."""

import math

import numpy as np
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from pointsman.request import SamplingParams
from pointsman.sampling.filters import kept, likeliest, pick

# Rounded logits have many ties; 700 tokens are more than filters sorts whole.
logits = st.builds(
    lambda seed, size, scale, digits: np.random.default_rng(seed).normal(0, scale, size).round(digits).astype(np.float32),
    st.integers(0, 1 << 30),
    st.sampled_from([1, 2, 7, 64, 255, 256, 257, 700, 1999]),
    st.sampled_from([0.0, 0.1, 1.0, 5.0, 50.0]),
    st.sampled_from([0, 1, 6]),
)
params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([1e-30, 0.01, 0.7, 1.0, 2.5, 100.0]),
    top_k=st.one_of(st.just(0), st.integers(1, 50), st.integers(1, 2500)),
    top_p=st.one_of(st.just(1.0), st.floats(0.001, 1.0)),
    min_p=st.one_of(st.just(0.0), st.floats(0.0, 1.0)),
)


def brute(logits_V, sampling: SamplingParams) -> dict[int, float]:
    """Kept tokens and their probabilities. Cases that rounding could decide either way are dropped."""
    scores = [(float(logit) - float(logits_V.max())) / sampling.temperature for logit in logits_V]
    order = sorted(range(len(scores)), key=lambda token: (-logits_V[token], token))
    order = order[: sampling.top_k or len(order)]
    weight = {token: math.exp(scores[token]) for token in order}
    if sampling.top_p < 1.0:
        total, reached, nucleus = math.fsum(weight.values()), 0.0, []
        for token in sorted(order, key=lambda token: (-weight[token], token)):
            nucleus.append(token)
            reached += weight[token]
            assume(abs(reached / total - sampling.top_p) > 1e-12)
            if reached / total >= sampling.top_p:
                break
        order = nucleus
    for token in order:
        assume(weight[token] == sampling.min_p or abs(weight[token] - sampling.min_p) > 1e-12 * sampling.min_p)
    order = [token for token in order if weight[token] >= sampling.min_p]
    total = math.fsum(weight[token] for token in order)
    return {token: weight[token] / total for token in sorted(order)}


@settings(deadline=None, max_examples=400)
@given(logits, params)
@example(np.zeros(1999, np.float32), SamplingParams(top_k=1000, top_p=0.3331))
@example(np.array([0, 1, 1, 1, 0], np.float32), SamplingParams(top_k=2))
def test_kept_tokens_and_probabilities(logits_V, sampling: SamplingParams) -> None:
    expected = brute(logits_V, sampling)
    ids_K, weights_K = kept(logits_V, sampling)
    ids_K = np.arange(len(logits_V)) if ids_K is None else ids_K
    assert ids_K.tolist() == list(expected)
    # Both are float64 and sum up to 2,000 terms.
    np.testing.assert_allclose(weights_K / weights_K.sum(), list(expected.values()), rtol=1e-12, atol=1e-300)


@settings(deadline=None, max_examples=400)
@given(logits, st.integers(1, 2500))
def test_likeliest(logits_V, k: int) -> None:
    order = sorted(range(len(logits_V)), key=lambda token: (-logits_V[token], token))
    assert likeliest(logits_V, k).tolist() == order[:k]


def test_likeliest_among_suppressed_ones() -> None:
    logits_V = np.full(1000, -np.inf, np.float32)
    logits_V[[5, 900]] = 1.0
    assert likeliest(logits_V, 4).tolist() == [5, 900, 0, 1]
    ids_K, weights_K = kept(logits_V, SamplingParams(top_k=4))
    assert ids_K is not None and {pick(ids_K, weights_K, number / 64) for number in range(64)} == {5, 900}


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=20).filter(any))
def test_a_sweep_of_uniform_numbers_hits_each_token_as_often_as_it_weighs(weights: list[int]) -> None:
    ids, total = np.arange(100, 100 + len(weights)), sum(weights)
    for scale in (1.0, 0.5, 1 / 3):
        # The middles of equal steps: far from every border, so that rounding cannot matter.
        drawn = [pick(ids, np.array(weights) * scale, (step + 0.5) / (4 * total)) - 100 for step in range(4 * total)]
        assert drawn == [index for index, weight in enumerate(weights) for _ in range(4 * weight)]


def test_the_borders_belong_to_the_token_above() -> None:
    weights = np.array([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    below = [np.nextafter(border, 0) for border in (0.25, 0.75, 1.0)]
    assert [pick(None, weights, border) for border in (0.0, 0.25, 0.75)] == [1, 3, 4]
    assert [pick(None, weights, number) for number in below] == [1, 3, 4]
