"""The routes. A handler reads the body, has it understood, submits it, and writes what comes back.

A request that streams is answered only when its first piece is there, so that what the engine refuses is still a plain error with
its own status. While it waits and while it writes, the client is listened to: one that goes away takes its request with it.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

import pointsman
from pointsman.config import EngineConfig, ServerConfig
from pointsman.request import ChoiceDelta
from pointsman.server.answers import Answer
from pointsman.server.bridge import Bridge, Stream
from pointsman.server.prompts import ServedModel
from pointsman.server.protocol import MAX_BODY_BYTES, ApiError, ChatRequest, CompletionRequest, parse

log = logging.getLogger(__name__)

OPEN_ROUTES = ("/health", "/ready")
LONG_BODY_BYTES = 16 << 10
RETRY_SECONDS = "1"
CLIENT_GONE = 499

T = TypeVar("T")


class ClientGone(Exception):
    """The client has closed the connection; nobody reads the answer."""


def create_app(bridge: Bridge, server: ServerConfig, engine: EngineConfig) -> FastAPI:
    """The application for one engine."""
    app = FastAPI(title="Pointsman", version=pointsman.__version__, openapi_url=None, docs_url=None, redoc_url=None)
    if server.api_key is not None:
        app.add_middleware(KeyCheck, key=server.api_key)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientGone, _client_gone)
    app.add_exception_handler(Exception, _fault)
    _add_health(app, bridge)
    _add_models(app, bridge, engine)
    _add_completions(app, bridge)
    return app


def _add_health(app: FastAPI, bridge: Bridge) -> None:
    async def health() -> Response:
        bridge.served()
        return Response(status_code=200)

    for path in OPEN_ROUTES:
        app.add_api_route(path, health, methods=["GET", "HEAD"])


def _add_models(app: FastAPI, bridge: Bridge, engine: EngineConfig) -> None:
    def card(model: ServedModel) -> dict[str, Any]:
        return {
            "id": model.info.name,
            "object": "model",
            "created": model.loaded,
            "owned_by": "pointsman",
            "max_model_len": model.info.context_length,
        }

    @app.get("/v1/models")
    async def models() -> Response:
        return _json({"object": "list", "data": [card(bridge.served())]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        served = bridge.served()
        served.check_name(name)
        return _json(card(served))

    @app.get("/server_info")
    async def server_info() -> Response:
        info = msgspec.to_builtins(bridge.served().info)
        return _json({"version": pointsman.__version__, "model": info, "engine": msgspec.to_builtins(engine), "running": bridge.running})


def _add_completions(app: FastAPI, bridge: Bridge) -> None:
    @app.post("/v1/chat/completions")
    async def chat(http: Request) -> Response:
        served = bridge.served()
        body = await _body(http)
        request = parse(body, ChatRequest)
        answer = await _aside(len(body), served.chat, request, f"chatcmpl-{uuid.uuid4().hex}")
        return await _respond(http, bridge, answer)

    @app.post("/v1/completions")
    async def completions(http: Request) -> Response:
        served = bridge.served()
        body = await _body(http)
        request = parse(body, CompletionRequest)
        answer = await _aside(len(body), served.complete, request, f"cmpl-{uuid.uuid4().hex}")
        return await _respond(http, bridge, answer)


async def _aside(size: int, prepare: Callable[..., T], *arguments: Any) -> T:
    """Run what takes time in proportion to the body: a long one in a thread, so that other streams go on."""
    if size > LONG_BODY_BYTES:
        return await asyncio.to_thread(prepare, *arguments)
    return prepare(*arguments)


async def _body(http: Request) -> bytes:
    """The body, if it is JSON and not too long. The type is insisted on because a web page of anyone may post the others to us."""
    kind = http.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"the content type is {kind[:80]!r}; it must be 'application/json'")
    body = bytearray()
    async for part in http.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise ApiError(413, f"the body is longer than {MAX_BODY_BYTES} bytes")
    return bytes(body)


async def _respond(http: Request, bridge: Bridge, answer: Answer) -> Response:
    stream = bridge.submit(answer.requests)
    handed_over = False
    try:
        if not answer.stream:
            return _json(await _unless_gone(http.receive, _collect(stream, answer)))
        first = await _unless_gone(http.receive, anext(stream))
        handed_over = True
        return EventStream(stream, answer, first)
    finally:
        if not handed_over:
            stream.close()


async def _collect(stream: Stream, answer: Answer) -> dict[str, Any]:
    async for deltas in stream:
        for delta in deltas:
            answer.take(delta)
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
            await _unless_gone(receive, self._write(send))

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for events in self._events():
            await send({"type": "http.response.body", "body": events, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        """Events, those that are there at the same time in one piece."""
        yield self._chunks(self._first)
        try:
            async for deltas in self._stream:
                yield self._chunks(deltas)
        except ApiError as error:
            yield _event(error.body())
            return
        last = self._answer.last()
        yield (_event(last) if last else b"") + b"data: [DONE]\n\n"

    def _chunks(self, deltas: list[ChoiceDelta]) -> bytes:
        return b"".join(_event(chunk) for delta in deltas if (chunk := self._answer.take(delta)) is not None)


async def _unless_gone(receive: Receive, work: Awaitable[T] | Coroutine[Any, Any, T]) -> T:
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


class Ending:
    """Around the whole application: a client that does not read is cut off when the server ends, and that is no fault to log."""

    def __init__(self, app: ASGIApp, bridge: Bridge) -> None:
        self._app = app
        self._bridge = bridge

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except asyncio.CancelledError:
            if self._bridge.reason is None:
                raise


class KeyCheck:
    """Lets a request through that brings the key, on every route but those that only tell whether the server lives."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._digest = _digest(f"Bearer {key}".encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_ROUTES:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(_digest(given), self._digest):
                error = ApiError(401, "a valid API key is needed: send it as 'Authorization: Bearer KEY'", code="invalid_api_key")
                await _error(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _digest(text: bytes) -> bytes:
    """Of equal length for all texts, so that comparing two takes the same time."""
    return hashlib.sha256(text).digest()


async def _api_error(http: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _error(error)


async def _http_error(http: Request, error: Exception) -> Response:
    """What the framework itself refuses: an unknown route, a method that a route does not have."""
    assert isinstance(error, HTTPException)
    return _error(ApiError(error.status_code, f"{http.method} {http.url.path[:200]}: {error.detail}"))


async def _client_gone(http: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


async def _fault(http: Request, error: Exception) -> Response:
    """A fault of ours. The traceback goes to the log, and nothing of it to the client."""
    return _error(ApiError(500, "internal error"))


def _error(error: ApiError) -> Response:
    headers = {"retry-after": RETRY_SECONDS} if error.status in (429, 503) else None
    return _json(error.body(), error.status, headers)


def _json(content: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"
