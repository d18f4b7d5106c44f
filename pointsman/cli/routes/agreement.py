"""Where two records of the same tokens part.

Two choices agree where they are the same set of experts: the order of a router's choice has no effect on what a layer computes. Whether
the order is the same too is told beside it, because it shows how near two computations are.

Shape suffixes: R rows that both know, L layers, K experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pointsman.routed_experts import RoutedExperts


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How alike two records are.

    Attributes:
        num_tokens: tokens that both have rows for.
        sets, orders: by layer, the share of tokens with the same experts, and with the same in the same order.
        tokens: share of the tokens that agree in every layer.
        first: position and layer of the first choice that differs, and the two choices; None where all agree.
        by_layer: by layer, the first position that differs, or None.
    """

    layers: tuple[int, ...]
    num_tokens: int
    sets: list[float]
    orders: list[float]
    tokens: float
    first: tuple[int, int, list[int], list[int]] | None
    by_layer: list[int | None]

    def figures(self) -> dict[str, Any]:
        first = None if self.first is None else dict(zip(("position", "layer", "left", "right"), self.first, strict=True))
        each = zip(self.layers, self.sets, self.orders, self.by_layer, strict=True)
        return {
            "num_tokens": self.num_tokens,
            "agreement": sum(self.sets) / len(self.sets),
            "ordered_agreement": sum(self.orders) / len(self.orders),
            "tokens_alike": self.tokens,
            "first_divergence": first,
            "layers": [
                {"layer": layer, "agreement": same, "ordered_agreement": ordered, "first_divergence": position}
                for layer, same, ordered, position in each
            ],
        }


def compare(left: RoutedExperts, right: RoutedExperts) -> Agreement:
    """Compare two records where both know rows. Raises ValueError where they are not of one model, or share no position."""
    if left.layers != right.layers or left.rows_RLK.shape[2] != right.rows_RLK.shape[2]:
        sizes = [f"{len(each.layers)} layers with {each.rows_RLK.shape[2]} experts a token" for each in (left, right)]
        raise ValueError(f"the first record is of {sizes[0]}, the second of {sizes[1]}; they must be of one model")
    start, end = max(left.start, right.start), min(left.start + left.num_rows, right.start + right.num_rows)
    if start >= end:
        raise ValueError(f"the first record has positions from {left.start}, the second from {right.start}: they have none in common")
    known_R = left.known_R[start - left.start : end - left.start] & right.known_R[start - right.start : end - right.start]
    positions_R = start + np.flatnonzero(known_R)
    if not len(positions_R):
        raise ValueError("there is no position whose rows both records know")
    left_RLK, right_RLK = left.rows_RLK[positions_R - left.start], right.rows_RLK[positions_R - right.start]
    same_RL = (np.sort(left_RLK) == np.sort(right_RLK)).all(axis=-1)
    first = None
    if not same_RL.all():
        row, layer = (int(index) for index in np.argwhere(~same_RL)[0])
        first = int(positions_R[row]), left.layers[layer], left_RLK[row, layer].tolist(), right_RLK[row, layer].tolist()
    return Agreement(
        layers=left.layers,
        num_tokens=len(positions_R),
        sets=same_RL.mean(axis=0).tolist(),
        orders=(left_RLK == right_RLK).all(axis=-1).mean(axis=0).tolist(),
        tokens=float(same_RL.all(axis=1).mean()),
        first=first,
        by_layer=[int(positions_R[column.argmin()]) if not column.all() else None for column in same_RL.T],
    )
