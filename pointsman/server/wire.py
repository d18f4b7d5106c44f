"""What crosses between the HTTP process and the engine's, and the sockets it crosses on.

Messages are msgpack with a schema, checked on arrival; nothing that arrives can name code to run. Arrays travel as their bytes
beside their type and shape. The sockets are files in a directory that only this user can enter.

There are two sockets, one for each direction, and each receiver binds: a sender may then write before the other side listens.
The HTTP side reads without a thread: the event loop watches the socket's descriptor. That descriptor only tells that *something*
changed, so whoever is woken must read until nothing is left; with a socket that only ever receives, this one rule suffices.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import msgspec
import zmq

from pointsman.config import EngineConfig
from pointsman.request import ChoiceDelta, EngineStats, Request
from pointsman.server.controls import Control, Controlled

PARENT_GONE = "the HTTP process has gone"
_ARRAY = 1
_FAREWELL_MS = 2000


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """The first line on the engine process's standard input, as JSON. That input stays open as long as the HTTP process lives."""

    engine: EngineConfig
    directory: str
    log_level: str


class Submit(msgspec.Struct, tag=True):
    """Queue a request."""

    request: Request


class Abort(msgspec.Struct, tag=True):
    """Stop working on a request; `tell`: answer with what there is of it, as aborted."""

    rid: str
    tell: bool = False


class FlushCache(msgspec.Struct, tag=True):
    """Forget cached prefixes; CacheFlushed follows."""


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the HTTP side must know of a model.

    Attributes:
        architecture: its entry in the registry of models.
        cache_tokens: that the cache holds.
        layers: those that have experts.
        folder: where the tokenizer and the chat template are; None where the checkpoint has no tokenizer.
        generation_defaults: sampling values the checkpoint advises.
    """

    name: str
    architecture: str
    folder: str | None
    context_length: int
    cache_tokens: int
    vocab_size: int
    layers: tuple[int, ...]
    num_experts: int
    top_k: int
    generation_defaults: dict[str, int | float] = {}


class Ready(msgspec.Struct, tag=True):
    """The model is loaded; requests may come."""

    model: ModelInfo


class Failed(msgspec.Struct, tag=True):
    """The engine cannot start, or cannot go on; nothing follows. Clients are told no more of it than the `rank` that it has lost."""

    reason: str
    rank: int | None = None


class Refused(msgspec.Struct, tag=True):
    """The engine did not take this request; the reason is meant for whoever sent it. `busy`: it may do so later."""

    rid: str
    reason: str
    busy: bool


class Deltas(msgspec.Struct, tag=True):
    """What one step added, for all choices together; now and then an empty one from an engine that works and has nothing to tell."""

    deltas: list[ChoiceDelta]


class Stats(msgspec.Struct, tag=True):
    """What the engine is doing, a few times a second at most."""

    stats: EngineStats


class CacheFlushed(msgspec.Struct, tag=True):
    """The answer to FlushCache."""


class Array(msgspec.Struct, frozen=True):
    """An array as this side sees it: bytes in C order, with numpy's name for their type."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


ToEngine = Submit | Abort | FlushCache | Control
FromEngine = Ready | Failed | Refused | Deltas | Stats | CacheFlushed | Controlled


def _pack_array(value: Any) -> msgspec.msgpack.Ext:
    """An object with `dtype`, `shape` and `tobytes` as an extension value."""
    if not all(hasattr(value, name) for name in ("dtype", "shape", "tobytes")):
        raise NotImplementedError(f"{type(value).__name__} does not cross between processes")
    array = Array(value.dtype.str, tuple(value.shape), value.tobytes())
    return msgspec.msgpack.Ext(_ARRAY, msgspec.msgpack.encode(array))


def _unpack_array(code: int, data: memoryview) -> Array:
    if code != _ARRAY:
        raise ValueError(f"unknown extension {code} in a message")
    return msgspec.msgpack.decode(data, type=Array)


_encoder = msgspec.msgpack.Encoder(enc_hook=_pack_array)
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine, ext_hook=_unpack_array)
_from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine, ext_hook=_unpack_array)


def encode(message: ToEngine | FromEngine) -> bytes:
    return _encoder.encode(message)


def decode_to_engine(data: bytes) -> ToEngine:
    return _to_engine.decode(data)


def decode_from_engine(data: bytes) -> FromEngine:
    return _from_engine.decode(data)


def _address(directory: str, name: str) -> str:
    path = Path(directory) / name
    if len(os.fsencode(path)) > zmq.IPC_PATH_MAX_LEN:
        raise ValueError(f"the temporary directory {directory!r} has too long a name for a socket; set TMPDIR to a shorter one")
    return f"ipc://{path}"


class EngineSide(Protocol):
    """What the engine's process needs of its end, whatever the messages travel over."""

    def receive(self, *, wait: bool, most_ms: int | None = None) -> list[ToEngine]: ...
    def send(self, message: FromEngine) -> None: ...
    def interrupt(self, fault: Exception) -> None: ...
    def last_words(self, words: Failed) -> None: ...


class ServerSide(Protocol):
    """What the HTTP process needs of its own."""

    def listen(self, loop: asyncio.AbstractEventLoop, receive: Callable[[FromEngine], None]) -> None: ...
    def send(self, message: ToEngine) -> None: ...


class EngineEnd:
    """The engine's end: blocking, for one thread.

    Args:
        directory: where the sockets are.
        parent: a descriptor that reads end-of-file once the HTTP process has gone.
    """

    def __init__(self, directory: str, parent: int) -> None:
        self._context = zmq.Context()
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.set(zmq.RCVHWM, 0)
        self._inbox.bind(_address(directory, "to_engine"))
        self._outbox = self._context.socket(zmq.PUSH)
        self._outbox.connect(_address(directory, "from_engine"))
        self._address = _address(directory, "from_engine")
        self._parent = parent
        self._fault: Exception | None = None
        self._woken, self._wake = os.pipe()
        self._poller = zmq.Poller()
        for source in (self._inbox, parent, self._woken):
            self._poller.register(source, zmq.POLLIN)

    def receive(self, *, wait: bool, most_ms: int | None = None) -> list[ToEngine]:
        """All messages that are there; with `wait`, at least one if it comes in time.

        Raises EOFError when the HTTP process has gone, and what `interrupt` was given.
        """
        ready = dict(self._poller.poll(most_ms if wait else 0))
        if self._fault is not None:
            raise self._fault
        if self._parent in ready:
            raise EOFError(PARENT_GONE)
        messages: list[ToEngine] = []
        while self._inbox in ready:
            try:
                messages.append(decode_to_engine(self._inbox.recv(zmq.NOBLOCK)))
            except zmq.Again:
                break
        return messages

    def send(self, message: FromEngine) -> None:
        """Send; waits where the HTTP side is far behind."""
        self._outbox.send(encode(message))

    def interrupt(self, fault: Exception) -> None:
        """Have `receive` raise this, from any thread, also where it is waiting."""
        self._fault = fault
        os.write(self._wake, b"!")

    def last_words(self, words: Failed) -> None:
        """Say why the engine has failed, from any thread, where the one that drives it does not get to it."""
        socket = self._context.socket(zmq.PUSH)
        socket.connect(self._address)
        socket.send(encode(words))
        socket.close(linger=_FAREWELL_MS)
        time.sleep(1.0)  # it is sent by another thread

    def close(self) -> None:
        """Close, after what was sent has left."""
        self._inbox.close(linger=0)
        self._outbox.close(linger=_FAREWELL_MS)
        self._context.term()
        os.close(self._woken)
        os.close(self._wake)


class ServerEnd:
    """The HTTP process's end: never blocks, for one event loop."""

    def __init__(self, directory: str) -> None:
        inbox, outbox = _address(directory, "from_engine"), _address(directory, "to_engine")
        self._context = zmq.Context()
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.bind(inbox)
        self._outbox = self._context.socket(zmq.PUSH)
        self._outbox.set(zmq.SNDHWM, 0)
        self._outbox.connect(outbox)
        self._receive: Callable[[FromEngine], None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def listen(self, loop: asyncio.AbstractEventLoop, receive: Callable[[FromEngine], None]) -> None:
        """From now on call `receive` in the loop with each message."""
        self._loop, self._receive = loop, receive
        loop.add_reader(self._inbox.fileno(), self.drain)
        loop.call_soon(self.drain)

    def drain(self) -> None:
        """Hand over every message that has arrived."""
        while self._receive is not None:
            try:
                data = self._inbox.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                message = decode_from_engine(data)
            except msgspec.MsgspecError as error:
                message = Failed(f"a message of the engine cannot be read: {error}")
            self._receive(message)

    def send(self, message: ToEngine) -> None:
        self._outbox.send(encode(message), zmq.NOBLOCK)

    def close(self) -> None:
        """Close at once; what was not sent is dropped. No error where it is closed."""
        if self._context.closed:
            return
        if self._loop is not None:
            self._loop.remove_reader(self._inbox.fileno())
        self._receive = None
        self._context.destroy(linger=0)
