"""The step on a device: rows sent in one copy, the model run over them, as a CUDA graph where it was captured.

A graph has fixed sizes, so a step is padded to the next of a few sizes. What pads has the slot -1 and no lane: it is computed and stored
nowhere. Everything that a step decides (rows, positions, slots, lanes, tiles of attention) is data in device memory that keeps its
place, so the graph of a size serves decode, prefill and both at once. The head is not part of it: it runs on the rows whose logits are
wanted, be they few or many.

Without graphs the same calls run one by one, padded alike, so that both give the same numbers.

Shape suffixes: T rows, R rows whose logits are wanted, D hidden.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pointsman.engine.batch import Batch, Lanes
from pointsman.engine.device_lanes import DeviceLanes
from pointsman.engine.transfer import Upload, lay_out
from pointsman.layers.context import Span, StepContext
from pointsman.layers.paged_kv import PagedKV
from pointsman.models.decoder import Decoder
from pointsman.moe.capture import RouteStore
from pointsman.moe.load import DeviceExpertLoad

logger = logging.getLogger(__name__)

SMALL_SIZES = (1, 2, 4, 8, 16, 32, 64)
STEP = 128
PADDING_SLOT = -1


def step_sizes(max_tokens: int) -> tuple[int, ...]:
    """The numbers of rows that steps are padded to: powers of two, then multiples of 128, up to the most tokens a step has."""
    sizes = [*SMALL_SIZES, *range(STEP, max_tokens + STEP, STEP)]
    return (*(size for size in sizes if size < max_tokens), max_tokens)


def size_for(num_tokens: int, sizes: Sequence[int]) -> int:
    """The least of the ascending sizes that holds so many rows; more rows than the last are not padded."""
    return next((size for size in sizes if size >= num_tokens), num_tokens)


Ints = np.ndarray[tuple[int], np.dtype[np.int64]]


def pad(batch: Batch, size: int) -> tuple[Ints, Ints, Ints, Ints]:
    """Tokens, positions, lanes and slots of a batch, padded to `size` rows."""
    room = size - len(batch.tokens_T)

    def padded(values_T: Ints, value: int) -> Ints:
        return np.pad(values_T, (0, room), constant_values=value)

    return padded(batch.tokens_T, 0), padded(batch.positions_T, 0), padded(batch.lanes_T, 0), padded(batch.slots_T, PADDING_SLOT)


@dataclass(frozen=True, eq=False, kw_only=True)
class DeviceMemory:
    """What a device keeps from step to step beside the weights."""

    kv: PagedKV
    routes: RouteStore
    lanes: DeviceLanes
    load: DeviceExpertLoad


class DeviceStep:
    """One model on one device.

    Args:
        sizes: the numbers of rows that steps are padded to, ascending.
    """

    final = True

    def __init__(self, decoder: Decoder, memory: DeviceMemory, *, sizes: Sequence[int]) -> None:
        self._decoder, self._memory, self._sizes = decoder, memory, tuple(sizes)
        device = decoder.device
        self._upload, self._small_upload = Upload(device), Upload(device)
        _, num_bytes = lay_out([np.empty(self._sizes[-1], np.int64)] * 4)
        self._inputs = torch.empty(num_bytes, dtype=torch.uint8, device=device)

    @property
    def name(self) -> str:
        return "eager"

    @torch.inference_mode()
    def __call__(self, batch: Batch, lanes: Lanes) -> Tensor:
        """Float32 logits [R, V] of the rows asked for, on the device; nothing is waited for."""
        memory = self._memory
        memory.lanes.grow(batch.growths)
        size = size_for(len(batch.tokens_T), self._sizes)
        tokens_T, positions_T, lanes_T, slots_T = self._upload(pad(batch, size), into=self._inputs)
        spread = () if batch.forced is None else (batch.forced.spread(size),)
        rows_R, *replay = self._small_upload((batch.rows_R, *spread))
        context = StepContext(
            positions_T=positions_T,
            slots_T=slots_T,
            attention_plan=self._decoder.plan_attention([Span(*segment) for segment in batch.segments], size),
            page_table_LP=memory.lanes.page_table_LP,
            kv=memory.kv,
            routes=memory.routes,
            replay_TNK=replay[0] if replay else None,
        )
        x_TD, delta_TD = self._decoder.hidden(memory.lanes.fill_in(tokens_T, lanes_T), context)
        memory.load.count(slots_T)
        return self._decoder.logits(x_TD[rows_R], None if delta_TD is None else delta_TD[rows_R])
