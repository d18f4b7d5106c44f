"""Speed of the compiled step on this machine: tokens a second of decoding and of prefill, without an engine around it.

    python -m benchmarks.cpu_step [--attention e4m3] [--experts e4m3] [--head bfloat16] [--cache bfloat16] [--threads 2] [--vocab 4096]

The model is random, of the size of the bundled checkpoint. Decoding walks contexts from 100 to 200 tokens; each figure is the best of
several runs, because whatever else the machine does only ever makes one slower.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable

import numpy as np

from pointsman.kernels.cpu_step import CpuStep, ModelShape
from tests.kernels.cpu_model import Model

FORMS = ("float32", "bfloat16", "e4m3")
CONTEXT = range(100, 200)
SHAPE = ModelShape(
    vocab=4096,
    hidden=256,
    layers=6,
    heads=8,
    kv_heads=2,
    head_dim=64,
    rotary_dim=32,
    experts=16,
    top_k=4,
    width=128,
    epsilon=1e-6,
)
RUNS = 15


def best_seconds(run: Callable[[], None]) -> float:
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def fill(step: CpuStep, lanes: int, vocab: int) -> None:
    """Put a prompt before the contexts that decoding walks."""
    for lane in range(lanes):
        tokens = (np.arange(CONTEXT.start) * 11 + 101 * lane) % vocab
        step.run(tokens, np.arange(CONTEXT.start), np.full(CONTEXT.start, lane), [])


def decode(step: CpuStep, batch: int, vocab: int) -> float:
    """Tokens a second at this many sequences, the next token chosen by argmax."""
    lanes, rows = np.arange(batch), np.arange(batch)

    def run() -> None:
        tokens = 37 * np.arange(batch) % vocab
        for position in CONTEXT:
            tokens = step.run(tokens, np.full(batch, position), lanes, rows).argmax(1)

    return batch * len(CONTEXT) / best_seconds(run)


def prefill(step: CpuStep, rows: int, vocab: int) -> float:
    """Tokens a second of a prompt fed in one step, for its last row's logits."""
    tokens, positions, lane = np.arange(rows) * 7 % vocab, np.arange(rows), np.zeros(rows, int)

    def run() -> None:
        for _ in range(8):
            step.run(tokens, positions, lane, [rows - 1])

    return 8 * rows / best_seconds(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, form in (("attention", "e4m3"), ("experts", "e4m3"), ("head", "bfloat16"), ("cache", "bfloat16")):
        parser.add_argument(f"--{name}", default=form, choices=FORMS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=SHAPE.vocab)
    arguments = parser.parse_args()
    shape = dataclasses.replace(SHAPE, vocab=arguments.vocab)
    model = Model(shape, attention=arguments.attention, experts=arguments.experts, head=arguments.head)
    step, _ = model.step(arguments.cache, lanes=32, pages=32, max_rows=512, num_threads=arguments.threads)
    fill(step, 32, arguments.vocab)
    results = {f"decode {batch}": decode(step, batch, arguments.vocab) for batch in (1, 8, 32)}
    results |= {f"prefill {rows}": prefill(step, rows, arguments.vocab) for rows in (64, 512)}
    for name, value in results.items():
        print(f"{name:12} {value:10.0f} tokens/s")
    print(json.dumps(vars(arguments) | {name: round(value) for name, value in results.items()}))


if __name__ == "__main__":
    main()
