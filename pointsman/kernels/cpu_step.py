"""A decoder step on a CPU as one compiled region over flat rows.

A row is a token, its position and the lane whose page table holds its past; decoding and chunked prefill are the same thing. Run
op by op, a small model spends its time between the operations. Here one call runs the whole step on all cores without coming
back to Python, and a row's result is the same bits whatever other rows share the step, however a prompt is cut into chunks, and
on any number of threads.

The step is compiled once for each combination of stored forms (attention weights, experts, head, cache; see `kinds_of`) and kept on
disk; shapes are run-time values. `is_cached` says whether `CpuStep` would start at once; where not, `start_compiling` compiles in
a process of its own.
"""

from __future__ import annotations

import os
import threading
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pointsman.kernels.cpu_object import Kinds, StepThread, is_cached, load, start_compiling
from pointsman.kernels.cpu_pack import PackedLinear, aligned, form_of
from pointsman.kernels.cpu_table import (
    ATTENTION_BLOCK,
    CONTROL_WORDS,
    MOST_ITEMS,
    NUM_LOGITS,
    NUM_ROWS,
    QUERIES,
    THREADS,
    step_fields,
    table,
)
from pointsman.kernels.cpu_weights import CpuWeights, LayerWeights, ModelShape, pack_weights, padded, pieces

__all__ = [
    "CpuCache",
    "CpuStep",
    "CpuWeights",
    "LayerWeights",
    "ModelShape",
    "is_cached",
    "kinds_of",
    "pack_weights",
    "pieces",
    "start_compiling",
]


@dataclass(frozen=True, eq=False)
class CpuCache:
    """Where the past of all lanes is.

    Attributes:
        k, v: [layers, pages, kv_heads, page_size, head_dim], float32, uint16 (bfloat16) or uint8 (e4m3, scale 1).
        routes: [pages * page_size, layers, top_k], uint8, or uint16 for more than 256 experts: the experts of the token in each slot.
        alike: int16 [pages * page_size]: of a forced token, the layers whose free choice would have been the same set of experts.
        page_table: int32 [lanes, most pages]; read in place at every step.
    """

    k: NDArray[np.generic]
    v: NDArray[np.generic]
    routes: NDArray[np.generic]
    alike: NDArray[np.int16]
    page_table: NDArray[np.int32]


def kinds_of(weights: CpuWeights, cache: CpuCache) -> Kinds:
    """The stored forms that the compiled step must be for."""
    return weights.qkv.form, weights.gate_up.form, weights.head.form, form_of(cache.k)


class CpuStep:
    """Runs steps of up to `max_rows` rows on `num_threads` threads, of which the caller's is one.

    Raises:
        ValueError: an array has the wrong shape or type.
        RuntimeError: the step is not on disk and could not be compiled.
    """

    def __init__(self, shape: ModelShape, weights: CpuWeights, cache: CpuCache, *, max_rows: int, num_threads: int) -> None:
        if max_rows < 1 or num_threads < 1:
            raise ValueError(f"max_rows is {max_rows} and num_threads {num_threads}; both must be at least 1")
        _check_cache(shape, cache)
        if _most_items(shape, max_rows) > MOST_ITEMS:
            raise ValueError(f"max_rows is {max_rows}; a step of this model would have more than {MOST_ITEMS} parts in one phase")
        self.max_rows, self.num_threads, self._vocab = max_rows, num_threads, shape.vocab
        kinds = kinds_of(weights, cache)
        self._run = load(kinds)
        pipe = os.pipe() if num_threads > 1 else (-1, -1)
        arrays = _numbers(shape, max_rows, num_threads) | _buffers(shape, max_rows, num_threads)
        self._control, self._logits = arrays["control"], arrays["logits"]
        self._rows = {name: arrays[name] for name in ("tokens", "positions", "lanes", "logit_rows", "forced")}
        values = arrays | _settings(shape, weights, cache, max_rows, num_threads, pipe)
        self._table = table(step_fields(*kinds), values)
        self._address = self._table.ctypes.data
        threads = [
            threading.Thread(target=self._run, args=(number, self._address), name=f"cpu-step-{number}", daemon=True)
            for number in range(1, num_threads)
        ]
        for thread in threads:
            thread.start()
        self.close = weakref.finalize(self, _stop, self._run, self._table, threads, pipe, values)

    def run(self, tokens: ArrayLike, positions: ArrayLike, lanes: ArrayLike, logit_rows: ArrayLike, forced: ArrayLike | None = None) -> Any:
        """Feed rows: store their keys, values and experts, and return float32 logits [len(logit_rows), vocab].

        Rows of one lane may come in any number; what a row attends to must be in the cache or among the rows of this step. A row
        that is `forced` takes the experts that stand at its slot in `routes`, and its entry in `alike` is set. The logits are a view
        that the next run overwrites.
        One run at a time: the buffers are the step's own.

        Raises:
            ValueError: there are too many rows, or one names something that does not exist.
        """
        assert self.close.alive, "the step was closed"
        num_rows, num_logits = len(tokens), len(logit_rows)  # type: ignore[arg-type]
        if not 0 < num_rows <= self.max_rows or num_logits > num_rows:
            raise ValueError(f"{num_rows} rows with {num_logits} logits; a step takes 1 to {self.max_rows} rows and at most their logits")
        given = self._rows
        given["tokens"][:num_rows] = tokens
        given["positions"][:num_rows] = positions
        given["lanes"][:num_rows] = lanes
        given["logit_rows"][:num_logits] = logit_rows
        given["forced"][:num_rows] = 0 if forced is None else forced
        self._control[NUM_ROWS], self._control[NUM_LOGITS] = num_rows, num_logits
        refused = self._run(0, self._address)
        if refused:
            row = refused - 1
            token, position, lane = (given[name][row] for name in ("tokens", "positions", "lanes"))
            raise ValueError(
                f"row {row} (token {token}, position {position}, lane {lane}) or its entry in logit_rows names something that does not"
                f" exist: a token, position, lane, row, page of its past, or forced expert"
            )
        return self._logits[:num_logits, : self._vocab]


def _stop(run: StepThread, table: NDArray[np.int64], threads: list[threading.Thread], pipe: tuple[int, int], arrays: object) -> None:
    """End the helping threads, which until then read the arrays."""
    if threads:
        run(-1, table.ctypes.data)
        for thread in threads:
            thread.join()
        for end in pipe:
            os.close(end)


def _most_items(shape: ModelShape, max_rows: int) -> int:
    """A bound on what threads can take in one phase: rows, panels times blocks of rows, or panels times experts."""
    channels = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    widest = padded(max(shape.vocab, shape.hidden, channels)) // 64
    matrices = shape.most_matrices
    return max(max_rows * shape.kv_heads, -(-max_rows // 64) * widest, matrices * (max(shape.width, shape.hidden) // 32 + 1))


def _check_cache(shape: ModelShape, cache: CpuCache) -> None:
    pages, page_size = cache.k.shape[1], cache.k.shape[3]
    routes = np.dtype(np.uint8 if shape.experts <= 256 else np.uint16)
    right = (shape.layers, pages, shape.kv_heads, page_size, shape.head_dim)
    for name, array, form, dtype in (
        ("k", cache.k, right, cache.k.dtype),
        ("v", cache.v, right, cache.k.dtype),
        ("routes", cache.routes, (pages * page_size, shape.routed_layers, shape.top_k), routes),
        ("alike", cache.alike, (pages * page_size,), np.dtype(np.int16)),
        ("page_table", cache.page_table, (*cache.page_table.shape[:1], cache.page_table.shape[-1]), np.dtype(np.int32)),
    ):
        if array.shape != form or array.dtype != dtype or not array.flags.c_contiguous:
            raise ValueError(f"{name} is {array.dtype} {array.shape}; it must be {dtype} {form}, contiguous")


def _numbers(shape: ModelShape, max_rows: int, num_threads: int) -> dict[str, NDArray[np.int64]]:
    """Integer buffers by name."""
    pairs = max_rows * shape.most_choices
    sizes = dict.fromkeys(("tokens", "positions", "lanes", "slots", "forced", "logit_rows", "wanted"), max_rows)
    sizes |= {"groups": max_rows + 1, "members": num_threads * _queries(shape), "places": num_threads * (ATTENTION_BLOCK + 64)}
    sizes |= dict.fromkeys(("chosen", "pairs", "sources"), pairs) | dict.fromkeys(("starts", "active"), shape.most_matrices + 1)
    numbers = {name: aligned((size,), np.dtype(np.int64)) for name, size in (sizes | {"control": CONTROL_WORDS}).items()}
    numbers["control"][THREADS] = num_threads
    return numbers | {"counting": np.arange(max_rows + 4)} | _layer_numbers(shape)


def _layer_numbers(shape: ModelShape) -> dict[str, NDArray[np.int64]]:
    """Of each layer: its number among those that route, or -1; choices of a row, its first matrix in the stacks, and how many it has."""
    layers = range(shape.layers)
    routed = [layer for layer in layers if layer not in shape.dense_layers]
    matrices = [shape.matrices(layer) for layer in layers]
    numbers = {
        "route_of": [routed.index(layer) if layer in routed else -1 for layer in layers],
        "choices_of": [shape.choices(layer) for layer in layers],
        "first_of": [sum(matrices[:layer]) for layer in layers],
        "matrices_of": matrices,
    }
    return {name: np.array(values, np.int64) for name, values in numbers.items()}


def _buffers(shape: ModelShape, max_rows: int, num_threads: int) -> dict[str, NDArray[np.float32]]:
    """Float buffers by name. Zero where padding is read; memory that is never touched is never taken."""
    hidden, head = padded(shape.hidden), padded(shape.head_dim, 16)
    queries = num_threads * _queries(shape)
    channels = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    sizes = {"x": (max_rows, hidden), "h": (max_rows, hidden), "projected": (max_rows, hidden), "weights": (max_rows, shape.most_choices)}
    sizes |= {
        "scores": (max_rows, padded(shape.experts)),
        "queries": (max_rows, shape.heads * head),
        "turned": (num_threads, head),
        "qkv_out": (max_rows, padded(channels)),
    }
    sizes |= {"attended": (max_rows, shape.heads * shape.head_dim)}
    sizes |= {"activations": (max_rows * shape.most_choices, padded(shape.width, 32)), "outputs": (max_rows * shape.most_choices, hidden)}
    sizes |= {
        "logits": (max_rows, padded(shape.vocab)),
        "tile": (num_threads, 4 * 64),
        "key_panel": (num_threads * padded(shape.head_dim), 64),
    }
    sizes |= {"scratch_scores": (queries, ATTENTION_BLOCK), "sums": (queries, head), "highest": (queries, 1), "weight": (queries, 1)}
    return {name: aligned(size, np.dtype(np.float32)) for name, size in sizes.items()}


def _queries(shape: ModelShape) -> int:
    """Most queries that attend together: the heads of a key head, of several rows if they are few."""
    return max(QUERIES, shape.heads // shape.kv_heads)


def _settings(
    shape: ModelShape, weights: CpuWeights, cache: CpuCache, max_rows: int, num_threads: int, pipe: tuple[int, int]
) -> dict[str, Any]:
    """Sizes, weights and cache, as the table names them."""
    lift = 2.0**60 if cache.k.dtype == np.uint8 else 1.0
    wide, bfloat16 = cache.routes.dtype == np.uint16, weights.embed.dtype == np.uint16
    none = {dtype: np.zeros(0, dtype) for dtype in (np.uint8, np.uint16, np.float32)}
    names = (
        "hidden",
        "layers",
        "heads",
        "kv_heads",
        "head_dim",
        "experts",
        "top_k",
        "vocab",
        "epsilon",
        "renormalize",
        "routing_scale",
        "biased",
    )
    values: dict[str, Any] = {name: getattr(shape, name) for name in names}
    values |= {name: getattr(shape, name) for name in ("routed_layers", "most_matrices")}
    values |= {"norms_all": shape.qk_norm == "all", "norms_each": shape.qk_norm == "each", "softmax": shape.score == "softmax"}
    values |= {
        "num_threads": num_threads,
        "max_rows": max_rows,
        "most_queries": _queries(shape),
        "panel_size": padded(shape.head_dim) * 64,
        "half_rotary": shape.rotary_dim // 2,
    }
    values |= {"hidden_stride": padded(shape.hidden), "head_stride": padded(shape.head_dim, 16), "expert_stride": padded(shape.experts)}
    values |= {
        "width_stride": padded(shape.width, 32),
        "logits_stride": padded(shape.vocab),
        "attended_stride": shape.heads * shape.head_dim,
    }
    values |= {"qkv_stride": padded((shape.heads + 2 * shape.kv_heads) * shape.head_dim), "max_positions": len(weights.cos)}
    values |= {"num_pages": cache.k.shape[1], "page_size": cache.k.shape[3]}
    values |= {"num_lanes": cache.page_table.shape[0], "max_pages": cache.page_table.shape[1], "page_table": cache.page_table}
    values |= {"pipe_in": pipe[1], "pipe_out": pipe[0], "cache_k": cache.k, "cache_v": cache.v, "alike": cache.alike}
    values |= {
        "wide_routes": wide,
        "routes16": cache.routes if wide else none[np.uint16],
        "routes8": none[np.uint8] if wide else cache.routes,
    }
    values |= {"embed_bfloat16": bfloat16, "embed16": weights.embed if bfloat16 else none[np.uint16]}
    values |= {"embed32": none[np.float32] if bfloat16 else weights.embed, "cache_lift": lift, "lifts": np.full(64, lift, np.float32)}
    values |= {"lift_attention": weights.qkv.lift, "lift_experts": weights.gate_up.lift, "lift_head": weights.head.lift}
    values |= {
        name: getattr(weights, name)
        for name in ("input_norm", "post_norm", "qkv_bias", "q_norm", "k_norm", "final_norm", "bias", "cos", "sin")
    }
    return values | {name: _linear(getattr(weights, name)) for name in ("qkv", "o", "gate", "gate_up", "down", "head")}


def _linear(packed: PackedLinear) -> dict[str, Any]:
    values = {"values": packed.values_PK, "scales": packed.scales_PB, "panels": packed.values_PK.shape[1]}
    return values | {"inputs": packed.inputs, "block": packed.block, "blocks": packed.blocks}
