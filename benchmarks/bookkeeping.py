"""What a step costs beside the model: scheduler, cache, batch layout, sampler, detokenizer.

    python -m benchmarks.bookkeeping [--running 1 64 256 1024] [--prefixes 0 100000] [--output FILE] [--plot FILE.svg]

The engine is the real one; only the model is a stub, whose logits are there at once. Every running request decodes one token a step,
greedily. The four parts of a step are timed one after the other, as the plain order runs them. BUDGET_MS is for 256 running requests.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pointsman.bench.machine import here
from pointsman.bench.plot import Line, Panel, chart
from pointsman.config import engine_config
from pointsman.engine.batch import Batch, Lanes
from pointsman.engine.engine import Engine
from pointsman.request import Request, SamplingParams

BUDGET_MS = 1.5
BUDGET_RUNNING = 256
PROMPT, OUTPUT, PREFIX = 64, 160, 4
WARM_STEPS, STEPS = 20, 100
PAGE_SIZE = 4
PARTS = ("plan", "execute", "commit", "deliver")


class StubStep:
    """Logits that are there at once; a row of them is one of a few."""

    name = "stub"
    final = True

    def __init__(self, vocab: int) -> None:
        self._logits_RV = torch.randn(4096, vocab, generator=torch.Generator().manual_seed(0))

    def __call__(self, batch: Batch, lanes: Lanes) -> Tensor:
        return self._logits_RV[: len(batch.rows_R)]


def new_engine(running: int, prefixes: int) -> Engine:
    engine = Engine(
        engine_config(
            load_format="dummy",
            cpu_step="torch",
            page_size=PAGE_SIZE,
            max_running_requests=running,
            max_total_tokens=running * (PROMPT + OUTPUT + PAGE_SIZE) + prefixes * PREFIX,
            chunked_prefill_size=4096,
            max_queued_requests=1 << 20,
            disable_overlap_schedule=True,
        ),
        progress=False,
    )
    engine._runner._routes.rows_SLK.zero_()  # the stub writes none, and experts are counted
    engine._runner.enter(StubStep(engine.architecture.vocab_size), "stub")
    return engine


def fill(engine: Engine, prefixes: int, draws: random.Random) -> None:
    """Leave so many prefixes in the cache, all different."""
    vocab = engine.architecture.vocab_size
    for index in range(prefixes):
        prompt = (index % vocab, index // vocab, draws.randrange(vocab), draws.randrange(vocab), 1)
        engine.add(Request(rid=f"fill-{index}", prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=1, temperature=0.0)))
    while engine.has_work:
        engine.step()


def measure(running: int, prefixes: int) -> dict[str, Any]:
    """Median milliseconds of each part of a step in which all requests decode."""
    draws = random.Random(0)
    with contextlib.closing(new_engine(running, prefixes)) as engine:
        fill(engine, prefixes, draws)
        params = SamplingParams(max_tokens=OUTPUT, temperature=0.0, ignore_eos=True)
        vocab = engine.architecture.vocab_size
        for index in range(running):
            engine.add(Request(rid=f"run-{index}", prompt_token_ids=tuple(draws.choices(range(vocab), k=PROMPT)), sampling=params))
        while engine.scheduler.num_waiting:
            engine.step()
        for _ in range(WARM_STEPS):
            engine.step()
        gc.collect()
        gc.freeze()
        times = [_step(engine, running) for _ in range(STEPS)]
        gc.unfreeze()
    parts = {name: round(1000 * statistics.median(time[index] for time in times), 4) for index, name in enumerate(PARTS)}
    return {"running": running, "prefixes": prefixes, "step_ms": round(1000 * statistics.median(map(sum, times)), 4)} | parts


def _step(engine: Engine, running: int) -> list[float]:
    """Seconds of each part of one step, the lines of `Engine.step` in the plain order."""
    marks = [time.perf_counter()]
    plan = engine.scheduler.plan()
    marks.append(time.perf_counter())
    assert plan is not None
    result = engine._runner.execute(plan)
    marks.append(time.perf_counter())
    advances = engine.scheduler.commit(plan, result)
    marks.append(time.perf_counter())
    deltas = engine._deliver(advances)
    marks.append(time.perf_counter())
    assert len(deltas) == running
    return [later - earlier for earlier, later in itertools.pairwise(marks)]


def followed(result: dict[str, Any], before: list[dict[str, Any]], date: str) -> dict[str, Any]:
    """A result that also says what the budgeted step took when it was measured before, oldest first, and now."""
    steps = {str(row["prefixes"]): row["step_ms"] for row in result["rows"] if row["running"] == BUDGET_RUNNING}
    return result | {"history": [*before, {"date": date, "commit": result["commit"], "cpu": result["cpu"], "step_ms": steps}]}


def figure(rows: list[dict[str, Any]], history: list[dict[str, Any]]) -> str:
    """Cost by running requests, and that of the budgeted step from measurement to measurement: an SVG document."""
    lines = []
    for prefixes in sorted({row["prefixes"] for row in rows}):
        points = [(row["running"], row["step_ms"]) for row in rows if row["prefixes"] == prefixes]
        lines.append(Line(name=f"{prefixes:,} cached prefixes", points=points))
    budget = (f"budget at {BUDGET_RUNNING}", BUDGET_MS)
    panels = [Panel(title="bookkeeping of a step", x="running requests", y="ms", lines=lines, limit=budget, logarithmic=True)]
    if history:
        labels = [(point["commit"] or "?")[:7] for point in history]
        over = [
            Line(
                name=f"{int(prefixes):,} cached prefixes",
                points=[(number, point["step_ms"][prefixes]) for number, point in enumerate(history, 1) if prefixes in point["step_ms"]],
                labels=labels if index == 0 else (),
            )
            for index, prefixes in enumerate(history[-1]["step_ms"])
        ]
        panels.append(Panel(title=f"at {BUDGET_RUNNING}, over time", x="measurement", y="ms", lines=over, limit=budget))
    return chart(panels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--running", type=int, nargs="+", default=[1, 64, 256, 1024])
    parser.add_argument("--prefixes", type=int, nargs="+", default=[0, 100_000])
    parser.add_argument("--output", help="write the figures to this file too")
    parser.add_argument("--plot", help="draw them into this SVG file")
    arguments = parser.parse_args()
    rows = []
    print(f"{'running':>8}{'prefixes':>10}{'step ms':>10}" + "".join(f"{name:>10}" for name in PARTS))
    for prefixes in arguments.prefixes:
        for running in arguments.running:
            row = measure(running, prefixes)
            rows.append(row)
            print(f"{running:>8}{prefixes:>10}{row['step_ms']:>10.3f}" + "".join(f"{row[name]:>10.3f}" for name in PARTS), flush=True)
    over = [row for row in rows if row["running"] <= BUDGET_RUNNING and row["step_ms"] > BUDGET_MS]
    print(f"budget: {BUDGET_MS} ms at {BUDGET_RUNNING} running requests: {'not kept' if over else 'kept'}")
    summary = {"bench": "bookkeeping", "budget_ms": BUDGET_MS, "budget_running": BUDGET_RUNNING, "rows": rows} | here()
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(summary, indent=1) + "\n")
    if arguments.plot:
        Path(arguments.plot).write_text(figure(rows, []))
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
