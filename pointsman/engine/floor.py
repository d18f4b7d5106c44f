"""The least time that a step can take on a device: what it must read over the rate of reading, or what it must multiply over the rate of
that, whichever is more, part by part; and what crosses between devices.

Every weight is read once a step, but of the experts only those that a token chose: with uniform routing, E * (1 - (1 - K/E)^T) of them.
Real routing is less even and hits fewer. Activations are read and written once where no kernel could keep them. Nothing is counted for
launches, for waiting or for parts that overlap badly: a step is never faster, and always slower.

Letters: E experts, K experts of a token, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pointsman.models.sizes import Size
from pointsman.moe.spec import experts_hit

LINKS = "links"
EXPERTS = "experts"
CACHE = "keys and values"


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a device reaches.

    Attributes:
        read: bytes a second.
        matrices: operations a second of products with the layers' matrices.
        plain: of all other products.
        num_ranks: devices that share every layer.
        link: bytes a second between them, one way.
        reduce_seconds: the shortest sum over them.
    """

    read: float
    matrices: float
    plain: float
    num_ranks: int = 1
    link: float = float("inf")
    reduce_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Share:
    """One rank's part of a model.

    Attributes:
        weights: by kind; those of `EXPERTS` are read in part, an "embedding" row by row.
        plain_kinds: kinds that are never quantized.
        expert_layers: layers with experts; `num_layers` are all.
        expert_row: bytes that a token's choice of an expert moves beside weights, at least.
        token_row: bytes of the hidden state into and out of a layer's experts.
        hidden_bytes: of a token's hidden state as it crosses between ranks.
        cache_token: bytes of keys and values of a token.
        query_channels: of all heads, over all layers.
        reductions: sums over ranks in a layer, of whole hidden states and of little else.
    """

    weights: Mapping[str, Size]
    plain_kinds: frozenset[str]
    num_experts: int
    top_k: int
    num_layers: int
    expert_layers: int
    expert_row: float
    token_row: float
    hidden_bytes: int
    cache_token: int
    query_channels: int
    reductions: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Floor:
    """One step. `seconds` and `num_bytes` are by part; those of `LINKS` cross between ranks."""

    num_tokens: int
    experts_hit: float
    seconds: Mapping[str, float]
    num_bytes: Mapping[str, float]

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def total_bytes(self) -> float:
        """What is read and written of the device's memory."""
        return sum(number for part, number in self.num_bytes.items() if part != LINKS)

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.total_seconds


def decode_floor(share: Share, rates: Rates, *, batch: int, context: int) -> Floor:
    """A step in which so many sequences of so many tokens decode one each."""
    return _floor(share, rates, rows=batch, logits=batch, read_tokens=batch * context, pairs=batch * context)


def prefill_floors(share: Share, rates: Rates, *, length: int, chunk: int) -> list[Floor]:
    """The steps of one prompt, alone, in chunks."""
    found = []
    for first in range(0, length, chunk):
        rows = min(chunk, length - first)
        pairs = rows * first + rows * (rows + 1) // 2
        found.append(_floor(share, rates, rows=rows, logits=int(first + rows == length), read_tokens=first + rows, pairs=pairs))
    return found


def _floor(share: Share, rates: Rates, *, rows: int, logits: int, read_tokens: int, pairs: int) -> Floor:
    """A step of so many rows, of which some need logits, that reads so many tokens' keys and values for so many scores of a head."""
    hit = experts_hit(share.num_experts, share.top_k, rows)
    num_bytes: dict[str, float] = {}
    operations: dict[str, float] = {}
    for kind, size in share.weights.items():
        used = {EXPERTS: hit / share.num_experts, "head": float(logits > 0), "embedding": 0.0}.get(kind, 1.0)
        weighted = {EXPERTS: rows * share.top_k / share.num_experts, "head": logits, "embedding": 0.0}.get(kind, rows)
        num_bytes[kind] = size.num_bytes * used
        operations[kind] = 2.0 * size.num_elements * weighted
    num_bytes["embedding"] = float(rows * share.hidden_bytes)
    choices = rows * share.top_k / rates.num_ranks
    num_bytes[EXPERTS] += share.expert_layers * (rows * share.token_row + choices * share.expert_row)
    num_bytes[CACHE] = float((read_tokens + rows) * share.cache_token)
    operations[CACHE] = 4.0 * pairs * share.query_channels / rates.num_ranks
    seconds = {}
    for part, number in num_bytes.items():
        rate = rates.plain if part in share.plain_kinds or part == CACHE else rates.matrices
        seconds[part] = max(number / rates.read, operations.get(part, 0.0) / rate)
    if rates.num_ranks > 1:
        large, small = (share.num_layers * number for number in share.reductions)
        crossing = large * rows * share.hidden_bytes * 2 * (rates.num_ranks - 1) / rates.num_ranks
        num_bytes[LINKS] = crossing
        seconds[LINKS] = (large + small) * rates.reduce_seconds + crossing / rates.link
    return Floor(num_tokens=rows, experts_hit=hit, seconds=seconds, num_bytes=num_bytes)
