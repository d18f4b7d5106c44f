"""The simulation against what was measured whole: the engine of `benchmarks/gpu_engine.py` on one GPU, and that of
`benchmarks/gpu_serve.py` on two, each layout in the version whose parts were measured. Nothing in the parts was fitted to either, and one
number of that version (RECOMPUTE_US).
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from pointsman.bench.scaling.layouts import Layout, Load, step_us
from pointsman.bench.scaling.parts import Parts
from pointsman.bench.scaling.serving import Served, distinct, new_scheduler, serve
from pointsman.bench.serving.datasets import random_lengths
from pointsman.bench.serving.metrics import summarize

ENGINE = "engine_h100.json"
# The experts' tiles at half their width came between the two; whole experts are those of before.
SERVED = {"tp2": "serve_2xh100_tiles.json", "tp2+ep2": "serve_2xh100.json"}
PROMPT, OUTPUT, BUDGET = 128, 64, 512  # of benchmarks/gpu_engine.py
RATIO, CONTEXT_ROOM = 0.8, 1536  # of benchmarks/gpu_serve.py
LAYOUTS = {"tp2": Layout(2, 2), "tp2+ep2": Layout(2, 2, 2)}
# Steps that give experts were no CUDA graph in the version that SERVED was measured with: their kernels were launched one by one. So
# were those in which a preempted sequence recomputed, and they are the longest; this is the P99 gap of tp2 at 128 in serve_2xh100.json,
# the one figure that is taken from there.
RECOMPUTE_US = 66_600.0


class Compared(NamedTuple):
    """A figure that was measured, in `unit`, and what the simulation says."""

    what: str
    unit: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def against_engine(parts: Parts, folder: Path) -> list[Compared]:
    """Milliseconds of steps of one GPU that holds some of the layers, as measured and as simulated."""
    speed = json.loads((folder / ENGINE).read_text())["speed"]
    layers = speed["layers"]
    time_of = functools.partial(step_us, Layout(1, 1), parts=parts, layers=layers)
    found = []
    for row in speed["decode"]:
        batch = row["batch"]
        served = together(batch, OUTPUT + batch * PROMPT // BUDGET, time_of)
        found.append(Compared(f"one GPU, {layers} layers: step of {batch}", "ms", row["step_ms"], step_ms(served)))
    return found


def against_serving(parts: Parts, folder: Path) -> list[Compared]:
    """The serving benchmark on two GPUs: tokens a second, and the median gap between two tokens; nothing where it was not measured.

    Runs whose runner was named (`benchmarks/gpu_serve.py --runner`) stand beside the layout's own and are not compared.
    """
    found: list[Compared] = []
    for layout, file in ((layout, folder / name) for layout, name in SERVED.items()):
        if not file.is_file():
            continue
        run = json.loads(file.read_text())[layout]
        time_of = functools.partial(_launched, LAYOUTS[layout], parts=parts, layers=run["layers"])
        most = max(row["concurrency"] for row in run["rows"])
        for row in (row for row in run["rows"] if not row["capture"]):
            lengths = random_lengths(Random(row["concurrency"]), row["requests"], row["input_len"], row["output_len"], RATIO)
            scheduler = new_scheduler(most * CONTEXT_ROOM, most, BUDGET)
            served = serve(distinct(lengths), [scheduler], time_of, row["concurrency"])
            figures = summarize(served.outcomes, served.seconds)
            what = f"{layout}, {run['layers']} layers, {row['concurrency']} at once"
            found.append(Compared(f"{what}: throughput", "tok/s", row["output_tok_s"], figures["output_throughput"]))
            found.append(Compared(f"{what}: median gap", "ms", row["median_itl_ms"], figures["median_itl_ms"]))
    return found


def _launched(layout: Layout, loads: list[Load], parts: Parts, layers: int) -> dict[str, float]:
    """The time of a step where those that give experts are no graphs."""
    found = step_us(layout, loads, parts=parts, layers=layers)
    if any(load.recomputes for load in loads):
        found["launches"] = max(0.0, RECOMPUTE_US - sum(found.values()))
    return found


def together(batch: int, output_len: int, time_of: Any) -> Served:
    """A batch of prompts that are all there from the start."""
    scheduler = new_scheduler(batch * (PROMPT + output_len + 32), batch, BUDGET)
    return serve(distinct([(PROMPT, output_len)] * batch), [scheduler], time_of, None)


def step_ms(served: Served) -> float:
    """Of a batch: from the moment the last sequence has its first token to the moment the first one ends, a token of each."""
    begin = max(outcome.piece_s[0] for outcome in served.outcomes)
    end = min(outcome.end_s for outcome in served.outcomes)
    tokens = sum(begin < moment <= end for outcome in served.outcomes for moment in outcome.piece_s)
    return 1000 * (end - begin) * len(served.outcomes) / tokens
