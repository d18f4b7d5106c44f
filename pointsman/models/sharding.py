"""What each of several ranks holds of a model: arithmetic over an architecture, without a tensor.

Attention is split by heads. Where there are fewer key/value heads than ranks, several ranks hold the same one, and one of them is its
owner: it alone speaks for the head in sums over ranks. The vocabulary is split by rows, of the embedding as of the head. Experts are split
twice: `ep` groups of ranks have whole experts each, and the ranks of a group share the width of theirs; what all tokens take (dense layers,
shared experts) is split in its width over all ranks. Norms, the gate and its bias are whole everywhere.

A width is cut between blocks of quantization, because a block is quantized as one: activations that meet a part of it would be scaled
otherwise than in one piece. What does not divide is dealt out unevenly, the first ranks having a block more; with fewer blocks than ranks
the last ones have none. Heads that are smaller than a block of the attention's projections share its scale: each rank has a copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from pointsman.models.architecture import Architecture

MOST_RANKS = 64
KERNEL_WIDTH = 128  # what kernels of plain weights want widths to be multiples of


def deal(count: int, num_ranks: int, rank: int) -> range:
    """A rank's share of so many things in a row: as even as can be, the first ranks having one more."""
    each, more = divmod(count, num_ranks)
    first = rank * each + min(rank, more)
    return range(first, first + each + (rank < more))


def deal_width(width: int, unit: int, num_ranks: int, rank: int) -> range:
    """A rank's share of a width that is cut at multiples of `unit` alone; its last piece may be smaller."""
    units = deal(-(-width // unit), num_ranks, rank)
    return range(min(units.start * unit, width), min(units.stop * unit, width))


@dataclass(frozen=True)
class Shard:
    """The part of a model that one rank holds.

    Raises:
        ValueError: the model cannot be split so; the message has the layouts that can be.
    """

    architecture: Architecture
    tp: int = 1
    ep: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        if reason := reason_against(self.architecture, self.tp, self.ep):
            raise ValueError(reason)
        assert 0 <= self.rank < self.tp

    @property
    def whole(self) -> bool:
        """Whether it is all of the model."""
        return self.tp == 1

    @property
    def heads(self) -> range:
        """The query heads."""
        return deal(self.architecture.num_heads, self.tp, self.rank)

    @property
    def kv_heads(self) -> range:
        """The key/value heads; those that the query heads read."""
        num_heads = self.architecture.num_kv_heads
        if num_heads >= self.tp:
            return deal(num_heads, self.tp, self.rank)
        first = self.rank * num_heads // self.tp
        return range(first, first + 1)

    @property
    def owns_kv_heads(self) -> bool:
        """Whether it is the first of the ranks that hold its key/value heads."""
        return self.rank % max(1, self.tp // self.architecture.num_kv_heads) == 0

    @property
    def group(self) -> int:
        """Which of the groups with whole experts it is in."""
        return self.rank // (self.tp // self.ep)

    @property
    def experts(self) -> range:
        """The experts of its group."""
        return deal(self.architecture.num_experts, self.ep, self.group)

    @cached_property
    def ranges(self) -> dict[str, range]:
        """What it has of each dimension that tensors are declared with."""
        sizes, head_dim = self.architecture.sizes, self.architecture.head_dim
        found = {name: range(size) for name, size in sizes.items()}
        found["vocab"] = deal(sizes["vocab"], self.tp, self.rank)
        found["q"] = range(self.heads.start * head_dim, self.heads.stop * head_dim)
        found["kv"] = range(self.kv_heads.start * head_dim, self.kv_heads.stop * head_dim)
        in_group = self.tp // self.ep
        found["width"] = self._width(sizes["width"], in_group, self.rank % in_group)
        found["shared"] = self._width(sizes["shared"], self.tp, self.rank)
        found["dense"] = self._width(sizes["dense"], self.tp, self.rank)
        return found

    def _width(self, width: int, num_ranks: int, rank: int) -> range:
        block = self.architecture.quantization_block
        if block is not None:
            return deal_width(width, math.lcm(*block), num_ranks, rank)
        whole_tiles = width % KERNEL_WIDTH == 0 and width // KERNEL_WIDTH >= num_ranks
        return deal_width(width, KERNEL_WIDTH if whole_tiles else 1, num_ranks, rank)

    @property
    def sizes(self) -> dict[str, int]:
        """How much it has of each dimension."""
        return {name: len(there) for name, there in self.ranges.items()}

    @property
    def vocab_sizes(self) -> list[int]:
        """The rows of the vocabulary on each rank."""
        return [len(deal(self.architecture.vocab_size, self.tp, rank)) for rank in range(self.tp)]

    def block(self, dimensions: Sequence[str], step: int) -> int:
        """Elements that share a scale along an axis made of these dimensions, where a block of the whole matrix has `step`.

        A block keeps its size where a range begins with one, or lies in one. Otherwise its scale is repeated for smaller ones.
        """
        ranges = [there for there in map(self.ranges.__getitem__, dimensions) if there]
        if all(there.start % step == 0 or there.start // step == there[-1] // step for there in ranges):
            return step
        return math.gcd(step, *(there.start for there in ranges))

    def scales(self, dimension: str, step: int, own_step: int) -> list[int]:
        """For each own block of `own_step` along a dimension, the block of `step` in the whole matrix that has its scale."""
        there = self.ranges[dimension]
        return [first // step for first in range(there.start, there.stop, own_step)]


def reason_against(architecture: Architecture, tp: int, ep: int) -> str | None:
    """Why a model cannot be split so, and how it can be; or None."""
    sizes = ", ".join(str(size) for size in range(1, MOST_RANKS + 1) if _splits_heads(architecture, size))
    if not _splits_heads(architecture, tp):
        return (
            f"tensor_parallel_size is {tp}: {architecture.num_heads} query heads and {architecture.num_kv_heads} key/value heads of "
            f"{architecture.name} cannot be shared evenly by {tp} ranks; by these they can be: {sizes}"
        )
    groups = [size for size in range(1, min(tp, architecture.num_experts) + 1) if tp % size == 0]
    if ep not in groups:
        return (
            f"expert_parallel_size is {ep}: groups with whole experts are made of the ranks ({tp}, by --tp), as many in each, "
            f"and a group needs one of the {architecture.num_experts} experts; it can be {', '.join(map(str, groups))}"
        )
    return None


def _splits_heads(architecture: Architecture, tp: int) -> bool:
    kv_heads = architecture.num_kv_heads
    return architecture.num_heads % tp == 0 and (kv_heads % tp == 0 or tp % kv_heads == 0) and tp <= architecture.vocab_size


def describe_split(architecture: Architecture, tp: int, ep: int) -> list[str]:
    """How a model is split, in a line for each kind of layer. Raises ValueError where it cannot be."""
    return list(_lines([Shard(architecture, tp, ep, rank) for rank in range(tp)]))


def _lines(shards: list[Shard]) -> Iterator[str]:
    first, architecture = shards[0], shards[0].architecture
    copies = max(1, first.tp // architecture.num_kv_heads)
    yield (
        f"attention: {len(first.heads)} of {architecture.num_heads} query heads and {len(first.kv_heads)} of {architecture.num_kv_heads} "
        f"key/value heads a rank{f', each of these on {copies} ranks' if copies > 1 else ''}"
    )
    block = "" if architecture.quantization_block is None else f", whole blocks of {math.lcm(*architecture.quantization_block)}"
    in_group = first.tp // first.ep
    if architecture.expert_layers:
        groups = [len(shard.experts) for shard in shards[::in_group]]
        whole = f"{_counts(groups)} of {architecture.num_experts} whole experts in {first.ep} groups of {in_group} ranks, "
        widths = [len(shard.ranges["width"]) for shard in shards[:in_group]]
        width = f"{_counts(widths)} of {architecture.expert_width} columns of each a rank{block if in_group > 1 else ''}"
        yield f"experts: {whole if first.ep > 1 else ''}{width}"
    for name, what in (("shared", "shared expert"), ("dense", "dense layers")):
        if total := architecture.sizes[name]:
            yield f"{what}: {_counts([len(shard.ranges[name]) for shard in shards])} of {total} columns a rank{block}"
    yield f"vocabulary: {_counts(first.vocab_sizes)} of {architecture.vocab_size} rows a rank"
    if idle := [str(shard.rank) for shard in shards if not shard.ranges["width"]]:
        yield f"ranks without a block of any expert: {', '.join(idle)}; --ep {first.tp} would give each whole ones"


def _counts(counts: list[int]) -> str:
    """One number where they are all the same, else all of them."""
    return str(counts[0]) if len(set(counts)) == 1 else "+".join(map(str, counts))
