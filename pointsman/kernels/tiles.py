"""How the experts' products are cut into programs: tables for known devices and shapes, and a rule for the others.

A table is data: rows of `tiles.json`, keyed by device, shape and type, each saying up to how many tokens it holds. What has no
table is cut by the rule below, which is right everywhere and good on Hopper; that a table is missing is said once.

Shape letters: D hidden, F expert width, E experts.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from pointsman.kernels.triton_support import version

logger = logging.getLogger(__name__)

Tables = dict[str, dict[str, dict[str, list[dict[str, Any]]]]]

MANY_PROGRAMS = 96  # with so many a large GPU reads almost as fast as with more


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One product's cut.

    Attributes:
        block: rows (pairs) of a program; the same for both products of a step.
        columns: columns of a program; of `up`, of a pass.
        warps, stages: of a program.
        swap: weights are the left operand.
        quantize: hidden rows leave `up` quantized; a program then makes 128 columns, in two passes if `columns` is 64.
        prefetch: of `down`, steps of K whose weights are asked for while `up` still runs.
        registers: most of a thread, so that more programs fit a processor; None leaves it to the assembler.
    """

    block: int
    columns: int
    warps: int
    stages: int
    swap: bool
    quantize: bool = False
    prefetch: int = 0
    registers: int | None = None


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """The cuts of `up` and `down`."""

    up: Tile
    down: Tile


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a layer's experts."""

    num_experts: int
    top_k: int
    hidden: int
    width: int
    quantized: bool

    @property
    def key(self) -> str:
        kind = "fp8-128x128" if self.quantized else "bfloat16"
        return f"E={self.num_experts},K={self.top_k},D={self.hidden},F={self.width},{kind}"


def rule(runner: str, shape: Shape, num_tokens: int) -> Tiles:
    """Cuts for any shape: blocks about as high as an expert has rows, and columns fine enough that most processors have work."""
    rows = num_tokens * shape.top_k / shape.num_experts
    used = min(num_tokens * shape.top_k, shape.num_experts)
    block = 16 if rows <= 10 else 32 if rows <= 24 else 64 if rows <= 96 else 128
    swap = block <= 32
    down = Tile(block=block, columns=128, warps=8 if block == 128 else 4, stages=3, swap=swap)
    if block == 16:
        down = replace(down, columns=64, stages=5)
    if runner == "triton":
        return Tiles(up=down, down=down)
    columns = 128
    while columns > 16 and used * (shape.width // columns) < MANY_PROGRAMS:
        columns //= 2
    if not shape.quantized or columns < 128:
        return Tiles(up=replace(down, columns=min(columns, 64), stages=4 if block == 16 else 3), down=down)
    up = {
        16: Tile(block=16, columns=128, warps=8 if num_tokens <= 8 else 4, stages=3, swap=True, quantize=True),
        32: Tile(block=32, columns=128, warps=8, stages=2, swap=True, quantize=True),
        64: Tile(block=64, columns=64, warps=4, stages=3, swap=False, quantize=True),
        128: Tile(block=128, columns=64, warps=8, stages=3, swap=False, quantize=True),
    }
    return Tiles(up=up[block], down=down)


def for_wide_products(tiles: Tiles) -> Tiles:
    """The same with at least 64 rows on the left of every product: from there on the tensor cores are those of Hopper (wgmma)."""
    return Tiles(
        **{
            name: replace(tile, columns=64) if tile.swap and tile.columns < 64 else tile
            for name, tile in (("up", tiles.up), ("down", tiles.down))
        }
    )


class TileTable:
    """A runner's cuts of one shape on one device, by number of tokens."""

    def __init__(self, runner: str, shape: Shape, device: str) -> None:
        self._runner, self._shape = runner, shape
        self._rows = _rows(runner, device, shape.key)

    def __call__(self, num_tokens: int) -> Tiles:
        for most, tiles in self._rows:
            if num_tokens <= most:
                return tiles
        return rule(self._runner, self._shape, num_tokens)


@functools.cache
def _rows(runner: str, device: str, key: str) -> tuple[tuple[int, Tiles], ...]:
    table = load_tables().get(device, {}).get(key, {}).get(runner)
    if table is None:
        logger.info("runner %s has no tiles for %s on %s; a rule cuts its products, `pointsman tune` measures", runner, key, device)
        return ()
    return tuple((row["tokens"], Tiles(up=Tile(**row["up"]), down=Tile(**row["down"]))) for row in table)


def load_tables() -> Tables:
    """All tables: by device name, shape and runner, rows in order of tokens. Those that `pointsman tune` made here come before ours."""
    shipped: Tables = json.loads((resources.files("pointsman.kernels") / "tiles.json").read_text())
    if (own := own_file()).is_file():
        merge(shipped, json.loads(own.read_text()))
    return shipped


def own_file() -> Path:
    """Where `pointsman tune` keeps what it measured on this machine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "pointsman" / "tiles.json"


def merge(tables: Tables, others: Tables) -> None:
    """Put the others' tables beside or in place of these."""
    for device, shapes in others.items():
        for key, runners in shapes.items():
            tables.setdefault(device, {}).setdefault(key, {}).update(runners)


def device_key(name: str) -> str:
    """What a table is kept under: the device and the compiler that made its kernels."""
    have = version()
    return f"{name}, triton {'none' if have is None else f'{have[0]}.{have[1]}'}"
