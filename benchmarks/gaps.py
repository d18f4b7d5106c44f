"""Which steps make the long gaps between tokens: the serving benchmark in simulated time, each step with what was in it.

    python -m benchmarks.gaps [--recompute-ms 60] [--cache-tokens 196608]

Steps last as `pointsman bench scaling` computes them, of the layout and the layers that `benchmarks/results/serve_2xh100.json` was measured
with. `--recompute-ms` is how long a step takes at least in which a preempted sequence computes again under the experts that it had: where
replays are no CUDA graph, its kernels are launched one by one.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from pointsman.bench.scaling.check import BUDGET, CONTEXT_ROOM, LAYOUTS, RATIO
from pointsman.bench.scaling.layouts import Load, step_us
from pointsman.bench.scaling.parts import read
from pointsman.bench.scaling.serving import distinct, new_scheduler, serve
from pointsman.bench.serving.datasets import random_lengths
from pointsman.bench.serving.metrics import summarize
from pointsman.scheduler import Scheduler
from pointsman.step import StepPlan

RESULTS = Path(__file__).parent / "results"
KINDS = ("decode alone", "with prefill", "with a recomputation")


class Noted:
    """A scheduler, and of which kind each of its steps was."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._plan, self._resumed = scheduler.plan, set[int]()
        self.kinds: list[str] = []
        self.decoding: list[int] = []
        self.preemptions = 0
        self._scheduler = scheduler
        scheduler.plan = self.plan  # type: ignore[method-assign]

    def plan(self) -> StepPlan | None:
        plan = self._plan()
        if plan is not None:
            self._resumed |= {start.seq for start in plan.starts if start.output}
            prompts = [segment for segment in plan.segments if len(segment.tokens) > 1]
            again = any(segment.seq in self._resumed for segment in prompts)
            self.kinds.append(KINDS[2] if again else KINDS[1] if prompts else KINDS[0])
            self.decoding.append(len(plan.decoding) + len(plan.segments) - len(prompts))
            self.preemptions += len(self._scheduler.preempted)
        return plan


def simulate(args: argparse.Namespace) -> dict[str, Any]:
    """Serve it, and say how often steps of each kind were, how many gaps they made, and how long they took."""
    scheduler = new_scheduler(args.cache_tokens, args.concurrency, args.chunked_prefill_size)
    noted, parts, times = Noted(scheduler), read(RESULTS), list[float]()

    def time_of(loads: Sequence[Load]) -> dict[str, float]:
        found = step_us(LAYOUTS[args.layout], list(loads), parts=parts, layers=args.layers)
        if noted.kinds[-1] == KINDS[2]:
            found["launches"] = max(0.0, 1000 * args.recompute_ms - sum(found.values()))
        times.append(sum(found.values()) / 1000)
        return found

    lengths = random_lengths(Random(args.concurrency), args.requests, 1024, 1024, RATIO)
    served = serve(distinct(lengths), [scheduler], functools.partial(time_of), args.concurrency)
    figures = summarize(served.outcomes, served.seconds)
    rows = [
        {
            "kind": kind,
            "steps": len(of := [index for index, each in enumerate(noted.kinds) if each == kind]),
            "gaps_share": round(sum(noted.decoding[index] for index in of) / sum(noted.decoding), 4),
            "mean_ms": round(sum(times[index] for index in of) / max(len(of), 1), 2),
        }
        for kind in KINDS
    ]
    names = ("output_throughput", "median_itl_ms", "p99_itl_ms", "mean_ttft_ms", "p99_ttft_ms")
    return {"preemptions": noted.preemptions, "steps": rows} | {name: round(figures[name], 2) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", default="tp2", choices=tuple(LAYOUTS))
    parser.add_argument("--layers", type=int, default=34)
    parser.add_argument("--concurrency", type=int, default=128)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--cache-tokens", type=int, default=128 * CONTEXT_ROOM)
    parser.add_argument("--chunked-prefill-size", type=int, default=BUDGET)
    parser.add_argument("--recompute-ms", type=float, default=0.0)
    found = simulate(parser.parse_args())
    print(f"{'steps':<24}{'number':>8}{'of gaps':>9}{'mean ms':>9}")
    for row in found["steps"]:
        print(f"{row['kind']:<24}{row['steps']:>8}{100 * row['gaps_share']:>8.1f}%{row['mean_ms']:>9.1f}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
