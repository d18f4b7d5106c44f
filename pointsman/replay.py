"""Between routing records and what the engine is fed: a record becomes a `Replay`, and a lane's replays become rows of a step.

A `Replay` is plain data, so that it can lie in a request, cross to the engine's process, and be part of a plan. Ids are checked here, once;
who builds a `Replay` by hand answers for them. Only numpy is needed.

Shape suffixes: R rows of a replay, F forced rows of a segment, L layers, K experts a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pointsman.request import Replay
from pointsman.routed_experts import RoutedExperts, decode_record, from_numbers

Ids = npt.NDArray[np.integer[Any]]
NAME = "replay_routed_experts"


def replay_of(value: object, *, layers: Sequence[int], num_experts: int, top_k: int) -> Replay:
    """A replay for a model of these sizes.

    Args:
        layers: the model's layers that have experts.
        value: a record as JSON has it, a `RoutedExperts`, an array of integers [rows, layers, top_k] for positions from 0 on, in which
            rows of -1 are none, or a `Replay`.

    Raises:
        ValueError: it is none of these, or of another model; the message says what would be right.
    """
    if isinstance(value, Replay):
        check_sizes(value, layers=layers, num_experts=num_experts, top_k=top_k)
        return value
    try:
        experts = _experts(value, layers, num_experts)
    except ValueError as error:
        raise ValueError(f"{NAME}: {error}") from None
    if experts.num_experts != num_experts:
        raise ValueError(f"{NAME} is of layers with {experts.num_experts} experts; this model's have {num_experts}")
    if experts.layers != tuple(layers):
        raise ValueError(f"{NAME} is of the layers {_spelt(experts.layers)}; this model's are {_spelt(layers)}")
    dtype = experts.rows_RLK.dtype.newbyteorder("<")
    shape: tuple[int, int, int] = experts.rows_RLK.shape  # type: ignore[assignment]
    data = np.ascontiguousarray(experts.rows_RLK, dtype).tobytes()
    replay = Replay(start=experts.start, shape=shape, data=data, missing=experts.missing)
    check_sizes(replay, layers=layers, num_experts=num_experts, top_k=top_k)
    return replay


def _experts(value: object, layers: Sequence[int], num_experts: int) -> RoutedExperts:
    if isinstance(value, RoutedExperts):
        value.check_ids()
        return value
    if isinstance(value, Mapping):
        return decode_record(value)
    if hasattr(value, "__array__"):
        array = np.asarray(value)
        return from_numbers(array, num_experts=num_experts, layers=layers if array.ndim == 3 and array.shape[1] == len(layers) else None)
    raise ValueError(f"it is a {type(value).__name__}; it must be a record, a RoutedExperts or an array of integers")


def _spelt(layers: Sequence[int]) -> str:
    if len(layers) > 1 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers[:9])) + (", ..." if len(layers) > 9 else "")


def check_sizes(replay: Replay, *, layers: Sequence[int], num_experts: int, top_k: int) -> None:
    """Raises ValueError where a replay is not of this model's sizes, or names an expert that it has not."""
    _, num_layers, experts = replay.shape
    if num_layers != len(layers):
        raise ValueError(f"{NAME} has {num_layers} layers; this model has {len(layers)}")
    if experts != top_k:
        raise ValueError(f"{NAME} has {experts} experts a token; this model uses {top_k}")
    dtype = _dtype(num_experts)
    if len(replay.data) != replay.shape[0] * num_layers * experts * dtype.itemsize:
        raise ValueError(
            f"{NAME} has {len(replay.data)} bytes; {replay.shape[0]} rows of a model of {num_experts} experts are {dtype.name}"
        )
    rows_RLK = rows_of(replay)
    for first, last in replay.forced:
        highest = int(rows_RLK[first - replay.start : last - replay.start].max())
        if highest >= num_experts:
            raise ValueError(f"{NAME} has the expert {highest}; ids of this model go from 0 to {num_experts - 1}")


def keep(rows_RLK: Ids) -> Replay:
    """The rows of positions from 0 on as a replay."""
    shape: tuple[int, int, int] = rows_RLK.shape  # type: ignore[assignment]
    return Replay(shape=shape, data=rows_RLK.astype(rows_RLK.dtype.newbyteorder("<"), copy=False).tobytes())


def _dtype(num_experts: int) -> np.dtype[Any]:
    return np.dtype("u1" if num_experts <= 256 else "<u2")


def rows_of(replay: Replay) -> Ids:
    """The ids [R, L, K]; those of missing rows mean nothing."""
    wide = len(replay.data) == 2 * replay.shape[0] * replay.shape[1] * replay.shape[2]
    return np.frombuffer(replay.data, "<u2" if wide else "u1").reshape(replay.shape)


class ForcedRows:
    """What the positions of one lane are forced to; of two replays that have a row for one position, the later one holds."""

    def __init__(self, replays: Sequence[Replay]) -> None:
        self._parts = [
            (first, last, rows_of(replay)[first - replay.start : last - replay.start])
            for replay in replays
            for first, last in replay.forced
        ]
        self.end = max((last for _, last, _ in self._parts), default=0)

    def within(self, start: int, length: int) -> tuple[npt.NDArray[np.int64], Ids] | None:
        """Of so many positions from start on, which are forced (counted from start), and their ids [F, L, K]; None where none is."""
        end = start + length
        hits = [part for part in self._parts if part[0] < end and start < part[1]]
        if not hits:
            return None
        ids = np.empty((length, *hits[0][2].shape[1:]), hits[0][2].dtype)
        forced = np.zeros(length, np.bool_)
        for first, last, rows in hits:
            low, high = max(first, start), min(last, end)
            ids[low - start : high - start] = rows[low - first : high - first]
            forced[low - start : high - start] = True
        return np.flatnonzero(forced), ids[forced]
