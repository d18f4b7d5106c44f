"""`pointsman routes` and `pointsman routes diff`: a table for people, pictures where asked, one line of JSON last."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pointsman.cli.routes.agreement import Agreement, compare
from pointsman.cli.routes.load import Balance, Load, balances, load_of, summary
from pointsman.cli.routes.options import DiffOptions, Reading, RoutesOptions
from pointsman.cli.routes.page import page
from pointsman.cli.routes.sources import records, server_load
from pointsman.plots.heat import heat_map, ramp
from pointsman.routed_experts import RoutedExperts

TITLE = "How often each expert was used"
BLOCKS = " ▁▂▃▄▅▆▇█"
MOST_DEAD = 4
COLUMNS, NARROWEST, WIDEST = 54, 16, 128  # what the other columns take, and what is left for the load
PAPER_WIDTH = 160  # of a file or a pipe


def show(_engine: dict[str, Any], options: RoutesOptions) -> int:
    """Load of the experts, of files or of a server."""
    if options.url is not None:
        load = server_load(options.url, options.api_key)
    else:
        source = options.files[0] if len(options.files) == 1 else f"{len(options.files)} files"
        load = load_of([record for path in options.files for record in records(path, options)], source)
    if options.png is not None:
        Path(options.png).write_bytes(heat_map(load.shares_LE, load.layers, TITLE, described(load)))
    if options.html is not None:
        Path(options.html).write_text(page(load, TITLE, described(load)), encoding="utf-8")
    figures = summary(load)
    if options.json:
        print(json.dumps(figures | {"counts": load.counts_LE.tolist()}))
        return 0
    console = _console()
    print(described(load))
    console.print(_load_table(load, console))
    print(json.dumps(figures))
    return 0


def diff(_engine: dict[str, Any], options: DiffOptions) -> int:
    """Where two records part."""
    left, right = (_one(path, options) for path in options.files)
    found = compare(left, right)
    if not options.json:
        print(f"{found.num_tokens:,} tokens in both records")
        _console().print(_diff_table(found))
        print(_first(found))
    print(json.dumps(found.figures()))
    return 0


def _console() -> Console:
    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        console.width = PAPER_WIDTH
    return console


def _one(path: str, options: Reading) -> RoutedExperts:
    found = records(path, options)
    if len(found) != 1:
        raise ValueError(f"{path}: it has {len(found)} records; diff compares one with one")
    return found[0]


def described(load: Load) -> str:
    """A load in a line of words."""
    missing = f", {load.num_missing:,} more are missing" if load.num_missing else ""
    return f"{load.source}: {load.num_tokens:,} tokens, {load.top_k} of {load.counts_LE.shape[1]} experts a token{missing}"


def _load_table(load: Load, console: Console) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.caption, table.caption_justify = "× is of an even share; entropy 1 is an even load", "left"
    for head in ("layer", "busiest", "quietest", "entropy", "unused"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column(f"experts 0-{load.counts_LE.shape[1] - 1}", no_wrap=True)
    places = min(max(console.width - COLUMNS, NARROWEST), WIDEST)
    for entry, shares_E in zip(balances(load), load.shares_LE, strict=True):
        strip = _strip(shares_E, places, colour=console.is_terminal and not console.no_color)
        busiest = f"{entry.busiest} {entry.max_over_mean:.2f}×"
        quietest = f"{entry.quietest} {shares_E[entry.quietest]:.2f}×"
        table.add_row(str(entry.layer), busiest, quietest, f"{entry.entropy:.3f}", _dead(entry), strip)
    return table


def _dead(entry: Balance) -> str:
    if len(entry.dead) > MOST_DEAD:
        return f"{len(entry.dead)}"
    return ", ".join(map(str, entry.dead)) or "none"


def _strip(shares_E: npt.NDArray[np.float64], room: int, *, colour: bool) -> Text:
    """A line of the load: a place an expert, or the busiest of several where they are many; a full block is twice an even share."""
    size = -(-len(shares_E) // room)
    padded = np.pad(shares_E, (0, -len(shares_E) % size))
    places = padded.reshape(-1, size).max(axis=1)
    text = Text()
    wide = 2 if colour and 2 * len(places) <= room else 1
    for share, (red, green, blue) in zip(places, ramp(places).astype(int).tolist(), strict=True):
        if colour:
            text.append(" " * wide, style=f"on rgb({red},{green},{blue})")
        else:
            text.append(BLOCKS[min(round(float(share) * 4), 8)])
    return text


def _diff_table(found: Agreement) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for head in ("layer", "same experts", "same order", "first divergence"):
        table.add_column(head, justify="right")
    for layer, same, ordered, position in zip(found.layers, found.sets, found.orders, found.by_layer, strict=True):
        table.add_row(str(layer), f"{same:.4f}", f"{ordered:.4f}", "-" if position is None else str(position))
    figures = found.figures()
    table.add_section()
    table.add_row(
        "all", f"{figures['agreement']:.4f}", f"{figures['ordered_agreement']:.4f}", "-" if found.first is None else str(found.first[0])
    )
    return table


def _first(found: Agreement) -> str:
    if found.first is None:
        return "The two choose the same experts everywhere."
    position, layer, left, right = found.first
    return f"They part at position {position}, layer {layer}: {left} and {right}; {found.tokens:.1%} of the tokens agree in every layer."
