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
from pointsman.sampling.logprobs import host_rows, likeliest_rows, row_logprobs

NO_TOKEN = -1

NOT_FINITE = "logits are not finite"
NONE_LEFT = "bias, penalties, min_tokens and the grammar leave no token with a finite logit"


class Drawn(NamedTuple):
    """What was drawn.

    Attributes:
        tokens: one for each lane; NO_TOKEN where there is an error.
        logprobs: of the lanes that asked and have no error.
        errors: row to what is wrong with it; the other rows are not touched by it.
    """

    tokens: list[int]
    logprobs: dict[int, dict[int, Logprob]]
    errors: dict[int, str]


def joined(*parts: tuple[Sequence[int], Drawn]) -> Drawn:
    """What was drawn in parts, each with the indices of its lanes, as if at once."""
    tokens: dict[int, int] = {}
    logprobs: dict[int, dict[int, Logprob]] = {}
    errors: dict[int, str] = {}
    for indices, drawn in parts:
        tokens.update(zip(indices, drawn.tokens, strict=True))
        logprobs.update((indices[at], entry) for at, entry in drawn.logprobs.items())
        errors.update((indices[at], error) for at, error in drawn.errors.items())
    return Drawn([tokens[index] for index in sorted(tokens)], logprobs, errors)


def sample(logits_BV: torch.Tensor, lanes: Sequence[LaneSampling]) -> Drawn:
    """Draw a token for each lane from its row of logits, and tell the lane."""
    assert len(logits_BV) == len(lanes)
    drawn = Drawn([], {}, {})
    rows_BV = host_rows(logits_BV)
    for index, (lane, likeliest, finite) in enumerate(zip(lanes, *likeliest_rows(rows_BV), strict=True)):
        token = likeliest
        if not finite:
            token, drawn.errors[index] = NO_TOKEN, NOT_FINITE
        elif lane.simple:
            lane.num_output += 1
        else:
            try:
                token = likeliest if lane.plain else _draw(rows_BV[index], lane)
            except ConstraintFault as fault:
                token, drawn.errors[index] = NO_TOKEN, str(fault)
            if token == NO_TOKEN:
                drawn.errors.setdefault(index, NONE_LEFT)
            else:
                if lane.sampling.logprobs is not None:
                    drawn.logprobs[index] = row_logprobs(rows_BV[index], token, lane.sampling.logprobs)
                lane.commit(token)
        drawn.tokens.append(token)
    return drawn


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
