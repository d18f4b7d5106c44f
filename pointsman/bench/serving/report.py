"""The figures of a load for people: the table of the field's serving benchmark line by line, runs side by side, and curves."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pointsman.bench.plot import Line, Panel, chart
from pointsman.bench.serving.metrics import NAMES

WIDTH = 50
LABEL = 40
COUNTS = (
    ("Successful requests:", "completed"),
    ("Failed requests:", "failed"),
    ("Benchmark duration (s):", "duration"),
    ("Total input tokens:", "total_input_tokens"),
    ("Total generated tokens:", "total_output_tokens"),
    ("Request throughput (req/s):", "request_throughput"),
    ("Request goodput (req/s):", "request_goodput"),
    ("Output token throughput (tok/s):", "output_throughput"),
    ("Total Token throughput (tok/s):", "total_token_throughput"),
)
COMPARED = (
    "request_throughput",
    "output_throughput",
    "total_token_throughput",
    *(f"{figure}_{metric}_ms" for metric in NAMES for figure in ("mean", "median", "p99")),
)


def table(summary: dict[str, Any], metrics: Sequence[str], percentiles: Sequence[float]) -> str:
    """The table of one run. Failed requests have a line only where there are any."""
    lines = [f"{' Serving Benchmark Result ':=^{WIDTH}}"]
    for label, key in COUNTS:
        value = summary.get(key)
        if value is None or (key == "failed" and not value):
            continue
        lines.append(f"{label:<{LABEL}} {value:<10}" if isinstance(value, int) else f"{label:<{LABEL}} {value:<10.2f}")
    for metric in metrics:
        short, long = NAMES[metric]
        if f"mean_{metric}_ms" not in summary:
            continue
        lines.append(f"{long:-^{WIDTH}}")
        figures = [("Mean", "mean"), ("Median", "median"), *((f"P{share:g}", f"p{share:g}") for share in percentiles)]
        lines += [f"{f'{label} {short} (ms):':<{LABEL}} {summary[f'{key}_{metric}_ms']:<10.2f}" for label, key in figures]
    return "\n".join([*(line.rstrip() for line in lines), "=" * WIDTH])


def comparison(names: Sequence[str], summaries: Sequence[dict[str, Any]]) -> str:
    """Runs side by side, each figure with its ratio to that of the first."""
    width = max(22, *(len(name) + 2 for name in names))
    lines = [f"{'':<28}" + "".join(f"{name:>{width}}" for name in names)]
    for key in COMPARED:
        if not all(key in summary for summary in summaries):
            continue
        values = [summary[key] for summary in summaries]
        cells = [f"{values[0]:,.2f}"] + [f"{value:,.2f} ({_ratio(value, values[0])})" for value in values[1:]]
        lines.append(f"{key:<28}" + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join(lines)


def _ratio(value: float, first: float) -> str:
    return f"{value / first:.2f}x" if first else "-"


def load_of(summary: dict[str, Any]) -> str:
    """What a run was loaded with, in a word: its rate where it had one, else its concurrency."""
    rate, most = summary.get("request_rate"), summary.get("max_concurrency")
    if isinstance(rate, (int, float)) and math.isfinite(rate):
        return f"{rate:g}/s"
    return "all" if most is None else f"{most}"


def curves(groups: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """Latency against throughput, a curve for each group of runs: an SVG document."""
    panels = []
    for key, title, y in (
        ("median_ttft_ms", "time to first token, median", "ms"),
        ("median_tpot_ms", "time per output token, median", "ms"),
    ):
        lines = []
        for name, summaries in groups.items():
            found = [summary for summary in summaries if key in summary]
            points = [(summary["output_throughput"], summary[key]) for summary in found]
            lines.append(Line(name=name, points=points, labels=[load_of(summary) for summary in found]))
        panels.append(Panel(title=title, x="output tokens/s", y=y, lines=lines))
    return chart(panels)


def read_saved(path: str) -> list[dict[str, Any]]:
    """The runs of a saved file. Raises ValueError where it has none."""
    found = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} of {path} is not JSON: {error}") from None
        if not isinstance(row, dict) or "output_throughput" not in row:
            raise ValueError(f"line {number} of {path} is no saved run of bench serve")
        found.append(row)
    if not found:
        raise ValueError(f"{path} is empty; it should have saved runs of bench serve")
    return found
