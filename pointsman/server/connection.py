"""A client's connection: what uvicorn has, with bounds on how long a silent client may hold one.

Every few seconds each connection is looked at. One that has not sent a whole request head, or that reads nothing of what is written to
it, is cut off. A client that reads slowly, but reads, is left alone: its answer is no longer than what it asked for.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import h11
import msgspec
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from pointsman.server.errors import ApiError

LOOK_SECONDS = 5.0
HEAD_SECONDS = 20.0
STALL_SECONDS = 60.0
MAX_HEAD_BYTES = 32 << 10


class Connection(H11Protocol):
    """One connection, from first to last byte."""

    def __init__(
        self, config: Config, server_state: ServerState, app_state: dict[str, Any], _loop: asyncio.AbstractEventLoop | None = None
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._looking: asyncio.TimerHandle | None = None
        self._waiting_since = 0.0
        self._unread = 0
        self._unread_since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # asyncio does so only for sockets that name their protocol, which ours do not: a small write would wait for the client's
        # acknowledgement of the one before, 40 ms where the client has nothing to send.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._waiting_since = self.loop.time()
        self._looking = self.loop.call_later(LOOK_SECONDS, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._looking is not None:
            self._looking.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._waiting_since = self.loop.time()
        super().on_response_complete()

    def _look(self) -> None:
        now = self.loop.time()
        unread = self.transport.get_write_buffer_size()
        if unread != self._unread or not unread:
            self._unread, self._unread_since = unread, now
        busy = self.cycle is not None and not self.cycle.response_complete
        if (not busy and not unread and now - self._waiting_since > HEAD_SECONDS) or now - self._unread_since > STALL_SECONDS:
            self.transport.abort()
            return
        self._looking = self.loop.call_later(LOOK_SECONDS, self._look)

    def send_400_response(self, msg: str) -> None:
        """What cannot be read as HTTP, or has too long a head."""
        body = msgspec.json.encode(ApiError(400, msg).body())
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
        for event in (h11.Response(status_code=400, headers=headers, reason=b"Bad Request"), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
