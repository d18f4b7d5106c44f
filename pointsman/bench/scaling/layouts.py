"""What a step of MiniMax-M2.5 costs on so many GPUs, by how they share it.

A layout is `gpus` that hold one copy of the model: `tp` of them share the attention of the same requests, so that gpus / tp groups attend
to requests of their own, and the experts are in `ep` groups that hold whole ones, whose width gpus / ep share. With one group
(tp = gpus) every layer ends in two sums over all GPUs. With more, rows are sent to the experts that they chose and back.

Time is that of the slowest GPU. Of experts in groups it is the one whose experts were chosen most, which is drawn from even routing;
a real router is less even, and a group slower. Messages between hosts are not measured here: their speed is an assumption, stated below.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pointsman.bench.scaling.parts import ROW_BYTES, SHARES, Parts, at_share
from pointsman.moe.spec import experts_hit

LAYERS, EXPERTS, TOP_K, KV_HEADS, HIDDEN, WIDTH_BLOCKS = 62, 256, 8, 8, 3072, 12
HEAD_DIM, HEADS, VOCABULARY = 128, 48, 200_064
ATTENTION_BYTES = HIDDEN * HEAD_DIM * (2 * HEADS + 2 * KV_HEADS)
EXPERT_BYTES = 3 * HIDDEN * 128 * WIDTH_BLOCKS
SENT_BYTES = HIDDEN + 4 * HIDDEN // 128  # a row of FP8 and its scales
KV_BYTES = 2 * KV_HEADS * HEAD_DIM  # of FP8, a token and layer
ROUTE_BYTES = LAYERS * TOP_K
HOST_GPUS = 8
# Between hosts, assumed: one adapter of 400 Gb/s a GPU, and what a message takes to begin.
HOST_BYTES_PER_US, HOST_LATENCY_US = 50_000.0, 20.0
WORKSPACE_BYTES = 3e9
STEP_SIZES = (1, 2, 4, 8, 16, 32, 64, *range(128, 512, 64), *range(512, 2048, 256))
DRAWS = 2048  # tokens whose experts are drawn, or 16 batches where that is more


@dataclass(frozen=True)
class Layout:
    """GPUs that hold one copy of the model. Raises ValueError for one that there is not."""

    gpus: int
    tp: int
    ep: int = 1

    def __post_init__(self) -> None:
        if self.gpus % self.tp or self.gpus % self.ep:
            raise ValueError(f"{self.tp} that share attention and {self.ep} groups of experts do not divide {self.gpus} GPUs")
        if self.gpus // self.ep > WIDTH_BLOCKS:
            raise ValueError(
                f"an expert's {WIDTH_BLOCKS} blocks of 128 columns cannot be shared by {self.gpus // self.ep} GPUs; ep would help"
            )
        if self.ep > EXPERTS:
            raise ValueError(f"{self.ep} groups of experts are more than the {EXPERTS} experts")
        if self.tp > HOST_GPUS:
            raise ValueError(f"{self.tp} GPUs that share attention are on several hosts; at most {HOST_GPUS} are on one")

    @property
    def name(self) -> str:
        parts = [f"tp{self.tp}"] if self.groups == 1 or self.tp > 1 else []
        return "+".join([*parts, *([f"dp{self.groups}"] if self.groups > 1 else []), *([f"ep{self.ep}"] if self.ep > 1 else [])])

    @property
    def groups(self) -> int:
        """How many groups attend to requests of their own."""
        return self.gpus // self.tp

    @property
    def width_share(self) -> float:
        """An expert's columns on the GPU that has most of them, as a share: blocks stay whole."""
        return math.ceil(WIDTH_BLOCKS / (self.gpus // self.ep)) / WIDTH_BLOCKS

    def cache_tokens(self, memory_bytes: float, layers: int) -> int:
        """Tokens that the cache of one group holds, on the GPU with the most of the experts; below 1 the model does not fit."""
        experts = math.ceil(EXPERTS / self.ep) * self.width_share
        weights = layers * (experts * EXPERT_BYTES + ATTENTION_BYTES / self.tp + 4 * EXPERTS * HIDDEN)
        weights += 2 * VOCABULARY * HIDDEN * (1 + 1 / self.tp)
        heads = math.ceil(KV_HEADS / self.tp) / KV_HEADS
        return int((0.9 * memory_bytes - weights - WORKSPACE_BYTES) / (layers * KV_BYTES * heads + ROUTE_BYTES))


class Load(NamedTuple):
    """What one group's part of a step is made of.

    Attributes:
        rows: tokens.
        sampled: rows that choose a token.
        read: positions that rows which decode attend to, all together.
        pairs: of a row of a prompt and a position that it attends to.
        recomputes: a sequence that was preempted is on its way back.
    """

    rows: int
    sampled: int
    read: int
    pairs: float
    recomputes: bool = False


def fullest(tokens: int, groups: int) -> tuple[float, float]:
    """Of groups of experts under even routing: the most experts in use, and the most pairs, on average over draws."""
    if groups == 1:
        return experts_hit(EXPERTS, TOP_K, tokens), float(TOP_K * tokens)
    near = tokens >> (shift := max(0, tokens.bit_length() - 6)) << shift  # within 3 %
    in_use, pairs = _drawn(near, groups)
    return in_use, pairs * tokens / near


@functools.lru_cache(maxsize=4096)
def _drawn(tokens: int, groups: int) -> tuple[float, float]:
    """The same of groups, over draws."""
    draws = np.random.default_rng(0)
    in_use, pairs = [], []
    for _ in range(max(16, DRAWS // tokens)):
        chosen = np.argpartition(draws.random((tokens, EXPERTS), dtype=np.float32), TOP_K, axis=1)[:, :TOP_K]
        counts = np.array_split(np.bincount(chosen.ravel(), minlength=EXPERTS), groups)
        in_use.append(max(np.count_nonzero(group) for group in counts))
        pairs.append(max(group.sum() for group in counts))
    return float(np.mean(in_use)), float(np.mean(pairs))


def step_us(layout: Layout, loads: list[Load], parts: Parts, layers: int = LAYERS) -> dict[str, float]:
    """Microseconds of a step by part, the groups' loads given."""
    busiest = max(loads, key=lambda load: load.rows)
    rows, share = padded(busiest.rows), 1 / layout.tp
    tokens = sum(load.rows for load in loads)
    in_use, pairs = fullest(tokens, layout.ep)
    heads = math.ceil(KV_HEADS / layout.tp) / KV_HEADS
    attention = max(parts.decode(load.read * KV_BYTES * heads) if load.read else 0.0 for load in loads)
    attention += max(parts.prefill(load.pairs * share) if load.pairs else 0.0 for load in loads)
    layer = {
        "experts": at_share({key: functools.partial(experts, in_use, pairs) for key, experts in parts.experts.items()}, layout.width_share),
        "linear": at_share(parts.qkv, share, rows) + at_share(parts.out, share, rows),
        "attention": attention,
        "glue": parts.norm(rows) + parts.norm_quantized(rows) + parts.qkv_post(rows),
        "communication": _between(layout, rows, tokens, parts),
    }
    found = {name: layers * us for name, us in layer.items()}
    sampled = max(load.sampled for load in loads)
    found["head"] = parts.head(sampled) * share + _gather(layout, sampled, parts)
    found["rest"] = parts.rest(sampled)
    return found


def assumed(layout: Layout) -> list[str]:
    """What of its steps no measurement is behind, though those of two GPUs and of whole, half and quarter experts are."""
    found = []
    if layout.tp > 2:
        found.append("sums over more than two GPUs (from those over two)")
    if layout.groups > 1:
        found.append("rows on their way to experts and back (at the speed of sums over two GPUs)")
    if layout.gpus > HOST_GPUS:
        found.append(f"messages between hosts ({HOST_BYTES_PER_US / 1000:g} GB/s a GPU, and {HOST_LATENCY_US:g} us each)")
    if layout.width_share < min(SHARES):
        found.append("experts at less than a quarter of their width (from a half and a quarter)")
    return found


def padded(rows: int) -> int:
    """Rows that a captured step computes."""
    return next((size for size in STEP_SIZES if size >= rows), rows)


def _between(layout: Layout, rows: int, tokens: int, parts: Parts) -> float:
    """What GPUs tell each other in a layer."""
    told = 0.0
    if layout.tp > 1:
        sums = 2 if layout.groups == 1 else 1
        told += sums * summed(layout.tp, rows, parts) + parts.sums.squares(rows)
    if layout.groups > 1:
        others = layout.gpus * (1 - (1 - 1 / layout.gpus) ** TOP_K) * (1 - 1 / layout.gpus)  # GPUs that a row goes to
        sent = tokens / layout.gpus * others
        outside = max(0.0, 1 - HOST_GPUS / layout.gpus)
        for size in (SENT_BYTES, ROW_BYTES):  # there, and back
            told += parts.sums.rows(1) + sent * size * (1 - outside) / parts.sums.bytes_per_us
            if outside:
                told += HOST_LATENCY_US + sent * size * outside / HOST_BYTES_PER_US
    return told


def summed(gpus: int, rows: int, parts: Parts) -> float:
    """A sum over GPUs of one host: each sends its rows to all others, or a part of them to each, and that part's sum to all."""
    begin, moved = parts.sums.rows(1), rows * ROW_BYTES / parts.sums.bytes_per_us
    if gpus == 2:
        return parts.sums.rows(rows)
    return min(begin + (gpus - 1) * moved, 2 * begin + 2 * (gpus - 1) / gpus * moved)


def _gather(layout: Layout, sampled: int, parts: Parts) -> float:
    """The logits of all parts of the vocabulary, in float32, on every GPU of a group, put side by side there."""
    if layout.tp == 1:
        return 0.0
    logits = sampled * VOCABULARY * 4
    return parts.sums.rows(1) + logits * (1 - 1 / layout.tp) / parts.sums.bytes_per_us + 1e6 * 2 * logits / parts.copy_bandwidth
