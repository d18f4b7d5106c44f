"""Finds how the experts' products are best cut on this GPU, and keeps it where the engine looks.

Each product is timed alone, as a CUDA graph over several routings, in every cut that makes sense for so many tokens; the best pair
with blocks of one height is kept. A pair is kept only if its result is right by the check of `bench kernels`. The file is written
after each size, and what it has is not measured again: a run that was broken off goes on.
"""

from __future__ import annotations

import importlib
import itertools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from pointsman.bench.expert_layer import Layer, time_graph
from pointsman.bench.kernels import BOUNDS, Block, check
from pointsman.bench.options import TuneOptions
from pointsman.kernels.capability import chains, describe
from pointsman.kernels.tiles import Shape, Tables, Tile, Tiles, device_key, merge, own_file
from pointsman.moe.candidates import unsupported
from pointsman.moe.grouped import RoutedRunner, TritonRunner

NUM_BATCHES = 4
MOST_TOKENS_AHEAD = 256  # in larger steps `down` does not wait for weights
RUNNERS: dict[str, type[RoutedRunner] | type[TritonRunner]] = {"routed": RoutedRunner, "triton": TritonRunner}


def blocks(rows: float) -> list[int]:
    """Heights worth trying where an expert has so many rows."""
    ranges = {16: (0, 20), 32: (3, 48), 64: (12, 300), 128: (48, float("inf"))}
    return [block for block, (low, high) in ranges.items() if low <= rows <= high]


def gemm_tiles(block: int) -> list[Tile]:
    """Cuts of a product alone."""
    cuts = {
        16: [(128, 4, 3), (128, 4, 4), (64, 4, 4), (64, 4, 5), (32, 4, 5), (128, 8, 4)],
        32: [(128, 4, 3), (64, 4, 4), (128, 8, 3)],
        64: [(128, 4, 3), (128, 8, 3), (128, 8, 4), (64, 4, 4)],
        128: [(128, 8, 3), (128, 8, 4), (64, 4, 3)],
    }
    return [Tile(block=block, columns=columns, warps=warps, stages=stages, swap=block <= 32) for columns, warps, stages in cuts[block]]


def up_tiles(block: int, *, quantized: bool) -> list[Tile]:
    """Cuts of gate, up and activation; those of hidden rows left in bfloat16 are for few experts in use, or plain weights."""
    whole = {
        16: [(128, 4, 2), (128, 4, 3), (128, 8, 3), (64, 4, 3)],
        32: [(128, 8, 2), (128, 8, 3), (64, 4, 3)],
        64: [(128, 8, 2), (128, 8, 3), (64, 4, 3), (64, 8, 3)],
        128: [(64, 8, 2), (64, 8, 3), (64, 8, 4)],
    }
    few = {
        16: [(64, 4, 3), (64, 4, 4), (32, 4, 4), (32, 4, 5), (16, 4, 4), (16, 4, 5)],
        32: [(64, 4, 3), (32, 4, 4)],
        64: [(64, 4, 3), (64, 8, 3)],
        128: [(64, 8, 3)],
    }
    form = Tile(block=block, columns=0, warps=0, stages=0, swap=block <= 32)
    found = [replace(form, columns=columns, warps=warps, stages=stages) for columns, warps, stages in few[block]]
    if quantized:
        found += [replace(form, columns=columns, warps=warps, stages=stages, quantize=True) for columns, warps, stages in whole[block]]
    return found


class Products:
    """Both products of one runner at one size, ready to be timed in any cut."""

    def __init__(self, layer: Layer, runner: str, num_tokens: int, seed: int = 0) -> None:
        self._layer, self._runner, self._num_tokens = layer, runner, num_tokens
        self._arrange = importlib.import_module("pointsman.kernels.arrange")
        self._gemm = importlib.import_module("pointsman.kernels.grouped_gemm")
        self._rows = importlib.import_module("pointsman.kernels.expert_rows")
        device, shape = layer.gate_ED.device, layer.shape
        generator = torch.Generator(device).manual_seed(seed)
        self._pdl = runner == "routed" and chains(device)
        self.x = [torch.randn(num_tokens, shape.hidden, generator=generator, device=device).bfloat16() for _ in range(NUM_BATCHES)]
        draws = [torch.rand(num_tokens, shape.num_experts, generator=generator, device=device) for _ in range(NUM_BATCHES)]
        self._ids = [draw.topk(shape.top_k).indices.int() for draw in draws]
        self._arranged: list[tuple[Any, Tensor | None, Tensor | None]] = []

    def set_block(self, block: int) -> None:
        """Arrange the pairs in blocks of this height."""
        quantized = self._layer.shape.quantized
        self._arranged = [
            self._arrange.arrange(ids, self._layer.shape.num_experts, block, x if quantized else None)
            for ids, x in zip(self._ids, self.x, strict=True)
        ]

    def time_up(self, tile: Tile) -> float:
        return time_graph(lambda: [self._up(index, tile) for index in range(NUM_BATCHES)]) / NUM_BATCHES

    def time_down(self, tile: Tile, *, from_quantized: bool) -> float:
        """With hidden rows as `up` leaves them, or as it leaves them for `down` to quantize."""
        shape = self._layer.shape
        pairs = self._num_tokens * shape.top_k
        some = Tile(block=tile.block, columns=64, warps=tile.warps, stages=2, swap=tile.swap, quantize=from_quantized)
        if self._runner == "routed":
            hidden = [self._up(index, some) for index in range(NUM_BATCHES)]
        else:
            hidden = [
                self._rows.activate(self._up(index, some), arranged, pairs, tile.block, quantize=shape.quantized)
                for index, (arranged, _, _) in enumerate(self._arranged)
            ]
        dtype = torch.float32 if self._runner == "routed" else torch.bfloat16
        y_RD = torch.empty(pairs, shape.hidden, dtype=dtype, device=self.x[0].device)

        def work() -> None:
            for (h_PF, scale_PG), (arranged, _, _) in zip(hidden, self._arranged, strict=True):
                self._gemm.gemm(h_PF, scale_PG, self._layer.experts.down, arranged, pairs, tile, y_RD, pdl=self._pdl)

        return time_graph(work) / NUM_BATCHES

    def _up(self, index: int, tile: Tile) -> Any:
        shape, (arranged, q_TD, scale_TG) = self._layer.shape, self._arranged[index]
        rows_TD, pairs, weight = self.x[index] if q_TD is None else q_TD, self._num_tokens * shape.top_k, self._layer.experts.gate_up
        if self._runner == "routed":
            return self._gemm.up(rows_TD, scale_TG, weight, arranged, pairs, shape.top_k, tile, pdl=self._pdl)
        both_PF = torch.empty(len(arranged.pairs_P), 2 * shape.width, dtype=torch.bfloat16, device=rows_TD.device)
        return self._gemm.gemm(rows_TD, scale_TG, weight, arranged, pairs, tile, both_PF, gather=shape.top_k)


def cuts(runner: str, shape: Shape, num_tokens: int) -> dict[int, tuple[list[Tile], list[tuple[Tile, bool]]]]:
    """By height of a block, the cuts of `up`, and those of `down` with whether hidden rows reach it quantized."""
    found = {}
    for block in blocks(num_tokens * shape.top_k / shape.num_experts):
        ups = up_tiles(block, quantized=shape.quantized) if runner == "routed" else gemm_tiles(block)
        ups = [tile for tile in ups if shape.width % tile.columns == 0]
        kinds = sorted({tile.quantize if runner == "routed" else shape.quantized for tile in ups})
        found[block] = ups, list(itertools.product(gemm_tiles(block), kinds))
    return found


def measured(products: Products, runner: str, shape: Shape, num_tokens: int, told: Callable[[Tile], None]) -> Iterator[tuple[float, Tiles]]:
    """Seconds of both products together for every pair of cuts; each is told when its turn comes."""
    for block, (ups, downs) in cuts(runner, shape, num_tokens).items():
        products.set_block(block)
        up_seconds = {}
        for up in ups:
            told(up)
            up_seconds[up] = products.time_up(up)
        for down, quantized in downs:
            told(down)
            seconds = products.time_down(down, from_quantized=quantized)
            for up in ups:
                if runner != "routed" or up.quantize == quantized:
                    yield up_seconds[up] + seconds, Tiles(up=up, down=down)


class Bar:
    """What is measured, of how much, and the best so far, on stderr where that is a terminal."""

    def __init__(self, runner: str, sizes: Sequence[int], shape: Shape) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[best]}"),
            TimeElapsedColumn(),
        )
        console = Console(stderr=True)
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        total = sum(len(ups) + len(downs) for size in sizes for ups, downs in cuts(runner, shape, size).values())
        self._task = self._progress.add_task(runner, total=total, best="")
        self._runner = runner

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def best_of(self, products: Products, shape: Shape, num_tokens: int) -> tuple[float, Tiles]:
        """The best pair of cuts at this size and its seconds."""

        def told(tile: Tile) -> None:
            self._progress.update(self._task, advance=1, description=f"{self._runner} {num_tokens} tokens {short_tile(tile)}")

        best: tuple[float, Tiles] | None = None
        for seconds, tiles in measured(products, self._runner, shape, num_tokens, told):
            if best is None or seconds < best[0]:
                best = seconds, tiles
                self._progress.update(self._task, best=f"best {1e6 * seconds:.1f} us")
        assert best is not None, "every size has cuts"
        return best

    def say(self, line: str) -> None:
        """A line above the bar."""
        self._progress.console.print(line, highlight=False, markup=False, soft_wrap=True)


def run(_: dict[str, Any], options: TuneOptions) -> int:
    """`pointsman tune`; 1 where no runner can serve here or a result is wrong."""
    logging.basicConfig(level=options.log_level.upper())
    device = torch.device("cuda")
    shape = Shape(
        num_experts=options.num_experts,
        top_k=options.experts_per_token,
        hidden=options.hidden_size,
        width=options.expert_width,
        quantized=not options.plain,
    )
    path = Path(options.save) if options.save is not None else own_file()
    layer: Layer | None = None
    results: dict[str, Any] = {}
    for name in RUNNERS:
        probe = Layer(shape, torch.empty(0), torch.empty(0), None)  # type: ignore[arg-type]
        if (why := unsupported(name, probe.spec, probe.form, describe(device), "bfloat16")) is not None:
            print(f"runner {name} is left out: {why}", file=sys.stderr)
            continue
        layer = layer or Layer.draw(shape, device, seed=0)
        results[name] = tune_runner(layer, name, path, options)
    if not results:
        raise ValueError("there is nothing to tune on this machine")
    print(json.dumps({"tune": shape.key, "device": torch.cuda.get_device_name(device), "file": str(path), "runners": results}))
    return 0


def tune_runner(layer: Layer, runner: str, path: Path, options: TuneOptions) -> list[dict[str, Any]]:
    """Measure every size that the file lacks; returns the runner's rows."""
    device = device_key(torch.cuda.get_device_name(layer.gate_ED.device))
    tables: Tables = json.loads(path.read_text()) if path.is_file() else {}
    known = {} if options.again else {row["tokens"]: row for row in tables.get(device, {}).get(layer.shape.key, {}).get(runner, [])}
    sizes = sorted(set(options.num_tokens))
    with Bar(runner, [size for size in sizes if size not in known], layer.shape) as bar:
        for index, num_tokens in enumerate(sizes):
            if num_tokens not in known:
                known[num_tokens] = tune_size(layer, runner, num_tokens, bar)
                merge(tables, {device: {layer.shape.key: {runner: [known[size] for size in sorted(known)]}}})
                write(path, tables)
            row = known[num_tokens]
            bar.say(f"[{index + 1}/{len(sizes)}] {runner} {num_tokens} tokens: {row['us']} us, {short(row)}")
    return [known[size] for size in sorted(known)]


def tune_size(layer: Layer, runner: str, num_tokens: int, bar: Bar) -> dict[str, Any]:
    """A table's row: the best cuts of this size, whose result is right."""
    products = Products(layer, runner, num_tokens)
    seconds, tiles = bar.best_of(products, layer.shape, num_tokens)
    if runner == "routed" and num_tokens <= MOST_TOKENS_AHEAD:
        tiles = with_prefetch(layer, tiles, products.x)
    fault, _ = check(layer, Block(layer, RUNNERS[runner](tiles=tiles)), products.x[0], BOUNDS[runner])
    if fault is not None:
        raise ValueError(f"{runner} with {num_tokens} tokens in {tiles}: {fault}")
    return {"tokens": num_tokens, "us": round(1e6 * seconds, 2), "up": asdict(tiles.up), "down": asdict(tiles.down)}


def with_prefetch(layer: Layer, tiles: Tiles, x: list[Tensor]) -> Tiles:
    """How far `down` should ask for weights ahead shows only in the whole block."""
    every = layer.shape.width // 128

    def seconds(steps: int) -> float:
        block = Block(layer, RoutedRunner(tiles=replace(tiles, down=replace(tiles.down, prefetch=steps))))
        return time_graph(lambda: [block(x_TD) for x_TD in x])

    best = min(sorted({0, min(2, every), min(4, every), every}), key=seconds)
    return replace(tiles, down=replace(tiles.down, prefetch=best))


def short(row: dict[str, Any]) -> str:
    return "; ".join(f"{name} {short_tile(Tile(**row[name]))}" for name in ("up", "down"))


def short_tile(tile: Tile) -> str:
    return f"{tile.block}x{tile.columns} w{tile.warps} s{tile.stages}"


def write(path: Path, tables: Tables) -> None:
    """Replace the file at once, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(f".{os.getpid()}")
    half.write_text(json.dumps(tables, indent=1) + "\n")
    half.replace(path)
