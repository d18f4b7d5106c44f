"""`pointsman quantize`: a plain checkpoint becomes one in FP8, in blocks or with one scale a matrix, and each layer's error is told."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from pointsman.cli.options import QuantizeOptions
from pointsman.models.folder import locate
from pointsman.models.quantize import BLOCK, Quantized, quantize_checkpoint


def run(_engine: dict[str, Any], options: QuantizeOptions) -> int:
    """Write the second folder from the first."""
    source, target = options.folders
    block = None if options.per_tensor else BLOCK
    found = quantize_checkpoint(locate(source), Path(target).expanduser(), block=block, force=options.force)
    if not options.json:
        Console(width=None if sys.stdout.isatty() else 120).print(_table(found))
        before, after = found.bytes_before / 2**30, found.bytes_after / 2**30
        print(f"{found.num_matrices:,} matrices in {target}; {before:.3g} GiB became {after:.3g} GiB")
    figures = dataclasses.asdict(found)
    print(json.dumps(figures if options.json else {key: value for key, value in figures.items() if key != "layers"}))
    return 0


def _table(found: Quantized) -> Table:
    table = Table(box=box.SIMPLE)
    for name, justify in (
        ("layer", "right"),
        ("matrices", "right"),
        ("relative error", "right"),
        ("largest", "right"),
        ("worst matrix", "left"),
    ):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for layer in found.layers:
        worst = layer.worst.partition(f"layers.{layer.layer}.")[2] or layer.worst
        table.add_row(str(layer.layer), str(layer.num_matrices), f"{layer.relative:.4%}", f"{layer.largest:.3g}", worst)
    table.add_row("all", str(found.num_matrices), f"{found.relative:.4%}", f"{found.largest:.3g}", "")
    return table
