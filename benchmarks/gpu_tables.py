"""Tables and the picture of docs/performance.md that a GPU has measured, out of what is kept in `results`.

In the document each stands between `<!-- table NAME -->` and `<!-- end of table -->`; NAME is one of TABLES.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.comparisons import table
from pointsman.bench.kernels import draw

RESULTS = Path(__file__).parent / "results"
PLACE = re.compile(r"(<!-- table (.+?) -->\n).*?(<!-- end of table -->\n)", re.DOTALL)

Result = dict[str, Any]


def steps(result: Result) -> str:
    """What a decode step takes beside what it must read."""
    rows = [
        (f"{row['batch']}", f"{row['step_ms']:.2f} ms", f"{row['floor_ms']:.2f} ms", f"{100 * row['share']:.0f} %")
        for row in result["speed"]["decode"]
    ]
    return table(("sequences", "a decode step", "floor", "share"), rows)


def experts(result: Result) -> str:
    """One layer's experts, by tokens and runner."""
    runners = list(dict.fromkeys(row["runner"] for row in result["rows"]))
    found = {(row["M"], row["runner"]): row for row in result["rows"]}
    rows = []
    for tokens in dict.fromkeys(row["M"] for row in result["rows"]):
        cells = [found[tokens, runner] for runner in runners]
        times = [f"{cell['us']:,.0f} us, {100 * cell['read_fraction']:.0f} %" for cell in cells]
        rows.append((f"{tokens:,}", f"{cells[0]['experts']:g}", *times))
    heads = [f"`{name}`{comma}{rest}" for name, comma, rest in (runner.partition(",") for runner in runners)]
    return table(("tokens", "experts in use", *heads), rows)


TABLES: dict[str, tuple[str, Callable[[Result], str]]] = {
    "steps_h100": ("engine_h100", steps),
    "steps_h200": ("engine_h200", steps),
    "experts_h200": ("moe_h200", experts),
}


def kept(name: str) -> Result:
    found: Result = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def filled(text: str) -> str:
    """A document with its tables."""

    def fill(place: re.Match[str]) -> str:
        result, make = TABLES[place[2]]
        return place[1] + make(kept(result)) + place[3]

    return PLACE.sub(fill, text)


def experts_plot() -> str:
    return draw(kept("moe_h200")["rows"])
