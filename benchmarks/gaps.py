"""Which steps make the long gaps between tokens: the serving benchmark in simulated time, each step with what was in it.

    python -m benchmarks.gaps [--recompute-ms 60] [--cache-tokens 196608]

Steps last as `pointsman bench scaling` computes them, of the layout and the layers that `benchmarks/results/serve_2xh100.json` was measured
with. `--recompute-ms` is how long a step takes at least in which a preempted sequence computes again under the experts that it had: where
replays are no CUDA graph, its kernels are launched one by one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random
from typing import Any

from pointsman.bench.scaling.check import BUDGET, CONTEXT_ROOM, LAYOUTS, RATIO
from pointsman.bench.scaling.layouts import Load, step_us
from pointsman.bench.scaling.parts import read
from pointsman.bench.scaling.serving import distinct, new_scheduler, serve
from pointsman.bench.serving.datasets import random_lengths
from pointsman.bench.serving.metrics import summarize

RESULTS = Path(__file__).parent / "results"
KINDS = ("decode alone", "with prefill", "with a recomputation")


def simulate(args: argparse.Namespace) -> dict[str, Any]:
    """Serve it, and say how often steps of each kind were, how many gaps they made, and how long they took."""
    scheduler = new_scheduler(args.cache_tokens, args.concurrency, args.chunked_prefill_size)
    parts, steps = read(RESULTS), list[tuple[str, int, float]]()

    def time_of(loads: list[Load]) -> dict[str, float]:
        found, (load,) = step_us(LAYOUTS[args.layout], loads, parts=parts, layers=args.layers), loads
        if load.recomputes:
            found["launches"] = max(0.0, 1000 * args.recompute_ms - sum(found.values()))
        kind = KINDS[2] if load.recomputes else KINDS[1] if load.pairs else KINDS[0]
        steps.append((kind, load.sampled, sum(found.values()) / 1000))
        return found

    lengths = random_lengths(Random(args.concurrency), args.requests, 1024, 1024, RATIO)
    served = serve(distinct(lengths), [scheduler], time_of, args.concurrency)
    figures = summarize(served.outcomes, served.seconds)
    tokens, rows = sum(sampled for _, sampled, _ in steps), []
    for kind in KINDS:
        of = [(sampled, ms) for each, sampled, ms in steps if each == kind]
        share, mean = sum(sampled for sampled, _ in of) / tokens, sum(ms for _, ms in of) / max(len(of), 1)
        rows.append({"kind": kind, "steps": len(of), "tokens_share": round(share, 4), "mean_ms": round(mean, 2)})
    names = ("output_throughput", "median_itl_ms", "p99_itl_ms", "mean_ttft_ms", "p99_ttft_ms")
    return {"steps": rows} | {name: round(figures[name], 2) for name in names}


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
    print(f"{'steps':<24}{'number':>8}{'of tokens':>11}{'mean ms':>9}")
    for row in found["steps"]:
        print(f"{row['kind']:<24}{row['steps']:>8}{100 * row['tokens_share']:>10.1f}%{row['mean_ms']:>9.1f}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
