"""Bodies in and answers out, with an ear for the client.

A request that streams is answered only when its first piece is there, so that what the engine refuses is still a plain error with
its own status. While it waits and while it writes, the client is listened to: one that goes away takes its request with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pointsman.request import ChoiceDelta
from pointsman.request import Request as EngineRequest
from pointsman.server.bounds import MAX_BODY_BYTES
from pointsman.server.errors import ApiError
from pointsman.server.fleet import Backend
from pointsman.server.routing import Routing
from pointsman.server.stream import Stream

BODY_SECONDS = 30.0
MAX_READING_BYTES = 16 * MAX_BODY_BYTES
MAX_DISCARDED_BYTES = 3 * MAX_BODY_BYTES
RETRY_SECONDS = "1"

T = TypeVar("T")


class ClientGone(Exception):
    """The client has closed the connection; nobody reads the answer."""


class Answer(Protocol):
    """What `respond` needs of an answer."""

    @property
    def requests(self) -> Sequence[EngineRequest]: ...
    @property
    def names(self) -> Sequence[str]: ...
    @property
    def stream(self) -> bool: ...
    @property
    def ended(self) -> bool: ...
    @property
    def routing(self) -> Routing | None: ...
    def take(self, deltas: Sequence[ChoiceDelta]) -> list[dict[str, Any]]: ...
    def last(self) -> dict[str, Any] | None: ...
    def whole(self) -> Any: ...


class BodyReader:
    """Reads bodies, no more at a time than there is room for.

    Args:
        most: bytes of a body, and of all that are being read; None is what requests may have.
        seconds: that a body may take to come.
    """

    def __init__(self, most: int | None = None, seconds: float | None = None) -> None:
        self._most, self._together = (MAX_BODY_BYTES, MAX_READING_BYTES) if most is None else (most, most)
        self._seconds = BODY_SECONDS if seconds is None else seconds
        self._reading = 0

    async def read(self, http: Request, *, optional: bool = False, media: str = "application/json") -> bytes:
        """A body that says it is of this type. Raises ApiError for one that is not, is too long, or takes too long to come.

        The type is insisted on because a web page of anyone may post the others to us. An optional body may be left out with its type.
        """
        kind = http.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != media and not (optional and not kind):
            raise ApiError(415, f"the content type is {kind[:80]!r}; it must be {media!r}")
        if int(http.headers.get("content-length", "0")) > self._most + MAX_DISCARDED_BYTES:
            raise self._too_long()
        try:
            async with asyncio.timeout(self._seconds):
                return await self._collect(http)
        except TimeoutError:
            raise ApiError(408, f"the body took longer than {self._seconds:g} s to come", headers={"connection": "close"}) from None

    async def _collect(self, http: Request) -> bytes:
        """What is a little too long is still read, and dropped: most clients look for an answer only when they have sent all."""
        body, length = bytearray(), 0
        try:
            async for part in http.stream():
                length += len(part)
                if length > self._most + MAX_DISCARDED_BYTES:
                    raise self._too_long()
                if length > self._most:
                    continue
                body += part
                self._reading += len(part)
                if self._reading > self._together:
                    raise ApiError(429, "too many long requests are coming in; try again later", code="queue_full")
            if length > self._most:
                raise self._too_long()
            return bytes(body)
        finally:
            self._reading -= len(body)

    def _too_long(self) -> ApiError:
        return ApiError(413, f"the body is longer than {self._most} bytes", headers={"connection": "close"})


async def respond(http: Request, bridge: Backend, answer: Answer, seconds: float) -> Response:
    """Have the engine answer, in not more than so many seconds."""
    stream = bridge.submit(answer.requests, answer.names)
    stream.fail_after(seconds, _took_too_long())
    handed_over = False
    try:
        if not answer.stream:
            return json_response(await unless_gone(http.receive, _collect(stream, answer)))
        first = await unless_gone(http.receive, anext(stream))
        handed_over = True
        return EventStream(stream, answer, first)
    finally:
        if not handed_over:
            stream.close()


async def _collect(stream: Stream, answer: Answer) -> Any:
    async for deltas in stream:
        answer.take(await _with_records(answer, deltas))
        if answer.ended:
            break
    return answer.whole()


class EventStream(Response):
    """An answer as server-sent events. It owns the stream from here on, and closes it however it ends."""

    media_type = "text/event-stream"

    def __init__(self, stream: Stream, answer: Answer, first: list[ChoiceDelta]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._stream = stream
        self._answer = answer
        self._first = first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._stream:
            await unless_gone(receive, self._write(send))

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for events in self._events():
            await send({"type": "http.response.body", "body": events, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        """Events, those that are there at the same time in one piece."""
        deltas: Sequence[ChoiceDelta] = self._first
        try:
            while True:
                deltas = await _with_records(self._answer, deltas)
                if events := b"".join(map(_event, self._answer.take(deltas))):
                    yield events
                if self._answer.ended:
                    break
                deltas = await anext(self._stream)
            # the engine hears of it before the client does, whose next request may rely on it
            self._stream.close()
        except ApiError as error:
            yield _event(error.body())
            return
        last = self._answer.last()
        yield (_event(last) if last else b"") + b"data: [DONE]\n\n"


async def _with_records(answer: Answer, deltas: Sequence[ChoiceDelta]) -> Sequence[ChoiceDelta]:
    return deltas if answer.routing is None else await answer.routing.encode(deltas)


async def unless_gone(receive: Receive, work: Awaitable[T] | Coroutine[Any, Any, T]) -> T:
    """Do this work as long as the client is there. Raises ClientGone, with the work cancelled, when it goes."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")


def error_response(error: ApiError) -> Response:
    headers = error.headers | ({"retry-after": RETRY_SECONDS} if error.status in (429, 503) else {})
    return json_response(error.body(), error.status, headers)


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


def _took_too_long() -> ApiError:
    text = "the answer took longer than this server allows (--request-timeout)"
    return ApiError(504, text, code="request_timeout", headers={"x-should-retry": "false"})
