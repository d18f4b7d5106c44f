"""The next token of every lane of a step.

Not a chain of batched tensor operations: lanes differ in nearly every parameter, and the promise is that the same seed gives the same
answer whatever else runs. So what is done for the whole batch is only what cannot round (largest and smallest logit), and the rest is
done row by row on the host, on as few tokens as the lane's parameters leave (`filters`). A greedy lane without edits needs nothing but
the first part, which `greedy` does where the logits are.

Order: bias, repetition penalty, presence and frequency penalty, the grammar's mask, suppression of what would end the text before
`min_tokens`, temperature, top-k, top-p, min-p; then one random number (`philox`) goes through the inverse of the cumulative weights
of the kept tokens, in the order of their ids. Temperature 0 and top-k 1 take the likeliest; equally likely tokens count by id
everywhere.

Shapes: B lanes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from pointsman.request import Logprob
from pointsman.sampling.constraint import ConstraintFault
from pointsman.sampling.filters import Floats, kept, pick
from pointsman.sampling.lane import LaneSampling
from pointsman.sampling.logprobs import finite_rows, host_rows, row_logprobs

NO_TOKEN = -1

NOT_FINITE = "logits are not finite"
NONE_LEFT = "bias, penalties, min_tokens and the grammar leave no token with a finite logit"


class Drawn(NamedTuple):
    """What was drawn.

    Attributes:
        tokens: one for each lane; NO_TOKEN where there is an error.
        logprobs: None where no lane asked; else an entry for each lane, None for lanes that did not ask or have an error.
        errors: row to what is wrong with it; the other rows are not touched by it.
    """

    tokens: list[int]
    logprobs: list[dict[int, Logprob] | None] | None
    errors: dict[int, str]


def sample(logits_BV: torch.Tensor, lanes: Sequence[LaneSampling]) -> Drawn:
    """Draw a token for each lane from its row of float32 logits, and tell the lane."""
    assert len(logits_BV) == len(lanes)
    errors: dict[int, str] = {}
    rows_BV = host_rows(logits_BV)
    tokens = rows_BV.argmax(axis=1).tolist()
    finite = finite_rows(rows_BV)
    for index, lane in enumerate(lanes):
        if finite[index] and not lane.plain:
            try:
                tokens[index] = _draw(rows_BV[index], lane)
            except ConstraintFault as fault:
                tokens[index], errors[index] = NO_TOKEN, str(fault)
    logprobs = _logprobs(rows_BV, lanes, tokens, finite)
    for index, lane in enumerate(lanes):
        if not finite[index]:
            tokens[index], errors[index] = NO_TOKEN, NOT_FINITE
        elif tokens[index] == NO_TOKEN:
            errors.setdefault(index, NONE_LEFT)
        else:
            lane.commit(tokens[index])
    return Drawn(tokens, logprobs, errors)


def greedy(logits_BV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest token of each row, int64, and whether the row is finite, where the logits are."""
    return logits_BV.argmax(dim=-1), torch.isfinite(logits_BV).all(dim=-1)


def _draw(row_V: Floats, lane: LaneSampling) -> int:
    """The token of a lane that needs more than its model's likeliest; NO_TOKEN where none is left."""
    if lane.edited:
        row_V = lane.edit(row_V)
        if not np.isfinite(row_V.max()):
            return NO_TOKEN
    if lane.greedy:
        return int(row_V.argmax())
    return pick(*kept(row_V, lane.sampling), lane.uniform())


def _logprobs(
    rows_BV: Floats, lanes: Sequence[LaneSampling], tokens: Sequence[int], finite: Sequence[bool]
) -> list[dict[int, Logprob] | None] | None:
    entries: list[dict[int, Logprob] | None] | None = None
    for index, lane in enumerate(lanes):
        k = lane.sampling.logprobs
        if k is not None:
            entries = entries or [None] * len(lanes)
            if finite[index] and tokens[index] != NO_TOKEN:
                entries[index] = row_logprobs(rows_BV[index], tokens[index], k)
    return entries
