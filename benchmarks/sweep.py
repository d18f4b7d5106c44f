"""Latency against throughput: `pointsman serve` with the bundled checkpoint under more and more requests at once.

    python -m benchmarks.sweep [--max-concurrency 1 2 4 8 16 32 64] [--num-prompts 256]

Server and load client share the machine, as they do for who tries the engine on a laptop. Each point is one run of
`pointsman bench serve` with prompts of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

from pointsman.bench.machine import here
from pointsman.bench.start_up import serving

SERVER = {"cpu_step": "compiled"}  # which waits for its compiler, where that has never run here
LOAD = "--random-input-len 64 --random-output-len 128 --ignore-eos --num-warmups 8"
METRICS = ("ttft", "tpot", "itl")
KEPT = (
    "max_concurrency",
    "num_prompts",
    "completed",
    "request_throughput",
    "output_throughput",
    *(f"{figure}_{name}_ms" for name in METRICS for figure in ("mean", "median", "p99")),
    "client_busy_share",
    "client_p99_late_ms",
)


def command(max_concurrency: list[int], num_prompts: int) -> str:
    """What is run, but for the address."""
    points = " ".join(map(str, max_concurrency))
    return f"pointsman bench serve {LOAD} --num-prompts {num_prompts} --sweep-max-concurrency {points}"


def measure(typed: str) -> list[dict[str, Any]]:
    """The points of a sweep over a server that is started for it."""
    with serving(SERVER) as port:
        words = [sys.executable, "-m", *typed.split(), "--port", str(port)]
        out = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout
    *tables, last = out.splitlines()
    print("\n".join(tables), flush=True)
    return [{name: point[name] for name in KEPT} for point in json.loads(last)["points"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-concurrency", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--num-prompts", type=int, default=256)
    arguments = parser.parse_args()
    typed = command(arguments.max_concurrency, arguments.num_prompts)
    print(json.dumps({"bench": "sweep", "command": typed, "points": measure(typed)} | here()))


if __name__ == "__main__":
    main()
