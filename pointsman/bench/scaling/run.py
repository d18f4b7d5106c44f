"""`pointsman bench scaling`: layouts side by side, for a workload, and how near the simulation is to what was measured."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pointsman
from pointsman.bench.options import ScalingOptions
from pointsman.bench.scaling.check import Compared, against_engine, against_serving
from pointsman.bench.scaling.layouts import HOST_GPUS, Layout, assumed, step_us
from pointsman.bench.scaling.parts import Parts, read
from pointsman.bench.scaling.serving import distinct, new_scheduler, serve
from pointsman.bench.serving.datasets import random_lengths
from pointsman.bench.serving.metrics import summarize
from pointsman.bench.serving.query import Outcome, Query
from pointsman.bench.serving.traces import BLOCK, TraceRow, read_azure, read_mooncake
from pointsman.plots.curves import Panel, curves

MEMORY = {"h100": 81_559 * 2**20, "h200": 143_771 * 2**20}
# bytes a second that a kernel reads which does nothing else, measured on an H200 as the H100's was
H200_BANDWIDTH = 4.49e12
TRACE_REQUESTS, ROUNDS = 500, 4
Row = dict[str, Any]


def run(engine: dict[str, Any], options: ScalingOptions) -> int:
    """Print the comparison, the table, and a line of JSON."""
    logging.basicConfig(level=options.log_level.upper())
    folder = Path(options.results) if options.results else Path(pointsman.__file__).parents[1] / "benchmarks" / "results"
    parts = read(folder)
    found = [layout for gpus in options.gpus for _, layout in fitting(gpus, options)]
    if not found:
        which = f"{', '.join(map(str, options.gpus))} {options.gpu.upper()}"
        raise ValueError(f"{what_must_fit(options)} fit on none of {which}; give more --gpus, or fewer --layers")
    if options.plot is not None:
        Path(options.plot).touch()  # a path that cannot be written is told before the work
    compared = against_engine(parts, folder) + against_serving(parts, folder)
    print(comparison(compared))
    if options.gpu == "h200":
        parts = parts.with_bandwidth(H200_BANDWIDTH, "H200 (predicted)")
    parts = replace(parts, assumed=tuple(dict.fromkeys([*parts.assumed, *(part for layout in found for part in assumed(layout))])))
    for part in parts.assumed:
        print(f"not measured: {part}")
    rows: list[Row] = []
    for gpus in options.gpus:
        if not fitting(gpus, options):
            print(f"{gpus} GPUs: {what_must_fit(options)} do not fit")
        for row in measure(gpus, parts, options):
            print(line(row) if rows else f"{heading()}\n{line(row)}", flush=True)
            rows.append(row)
    print(best(rows))
    if options.plot is not None:
        Path(options.plot).write_bytes(draw(rows, options))
    print(json.dumps(summary(parts, compared, rows, options), allow_nan=False))
    return 0


def summary(parts: Parts, compared: Sequence[Compared], rows: Sequence[Row], options: ScalingOptions) -> dict[str, Any]:
    """What the last line of the output has."""
    return {
        "bench": "scaling",
        "device": parts.device,
        "layers": options.layers,
        "assumed": parts.assumed,
        "dataset_name": options.dataset_name,
        "compared": [entry._asdict() | {"error": round(entry.error, 4)} for entry in compared],
        "rows": rows,
    }


def layouts(gpus: int) -> list[Layout]:
    """Ways in which so many GPUs hold one copy: attention shared by up to a host or by none, experts by width or in groups.

    Heads are shared by 2, 4 or 8 GPUs, and by as many in each group.
    """
    tp = math.gcd(gpus, HOST_GPUS)
    shared = [Layout(gpus, tp, ep) for ep in (1, gpus // 2, gpus) if ep and gpus % ep == 0 and gpus // ep <= HOST_GPUS]
    return list(dict.fromkeys([*shared, Layout(gpus, 1, gpus)]))


def fitting(gpus: int, options: ScalingOptions) -> list[tuple[int, Layout]]:
    """What so many GPUs can do: as many copies as fit, or one over all, each in its layouts."""
    most = next((copies for copies in range(gpus, 0, -1) if gpus % copies == 0 and fits(layouts(gpus // copies)[0], options)), None)
    if most is None:
        return []
    copied = [(most, layout) for layout in layouts(gpus // most) if layout.groups == 1] if most > 1 else []
    return copied + [(1, layout) for layout in layouts(gpus) if fits(layout, options)]


def fits(layout: Layout, options: ScalingOptions) -> bool:
    return layout.cache_tokens(MEMORY[options.gpu], options.layers) >= longest(options)


def longest(options: ScalingOptions) -> int:
    """Tokens of the longest request."""
    if options.dataset_name == "random":
        return options.random_input_len + options.random_output_len
    return max(row.input_len + row.output_len for row in trace(options))


def what_must_fit(options: ScalingOptions) -> str:
    return f"{options.layers} layers and {longest(options):,} tokens"


def measure(gpus: int, parts: Parts, options: ScalingOptions) -> Iterator[Row]:
    """A row for each layout that fits, and each load."""
    for copies, layout in fitting(gpus, options):
        for load in options.max_concurrency if options.dataset_name == "random" else options.trace_slowdown:
            if options.dataset_name != "random" or load >= copies:
                yield measure_one(layout, copies, load, parts, options)


def measure_one(layout: Layout, copies: int, load: float, parts: Parts, options: ScalingOptions) -> Row:
    """Serve the workload; each copy gets every so manyth request."""
    tokens = layout.cache_tokens(MEMORY[options.gpu], options.layers)
    at_once = int(load) if options.dataset_name == "random" else None
    queries = workload(options, load)
    outcomes: list[Outcome] = []
    seconds, steps, spent = 0.0, 0, Counter[str]()
    for copy in range(min(copies, len(queries))):
        running = -(-options.max_running_requests // layout.groups)
        schedulers = [new_scheduler(tokens, running, options.chunked_prefill_size) for _ in range(layout.groups)]
        time_of = functools.partial(step_us, layout, parts=parts, layers=options.layers)
        # of so many at once each copy has an equal part, and the first the ones that are over
        served = serve(queries[copy::copies], schedulers, time_of, None if at_once is None else (at_once + copies - 1 - copy) // copies)
        outcomes += served.outcomes
        seconds, steps = max(seconds, served.seconds), steps + served.steps
        spent.update(served.parts_us)
    figures = summarize(outcomes, seconds)
    names = [f"{figure}_{metric}_ms" for metric in ("ttft", "tpot", "itl") for figure in ("mean", "median", "p99")]
    return {
        "gpus": layout.gpus * copies,
        "layout": (f"{copies}x " if copies > 1 else "") + (layout.name or "one"),
        "load": load,
        "requests": len(outcomes),
        "cache_tokens": tokens * layout.groups * copies,
        "step_ms": round(sum(spent.values()) / 1000 / steps, 3),
        "parts_ms": {name: round(us / 1000 / steps, 3) for name, us in spent.items()},
        "output_tok_s": round(figures["output_throughput"], 1),
        **{name: round(figures[name], 2) for name in names if name in figures},
    }


def workload(options: ScalingOptions, load: float) -> list[Query]:
    """The requests: random lengths, or those of a trace at its moments times the load."""
    if options.dataset_name == "random":
        count = options.num_prompts or ROUNDS * int(load)
        lengths = (options.random_input_len, options.random_output_len, options.random_range_ratio)
        return distinct(random_lengths(Random(options.seed), count, *lengths))
    rows = trace(options)
    queries = distinct([(row.input_len, max(row.output_len, 1)) for row in rows])
    moments = [replace(query, arrival_s=row.at_s * load) for query, row in zip(queries, rows, strict=True)]
    return [replace(query, ids=block_ids(row)) if row.blocks else query for query, row in zip(moments, rows, strict=True)]


def trace(options: ScalingOptions) -> list[TraceRow]:
    """The requests of the trace that is named."""
    assert options.dataset_path is not None
    reader = read_azure if options.dataset_name == "azure" else read_mooncake
    return reader(options.dataset_path, options.num_prompts or TRACE_REQUESTS)


def block_ids(row: TraceRow) -> tuple[int, ...]:
    """Tokens of a prompt such that equal blocks are equal tokens."""
    whole = itertools.chain.from_iterable(range(block * BLOCK, (block + 1) * BLOCK) for block in row.blocks)
    return tuple(itertools.islice(whole, row.input_len))


def comparison(compared: Sequence[Compared]) -> str:
    """Measured and simulated, for people."""
    lines = [f"{'':<48}{'measured':>10}{'simulated':>11}{'error':>9}"]
    lines += [
        f"{f'{entry.what}, {entry.unit}':<48}{entry.measured:>10,.2f}{entry.predicted:>11,.2f}{100 * entry.error:>+8.1f}%"
        for entry in compared
    ]
    return "\n".join([*lines, ""])


COLUMNS = (
    ("output_tok_s", "tok/s"),
    ("per_gpu", "a GPU"),
    ("step_ms", "step ms"),
    ("mean_tpot_ms", "TPOT ms"),
    ("median_ttft_ms", "TTFT ms"),
    ("p99_ttft_ms", "P99"),
)


def heading() -> str:
    return f"{'GPUs':>5} {'layout':<16}{'load':>7}{'cache':>9}" + "".join(f"{name:>10}" for _, name in COLUMNS) + f"{'told ms':>9}"


def line(row: Row) -> str:
    cells = {**row, "per_gpu": row["output_tok_s"] / row["gpus"]}
    figures = "".join(f"{cells[name]:>10,.1f}" if name in cells else f"{'-':>10}" for name, _ in COLUMNS)
    told = row["parts_ms"]["communication"]
    return f"{row['gpus']:>5} {row['layout']:<16}{row['load']:>7g}{row['cache_tokens'] / 1000:>8,.0f}k{figures}{told:>9.2f}"


def best(rows: Sequence[Row]) -> str:
    """For each number of GPUs and load the layout with the most tokens a second."""
    found: dict[tuple[int, float], Row] = {}
    for row in rows:
        key = row["gpus"], row["load"]
        if key not in found or row["output_tok_s"] > found[key]["output_tok_s"]:
            found[key] = row
    lines = [f"{gpus} GPUs at {load:g}: {row['layout']}, {row['output_tok_s']:,.0f} tok/s" for (gpus, load), row in found.items()]
    return "\n".join(["", "the most tokens a second:", *lines, ""])


def draw(rows: Sequence[Row], options: ScalingOptions) -> bytes:
    """Throughput against load, a panel for each number of GPUs and a line for each layout."""
    loads = sorted({row["load"] for row in rows})
    figures = {(row["gpus"], row["layout"], row["load"]): float(row["output_tok_s"]) for row in rows}
    panels = []
    for gpus in sorted({row["gpus"] for row in rows}):
        names = dict.fromkeys(str(row["layout"]) for row in rows if row["gpus"] == gpus)
        lines: dict[str, Sequence[float | None]] = {name: [figures.get((gpus, name, load)) for load in loads] for name in names}
        panels.append(Panel(title=f"{gpus} GPUs", lines=lines, low=0.0))
    what = "requests at once" if options.dataset_name == "random" else "moments of the trace, times"
    return curves(
        f"Output tokens a second, MiniMax-M2.5 on {options.gpu.upper()}, simulated", panels, what, [f"{load:g}" for load in loads]
    )
