"""Time of attention over paged keys and values, by kernels of ours and by FlashInfer's, on one GPU.

    python -m benchmarks.paged_attention [--only triton flashinfer] [--tp 1 4] [--json FILE]

A layer of MiniMax-M2.5, its heads whole or as one of several ranks has them. A time is reported only behind a check of the same call
against `kernels.reference`, and is that of a CUDA graph over several caches in turn, so that none is found in the cache of the chip.
Beside it stands what planning the step costs the host, once for all layers. FlashInfer compiles for minutes when it first runs.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.dense_kernels import BOUNDS, CHANNELS, DEVICE, HEADS, KV_HEADS, PAGE, Row, normal, off
from pointsman.bench.expert_layer import time_graph
from pointsman.bench.kernels import measure_ceilings, versions
from pointsman.kernels import candidates, reference
from pointsman.kernels.candidates import AttentionShape, StepBounds
from pointsman.kernels.capability import describe
from pointsman.kernels.operations import ATTENTIONS
from pointsman.kernels.reference import Span
from pointsman.kernels.weight import FP8

# (positions before, new rows) of each lane
STEPS = {f"decode {batch} of {context}": [(context - 1, 1)] * batch for batch in (1, 16, 128) for context in (1024, 4096)}
STEPS |= {
    "prefill 512": [(0, 512)],
    "prefill 512 after 4096": [(4096, 512)],
    "64 decode and a chunk of 448": [(1024, 1)] * 64 + [(512, 448)],
}
NAMES = {torch.bfloat16: "bfloat16", FP8: "fp8_e4m3"}
PLANS = 21
CACHE_BYTES = 4 << 30  # of all caches that a step is timed over


class Step(NamedTuple):
    """Rows, and the caches that they are timed over."""

    name: str
    shape: AttentionShape
    kv_dtype: torch.dtype
    spans: list[Span]
    lengths: list[int]
    q_TQC: Tensor
    positions_T: Tensor
    table_LP: Tensor
    caches: list[tuple[Tensor, Tensor]]

    @property
    def row(self) -> Row:
        return {"step": self.name, "tp": HEADS // self.shape.num_heads, "cache": str(self.kv_dtype)[6:], "rows": len(self.positions_T)}

    @property
    def moved(self) -> float:
        """Bytes of the keys and values in use, and of rows in and out."""
        cache = sum(self.lengths) * 2 * self.shape.num_kv_heads * CHANNELS * self.kv_dtype.itemsize
        return cache + 4.0 * self.q_TQC.numel()

    @property
    def operations(self) -> float:
        pairs = sum(
            span.length * (length - span.length) + span.length * (span.length + 1) / 2
            for span, length in zip(self.spans, self.lengths, strict=True)
        )
        return 4 * pairs * self.shape.num_heads * CHANNELS


def draw(name: str, shape: AttentionShape, kv_dtype: torch.dtype) -> Step:
    lanes = STEPS[name]
    most = -(-max(past + new for past, new in lanes) // PAGE)
    size = (most * len(lanes), shape.num_kv_heads, PAGE, CHANNELS)
    num_bytes = 2 * int(np.prod(size)) * kv_dtype.itemsize
    copies = min(max(CACHE_BYTES // num_bytes, 2), 16)
    caches = [(normal(*size, seed=2 * copy).to(kv_dtype), normal(*size, seed=2 * copy + 1).to(kv_dtype)) for copy in range(copies)]
    table_LP = torch.randperm(size[0], generator=torch.Generator().manual_seed(1)).view(len(lanes), most).int()
    spans: list[Span] = []
    positions: list[int] = []
    for lane, (past, new) in enumerate(lanes):
        spans.append(Span(lane, len(positions), new))
        positions += range(past, past + new)
    q_TQC = normal(len(positions), shape.num_heads, CHANNELS, seed=77).bfloat16()
    lengths = [past + new for past, new in lanes]
    return Step(name, shape, kv_dtype, spans, lengths, q_TQC, torch.tensor(positions, device=DEVICE), table_LP, caches)


def planned(name: str, step: Step) -> tuple[Callable[[], Any], Any]:
    """What plans the step once more, and a plan."""
    attention, num_rows = ATTENTIONS[name], len(step.positions_T)
    if attention.planner is None:
        assert attention.plan is not None
        plan = functools.partial(attention.plan, step.spans, num_rows, step.shape, DEVICE)
        return plan, plan()
    bounds = StepBounds((num_rows,), len(step.spans), step.table_LP.shape[1], PAGE)
    planner, table_LP = attention.planner(step.shape, bounds, torch.bfloat16, step.kv_dtype, DEVICE), step.table_LP.numpy()

    def again() -> Any:
        requests = planner.requests(step.spans, step.lengths, table_LP, num_rows)
        return planner.plan(requests, torch.from_numpy(requests.pages_N).pin_memory().to(DEVICE, non_blocking=True))

    return again, again()


def _each(work: Callable[[int], Tensor], count: int) -> list[Tensor]:
    return [work(copy) for copy in range(count)]


def rows_of(step: Step, names: list[str], ceilings: dict[str, float]) -> Iterator[Row]:
    table_LP = step.table_LP.to(DEVICE)
    scale = CHANNELS**-0.5
    want = reference.attention(step.q_TQC, *step.caches[0], step.spans, step.positions_T, table_LP, scale)
    for name in names:
        row = step.row | {"backend": name}
        if (why := candidates.ATTENTIONS[name](describe(DEVICE), "bfloat16", step.shape, NAMES[step.kv_dtype])) is not None:
            yield row | {"fault": why}
            continue
        again, plan = planned(name, step)

        def work(copy: int, name: str = name, plan: Any = plan) -> Tensor:
            return ATTENTIONS[name].run(step.q_TQC, *step.caches[copy], plan, step.positions_T, table_LP, scale)

        fault = off(work(0), want, BOUNDS["attention"]) or (None if torch.equal(work(0), work(0)) else "a second run gave other bits")
        if fault is not None:
            yield row | {"fault": fault}
            continue
        error = float((work(0).double() - want.double()).norm() / want.double().norm())
        seconds = time_graph(functools.partial(_each, work, len(step.caches))) / len(step.caches)
        yield row | {
            "us": round(1e6 * seconds, 2),
            "read_fraction": round(step.moved / seconds / (1e9 * ceilings["read_gb_s"]), 4),
            "tflops": round(step.operations / seconds / 1e12, 1),
            "plan_us": round(1e6 * host_seconds(again), 1),
            "error": round(error, 6),
        }


def host_seconds(work: Callable[[], Any]) -> float:
    """Of the host alone: the device has nothing to do when each begins."""
    times = []
    for _ in range(PLANS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=("triton", "flashinfer"), default=["triton", "flashinfer"])
    parser.add_argument("--tp", nargs="+", type=int, choices=(1, 2, 4), default=[1, 4])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("these kernels need a CUDA device, and torch sees none")
    rows: list[Row] = []
    ceilings = measure_ceilings(DEVICE)
    summary = {"bench": "paged attention", "device": torch.cuda.get_device_name(DEVICE), **ceilings, **versions()}
    for tp in options.tp:
        shape = AttentionShape(HEADS // tp, KV_HEADS // tp, CHANNELS)
        for name in STEPS:
            for kv_dtype in (torch.bfloat16, FP8):
                for row in rows_of(draw(name, shape, kv_dtype), options.only, ceilings):
                    rows.append(row)
                    print(" ".join(str(value) for value in row.values()), file=sys.stderr, flush=True)
                if options.json is not None:
                    options.json.write_text(json.dumps(summary | {"rows": rows}, allow_nan=False))
    print(json.dumps(summary | {"faults": [row for row in rows if "fault" in row]}))
    return 1 if any("fault" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
