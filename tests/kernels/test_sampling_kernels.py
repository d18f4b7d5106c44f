"""Tokens drawn by the kernels are the host sampler's, for every kind of parameters, with ties, at the borders of chunks, in any batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pointsman.kernels import sampling as sampling_module
from pointsman.kernels.sampling import NO_TOKEN, RowSampling, draw
from pointsman.request import SamplingParams
from pointsman.sampling.filters import kept, likeliest, pick
from pointsman.sampling.logprobs import row_logprobs
from pointsman.sampling.philox import round_keys, uniform
from tests.kernels.interpreter import correct

correct()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def rows_of(samplings: list[SamplingParams], rows: list[int], seeds: list[int], positions: list[int]) -> RowSampling:
    def column(values: list[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=DEVICE)

    return RowSampling(
        row_B=column(rows, torch.int64),
        top_k_B=column([1 if sampling.greedy else sampling.top_k for sampling in samplings], torch.int32),
        temperature_B=column([sampling.temperature or 1.0 for sampling in samplings], torch.float64),
        top_p_B=column([sampling.top_p for sampling in samplings], torch.float64),
        min_p_B=column([sampling.min_p for sampling in samplings], torch.float64),
        seed_B=torch.from_numpy(np.array([seed & (1 << 64) - 1 for seed in seeds], np.uint64).view(np.int64)).to(DEVICE),
        position_B=column(positions, torch.int64),
    )


def host(logits_V: Tensor, sampling: SamplingParams, seed: int, position: int) -> int:
    row_V = logits_V.float().cpu().numpy()
    return int(row_V.argmax()) if sampling.greedy else pick(*kept(row_V, sampling), uniform(round_keys(seed), position))


def params(**fields: float) -> SamplingParams:
    return SamplingParams(**fields)  # type: ignore[arg-type]


KINDS = [
    params(temperature=0.0),
    params(temperature=1.0, top_k=1),
    params(temperature=1.0, top_k=40, top_p=0.95),
    params(temperature=0.7, top_k=64, top_p=0.5, min_p=0.01),
    params(temperature=2.0, top_k=5),
    params(temperature=1.0, top_k=3, min_p=0.4),
    params(temperature=1.0),
    params(temperature=0.6, top_p=0.95),
    params(temperature=1.5, top_p=0.3, min_p=0.001),
    params(temperature=1.0, min_p=0.05),
    params(temperature=1e-5, top_p=0.9),
    params(temperature=1.0, top_p=1e-9),
]


@pytest.mark.parametrize("vocabulary", [70, 4096, 9000])
@pytest.mark.parametrize("kind", ["smooth", "tied", "bfloat16"])
def test_the_token_is_the_hosts(vocabulary: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits_RV = torch.randn(3, vocabulary, generator=generator) * 4
    if kind == "tied":
        logits_RV = (logits_RV / 3).round()  # about ten values, -0 among them
    logits_RV = (logits_RV.bfloat16() if kind == "bfloat16" else logits_RV).to(DEVICE)
    rows = [index % 3 for index in range(len(KINDS))]
    seeds = [(index * 0x9E3779B97F4A7C15) % (1 << 64) for index in range(len(KINDS))]
    positions = [index * 1000 + (index == 4) * (1 << 33) for index in range(len(KINDS))]
    got = draw(logits_RV, rows_of(KINDS, rows, seeds, positions), score=True)
    assert got.logprob_B is not None and got.rank_B is not None
    for index, sampling in enumerate(KINDS):
        row_V = logits_RV[rows[index]]
        token = int(got.token_B[index])
        assert token == host(row_V, sampling, seeds[index], positions[index]), sampling
        want = row_logprobs(row_V.float().cpu().numpy(), token, 0)[token]
        assert math.isclose(float(got.logprob_B[index]), want.logprob, abs_tol=1e-11) and int(got.rank_B[index]) == want.rank


@pytest.mark.parametrize("kind", ["flat", "tied"])
def test_a_nucleus_that_ends_among_many_tokens(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More tokens in its last level than one look takes."""
    monkeypatch.setattr(sampling_module, "AT_ONCE", 512)
    logits_RV = torch.randn(1, 4500, generator=torch.Generator().manual_seed(5)) * 0.2
    logits_RV = ((logits_RV * 20).round() / 20 if kind == "tied" else logits_RV).to(DEVICE)
    kinds = [params(temperature=1.0, top_p=top_p) for top_p in (0.02, 0.5, 0.98)]
    for position in range(3):
        got = draw(logits_RV, rows_of(kinds, [0] * 3, [3] * 3, [position] * 3)).token_B.tolist()
        assert got == [host(logits_RV[0], sampling, 3, position) for sampling in kinds]


@pytest.mark.parametrize("vocabulary", [5, 9000])
@pytest.mark.parametrize("tied", [False, True])
def test_the_likeliest_tokens_are_the_hosts(vocabulary: int, tied: bool) -> None:
    logits_RV = torch.randn(2, vocabulary, generator=torch.Generator().manual_seed(9)) * 3
    logits_RV = (logits_RV.round() if tied else logits_RV).to(DEVICE)
    wanted = [0, 1, 7, 64]
    rows = rows_of([params(temperature=1.0)] * 4, [0, 1, 0, 1], [1, 2, 3, 4], [0] * 4)
    top_B = torch.tensor(wanted, dtype=torch.int32, device=DEVICE)
    got = draw(logits_RV, rows, score=True, top_B=top_B, most_top=min(64, vocabulary))
    assert got.top_BN is not None and got.top_logprob_BN is not None
    for index, num in enumerate(wanted):
        row_V = logits_RV[index % 2].cpu().numpy()
        want = likeliest(row_V, num) if num else np.zeros(0, np.int64)
        ids = got.top_BN[index, : len(want)].cpu()
        assert sorted(ids.tolist()) == sorted(want.tolist())
        log_probabilities = torch.log_softmax(torch.from_numpy(row_V).double(), 0)[ids]
        torch.testing.assert_close(got.top_logprob_BN[index, : len(want)].cpu(), log_probabilities, rtol=0, atol=1e-11)


@pytest.mark.parametrize("sampling", [KINDS[2], KINDS[6], KINDS[7]], ids=["top_k", "all", "top_p"])
def test_it_draws_each_token_as_often_as_the_host(sampling: SamplingParams) -> None:
    """Many positions of one row: the whole distribution, token by token."""
    logits_RV = (torch.randn(1, 300, generator=torch.Generator().manual_seed(1)) * 2).to(DEVICE)
    got = draw(logits_RV, rows_of([sampling] * 20, [0] * 20, [7] * 20, list(range(20)))).token_B.tolist()
    assert got == [host(logits_RV[0], sampling, 7, position) for position in range(20)] and len(set(got)) > 5


def test_equal_logits_count_by_id() -> None:
    logits_RV = torch.zeros(1, 9000, device=DEVICE)
    logits_RV[0, [5, 4095, 4096, 8000]] = 3.0
    logits_RV[0, 100] = -0.0
    kinds = [
        params(temperature=0.0),
        params(temperature=1.0, top_k=3),
        params(temperature=9.0, top_k=60),
        params(temperature=0.2, top_p=0.6),
    ]
    for position in range(4):
        got = draw(logits_RV, rows_of(kinds, [0] * 4, [3] * 4, [position] * 4)).token_B.tolist()
        assert got == [host(logits_RV[0], sampling, 3, position) for sampling in kinds]
    assert got[0] == 5


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's numpy, at infinity minus infinity
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_draws_nothing_and_disturbs_no_other(value: float) -> None:
    logits_RV = torch.randn(2, 5000, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    kinds = [KINDS[0], KINDS[2], KINDS[6], KINDS[7]]
    alone = draw(logits_RV, rows_of(kinds, [1] * 4, [1] * 4, [0] * 4)).token_B
    logits_RV[0, 4999] = value
    got = draw(logits_RV, rows_of(kinds * 2, [0] * 4 + [1] * 4, [1] * 8, [0] * 8)).token_B
    assert got[:4].tolist() == [NO_TOKEN] * 4 and torch.equal(got[4:], alone)


def test_kernels_that_no_row_needs_are_not_needed() -> None:
    logits_RV = torch.randn(1, 5000, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    for sampling, needs in (
        (KINDS[2], {"whole": False, "nucleus": False}),
        (KINDS[6], {"few": False, "nucleus": False}),
        (KINDS[7], {"few": False}),
    ):
        row = rows_of([sampling], [0], [5], [9])
        assert torch.equal(draw(logits_RV, row, **needs).token_B, draw(logits_RV, row).token_B)
    assert draw(logits_RV, rows_of([], [], [], []), score=True).token_B.shape == (0,)
