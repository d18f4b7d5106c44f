"""The sampler as a whole: it draws what its parts say, a row's answer is the same in any company, and a bad row harms no other."""

import itertools
import math
import random

import numpy as np
import pytest
import torch

from pointsman.request import SamplingParams
from pointsman.sampling import NO_TOKEN, LaneSampling, sample
from pointsman.sampling.filters import kept, pick
from pointsman.sampling.philox import round_keys, uniform
from pointsman.sampling.sampler import greedy
from pointsman.step import LaneStart

EOS = (3,)
PARAMS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.0, logprobs=3),
    SamplingParams(),
    SamplingParams(temperature=0.7, top_p=0.9, logprobs=0),
    SamplingParams(top_k=40, top_p=0.95, seed=1),
    SamplingParams(top_k=300, min_p=0.05, repetition_penalty=1.3, logprobs=7),
    SamplingParams(temperature=0.0, presence_penalty=1.0, frequency_penalty=0.5),
    SamplingParams(temperature=1.5, min_p=0.1, logit_bias={5: 4.0}, min_tokens=3),
    SamplingParams(top_k=1, logprobs=1),
]


def lane(sampling: SamplingParams, vocab_size: int, seed: int = 7, prompt=(1, 2), output=()) -> LaneSampling:
    return LaneSampling(LaneStart(0, 0, tuple(prompt), tuple(output), sampling, seed), vocab_size, EOS)


def logits(rows: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def alone(logits_BV: torch.Tensor, row: int, steps: int = 2):
    """What a row draws alone, over some steps on the same logits."""
    state = lane(PARAMS[row], logits_BV.shape[1], seed=row)
    return [sample(logits_BV[row : row + 1].clone(), [state]) for _ in range(steps)]


@pytest.mark.parametrize("vocab_size", [11, 1003, 20011])
def test_a_row_gives_the_same_in_any_batch(vocab_size: int) -> None:
    logits_BV = logits(len(PARAMS), vocab_size)
    expected = [alone(logits_BV, row) for row in range(len(PARAMS))]
    everyone = range(len(PARAMS))
    batches = [*itertools.permutations(everyone, 2), *(random.Random(n).sample(everyone, k=n % 8 + 2) for n in range(40))]
    for rows in batches:
        lanes = [lane(PARAMS[row], vocab_size, seed=row) for row in rows]
        for step in range(2):
            drawn = sample(logits_BV[list(rows)], lanes)
            for place, row in enumerate(rows):
                assert drawn.tokens[place] == expected[row][step].tokens[0]
                assert drawn.logprobs.get(place) == expected[row][step].logprobs.get(0)  # bitwise: floats compare equal


def test_all_permutations_of_four() -> None:
    rows = (2, 4, 5, 7)
    logits_BV = logits(len(PARAMS), 517)
    expected = {row: alone(logits_BV, row, steps=1)[0].tokens[0] for row in rows}
    for order in itertools.permutations(rows):
        drawn = sample(logits_BV[list(order)], [lane(PARAMS[row], 517, seed=row) for row in order])
        assert drawn.tokens == [expected[row] for row in order]


def test_draws_what_the_parts_say() -> None:
    logits_BV = logits(len(PARAMS), 700)
    lanes = [lane(sampling, 700, seed=row) for row, sampling in enumerate(PARAMS)]
    twins = [lane(sampling, 700, seed=row) for row, sampling in enumerate(PARAMS)]
    for position in range(6):
        tokens, _, errors = sample(logits_BV, lanes)
        assert not errors
        for row, (sampling, twin) in enumerate(zip(PARAMS, twins, strict=True)):
            edited_V = twin.edit(logits_BV[row].numpy())
            number = uniform(round_keys(row), position)
            expected = int(edited_V.argmax()) if sampling.greedy else pick(*kept(edited_V, sampling), number)
            assert tokens[row] == expected
            twin.commit(tokens[row])


def test_frequencies_follow_the_probabilities() -> None:
    probabilities = np.array([0.5, 0.25, 0.125, 0.0625, 0.0625])
    state, counts = lane(SamplingParams(), 5, seed=-1), np.zeros(5)
    logits_BV = torch.from_numpy(np.log(probabilities)).float()[None]
    for _ in range(4000):
        counts[sample(logits_BV, [state]).tokens[0]] += 1
    # Five standard deviations of each count; the seed is fixed, so this holds or not once and for all.
    assert (abs(counts - 4000 * probabilities) < 5 * np.sqrt(4000 * probabilities * (1 - probabilities))).all()


@pytest.mark.parametrize("sampling", PARAMS)
def test_a_resumed_lane_goes_on_as_if_never_interrupted(sampling: SamplingParams) -> None:
    steps = [logits(1, 300, seed=step) for step in range(12)]
    state = lane(sampling, 300)
    tokens = [sample(step, [state]).tokens[0] for step in steps]
    for cut in (1, 5, 11):
        resumed = lane(sampling, 300, output=tokens[:cut])
        assert [sample(step, [resumed]).tokens[0] for step in steps[cut:]] == tokens[cut:]


def test_another_seed_draws_other_tokens() -> None:
    steps = [logits(1, 300, seed=step) for step in range(12)]
    drawn = {tuple(sample(step, [state]).tokens[0] for step in steps) for state in (lane(SamplingParams(), 300, seed=n) for n in range(5))}
    assert len(drawn) == 5


def test_greedy_takes_the_lower_of_equal_tokens() -> None:
    logits_BV = torch.zeros(2, 500)
    logits_BV[:, [7, 300]] = 1.0
    for sampling in (SamplingParams(temperature=0.0), SamplingParams(top_k=1), SamplingParams(temperature=0.0, logit_bias={0: -1.0})):
        assert sample(logits_BV, [lane(sampling, 500) for _ in range(2)]).tokens == [7, 7]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_end_before_min_tokens(temperature: float) -> None:
    logits_BV = torch.zeros(1, 8)
    logits_BV[0, 3], logits_BV[0, 6] = 50.0, 40.0  # 3 ends the text, so does 6 where it is asked for

    def drawn(**params) -> list[int]:
        state = lane(SamplingParams(temperature=temperature, min_tokens=2, **params), 8)
        return [sample(logits_BV, [state]).tokens[0] for _ in range(3)]

    assert drawn() == [6, 6, 3]
    assert drawn(ignore_eos=True) == [3, 3, 3]
    assert drawn(ignore_eos=True, stop_token_ids=(3,)) == [6, 6, 3]
    first, second, third = drawn(stop_token_ids=(6,))
    assert first not in (3, 6) and second not in (3, 6) and third == 3


def test_bias_decides() -> None:
    logits_BV = logits(1, 50)
    best = int(logits_BV.argmax())
    assert sample(logits_BV, [lane(SamplingParams(logit_bias={17: 100.0}), 50)]).tokens == [17]
    assert sample(logits_BV, [lane(SamplingParams(temperature=0.0, logit_bias={best: -100.0}), 50)]).tokens != [best]


def test_logprobs_are_the_models_own() -> None:
    logits_BV = logits(1, 50)
    sampling = SamplingParams(temperature=0.3, logit_bias={17: 100.0}, logprobs=2)
    drawn = sample(logits_BV, [lane(sampling, 50)])
    expected_V = torch.log_softmax(logits_BV[0].double(), -1)
    assert list(drawn.logprobs[0]) == [17, *expected_V.topk(2).indices.tolist()]
    assert drawn.logprobs[0][17].logprob == pytest.approx(expected_V[17].item(), abs=1e-12)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 499])
def test_a_row_that_is_not_finite_fails_alone(wrong: float, place: int) -> None:
    for bad in range(len(PARAMS)):
        logits_BV = logits(len(PARAMS), 500)
        expected = sample(logits_BV, [lane(sampling, 500) for sampling in PARAMS])
        logits_BV[bad, place] = wrong
        lanes = [lane(sampling, 500) for sampling in PARAMS]
        drawn = sample(logits_BV, lanes)
        assert drawn.errors == {bad: "logits are not finite"}
        assert drawn.tokens[bad] == NO_TOKEN and lanes[bad].num_output == 0
        assert drawn.logprobs.keys() == expected.logprobs.keys() - {bad}
        others = [row for row in range(len(PARAMS)) if row != bad]
        assert [drawn.tokens[row] for row in others] == [expected.tokens[row] for row in others]
        assert greedy(logits_BV)[1].tolist() == [row != bad for row in range(len(PARAMS))]


def test_a_row_with_nothing_left_fails_alone() -> None:
    everything = SamplingParams(temperature=0.0, min_tokens=1, stop_token_ids=tuple(range(8)), logprobs=1)
    overflow = SamplingParams(repetition_penalty=1e-30)
    logits_BV = torch.full((3, 8), 1e20)
    drawn = sample(logits_BV, [lane(everything, 8), lane(SamplingParams(temperature=0.0), 8), lane(overflow, 8)])
    assert drawn.tokens == [NO_TOKEN, 0, NO_TOKEN] and set(drawn.errors) == {0, 2}
    assert drawn.errors[0] == "bias, penalties, min_tokens and the grammar leave no token with a finite logit"


def test_the_device_path_agrees_with_the_host() -> None:
    logits_BV = logits(9, 3000).round()
    lanes = [lane(SamplingParams(temperature=0.0), 3000) for _ in range(9)]
    tokens_B, finite_B = greedy(logits_BV)
    assert (tokens_B.tolist(), finite_B.tolist()) == (sample(logits_BV, lanes).tokens, [True] * 9)


def test_no_lanes() -> None:
    assert sample(torch.empty(0, 50), []) == ([], {}, {})
