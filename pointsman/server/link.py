"""The wire of `wire` over a TCP connection: an engine that somebody else has started connects to the HTTP process, wherever it is.

Whoever connects says a token first that nobody else can know, and then where it is; after that messages go both ways, each behind its
length. The other side is gone when the connection is: an engine then ends, in order if it can, and the HTTP process counts it as lost.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import select
import socket
import threading
from collections.abc import Awaitable, Callable

import msgspec

from pointsman.engine.channel import Channel
from pointsman.engine.orders import MAX_BYTES, SIZE
from pointsman.server import wire
from pointsman.server.wire import FromEngine, ToEngine

HELLO_SECONDS = 10.0
MAX_HELLO_BYTES = 4096


class Hello(msgspec.Struct, frozen=True, kw_only=True):
    """The first message: the token, and where the engine runs, for people."""

    token: str
    place: str


def framed(data: bytes) -> bytes:
    return SIZE.pack(len(data)) + data


class EngineLink:
    """The engine's end of a link: blocking, for one thread but for `interrupt` and `last_words`.

    Raises OSError where nobody listens there.
    """

    def __init__(self, address: str, port: int, hello: Hello, *, seconds: float) -> None:
        self._connection = socket.create_connection((address, port), timeout=seconds)
        self._connection.settimeout(None)
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection.sendall(framed(msgspec.json.encode(hello)))
        self._channel = Channel(self._connection, most=MAX_BYTES)
        self._fault: Exception | None = None
        self._woken, self._wake = os.pipe()
        self._poll = select.poll()
        for source in (self._connection.fileno(), self._woken):
            self._poll.register(source, select.POLLIN)

    def receive(self, *, wait: bool, most_ms: int | None = None) -> list[ToEngine]:
        """All messages that are there; with `wait`, at least one if it comes in time.

        Raises EOFError when the HTTP process has gone, and what `interrupt` was given.
        """
        messages: list[ToEngine] = []
        timeout = most_ms if wait else 0
        while ready := dict(self._poll.poll(timeout)):
            if self._fault is not None:
                raise self._fault
            if self._connection.fileno() in ready:
                messages += map(wire.decode_to_engine, self._channel.arrived())
            timeout = 0 if messages else timeout
        return messages

    def send(self, message: FromEngine) -> None:
        """Send; waits where the HTTP side is far behind. Raises EOFError when it has gone."""
        try:
            self._channel.send(framed(wire.encode(message)))
        except OSError as error:
            raise EOFError(wire.PARENT_GONE) from error

    def interrupt(self, fault: Exception) -> None:
        """Have `receive` raise this, from any thread, also where it is waiting."""
        self._fault = fault
        os.write(self._wake, b"!")

    def last_words(self, words: wire.Failed) -> None:
        """Say why the engine has failed, from any thread, where the one that drives it does not get to it."""
        self.send(words)

    def close(self) -> None:
        """Close it. Whoever waits in `receive` is not woken."""
        self._connection.close()
        os.close(self._woken)
        os.close(self._wake)

    def on_end(self, call: Callable[[], object]) -> None:
        """Have this called in a thread of its own when the HTTP process has gone, whatever the one that drives the engine does then."""

        def watch() -> None:
            poll = select.poll()
            poll.register(self._connection, select.POLLRDHUP)
            poll.poll()
            call()

        threading.Thread(target=watch, name="link", daemon=True).start()


class ServerLink:
    """The HTTP process's end of one link: never blocks, for one event loop."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._receive: Callable[[FromEngine], None] | None = None
        self._early: list[FromEngine] = []

    def listen(self, loop: asyncio.AbstractEventLoop, receive: Callable[[FromEngine], None]) -> None:
        """From now on call `receive` in the loop with each message, those first that have come already."""
        self._receive = receive
        early, self._early = self._early, []
        for message in early:
            loop.call_soon(receive, message)

    def take(self, message: FromEngine) -> None:
        """A message has arrived."""
        if self._receive is None:
            self._early.append(message)
        else:
            self._receive(message)

    def send(self, message: ToEngine) -> None:
        if not self._writer.is_closing():
            self._writer.write(framed(wire.encode(message)))

    def close(self) -> None:
        """Close, when what was sent has left; no error where it is closed."""
        self._writer.close()

    def abort(self) -> None:
        """Close at once."""
        self._writer.transport.abort()


async def accept(
    listener: socket.socket, token: str, serve: Callable[[Hello, ServerLink], Callable[[], Awaitable[None]] | None]
) -> asyncio.Server:
    """Take the links of those who know the token.

    Args:
        serve: called with each; returns what is to be called when it has ended, or None where it is not wanted and is closed.
    """

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = ServerLink(writer)
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                hello = msgspec.json.decode(await _message(reader, MAX_HELLO_BYTES), type=Hello)
        except (OSError, EOFError, ValueError, TimeoutError):
            link.abort()
            return
        if not hmac.compare_digest(hello.token.encode(), token.encode()) or (ended := serve(hello, link)) is None:
            link.abort()
            return
        try:
            while True:
                link.take(wire.decode_from_engine(await _message(reader, MAX_BYTES)))
        except (OSError, EOFError):
            pass
        except ValueError as error:
            link.take(wire.Failed(f"a message of the engine cannot be read: {error}"))
        finally:
            link.abort()
            await ended()

    return await asyncio.start_server(handle, sock=listener)


async def _message(reader: asyncio.StreamReader, most: int) -> bytes:
    """The next message. Raises EOFError where none comes any more, ValueError where it is too long."""
    (length,) = SIZE.unpack(await reader.readexactly(SIZE.size))
    if length > most:
        raise ValueError(f"a message of {length} bytes; the longest is {most}")
    return await reader.readexactly(length)
