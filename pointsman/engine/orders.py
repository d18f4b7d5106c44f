"""What rank 0 says to the other ranks, and what they answer.

Rank 0 alone schedules. The others get orders: run this plan, read these weights, put them in force. Orders are msgpack with a schema, each
behind its length, and are checked on arrival; nothing that arrives can name code to run. All executors speak this protocol, whatever
started the ranks and however the bytes travel.

Orders are obeyed in their order. What takes time (`Stage`) is begun in its order and answered when it is done, while plans go on.
"""

from __future__ import annotations

import struct
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from pointsman.config import EngineConfig
from pointsman.request import MemoryTag
from pointsman.step import StepPlan
from pointsman.update import Update

SIZE = struct.Struct("<I")
MAX_BYTES = 1 << 32  # of an order: weights come in pieces of at most 2 GiB
MAX_REPLY_BYTES = 1 << 20

Shape = tuple[Annotated[int, Meta(ge=0, le=1 << 40)], ...]


class Join(msgspec.Struct, tag=0, array_like=True, frozen=True):
    """The first order: who you are, where the others meet, and what to load.

    Attributes:
        address, port: where rank 0's store is.
        token: names the meeting; nobody else can know it.
        engine: what every rank is given; `num_threads` is of one rank.
        device: "cpu", or "cuda:" and the number of the rank's device on its host.
        timeout: seconds that meeting, and any exchange after it, may take.
    """

    engine: EngineConfig
    rank: Annotated[int, Meta(ge=1, le=1023)]
    address: str
    port: Annotated[int, Meta(ge=1, le=65535)]
    token: str
    device: Annotated[str, Meta(pattern=r"^(cpu|cuda:[0-9]{1,3})$")]
    timeout: Annotated[float, Meta(gt=0, le=1e6)]
    log_level: str


class Run(msgspec.Struct, tag=1, array_like=True, frozen=True):
    """Execute a plan. Not answered: what is drawn is told by rank 0, who draws."""

    plan: StepPlan


class FromDisk(msgspec.Struct, tag=0, array_like=True, frozen=True):
    """Weights of a checkpoint."""

    model_path: str


class FromFiles(msgspec.Struct, tag=1, array_like=True, frozen=True):
    """Weights out of safetensors files, or a part of them."""

    files: list[bytes]
    update: Update


class FromGroup(msgspec.Struct, tag=2, array_like=True, frozen=True):
    """Weights that come by broadcasts: (name, type, shape) of each, in their order."""

    group_name: str
    announced: list[tuple[str, str, Shape]]
    update: Update


class FromBefore(msgspec.Struct, tag=3, array_like=True, frozen=True):
    """What was released, had again."""

    tags: list[MemoryTag]


class JoinGroup(msgspec.Struct, tag=4, array_like=True, frozen=True):
    """Meet the others of a trainer's group; `rank` is rank 0's there, and those after it follow in their order."""

    master_address: str
    master_port: Annotated[int, Meta(ge=1, le=65535)]
    rank: int
    world_size: int
    name: str
    backend: str
    timeout: float


class LeaveGroup(msgspec.Struct, tag=5, array_like=True, frozen=True):
    """Have no more to do with it."""

    name: str


Work = FromDisk | FromFiles | FromGroup | FromBefore | JoinGroup | LeaveGroup


class Stage(msgspec.Struct, tag=2, array_like=True, frozen=True):
    """Make this ready beside what serves. Answered."""

    number: int
    work: Work


class Complete(msgspec.Struct, tag=3, array_like=True, frozen=True):
    """Make of what is staged what could not be made beside a step. Answered."""

    number: int


class Enter(msgspec.Struct, tag=4, array_like=True, frozen=True):
    """Put in force what is staged, under this name."""

    version: str


class Forget(msgspec.Struct, tag=5, array_like=True, frozen=True):
    """Another rank could not: have it all as it was before it was staged."""


class Release(msgspec.Struct, tag=6, array_like=True, frozen=True):
    """Free memory. Answered."""

    number: int
    tags: list[MemoryTag]


class Leave(msgspec.Struct, tag=7, array_like=True, frozen=True):
    """The last order: end."""


class Here(msgspec.Struct, tag=0, array_like=True, frozen=True):
    """This rank has started and waits for orders."""


class Joined(msgspec.Struct, tag=1, array_like=True, frozen=True):
    """Its part is loaded, and plans may come."""


class Sign(msgspec.Struct, tag=2, array_like=True, frozen=True):
    """It is alive; given every second, whatever it is doing."""


class Answer(msgspec.Struct, tag=3, array_like=True, frozen=True):
    """The answer to the order of this number. `refused`: the error is meant for whoever asked, and no fault of this rank."""

    number: int
    error: str | None = None
    refused: bool = False


class Fault(msgspec.Struct, tag=4, array_like=True, frozen=True):
    """It cannot go on; nothing follows. `refused`: for what it was asked to load. `bereft`: for another rank that is gone."""

    reason: str
    refused: bool = False
    bereft: bool = False


Order = Join | Run | Stage | Complete | Enter | Forget | Release | Leave
Reply = Here | Joined | Sign | Answer | Fault

_encoder = msgspec.msgpack.Encoder()
_orders: msgspec.msgpack.Decoder[Order] = msgspec.msgpack.Decoder(Order)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
T = TypeVar("T")


def encode(message: Order | Reply) -> bytes:
    """The message behind its length. Raises ValueError where it is too long."""
    data = _encoder.encode(message)
    if len(data) >= MAX_BYTES:
        raise ValueError(f"a message of {len(data)} bytes to the other ranks is too long; it must be shorter than {MAX_BYTES}")
    return SIZE.pack(len(data)) + data


def decode_order(data: bytes | memoryview) -> Order:
    """Raises ValueError where it is none."""
    return _decode(_orders, data)


def decode_reply(data: bytes | memoryview) -> Reply:
    """Raises ValueError where it is none."""
    return _decode(_replies, data)


def _decode(decoder: msgspec.msgpack.Decoder[T], data: Any) -> T:
    try:
        return decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise ValueError(f"this is no message of the protocol between ranks: {error}") from None
