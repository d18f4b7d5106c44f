"""Log-probabilities and ranks of tokens under the model: log-softmax of its logits as they came, before bias, penalties and temperature.

One row at a time and summed in float64, so that a row's numbers do not depend on the batch.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from pointsman.request import Logprob
from pointsman.sampling.filters import Floats, likeliest


def row_logprobs(logits_V: Floats, token: int, k: int) -> dict[int, Logprob]:
    """The given token, then the k likeliest; equally likely tokens rank by id. The logits are finite."""
    largest, logit = float(logits_V.max()), logits_V[token]
    log_sum = math.log(np.exp(logits_V.astype(np.float64) - largest).sum())
    rank = 1 + int(np.count_nonzero(logits_V > logit)) + int(np.count_nonzero(logits_V[:token] == logit))
    entry = {token: Logprob(float(logit) - largest - log_sum, rank)}
    if k:
        for rank, likely in enumerate(likeliest(logits_V, k).tolist(), 1):
            entry.setdefault(likely, Logprob(float(logits_V[likely]) - largest - log_sum, rank))
    return entry


def prompt_logprobs(logits_RV: torch.Tensor, next_tokens: Sequence[int], k: int) -> list[dict[int, Logprob]]:
    """For each row, the prompt token that follows it and the k likeliest tokens.

    A row whose logits are not finite gives the following token alone, with the log-probability NaN and the last rank: such a fault belongs
    to one sequence, and ends it when it is sampled.
    """
    rows_RV = host_rows(logits_RV)
    _, finite_R = likeliest_rows(rows_RV)
    return [
        row_logprobs(row_V, token, k) if finite else {token: Logprob(math.nan, len(row_V))}
        for row_V, token, finite in zip(rows_RV, next_tokens, finite_R, strict=True)
    ]


def likeliest_rows(rows_RV: Floats) -> tuple[list[int], list[bool]]:
    """The likeliest token of each row, and which rows are finite. In a row with a NaN the first of these counts as the largest."""
    likeliest_R = rows_RV.argmax(axis=1)
    largest_R = rows_RV[np.arange(len(rows_RV)), likeliest_R]
    return likeliest_R.tolist(), (np.isfinite(largest_R) & np.isfinite(rows_RV.min(axis=1))).tolist()


def host_rows(logits_BV: torch.Tensor) -> Floats:
    """Float32 or bfloat16 logits as a float32 array on the host; float32 on a CPU is the same memory."""
    shape = tuple(logits_BV.shape)
    assert logits_BV.dim() == 2 and logits_BV.dtype in (torch.float32, torch.bfloat16), f"{logits_BV.dtype} of shape {shape}"
    return logits_BV.float().numpy(force=True)
