"""Many clients on one event loop, one engine behind a socket.

Each HTTP request has a stream: what arrives for it is put there at once and taken when the client's turn comes, all that is there
in one go. So a slow reader costs fewer and larger writes, never a longer queue of small ones. A stream that is closed early takes
its work back from the engine.

The engine is starting, ready, or gone. It never comes back: once it has gone, every stream gets the same error and every new
request too, and `gone` tells the server to end.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Protocol, Self

from pointsman.request import ChoiceDelta, FinishReason, Request
from pointsman.server import wire
from pointsman.server.prompts import ServedModel
from pointsman.server.protocol import ApiError

log = logging.getLogger(__name__)

LAST_WORDS_SECONDS = 0.2


class Process(Protocol):
    """What the bridge needs of the engine's process."""

    end: wire.ServerEnd

    def wait(self) -> int: ...


class Stream:
    """What the engine adds to some requests, until every choice of each has ended. Closing it earlier aborts them.

    Iterating gives lists: all deltas that have arrived since the last one. Raises ApiError where the engine refuses or fails.
    """

    def __init__(self, bridge: Bridge, requests: Sequence[Request]) -> None:
        self._bridge = bridge
        self._left = {request.rid: request.sampling.n for request in requests}
        self._arrived: list[ChoiceDelta] = []
        self._error: ApiError | None = None
        self._news = asyncio.Event()

    def put(self, delta: ChoiceDelta) -> None:
        if delta.finish_reason is FinishReason.ERROR:
            log.error("the engine gave up on %s: %s", delta.rid, delta.error)
            self.fail(ApiError(500, "the engine could not finish this request"))
            return
        if delta.finish_reason is not None:
            self._left[delta.rid] -= 1
            if not self._left[delta.rid]:
                del self._left[delta.rid]
                self._bridge.forget(delta.rid)
        self._arrived.append(delta)
        self._news.set()

    def fail(self, error: ApiError) -> None:
        self._error = self._error or error
        self._news.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[ChoiceDelta]:
        if not self._arrived and self._error is None:
            if not self._left:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        if self._error is not None:
            raise self._error
        arrived, self._arrived = self._arrived, []
        return arrived

    def close(self) -> None:
        """Abort what has not ended; harmless after the end and when called twice."""
        left, self._left = self._left, {}
        for rid in left:
            self._bridge.forget(rid)
            self._bridge.abort(rid)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Bridge:
    """This side's view of the engine.

    Args:
        process: the engine's process.
        load: from what the engine says about its model to what this side needs of it; runs in a thread.
        max_requests: most prompts in the engine at once, running and waiting.

    Attributes:
        model: None until the engine is ready.
        reason: why the engine has gone.
    """

    def __init__(self, process: Process, load: Callable[[wire.ModelInfo], ServedModel], *, max_requests: int) -> None:
        self._process = process
        self._load = load
        self._max_requests = max_requests
        self._streams: dict[str, Stream] = {}
        self._loading: asyncio.Task[None] | None = None
        self.model: ServedModel | None = None
        self.reason: str | None = None
        self.ready = asyncio.Event()
        self.gone = asyncio.Event()
        self.idle = asyncio.Event()
        self.idle.set()

    def start(self) -> None:
        """Begin to listen, to the socket and for the end of the process. Call once, in the event loop."""
        loop = asyncio.get_running_loop()
        self._process.end.listen(loop, self._receive)
        threading.Thread(target=self._watch, args=(loop,), daemon=True).start()

    @property
    def running(self) -> int:
        return len(self._streams)

    def served(self) -> ServedModel:
        """The model. Raises ApiError while there is none."""
        if self.reason is not None:
            raise ApiError(503, "the engine has stopped", code="engine_stopped")
        if self.model is None:
            raise ApiError(503, "the model is still loading", code="model_loading")
        return self.model

    def submit(self, requests: Sequence[Request]) -> Stream:
        """Hand requests to the engine. Raises ApiError where it is not there or has too much to do."""
        self.served()
        if self.running + len(requests) > self._max_requests:
            raise _queue_full(f"{self.running} requests are running or waiting; try again later")
        stream = Stream(self, requests)
        for request in requests:
            self._streams[request.rid] = stream
            self._process.end.send(wire.Submit(request))
        self.idle.clear()
        return stream

    def abort(self, rid: str) -> None:
        if self.reason is None:
            self._process.end.send(wire.Abort(rid))

    def forget(self, rid: str) -> None:
        self._streams.pop(rid, None)
        if not self._streams:
            self.idle.set()

    def fail(self, reason: str, error: ApiError) -> None:
        """The engine is no more: end every stream with this error."""
        if self.reason is not None:
            return
        self.reason = reason
        for stream in set(self._streams.values()):
            stream.fail(error)
        self.gone.set()

    def _receive(self, message: wire.FromEngine) -> None:
        match message:
            case wire.Deltas():
                for delta in message.deltas:
                    if (stream := self._streams.get(delta.rid)) is not None:
                        stream.put(delta)
            case wire.Refused():
                if (stream := self._streams.get(message.rid)) is not None:
                    stream.fail(_queue_full(message.reason) if message.busy else ApiError(400, message.reason))
            case wire.Ready():
                self._loading = asyncio.get_running_loop().create_task(self._become_ready(message.model))
            case wire.Failed():
                self.fail(message.reason, _engine_failed())

    async def _become_ready(self, info: wire.ModelInfo) -> None:
        try:
            self.model = await asyncio.to_thread(self._load, info)
        except Exception as error:
            if not isinstance(error, ValueError):
                log.exception("the tokenizer of %s cannot be loaded", info.name)
            self.fail(str(error), _engine_failed())
            return
        self.ready.set()

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wait, in a thread, for the end of the process."""
        code = self._process.wait()
        try:
            loop.call_soon_threadsafe(loop.call_later, LAST_WORDS_SECONDS, self._ended, code)
        except RuntimeError:
            assert loop.is_closed(), "the loop refuses calls though it is open"

    def _ended(self, code: int) -> None:
        """The process has ended: if it said why, that has arrived by now."""
        how = f"exit code {code}" if code >= 0 else f"signal {-code}, {signal.strsignal(-code)}"
        self.fail(f"the engine's process ended without saying why ({how})", _engine_failed())


def _queue_full(message: str) -> ApiError:
    return ApiError(429, message, code="queue_full")


def _engine_failed() -> ApiError:
    return ApiError(500, "the engine failed", code="engine_failed")
