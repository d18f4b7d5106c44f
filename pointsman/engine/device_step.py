"""The step on a device: rows sent in one copy, the model run over them, as a CUDA graph where it was captured.

A graph has fixed sizes, so a step is padded to the next of a few sizes. What pads has the slot -1 and no lane: it is computed and stored
nowhere. Everything that a step decides (rows, positions, slots, lanes, tiles of attention) is data in device memory that keeps its
place, so the graph of a size serves decode, prefill and both at once. The head is not part of it: it runs on the rows whose logits are
wanted, be they few or many.

Without graphs the same calls run one by one, padded alike, so that both give the same numbers. Experts that rows are given are such data
too, with -1 where a row chooses freely, if the router looks at them at no cost; else steps that force experts run without a graph.

Shape suffixes: T rows, R rows whose logits are wanted, D hidden.
"""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from pointsman.config import EngineConfig
from pointsman.engine.batch import NONE, Batch, Forced, Ints, Lanes
from pointsman.engine.candidates import graph_choice
from pointsman.engine.device_lanes import DeviceLanes
from pointsman.engine.memory import kv_dtype_of
from pointsman.engine.step_sizes import bounds_of, size_for, step_sizes
from pointsman.engine.transfer import Upload, lay_out
from pointsman.kernels.operations import Planner
from pointsman.layers.context import Span, StepContext
from pointsman.layers.paged_kv import KV_DTYPES, PagedKV
from pointsman.models.backends import Backends
from pointsman.models.decoder import Decoder
from pointsman.moe.capture import RouteStore
from pointsman.moe.load import DeviceExpertLoad
from pointsman.moe.runner import OWN_RUNNERS, reason_against_replay

logger = logging.getLogger(__name__)

PADDING_SLOT = -1
NUM_ROW_ARRAYS = 4
# how many logits' rows the head's kernels are made ready for: Triton compiles anew for 1, and for multiples of 16
HEAD_SIZES = (1, 2, 16)


def pad(batch: Batch, size: int) -> tuple[Ints, Ints, Ints, Ints]:
    """Tokens, positions, lanes and slots of a batch, padded to `size` rows."""

    def padded(values_T: Ints, value: int) -> Ints:
        padded_T = np.full(size, value, np.int64)  # np.pad takes ten times as long
        padded_T[: len(values_T)] = values_T
        return padded_T

    return padded(batch.tokens_T, 0), padded(batch.positions_T, 0), padded(batch.lanes_T, 0), padded(batch.slots_T, PADDING_SLOT)


@dataclass(frozen=True, eq=False, kw_only=True)
class DeviceMemory:
    """What a device keeps from step to step beside the weights; a planner where attention has one."""

    kv: PagedKV
    routes: RouteStore
    lanes: DeviceLanes
    load: DeviceExpertLoad
    planner: Planner | None = None


class Captured(NamedTuple):
    """The graph of a size, and where it leaves the two parts of the hidden state [T, D]."""

    graph: torch.cuda.CUDAGraph
    hidden: tuple[Tensor, Tensor | None]


class GivenExperts:
    """The experts that the rows of a step are given, int32 `ids_TNK` in memory that keeps its place; -1 where a row chooses freely."""

    def __init__(self, num_rows: int, num_layers: int, top_k: int, device: torch.device) -> None:
        self.ids_TNK = torch.full((num_rows, num_layers, top_k), -1, dtype=torch.int32, device=device)
        self._upload = Upload(device)
        self._written = 0

    def send(self, forced: Forced | None, num_rows: int) -> None:
        """Make the first rows those of the next step."""
        if forced is not None:
            self._upload((forced.spread(num_rows),), into=self.ids_TNK.view(torch.uint8).view(-1))
            self._written = max(self._written, num_rows)
        elif self._written:
            self.ids_TNK[: self._written].fill_(-1)
            self._written = 0


class DeviceStep:
    """One model on one device.

    Args:
        sizes: the numbers of rows that steps are padded to, ascending.
    """

    final = True

    def __init__(self, decoder: Decoder, memory: DeviceMemory, *, sizes: Sequence[int]) -> None:
        self._decoder, self._memory, self._sizes = decoder, memory, tuple(sizes)
        device = decoder.device
        self._planner = memory.planner
        self._fixed = decoder.backends.attention.fixed
        self._max_lanes = len(memory.lanes.last_token_L)
        self._upload, self._small_upload, self._page_upload = Upload(device), Upload(device), Upload(device)
        _, num_bytes = lay_out(self._arrays(EMPTY, self._sizes[-1]))
        self._inputs = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self._given: GivenExperts | None = None
        if takes_given(decoder.backends):
            _, num_layers, top_k = memory.routes.rows_SLK.shape
            self._given = GivenExperts(self._sizes[-1], num_layers, top_k, device)
        self._graphs: dict[int, Captured] = {}

    @property
    def name(self) -> str:
        return "graphs" if self._graphs else "eager"

    @torch.inference_mode()
    def __call__(self, batch: Batch, lanes: Lanes) -> Tensor:
        """Logits [R, V] of the rows asked for, in the model's dtype, on the device; nothing is waited for."""
        self._memory.lanes.grow(batch.places_G, batch.pages_G)
        size = size_for(len(batch.tokens_T), self._sizes)
        inputs = self._upload(self._arrays(batch, size), into=self._inputs if size <= self._sizes[-1] else None)
        captured = self._graphs.get(size)
        replay = (batch.forced.spread(size),) if batch.forced is not None and (self._given is None or captured is None) else ()
        rows_R, *given = self._small_upload((batch.rows_R, *replay))
        plan = self._plan(inputs, batch, lanes.page_table_LP)
        if captured is None or given:
            x_TD, delta_TD = self._hidden(inputs, plan, given[0] if given else None)
        else:
            if self._given is not None:
                self._given.send(batch.forced, size)
            captured.graph.replay()
            x_TD, delta_TD = captured.hidden
        return self._decoder.logits(x_TD[rows_R], None if delta_TD is None else delta_TD[rows_R])

    def _arrays(self, batch: Batch, size: int) -> list[Any]:
        """What the host sends of a step: its rows, and the plan of attention where that is arrays."""
        rows = pad(batch, size)
        if self._fixed is None:
            return [*rows]
        return [*rows, *self._fixed.arrays(_spans(batch), size, self._max_lanes, self._decoder.attention_shape)]

    def _plan(self, inputs: Sequence[Tensor], batch: Batch, page_table_LP: npt.NDArray[np.int32]) -> Any:
        """How the step attends; what a planner plans is on its way to the device when this returns."""
        if self._planner is not None:
            lengths = [int(batch.positions_T[start + length - 1]) + 1 for _, start, length in batch.segments]
            requests = self._planner.requests(_spans(batch), lengths, page_table_LP, len(inputs[0]))
            (pages_N,) = self._page_upload((requests.pages_N,))
            return self._planner.plan(requests, pages_N)
        if self._fixed is None:
            return self._decoder.plan_attention(_spans(batch), len(inputs[0]))
        return self._fixed.of(inputs[NUM_ROW_ARRAYS:], self._decoder.attention_shape)

    def _hidden(self, inputs: Sequence[Tensor], plan: Any, replay_TNK: Tensor | None) -> tuple[Tensor, Tensor | None]:
        tokens_T, positions_T, lanes_T, slots_T = inputs[:NUM_ROW_ARRAYS]
        memory = self._memory
        context = StepContext(
            positions_T=positions_T,
            slots_T=slots_T,
            attention_plan=plan,
            page_table_LP=memory.lanes.page_table_LP,
            kv=memory.kv,
            routes=memory.routes,
            replay_TNK=replay_TNK,
        )
        hidden = self._decoder.hidden(memory.lanes.fill_in(tokens_T, lanes_T), context)
        memory.load.count(slots_T)
        return hidden

    @torch.inference_mode()
    def capture(self, max_tokens: int, *, progress: bool | None = None) -> None:
        """Make graphs of all sizes up to so many rows, the largest first, so that the others fit in its memory.

        All sizes' kernels are compiled first, side by side. Then each size runs once before: what kernels need for good is made then.
        """
        sizes = sorted((size for size in self._sizes if size <= max_tokens), reverse=True)
        pool, graphs = torch.cuda.graph_pool_handle(), {}
        begin, before = time.perf_counter(), torch.cuda.memory_reserved()
        self._rehearse(sizes)
        compiled = time.perf_counter() - begin
        console = Console(stderr=True)
        columns = (TextColumn("capturing CUDA graphs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        hidden = progress is False or (progress is None and not console.is_terminal)
        with Progress(*columns, console=console, transient=console.is_terminal, disable=hidden) as bar:
            for size in bar.track(sizes, description="sizes"):
                inputs, plan, given_TNK = self._padding(size)
                x_TD, delta_TD = self._hidden(inputs, plan, given_TNK)
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                    x_TD, delta_TD = self._hidden(inputs, plan, given_TNK)
                graphs[size] = Captured(graph, (x_TD, delta_TD))
        self._try_head()
        torch.cuda.synchronize()
        self._graphs = graphs
        logger.info(
            "CUDA graphs: %d sizes up to %d tokens in %.1f s, of which kernels %.1f s, %.2f GiB",
            len(sizes),
            sizes[0],
            time.perf_counter() - begin,
            compiled,
            (torch.cuda.memory_reserved() - before) / 2**30,
        )

    def _padding(self, size: int) -> tuple[Sequence[Tensor], Any, Tensor | None]:
        """So many rows that are all padding, their plan, and the experts that none is given, where graphs find theirs."""
        inputs = self._upload(self._arrays(EMPTY, size), into=self._inputs)
        return inputs, self._plan(inputs, EMPTY, NO_PAGES), None if self._given is None else self._given.ids_TNK[:size]

    def _rehearse(self, sizes: Sequence[int]) -> None:
        """Compile the kernels of steps of these sizes side by side. A library's kernels would run, over what nobody wrote: with those of
        others' making each size compiles its own when it is first run."""
        if self._decoder.backends.moe.name not in OWN_RUNNERS:
            return
        with importlib.import_module("pointsman.kernels.ahead").rehearsal():
            for size in sizes:
                self._hidden(*self._padding(size))
            self._try_head()

    def _try_head(self) -> None:
        for size in HEAD_SIZES:
            x_RD = torch.zeros(size, self._decoder.architecture.hidden_size, dtype=self._decoder.dtype, device=self._decoder.device)
            self._decoder.logits(x_RD, x_RD)


EMPTY = Batch(NONE, NONE, NONE, NONE, 0, [], NONE, [], NONE, [], NONE, NONE)
"""A step without rows; padded, it is nothing but padding."""
NO_PAGES = np.zeros((0, 0), np.int32)


def _spans(batch: Batch) -> list[Span]:
    return [Span(*segment) for segment in batch.segments]


def make_planner(config: EngineConfig, decoder: Decoder) -> Planner | None:
    """What plans the steps of this model, where its attention wants that.

    Raises:
        ValueError: the library that it is of lacks something; the message says what.
    """
    make = decoder.backends.attention.planner
    if make is None:
        return None
    bounds, kv_dtype = bounds_of(config, decoder.architecture), KV_DTYPES[kv_dtype_of(config)]
    return make(decoder.attention_shape, bounds, decoder.dtype, kv_dtype, decoder.device)


def takes_given(backends: Backends) -> bool:
    """Whether experts may always be given, at no cost for the rows that choose freely."""
    return reason_against_replay(backends.moe) is None and (backends.moe.routes_itself or backends.router.always_given)


def make_device_step(config: EngineConfig, decoder: Decoder, memory: DeviceMemory, *, progress: bool | None) -> DeviceStep:
    """The step that the configuration asks for, captured or not.

    Raises:
        ValueError: graphs are asked for and cannot be; the message says why.
    """
    max_tokens = config.scheduler.chunked_prefill_size
    step = DeviceStep(decoder, memory, sizes=step_sizes(max_tokens))
    if graph_choice(config.kernel, decoder.reason_against_capture()).take() == "graphs":
        step.capture(config.kernel.cuda_graph_max_bs or max_tokens, progress=progress)
    return step
