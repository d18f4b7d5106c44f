"""The times of a step's parts, as they were measured: curves through the points of benchmarks/results.

Experts are told by three numbers for each share of their width: a time for any batch at all, a time for each expert in use, whose weights
must be read, and what more tokens cost beyond that. The first two go through the measured times of the smallest batch and of one that
uses nearly all experts; the third is what is left, a curve over the pairs of token and choice.

Two files may be missing, and what stands in their place is told with every result: at less than an expert's whole width the weights take as
much less time as there are fewer of them, and a sum over GPUs takes what ASSUMED_SUM says.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

FILES = ("moe_h100.json", "dense_h100.json", "engine_h100.json")
SHARED, SUMMED = "moe_tp_tiles_h100.json", "allreduce_2xh100.json"
SHARES = (1.0, 0.5, 0.25)
ASSUMED_SUM = (5.0, 350_000.0)  # microseconds to begin, bytes a microsecond
MOST_ROWS = 2048
TOP_K = 8
FULL_BATCH = 128
KV_CACHE = "float8_e4m3fn"
EXPERT_BYTES = 3 * 3072 * 1536 * (1 + 4 / 128**2)
ROW_BYTES = 3072 * 2
OUTSIDE = ("nvjet", "cutlass")  # the head's product in a profile, which `dense_h100.json` has by itself
IN_LAYERS = ("up_kernel", "gemm_kernel", "multiply", "choose", "combine", "gate", "arrange", "norm", "attend", "join", "qkv_post")


@dataclass(frozen=True)
class Curve:
    """Straight lines through points of ascending x; beyond the last it goes on as between the last two, before the first it is flat."""

    points: tuple[tuple[float, float], ...]

    @staticmethod
    def through(points: Iterable[tuple[float, float]]) -> Curve:
        found = Curve(tuple(sorted(points)))
        if len(found.points) < 2:
            raise ValueError(f"a curve needs two points; there are {len(found.points)}")
        return found

    def __call__(self, x: float) -> float:
        if x <= self.points[0][0]:
            return self.points[0][1]
        right = min(bisect.bisect_left(self.points, (x,)), len(self.points) - 1)
        (x0, y0), (x1, y1) = self.points[right - 1], self.points[right]
        return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


@dataclass(frozen=True)
class Experts:
    """Microseconds of a layer's experts, router included, at one share of their width."""

    base: float
    each: float
    more: Curve

    def __call__(self, in_use: float, pairs: float) -> float:
        return self.base + self.each * in_use + self.more(pairs)

    def at(self, share: float) -> Experts:
        """With so much of the width, if time goes by weights and products alone."""
        return Experts(self.base, self.each * share, Curve(tuple((x, y * share) for x, y in self.more.points)))


@dataclass(frozen=True)
class Sums:
    """What a sum over two GPUs adds to the kernel that it is joined with, by rows; and the bytes a microsecond of a sum on its own."""

    rows: Curve
    squares: Curve
    bytes_per_us: float


@dataclass(frozen=True)
class Parts:
    """Curves in microseconds, by rows unless said otherwise. Where several GPUs share a part, its key is the share of one.

    Attributes:
        read_bandwidth, copy_bandwidth: bytes a second that this GPU reads at most, and that it reads and writes when it copies.
        decode: attention of rows that decode, by bytes of the cache that it reads.
        prefill: attention of a prompt's chunk, by pairs of a row and a position that it attends to, over all heads.
        rest: what a step does outside of its layers besides the head, by rows that sample.
        assumed: which of these were not measured.
    """

    device: str
    read_bandwidth: float
    copy_bandwidth: float
    experts: dict[float, Experts]
    qkv: dict[float, Curve]
    out: dict[float, Curve]
    norm: Curve
    norm_quantized: Curve
    qkv_post: Curve
    decode: Curve
    prefill: Curve
    head: Curve
    rest: Curve
    sums: Sums
    assumed: tuple[str, ...]

    def with_bandwidth(self, bandwidth: float, device: str) -> Parts:
        """The same with another memory: what must be read takes as much less as the bandwidth says, everything else as long."""
        saved = 1e6 * (1 / self.read_bandwidth - 1 / bandwidth)  # microseconds a byte
        return replace(
            self,
            device=device,
            assumed=(*self.assumed, f"{device}: reads at {bandwidth / 1e12:g} TB/s, all else as on the {self.device}"),
            read_bandwidth=bandwidth,
            copy_bandwidth=self.copy_bandwidth * bandwidth / self.read_bandwidth,
            experts={share: replace(one, each=one.each - saved * share * EXPERT_BYTES) for share, one in self.experts.items()},
            decode=Curve(tuple((x, y - saved * x) for x, y in self.decode.points)),
            head=Curve(tuple((x, y - saved * 3072 * 200_064 * 2) for x, y in self.head.points)),
        )


def at_share(table: dict[float, Any], share: float, *arguments: float) -> float:
    """A part's time at any share of it: on the straight line through the nearest two shares that were measured."""
    if share in table:
        return float(table[share](*arguments))
    shares = sorted(table)
    right = min(max(bisect.bisect_left(shares, share), 1), len(shares) - 1)
    low, high = shares[right - 1], shares[right]
    below, above = table[low](*arguments), table[high](*arguments)
    return float(below + (above - below) * (share - low) / (high - low))


def read(folder: Path) -> Parts:
    """The parts of MiniMax-M2.5's steps on an H100. Raises ValueError where a file is missing."""
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise ValueError(f"{folder} has no {', '.join(missing)}; --results is the folder benchmarks/results of the source tree")
    moe, dense, engine = (json.loads((folder / name).read_text()) for name in FILES)
    shared, summed = (json.loads((folder / name).read_text())["rows"] if (folder / name).is_file() else [] for name in (SHARED, SUMMED))
    linear = {kind: _by_share(dense["rows"], "linear", kind) for kind in ("qkv", "o")}
    return Parts(
        device=moe["device"],
        read_bandwidth=1e9 * moe["read_gb_s"],
        copy_bandwidth=1e9 * moe["copy_gb_s"],
        experts=_experts(moe["rows"] + shared),
        qkv=linear["qkv"],
        out=linear["o"],
        norm=_one(dense["rows"], "glue", "sum and norm"),
        norm_quantized=_one(dense["rows"], "glue", "sum and norm, quantizing"),
        qkv_post=_one(dense["rows"], "glue", "qkv_post"),
        decode=_decode(dense["rows"]),
        prefill=_prefill(dense["rows"]),
        head=_one(dense["rows"], "head", "head", "torch"),
        rest=_rest(engine["speed"]["profile"]),
        sums=_sums(summed) if summed else _assumed_sums(),
        assumed=(*(() if shared else ("experts at a share of their width",)), *(() if summed else ("sums over GPUs",))),
    )


def _rows(rows: list[dict[str, Any]], kernel: str, name: str, variant: str = "ours") -> list[dict[str, Any]]:
    return [row for row in rows if (row["kernel"], row["name"], row["variant"]) == (kernel, name, variant)]


def _one(rows: list[dict[str, Any]], kernel: str, name: str, variant: str = "ours") -> Curve:
    return Curve.through((row["M"], row["us"]) for row in _rows(rows, kernel, name, variant))


def _by_share(rows: list[dict[str, Any]], kernel: str, name: str) -> dict[float, Curve]:
    found = _rows(rows, kernel, name)
    return {1 / tp: Curve.through((row["M"], row["us"]) for row in found if row["tp"] == tp) for tp in {row["tp"] for row in found}}


def _experts(rows: list[dict[str, Any]]) -> dict[float, Experts]:
    routed = [row for row in rows if row["runner"] == "routed"]
    found = {1 / tp: _experts_at([row for row in routed if row["tp"] == tp]) for tp in {row["tp"] for row in routed}}
    return {share: found.get(share, found[1.0].at(share)) for share in SHARES}


def _experts_at(rows: list[dict[str, Any]]) -> Experts:
    first = min(rows, key=lambda row: row["M"])
    full = next(row for row in rows if row["M"] == FULL_BATCH)
    each = (full["us"] - first["us"]) / (full["experts"] - first["experts"])
    base = first["us"] - each * first["experts"]
    return Experts(base, each, Curve.through((TOP_K * row["M"], row["us"] - base - each * row["experts"]) for row in rows))


def _decode(rows: list[dict[str, Any]]) -> Curve:
    found = [row for name in ("decode 1", "decode 16", "decode 128") for row in _rows(rows, "attention", name) if row["cache"] == KV_CACHE]
    points = sorted((float(row["bytes"]), float(row["us"])) for row in found)
    (x0, y0), (x1, y1) = points[:2]
    return Curve.through([(0.0, y0 - (y1 - y0) * x0 / (x1 - x0)), *points])


def _prefill(rows: list[dict[str, Any]]) -> Curve:
    chunk = 512
    pairs = {"prefill 512": chunk * chunk / 2, "prefill 512 after 4096": chunk * (4096 + chunk / 2)}
    found = {
        places: next(row["us"] for row in _rows(rows, "attention", name) if row["cache"] == KV_CACHE) for name, places in pairs.items()
    }
    (x0, y0), (x1, y1) = sorted(found.items())
    return Curve.through([(0.0, y0 - (y1 - y0) * x0 / (x1 - x0)), (x0, y0), (x1, y1)])


def _rest(profile: dict[str, Any]) -> Curve:
    """Of a profile, the kernels that are neither a layer's nor the head's."""

    def of(kernels: list[dict[str, Any]]) -> float:
        return float(sum(row["us"] for row in kernels if not row["name"].startswith((*OUTSIDE, *IN_LAYERS))))

    return Curve.through((int(batch), of(found["kernels"])) for batch, found in profile.items())


def _sums(rows: list[dict[str, Any]]) -> Sums:
    few, many = rows[0], rows[-1]
    added = [(row["rows"], row["norm with mailbox"] - row["norm alone"]) for row in rows]
    bandwidth = ROW_BYTES * (many["rows"] - few["rows"]) / (many["mailbox"] - few["mailbox"])
    return Sums(
        Curve.through(added),
        Curve.through((row["rows"], row["qkv_post with mailbox"] - row["qkv_post alone"]) for row in rows),
        bandwidth,
    )


def _assumed_sums() -> Sums:
    begin, bandwidth = ASSUMED_SUM
    rows = Curve.through([(1, begin + ROW_BYTES / bandwidth), (MOST_ROWS, begin + MOST_ROWS * ROW_BYTES / bandwidth)])
    return Sums(rows, Curve.through([(1, begin), (MOST_ROWS, begin)]), bandwidth)
