"""Against torch's log-softmax in float64 and a full sort."""

import math

import pytest
import torch

from pointsman.request import Logprob
from pointsman.sampling import prompt_logprobs


@pytest.mark.parametrize("vocab_size", [3, 300, 5001])
@pytest.mark.parametrize("k", [0, 1, 5, 64])
@pytest.mark.parametrize("digits", [0, 6])
def test_logprobs_and_ranks(vocab_size: int, k: int, digits: int) -> None:
    torch.manual_seed(vocab_size + k)
    logits_RV = (torch.randn(9, vocab_size) * 4).round(decimals=digits)
    next_tokens = torch.randint(vocab_size, (9,)).tolist()
    expected_RV = torch.log_softmax(logits_RV.double(), -1)
    order_RV = logits_RV.sort(dim=-1, descending=True, stable=True).indices
    for row, entry in enumerate(prompt_logprobs(logits_RV, next_tokens, k)):
        order = order_RV[row].tolist()
        assert list(entry) == [next_tokens[row], *(token for token in order[:k] if token != next_tokens[row])]
        for token, item in entry.items():
            assert item.rank == 1 + order.index(token)
            assert item.logprob == pytest.approx(expected_RV[row, token].item(), abs=1e-12)


def test_huge_logits() -> None:
    (entry,) = prompt_logprobs(torch.tensor([[-3e38, 3e38, 3e38]]), [0], 2)
    assert entry[1].logprob == entry[2].logprob == -math.log(2) and entry[0].logprob == pytest.approx(-6e38)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_spoils_no_other(wrong: float) -> None:
    logits_RV = torch.randn(3, 50)
    expected = prompt_logprobs(logits_RV, [1, 2, 3], 4)
    logits_RV[1, 7] = wrong
    first, spoilt, last = prompt_logprobs(logits_RV, [1, 2, 3], 4)
    assert [first, last] == [expected[0], expected[2]]
    assert list(spoilt) == [2] and math.isnan(spoilt[2].logprob) and spoilt[2].rank == 50


def test_no_rows() -> None:
    assert prompt_logprobs(torch.empty(0, 50), [], 1) == []
    assert prompt_logprobs(torch.zeros(1, 2), [1], 0) == [{1: Logprob(-math.log(2), 2)}]
