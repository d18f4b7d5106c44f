"""The compiled step where threads have to share cores: more of them than there are, or others that never pause.

    python -m benchmarks.crowded

The model is that of `cpu_step`; medians of whole walks over its contexts. Beside each row stands what is left of the first, in which every
thread has a core of its own. With as many busy processes as cores a fair share is a half.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.cpu_step import CONTEXT, SHAPE, fill
from pointsman.bench.machine import here
from pointsman.kernels.cpu_step import CpuStep
from tests.kernels.cpu_model import Model

BATCHES = (1, 8, 32)
RUNS = 7


@contextlib.contextmanager
def busy(number: int) -> Iterator[None]:
    """So many processes that never pause, at this one's priority."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def rate(step: CpuStep, batch: int, contexts: range = CONTEXT) -> float:
    """Tokens a second, in the median."""
    lanes = np.arange(batch)
    seconds = []
    for _ in range(RUNS):
        tokens = 37 * lanes % SHAPE.vocab
        begin = time.perf_counter()
        for position in contexts:
            tokens = step.run(tokens, np.full(batch, position), lanes, lanes).argmax(1)
        seconds.append(time.perf_counter() - begin)
    return batch * len(contexts) / statistics.median(seconds)


def measure(threads: int, others: int, contexts: range = CONTEXT) -> dict[str, Any]:
    """One row: so many threads beside so many busy processes."""
    step, _ = Model(SHAPE, attention="e4m3", experts="e4m3", head="bfloat16").step(
        "bfloat16", lanes=max(BATCHES), pages=32, max_rows=512, num_threads=threads
    )
    fill(step, max(BATCHES), SHAPE.vocab)
    with busy(others):
        return {"threads": threads, "busy": others, "tokens_per_s": {str(batch): round(rate(step, batch, contexts)) for batch in BATCHES}}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    cores = len(os.sched_getaffinity(0))
    rows = []
    for threads, others in ((cores, 0), (2 * cores, 0), (4 * cores, 0), (cores, cores)):
        rows.append(measure(threads, others))
        print(
            f"{threads} threads, {others} busy: " + ", ".join(f"{found:,} at {batch}" for batch, found in rows[-1]["tokens_per_s"].items())
        )
    print(json.dumps({"bench": "crowded", "rows": rows} | here()))


if __name__ == "__main__":
    main()
