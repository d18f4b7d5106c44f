"""How often each expert was used, and how evenly.

Shape suffixes: R rows, L layers, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pointsman.routed_experts import RoutedExperts


@dataclass(frozen=True, kw_only=True)
class Load:
    """Counts of uses.

    Attributes:
        counts_LE: how many tokens used each expert.
        layers: the layers' numbers in the model.
        num_tokens: tokens that were counted.
        num_missing: tokens whose rows are not known.
        source: where the counts are from, in words.
    """

    counts_LE: npt.NDArray[np.int64]
    layers: tuple[int, ...]
    num_tokens: int
    num_missing: int = 0
    source: str

    @property
    def shares_LE(self) -> npt.NDArray[np.float64]:
        """Counts as multiples of an even share of their layer; 0 where a layer was not used at all."""
        even_L1 = self.counts_LE.mean(axis=1, keepdims=True)
        return self.counts_LE / np.where(even_L1 > 0, even_L1, 1.0)

    @property
    def top_k(self) -> int:
        return round(int(self.counts_LE[0].sum()) / self.num_tokens) if self.num_tokens else 0


@dataclass(frozen=True, kw_only=True)
class Balance:
    """How even one layer's load is.

    Attributes:
        max_over_mean: of the busiest expert; 1 is even.
        entropy: of the load, over that of an even one: 1 is even, 0 is one expert for all.
        effective: so many experts, evenly used, have the same entropy.
        busiest, quietest: which experts.
        dead: experts that were never used.
    """

    layer: int
    max_over_mean: float
    entropy: float
    effective: float
    busiest: int
    quietest: int
    dead: tuple[int, ...]


def load_of(records: Sequence[RoutedExperts], source: str) -> Load:
    """What records count together. Raises ValueError where they are not of one model, or no row is known."""
    first = records[0]
    num_experts = max(record.num_experts for record in records)
    counts_LE = np.zeros((len(first.layers), num_experts), np.int64)
    first_L1 = np.arange(len(first.layers))[:, None] * num_experts
    num_tokens = num_missing = 0
    for index, record in enumerate(records):
        if record.layers != first.layers or record.rows_RLK.shape[2] != first.rows_RLK.shape[2]:
            raise ValueError(f"{source}: record {index} is of {_sizes(record)}, the first of {_sizes(first)}; they must be of one model")
        rows_RLK = record.rows_RLK[record.known_R].astype(np.int64)
        counts_LE += np.bincount((rows_RLK + first_L1).ravel(), minlength=counts_LE.size).reshape(counts_LE.shape)
        num_tokens += len(rows_RLK)
        num_missing += record.num_rows - len(rows_RLK)
    if not num_tokens:
        raise ValueError(f"{source}: no row is known")
    return Load(counts_LE=counts_LE, layers=first.layers, num_tokens=num_tokens, num_missing=num_missing, source=source)


def _sizes(record: RoutedExperts) -> str:
    return f"{len(record.layers)} layers from {record.layers[0]} with {record.rows_RLK.shape[2]} experts a token"


def balances(load: Load) -> list[Balance]:
    """The balance of each layer."""
    found = []
    num_experts = load.counts_LE.shape[1]
    for layer, counts_E, shares_E in zip(load.layers, load.counts_LE, load.shares_LE, strict=True):
        parts = counts_E[counts_E > 0] / max(int(counts_E.sum()), 1)
        entropy = float(-(parts * np.log(parts)).sum()) + 0.0
        found.append(
            Balance(
                layer=layer,
                max_over_mean=float(shares_E.max()),
                entropy=entropy / float(np.log(num_experts)) if num_experts > 1 else 1.0,
                effective=float(np.exp(entropy)) if len(parts) else 0.0,
                busiest=int(counts_E.argmax()),
                quietest=int(counts_E.argmin()),
                dead=tuple(np.flatnonzero(counts_E == 0).tolist()),
            )
        )
    return found


def summary(load: Load) -> dict[str, Any]:
    """The figures that a program wants."""
    layers = balances(load)
    return {
        "source": load.source,
        "num_tokens": load.num_tokens,
        "num_missing": load.num_missing,
        "num_experts": load.counts_LE.shape[1],
        "top_k": load.top_k,
        "max_over_mean": round(max(entry.max_over_mean for entry in layers), 4),
        "mean_entropy": round(sum(entry.entropy for entry in layers) / len(layers), 4),
        "num_dead": sum(len(entry.dead) for entry in layers),
        "layers": [
            {
                "layer": entry.layer,
                "max_over_mean": round(entry.max_over_mean, 4),
                "entropy": round(entry.entropy, 4),
                "effective": round(entry.effective, 2),
                "busiest": entry.busiest,
                "dead": list(entry.dead),
            }
            for entry in layers
        ],
    }
