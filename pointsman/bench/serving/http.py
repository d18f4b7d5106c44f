"""HTTP/1.1 for a load client: one answer at a time on a connection, every piece handed over the moment it is there.

A library's client spends more on a streamed token than many a server; `python -m benchmarks.load_client` measures that. So this
is the part of the protocol that a model server speaks, and no more: no redirects, no cookies, no compression (none is asked for).
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from urllib.parse import urlsplit

MAX_HEAD = 1 << 16
MAX_LINE = 1 << 12
EVERY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}
OK = 200
Take = Callable[[bytes], None]


class BrokenAnswer(ConnectionError):
    """The server sent something that is not HTTP, or closed the connection before its answer was whole."""


@dataclass(frozen=True)
class Origin:
    """Where a server is.

    Attributes:
        path: what comes before the path of every request, without a slash at its end.
    """

    host: str
    port: int
    secure: bool = False
    path: str = ""

    @classmethod
    def of(cls, host: str, port: int) -> Origin:
        """A plain server. Where one listens on every address, a client means this machine."""
        return cls(EVERY_ADDRESS.get(host, host), port)

    @classmethod
    def parse(cls, url: str) -> Origin:
        """Raises ValueError for anything but http://host[:port][/path] and its secure form."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ValueError(f"{url!r} is not an address: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or parts.username:
            raise ValueError(f"{url!r} is not an address; it should look like http://host:port")
        secure = parts.scheme == "https"
        return cls(parts.hostname, port or (443 if secure else 80), secure, parts.path.rstrip("/"))

    def __str__(self) -> str:
        return f"{'https' if self.secure else 'http'}://{self.name}{self.path}"

    @property
    def name(self) -> str:
        """Host and port, as the Host header has them."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class _Part(Enum):
    HEAD = "head"
    SIZE = "size of a chunk"
    CHUNK = "chunk"
    CHUNK_END = "end of a chunk"
    TRAILER = "trailer"
    LENGTH = "body of a known length"
    REST = "body to the end of the connection"
    DONE = "done"


class AnswerReader:
    """One answer out of bytes that may be cut anywhere.

    Attributes:
        status: 0 until the head is there.
        headers: names in lower case.
        done: the answer is whole.
    """

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self._part = _Part.HEAD
        self._buffer = b""
        self._left = 0

    @property
    def done(self) -> bool:
        return self._part is _Part.DONE

    @property
    def keeps_connection(self) -> bool:
        """Whether the connection may carry another request."""
        return self.done and not self._buffer and self.headers.get("connection", "").lower() != "close"

    def feed(self, data: bytes) -> bytes:
        """What these bytes add to the body. Raises BrokenAnswer."""
        self._buffer = self._buffer + data if self._buffer else data
        body: list[bytes] = []
        while self._buffer and self._step(body):
            pass
        return body[0] if len(body) == 1 else b"".join(body)

    def end(self) -> None:
        """The connection is closed. Raises BrokenAnswer where something is missing."""
        if self._part is _Part.REST:
            self._part = _Part.DONE
        if not self.done:
            raise BrokenAnswer(f"the server closed the connection in the middle of its answer ({self._part.value})")

    def _step(self, body: list[bytes]) -> bool:
        """Read one element; False where more bytes are needed."""
        part = self._part
        if part is _Part.SIZE:
            line = self._line()
            return line is not None and self._open_chunk(line)
        if part is _Part.CHUNK or part is _Part.LENGTH:
            return self._read_counted(body)
        if part is _Part.CHUNK_END:
            return self._close_chunk()
        if part is _Part.HEAD:
            return self._read_head()
        if part is _Part.TRAILER:
            line = self._line()
            if line == b"":
                self._part = _Part.DONE
            return line is not None
        if part is _Part.REST:
            body.append(self._buffer)
            self._buffer = b""
        return False

    def _line(self) -> bytes | None:
        end = self._buffer.find(b"\r\n")
        if end < 0:
            if len(self._buffer) > MAX_LINE:
                raise BrokenAnswer(f"a line of the answer has more than {MAX_LINE} bytes ({self._part.value})")
            return None
        line, self._buffer = self._buffer[:end], self._buffer[end + 2 :]
        return line

    def _open_chunk(self, line: bytes) -> bool:
        digits = line.partition(b";")[0].strip()
        try:
            self._left = int(digits, 16)
        except ValueError:
            raise BrokenAnswer(f"the size of a chunk is {digits[:40]!r}") from None
        if self._left < 0:
            raise BrokenAnswer(f"the size of a chunk is {digits[:40]!r}")
        self._part = _Part.CHUNK if self._left else _Part.TRAILER
        return True

    def _read_counted(self, body: list[bytes]) -> bool:
        piece = self._buffer[: self._left]
        self._buffer = self._buffer[self._left :]
        self._left -= len(piece)
        body.append(piece)
        if not self._left:
            self._part = _Part.CHUNK_END if self._part is _Part.CHUNK else _Part.DONE
        return True

    def _close_chunk(self) -> bool:
        if len(self._buffer) < 2:
            return False
        if not self._buffer.startswith(b"\r\n"):
            raise BrokenAnswer("a chunk is longer than it says")
        self._buffer = self._buffer[2:]
        self._part = _Part.SIZE
        return True

    def _read_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > MAX_HEAD:
                raise BrokenAnswer(f"the head of the answer has more than {MAX_HEAD} bytes")
            return False
        first, *lines = self._buffer[:end].decode("latin-1").split("\r\n")
        self._buffer = self._buffer[end + 4 :]
        words = first.split(" ", 2)
        if not words[0].startswith("HTTP/1.") or len(words) < 2 or not words[1].isdecimal():
            raise BrokenAnswer(f"{first[:80]!r} is no answer in HTTP/1.1")
        self.status = int(words[1])
        if self.status < OK:  # a preliminary answer: the real one follows
            self.status = 0
            return True
        self.headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self._begin_body()
        return True

    def _begin_body(self) -> None:
        length = self.headers.get("content-length")
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            self._part = _Part.SIZE
        elif self.status in (204, 304):
            self._part = _Part.DONE
        elif length is None:
            self._part = _Part.REST
        elif not length.isdecimal():
            raise BrokenAnswer(f"the Content-Length of the answer is {length[:40]!r}")
        else:
            self._left = int(length)
            self._part = _Part.LENGTH if self._left else _Part.DONE


@dataclass(frozen=True)
class Answer:
    """A whole answer; the body is empty where it was handed over in pieces."""

    status: int
    headers: dict[str, str]
    body: bytes


class _Connection(asyncio.Protocol):
    """Carries one exchange at a time."""

    def __init__(self) -> None:
        self.open = False
        self.began = False  # whether a byte of the present answer has come
        self._transport: asyncio.Transport | None = None
        self._reader = AnswerReader()
        self._take: Take | None = None
        self._kept: list[bytes] = []
        self._waiter: asyncio.Future[Answer] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.open = True

    async def exchange(self, request: bytes, take: Take | None) -> Answer:
        """Send a request and wait for its answer; pieces of the body of a success go to `take` where there is one."""
        assert self._transport is not None and self._waiter is None
        self._reader, self._take, self._kept, self.began = AnswerReader(), take, [], False
        self._waiter = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._waiter
        finally:
            self._waiter = None
            if not self._reader.keeps_connection:
                self.close()

    def close(self) -> None:
        self.open = False
        if self._transport is not None:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        if self._waiter is None or self._waiter.done():
            self.close()  # nobody asked
            return
        self.began = True
        try:
            piece = self._reader.feed(data)
            if piece:
                if self._take is not None and self._reader.status == OK:
                    self._take(piece)
                else:
                    self._kept.append(piece)
        except (ConnectionError, ValueError) as error:
            self._fail(error)
            return
        if self._reader.done:
            self._succeed()

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        if self._waiter is None or self._waiter.done():
            return
        try:
            if exc is not None:
                raise exc
            self._reader.end()
        except OSError as error:
            self._fail(error)
        else:
            self._succeed()

    def _succeed(self) -> None:
        assert self._waiter is not None
        self._waiter.set_result(Answer(self._reader.status, self._reader.headers, b"".join(self._kept)))

    def _fail(self, error: Exception) -> None:
        assert self._waiter is not None
        self._waiter.set_exception(error)
        self.close()


@dataclass
class HttpClient:
    """Requests to one server over connections that are kept."""

    origin: Origin
    headers: dict[str, str] = field(default_factory=dict)
    _free: list[_Connection] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, value in self.headers.items():
            if not name or not (name + value).isprintable() or ":" in name or not (name + value).isascii():
                raise ValueError(f"header {name!r} has a character that no header can have")
        self._tls = ssl.create_default_context() if self.origin.secure else None

    async def get(self, path: str) -> Answer:
        """Raises OSError where the server cannot be reached or breaks off."""
        return await self._ask("GET", path, b"", None)

    async def post(self, path: str, body: bytes, take: Take | None = None) -> Answer:
        """Send JSON. Pieces of the body of a success go to `take`, where there is one, as they come. Raises OSError as `get`."""
        return await self._ask("POST", path, body, take)

    def close(self) -> None:
        for connection in self._free:
            connection.close()
        self._free.clear()

    async def _ask(self, method: str, path: str, body: bytes, take: Take | None) -> Answer:
        lines = [f"{method} {self.origin.path}{path} HTTP/1.1", f"Host: {self.origin.name}", "Accept: */*"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        if method == "POST":
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        request = "\r\n".join([*lines, "", ""]).encode("latin-1") + body
        while self._free:
            connection = self._free.pop()
            if not connection.open:
                continue
            try:
                return await self._exchange(connection, request, take)
            except ConnectionError:
                if connection.began:
                    raise
                # it was closed while it lay idle: the request has not been answered, ask again on another
        return await self._exchange(await self._connect(), request, take)

    async def _exchange(self, connection: _Connection, request: bytes, take: Take | None) -> Answer:
        answer = await connection.exchange(request, take)
        if connection.open:
            self._free.append(connection)
        return answer

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, self.origin.host, self.origin.port, ssl=self._tls)
        return connection
