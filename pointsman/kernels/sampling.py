"""Tokens drawn from logits where the logits are: no sort, no copy of 200,000 numbers to the host.

It computes what `pointsman.sampling` defines (its filters, then the inverse of the cumulative weights in the order of ids), with the same
random number (Philox of seed and position) and weights in float64 as there. Sums are made in another order, and the two exponential
functions may differ in their last bit. So what is promised: the likeliest token, the top-k set and every tie are exactly the host's; the
drawn token is the host's unless the random number, top_p or min_p falls within about 1e-12 (relative) of a border between two tokens, which
one draw in a thousand million does. The same row and parameters give the same token in any batch, bit for bit.

How. Logits are read in chunks of 4096, and each chunk tells its 64 groups' largest. With a top_k of 1 to 64 (greedy is 1) that is all the
reading: the k likeliest tokens lie in the k groups with the largest maxima (ties: the lower group), so one program looks at these 4096
candidates, and finds thresholds bit by bit where a sort would order them. Without top_k every chunk weighs its tokens. A nucleus is a
threshold on the logit: every chunk weighs its tokens down to each of a few levels below the largest logit, the tokens of the level in
which the nucleus ends are gathered, and one program finds the threshold among them, bit by bit. The program of a row then walks to the
chunk, and in it to the token.

Logits become keys whose order as integers is theirs as numbers; -0 is 0. A row with a NaN or an infinity draws nothing.

Shape suffixes: R rows of logits, V vocabulary, B rows drawn, C chunks, G groups of 64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from pointsman.kernels.nucleus_kernels import end_kernel, gather_kernel, level_kernel, nucleus_kernel
from pointsman.kernels.sampling_kernels import (
    few_kernel,
    score_kernel,
    survey_kernel,
    top_kernel,
    weigh_kernel,
    whole_kernel,
)

CHUNK = 4096
GROUP = 64
MOST_TOP_K = 64
NO_TOKEN = -1
LEVELS = 24  # of three quarters of the temperature: what is below the last but one weighs less than 1e-7 of the likeliest token
AT_ONCE = 4096  # logits of a nucleus's last level that one program holds


class RowSampling(NamedTuple):
    """How each row is drawn, on the device.

    Attributes:
        row_B: int64, its row of the logits.
        top_k_B: int32; 1 takes the likeliest, 0 keeps all tokens, at most `MOST_TOP_K`.
        temperature_B, top_p_B, min_p_B: float64; the temperature is not 0 (with top_k 1 any number will do).
        seed_B: int64, the 64 bits of the seed.
        position_B: int64, tokens of output so far.
    """

    row_B: Tensor
    top_k_B: Tensor
    temperature_B: Tensor
    top_p_B: Tensor
    min_p_B: Tensor
    seed_B: Tensor
    position_B: Tensor


class Tokens(NamedTuple):
    """What was drawn.

    Attributes:
        token_B: int64; NO_TOKEN where a logit is not finite.
        logprob_B: float64 log-probability of the token under the logits as they are, None where it was not asked for.
        rank_B: int64, 1 for the likeliest; equally likely tokens rank by id.
        top_BN: int64, as many of the likeliest tokens as the row wants, by id within a group of 64; what follows is not set. None where
            no row wants any.
        top_logprob_BN: float64, their log-probabilities.
    """

    token_B: Tensor
    logprob_B: Tensor | None = None
    rank_B: Tensor | None = None
    top_BN: Tensor | None = None
    top_logprob_BN: Tensor | None = None


def draw(
    logits_RV: Tensor,
    rows: RowSampling,
    *,
    few: bool = True,
    whole: bool = True,
    nucleus: bool = True,
    score: bool = False,
    top_B: Tensor | None = None,
    most_top: int = 0,
) -> Tokens:
    """Draw a token for each row of `rows`; nothing is waited for, and no memory outlives the call but its answer's.

    Args:
        logits_RV: float32 or bfloat16.
        few: some row has a top_k. False spares its kernels, as do the next two.
        whole: some row has none.
        nucleus: some row without a top_k has a top_p below 1.
        score: the tokens' log-probabilities and ranks are wanted.
        top_B: int32, with `score`: of how many of the likeliest tokens the log-probabilities are wanted, at most `most_top`, which is at
            most `MOST_TOP_K` and the vocabulary.
    """
    assert logits_RV.is_contiguous() and logits_RV.dtype in (torch.float32, torch.bfloat16)
    vocabulary, count, device = logits_RV.shape[1], len(rows.row_B), logits_RV.device
    chunks = triton.cdiv(vocabulary, CHUNK)
    sizes = {"NUM_CHUNKS": chunks, "CHUNKS_PAD": triton.next_power_of_2(chunks), "num_warps": 8}

    def room(*size: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    token_B = room(count, dtype=torch.int64)
    if count == 0:
        return Tokens(token_B, room(0), room(0, dtype=torch.int64)) if score else Tokens(token_B)
    maxima, faults = room(count, chunks * GROUP, dtype=torch.float32), room(count, chunks, dtype=torch.int32)
    sums = room(count, chunks) if score else maxima
    survey_kernel[(count, chunks)](logits_RV, rows.row_B, maxima, faults, sums, vocabulary, NUM_CHUNKS=chunks, SCORE=score, num_warps=8)
    shape = (rows.top_k_B, rows.temperature_B, rows.top_p_B)
    chance = (rows.min_p_B, rows.seed_B, rows.position_B)
    if few:
        groups = room(count, MOST_TOP_K, dtype=torch.int32)
        few_kernel[(count,)](logits_RV, rows.row_B, *shape, *chance, maxima, faults, groups, token_B, vocabulary, **sizes)
    if whole:
        _draw_from_all(logits_RV, rows, maxima, faults, token_B, nucleus=nucleus)
    if not score:
        return Tokens(token_B)
    logprob_B, rank_B = room(count), torch.ones(count, dtype=torch.int64, device=device)
    score_kernel[(count, chunks)](logits_RV, rows.row_B, token_B, maxima, sums, logprob_B, rank_B, vocabulary, **sizes)
    if not most_top:
        return Tokens(token_B, logprob_B, rank_B)
    groups = room(count, MOST_TOP_K, dtype=torch.int32)
    top_BN, top_logprob_BN = room(count, most_top, dtype=torch.int64), room(count, most_top)
    top_kernel[(count,)](logits_RV, rows.row_B, top_B, token_B, maxima, sums, groups, top_BN, top_logprob_BN, vocabulary, most_top, **sizes)
    return Tokens(token_B, logprob_B, rank_B, top_BN, top_logprob_BN)


def _draw_from_all(logits_RV: Tensor, rows: RowSampling, maxima: Tensor, faults: Tensor, token_B: Tensor, *, nucleus: bool) -> None:
    """Draw the rows without a top_k, given what was surveyed of all."""
    vocabulary, count, device = logits_RV.shape[1], len(rows.row_B), logits_RV.device
    chunks = triton.cdiv(vocabulary, CHUNK)
    sizes = {"NUM_CHUNKS": chunks, "CHUNKS_PAD": triton.next_power_of_2(chunks), "num_warps": 8}
    shape = (rows.top_k_B, rows.temperature_B, rows.top_p_B)
    chance = (rows.min_p_B, rows.seed_B, rows.position_B)

    def room(*size: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    bound, short = room(count, dtype=torch.int64), room(count)
    if nucleus:
        weight, number = room(count, LEVELS, chunks), room(count, chunks, dtype=torch.int32)
        level, goal, over = room(count, 2, dtype=torch.float32), room(count), room(count)
        found, levels = room(count, vocabulary, dtype=torch.float32), sizes | {"LEVELS": LEVELS}
        level_kernel[(count, chunks)](logits_RV, rows.row_B, *shape, maxima, weight, vocabulary, **levels)
        end_kernel[(count,)](*shape, maxima, weight, level, goal, over, LEVELS_PAD=triton.next_power_of_2(LEVELS), **levels)
        for counting in (True, False):
            gather_kernel[(count, chunks)](
                logits_RV, rows.row_B, rows.top_k_B, rows.top_p_B, level, number, found, vocabulary, COUNT=counting, **sizes
            )
        search = sizes | {"AT_ONCE": AT_ONCE, "PASS": AT_ONCE}
        nucleus_kernel[(count,)](*shape, maxima, goal, over, number, found, bound, short, vocabulary, **search)
    above, level, each = room(count, chunks), room(count, chunks, dtype=torch.int32), room(count, chunks)
    kept = {"NUCLEUS": nucleus} | sizes
    weigh_kernel[(count, chunks)](logits_RV, rows.row_B, *shape, rows.min_p_B, maxima, bound, above, level, each, vocabulary, **kept)
    whole_kernel[(count,)](
        logits_RV, rows.row_B, *shape, *chance, maxima, faults, bound, short, above, level, each, token_B, vocabulary, **kept
    )
