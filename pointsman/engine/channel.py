"""Messages over a connected socket, each behind its length, for one reader and any number of writers."""

from __future__ import annotations

import socket
import threading

from pointsman.engine.orders import SIZE

_PIECE = 1 << 16


class Channel:
    """One end. A message that is longer than `most` bytes ends what is read: whoever sends such is no rank of ours."""

    def __init__(self, connection: socket.socket, *, most: int) -> None:
        self._connection = connection
        self._most = most
        self._received = bytearray()
        self._sending = threading.Lock()

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, framed: bytes) -> None:
        """Write what `orders.encode` has made; waits where the other side is far behind. Raises OSError where there is none any more."""
        with self._sending:
            self._connection.sendall(framed)

    def receive(self) -> bytes:
        """The next message; waits for it. Raises EOFError where none comes any more, and ValueError where it is too long."""
        while (message := self._whole()) is None:
            self._read()
        return message

    def arrived(self) -> list[bytes]:
        """What has arrived, when something has: waits for one piece at most. Raises as `receive`."""
        self._read()
        messages = []
        while (message := self._whole()) is not None:
            messages.append(message)
        return messages

    def _read(self) -> None:
        try:
            piece = self._connection.recv(_PIECE)
        except ConnectionError:
            piece = b""
        if not piece:
            raise EOFError("the other side has gone")
        self._received += piece

    def _whole(self) -> bytes | None:
        """The first message, taken out, if all of it is there."""
        if len(self._received) < SIZE.size:
            return None
        (length,) = SIZE.unpack_from(self._received)
        if length > self._most:
            raise ValueError(f"a message of {length} bytes; the longest is {self._most}")
        end = SIZE.size + length
        if len(self._received) < end:
            return None
        message = bytes(memoryview(self._received)[SIZE.size : end])
        del self._received[:end]
        return message

    def close(self) -> None:
        self._connection.close()
