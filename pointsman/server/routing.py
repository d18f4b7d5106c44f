"""Routing records in answers and requests: the fields that ask for one or give one to replay, and the form in which it is given.

The engine hands over bare rows with the last tokens of a choice. They become a record here, in a thread: a long one takes milliseconds,
and other clients are waiting for their tokens. numpy is loaded with the first record, so that a server starts without.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta

from pointsman.request import ChoiceDelta, Replay
from pointsman.server import bounds
from pointsman.server.errors import ApiError
from pointsman.server.wire import ModelInfo

if TYPE_CHECKING:
    from pointsman.routed_experts import RoutedExperts

START_NAMES = ("routed_experts_start", "routed_experts_start_len", "routed_experts_prompt_start")

REPLAY = "replay_routed_experts"
_RECORD = {"$ref": "#/components/schemas/RoutingRecord"}
_RECORDS = {"items": {"anyOf": [_RECORD, {"type": "null"}]}}

RecordForm = Literal["record", "npy", "int32"]
Start = Annotated[int, Meta(ge=0, le=1 << 30)]
Record = Annotated[dict[str, Any], Meta(extra_json_schema=_RECORD)]
Records = Annotated[list[dict[str, Any] | None], Meta(max_length=bounds.MAX_PROMPTS, extra_json_schema=_RECORDS)]


class RoutingFields(msgspec.Struct, kw_only=True):
    """What asks for routing records; the start has the names that it has in SGLang and vLLM too."""

    return_routed_experts: bool | None = None
    routed_experts_format: RecordForm | None = None
    routed_experts_start: Start | None = None
    routed_experts_start_len: Start | None = None
    routed_experts_prompt_start: Start | None = None

    def routing_start(self) -> int:
        """Where rows begin. Raises ApiError for fields that do not go together."""
        given = {name: value for name in START_NAMES if (value := getattr(self, name)) is not None}
        if len(set(given.values())) > 1:
            raise ApiError(400, f"{' and '.join(given)} are one thing by several names and differ; give one", param=list(given)[1])
        alone = [*given] + ["routed_experts_format"] * (self.routed_experts_format is not None)
        if alone and not self.return_routed_experts:
            raise ApiError(400, f"{alone[0]} needs return_routed_experts true", param=alone[0])
        return next(iter(given.values()), 0)


@dataclass(frozen=True)
class Routing:
    """How the records of an answer are made.

    Attributes:
        form: record, npy or int32.
        layers: the model's layers that have experts, and how many each has (`num_experts`).
        starts: for each request of the engine, the position of its first row.
    """

    form: RecordForm
    layers: tuple[int, ...]
    num_experts: int
    starts: dict[str, int]

    async def encode(self, deltas: Sequence[ChoiceDelta]) -> Sequence[ChoiceDelta]:
        """The same deltas, with rows in the form that the client asked for."""
        if all(delta.routed_experts is None for delta in deltas):
            return deltas
        return await asyncio.to_thread(lambda: [self._encoded(delta) for delta in deltas])

    def _encoded(self, delta: ChoiceDelta) -> ChoiceDelta:
        if delta.routed_experts is None:
            return delta
        from pointsman.routed_experts import encode  # noqa: PLC0415 - numpy comes with it, and most servers never need it

        return msgspec.structs.replace(delta, routed_experts=encode(self._record(delta), self.form))

    def _record(self, delta: ChoiceDelta) -> RoutedExperts:
        import numpy as np  # noqa: PLC0415

        from pointsman.routed_experts import RoutedExperts  # noqa: PLC0415

        array = delta.routed_experts
        return RoutedExperts(
            rows_RLK=np.frombuffer(array.data, array.dtype).reshape(array.shape),
            num_experts=self.num_experts,
            start=self.starts[delta.rid],
            layers=self.layers,
            missing=delta.routed_experts_missing,
            weight_versions=delta.weight_versions,
        )


def routing_of(fields: RoutingFields, info: ModelInfo, requests: Sequence[Any], default: RecordForm = "record") -> Routing | None:
    """How to make the records that were asked for; None where none was."""
    if not fields.return_routed_experts:
        return None
    starts = {request.rid: request.sampling.routed_experts_start for request in requests}
    return Routing(fields.routed_experts_format or default, info.layers, info.num_experts, starts)


def replays_of(
    given: dict[str, Any] | list[dict[str, Any] | None] | None, count: int, *, layers: Sequence[int], num_experts: int, top_k: int
) -> list[Replay | None]:
    """What the body says of replays, for each of so many prompts. Raises ApiError."""
    if given is None:
        return [None] * count
    records = given if isinstance(given, list) else [given]
    if len(records) != count:
        what = f"has {len(given)} entries" if isinstance(given, list) else "is one record"
        raise ApiError(400, f"{REPLAY} {what} for {count} prompts; give a list with a record, or null, for each", param=REPLAY)
    from pointsman.replay import replay_of  # noqa: PLC0415 - numpy comes with it

    replays: list[Replay | None] = []
    for index, record in enumerate(records):
        try:
            replays.append(None if record is None else replay_of(record, layers=layers, num_experts=num_experts, top_k=top_k))
        except ValueError as error:
            place = f"{REPLAY}[{index}]" if isinstance(given, list) else REPLAY
            raise ApiError(400, str(error), param=place) from None
    return replays
