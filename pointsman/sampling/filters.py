"""Which tokens stay after top-k, top-p and min-p, and how likely each is.

All of it works on one row, in float64, on the host: what a row gives cannot depend on the rows beside it, not even in the last bit, and a
few operations on 40 numbers cost less than launching them for the batch. Passes over the whole vocabulary are kept few: a sort only
ever sees the tokens that can still be kept.

Shapes: V vocabulary, K kept tokens, N tokens looked at.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pointsman.request import SamplingParams

Floats = NDArray[np.floating[Any]]
Doubles = NDArray[np.float64]
Ids = NDArray[np.intp]

# Below this many, sorting all is quicker than first finding the ones worth sorting.
SMALL = 256


def likeliest(logits_V: Floats, k: int) -> Ids:
    """Ids of the k largest logits, largest first; equal ones by id."""
    if len(logits_V) <= max(k, SMALL):
        return (-logits_V).argsort(kind="stable")[:k]
    near_N: Ids = (logits_V >= _lower_bound(logits_V, k)).nonzero()[0]
    order_N = (-logits_V[near_N]).argsort(kind="stable")
    return near_N[order_N[:k]]


def _lower_bound(logits_V: Floats, k: int) -> Any:
    """A number that at least k logits reach, and few more than k where that is cheap to find.

    The row is cut into n groups. The k largest of the groups' maxima are k different logits, so the k-th of them will do.
    """
    groups = 4 * k
    deep = len(logits_V) // groups
    if deep < 2:
        return np.partition(logits_V, len(logits_V) - k)[len(logits_V) - k]
    maxima = logits_V[: deep * groups].reshape(deep, groups).max(axis=0)
    return np.partition(maxima, groups - k)[groups - k]


def kept(logits_V: Floats, sampling: SamplingParams) -> tuple[Ids | None, Doubles]:
    """The tokens that may be drawn, in the order of their ids (None: all), and weights in proportion to their probabilities.

    In turn: temperature; the top_k likeliest; of these, the likeliest that together reach top_p of their weight; those at least min_p times
    as likely as the likeliest. Equally likely tokens count by id. The likeliest token always stays, with the weight 1.
    """
    ids_K = np.sort(likeliest(logits_V, sampling.top_k)) if 0 < sampling.top_k < len(logits_V) else None
    scores_K = (logits_V if ids_K is None else logits_V[ids_K]).astype(np.float64)
    scores_K -= scores_K.max()
    with np.errstate(over="ignore"):  # a tiny temperature: -inf, and so the weight 0, is right
        scores_K /= sampling.temperature
    weights_K: Doubles = np.exp(scores_K)
    if sampling.top_p < 1.0:
        ids_K, weights_K = _select(ids_K, weights_K, _nucleus(weights_K, sampling.top_p))
    if sampling.min_p > 0.0:
        ids_K, weights_K = _select(ids_K, weights_K, (weights_K >= sampling.min_p).nonzero()[0])
    return ids_K, weights_K


def _select(ids_K: Ids | None, weights_K: Doubles, chosen: Ids) -> tuple[Ids, Doubles]:
    return (chosen if ids_K is None else ids_K[chosen]), weights_K[chosen]


def _nucleus(weights_N: Doubles, top_p: float) -> Ids:
    """Where the largest weights stand that together reach top_p of all: as few as will do, in their own order."""
    total = weights_N.sum()
    if len(weights_N) > SMALL:
        # All that are not above this weigh less than 1 - top_p together: the largest reach top_p without them.
        near = (weights_N > (1.0 - top_p) * total / len(weights_N)).nonzero()[0]
        order = near[(-weights_N[near]).argsort(kind="stable")]
    else:
        order = (-weights_N).argsort(kind="stable")
    reached = weights_N[order].cumsum()
    count = int(reached.searchsorted(top_p * total)) + 1
    return np.sort(order[:count])


def pick(ids_K: Ids | None, weights_K: Doubles, uniform: float) -> int:
    """The token at `uniform` (0 to below 1) of the way through the weights: the inverse of their cumulative sum."""
    reached_K = weights_K.cumsum()
    at = int(reached_K.searchsorted(uniform * reached_K[-1], side="right"))
    at = min(at, len(reached_K) - 1)
    return at if ids_K is None else int(ids_K[at])
