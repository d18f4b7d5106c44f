"""Many clients on one event loop, one engine behind a socket.

Each HTTP request has a stream, which takes its work back from the engine when it is closed early. Requests are known to the engine by
names of ours, and to `/abort_request` by those that clients gave: these come back when they like, and those never do.

The engine is starting, ready, or gone. Once it has gone, every stream gets the same error and every new request too, and `gone` tells the
server to end, or to start another engine (`revive`).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from pointsman.request import FIRST_VERSION, MemoryTag, Request
from pointsman.server import controls, wire
from pointsman.server.errors import ApiError
from pointsman.server.meter import ExpertLoad, Meter, array_load
from pointsman.server.prompts import ServedModel
from pointsman.server.stream import Stream

log = logging.getLogger(__name__)

LAST_WORDS_SECONDS = 0.2
REPLY_SECONDS = 30.0
MAX_WAITING_TOKENS = 1 << 24
REPLAY_BYTES_PER_TOKEN = 256
WATCHDOG_LOOKS = 10


class Process(Protocol):
    """What the bridge needs of the engine's process."""

    @property
    def end(self) -> wire.ServerSide: ...
    def wait(self) -> int: ...


class Bridge:
    """This side's view of the engine.

    Args:
        process: the engine's process.
        load: from what the engine says about its model to what this side needs of it; runs in a thread.
        max_requests: most prompts in the engine at once, running and waiting.
        meter: counts what passes.
        watchdog_seconds: an engine that has work and says nothing for so long is taken for stuck.
        name: what the engine is called where it is one of several.

    Attributes:
        model: None until the engine is ready.
        reason: why the engine has gone.
        paused: whether no step runs because somebody has said so.
        released: the memory without which no step runs, as it is released.
        weight_version: of the weights in force.
    """

    def __init__(
        self,
        process: Process,
        load: Callable[[wire.ModelInfo], ServedModel],
        meter: Meter,
        *,
        max_requests: int,
        watchdog_seconds: float,
        name: str = "the engine",
    ) -> None:
        self.name = name
        self._process = process
        self._load = load
        self.meter = meter
        self._max_requests = max_requests
        self._watchdog_seconds = watchdog_seconds
        self._streams: dict[str, Stream] = {}
        self._names: dict[str, list[str]] = {}
        self._named: dict[str, str] = {}
        self._num_tokens = 0
        self._flushes: list[asyncio.Future[None]] = []
        self._controls: dict[int, asyncio.Future[controls.Controlled]] = {}
        self._numbers = itertools.count(1)
        self._halted_since: float | None = None
        self._halted_before = 0.0
        self.paused = False
        self.released: tuple[MemoryTag, ...] = ()
        self.weight_version = FIRST_VERSION
        self._sign = 0.0
        self._engine = 1
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
        self._look(loop, loop.time(), self._engine)
        threading.Thread(target=self._watch, args=(loop, self._engine), daemon=True).start()

    def revive(self) -> None:
        """The process has been started anew, after its engine had gone: begin again. Nothing of the one before is left."""
        assert self.reason is not None
        self._engine += 1
        self._flushes.clear()
        self._controls.clear()
        self._end_halt()
        self.paused, self.released, self.weight_version = False, (), FIRST_VERSION
        self.model = self.reason = None
        self.ready.clear()
        self.gone.clear()
        self.start()

    @property
    def halted(self) -> bool:
        """No step runs, and requests wait."""
        return self._halted_since is not None

    @property
    def halted_seconds(self) -> float:
        """How long it has been halted so far, all times together."""
        since = self._halted_since
        return self._halted_before + (0.0 if since is None else asyncio.get_running_loop().time() - since)

    @property
    def meters(self) -> dict[str | None, Meter]:
        """Of this one engine, which has no name among others."""
        return {None: self.meter}

    @property
    def load(self) -> ExpertLoad | None:
        return self.meter.load

    @property
    def running(self) -> int:
        return len(self._streams)

    def served(self) -> ServedModel:
        """The model. Raises ApiError while there is none."""
        if self.reason is not None:
            raise ApiError(503, f"{self.name} has stopped", code="engine_stopped")
        if self.model is None:
            raise ApiError(503, "the model is still loading", code="model_loading")
        return self.model

    def submit(self, requests: Sequence[Request], names: Sequence[str]) -> Stream:
        """Hand requests to the engine. Raises ApiError where it is not there or has too much to do.

        Args:
            names: what `abort_named` calls each of them; several may have one name.
        """
        self.check_room(requests)
        self.check_names(names)
        stream = Stream(self, requests)
        for request, name in zip(requests, names, strict=True):
            self.enter(stream, request, name)
        return stream

    def check_room(self, requests: Sequence[Request]) -> None:
        """Raises ApiError where the engine is not there or has too much to do for these."""
        self.served()
        if len(requests) > self._max_requests:
            raise ApiError(400, f"{len(requests)} prompts are more than this server takes at once, which is {self._max_requests}")
        num_tokens = self._num_tokens + sum(map(_burden, requests))
        if self.running + len(requests) > self._max_requests or num_tokens > MAX_WAITING_TOKENS:
            raise _queue_full(f"{self.running} requests are running or waiting; try again later")

    def check_names(self, names: Sequence[str]) -> None:
        """Raises ApiError where a request runs under one of these."""
        for name in names:
            if name in self._names:
                raise ApiError(400, f"rid {name!r} is the name of a request that has not ended; each needs its own", param="rid")

    def enter(self, stream: Stream, request: Request, name: str) -> None:
        """Hand a request for which there is room to the engine; what it adds goes to this stream."""
        if not self._streams:
            self._sign = asyncio.get_running_loop().time()
        self._streams[request.rid] = stream
        self._names.setdefault(name, []).append(request.rid)
        self._named[request.rid] = name
        self.meter.begin(request, name)
        self._process.end.send(wire.Submit(request))
        self._num_tokens += _burden(request)
        self.idle.clear()

    def abort(self, rid: str, *, tell: bool = False) -> None:
        """Tell the engine to stop working on a request, and with `tell` to say what there is of it."""
        if self.reason is None:
            self._process.end.send(wire.Abort(rid, tell))

    def abort_named(self, name: str | None) -> int:
        """End what is running under a client's name, or everything. Returns how many requests that were."""
        rids = list(self._streams) if name is None else list(self._names.get(name, ()))
        for rid in rids:
            self._streams[rid].abort(rid)
        return len(rids)

    async def flush_cache(self) -> None:
        """Have the engine forget cached prefixes. Raises ApiError."""
        self.served()
        reply: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._flushes.append(reply)
        self._process.end.send(wire.FlushCache())
        try:
            await asyncio.wait_for(reply, REPLY_SECONDS)
        except TimeoutError:
            raise ApiError(503, f"{self.name} is busy; it flushes its cache after this step", code="engine_busy") from None

    async def control(self, message: controls.Control) -> controls.Controlled:
        """Have the engine do something, however long that takes. Raises ApiError where it does not."""
        self.served()
        message.number = next(self._numbers)
        reply: asyncio.Future[controls.Controlled] = asyncio.get_running_loop().create_future()
        self._controls[message.number] = reply
        self._process.end.send(message)
        answer = await reply
        if answer.error is not None:
            raise ApiError(answer.status, answer.error, code="not_now" if answer.status == 409 else None)
        return answer

    def forget(self, request: Request) -> None:
        """A request has ended."""
        if self._streams.pop(request.rid, None) is None:
            return
        self.meter.end(request.rid)
        self._num_tokens -= _burden(request)
        name = self._named.pop(request.rid)
        self._names[name].remove(request.rid)
        if not self._names[name]:
            del self._names[name]
        if not self._streams:
            self.idle.set()

    def fail(self, reason: str, error: ApiError) -> None:
        """The engine is no more: end every stream with this error."""
        if self.reason is not None:
            return
        self.reason = reason
        for stream in set(self._streams.values()):
            stream.fail(error)
        replies: list[asyncio.Future[Any]] = [*self._flushes, *self._controls.values()]
        for reply in replies:
            if not reply.done():
                reply.set_exception(error)
        self.gone.set()

    def _look(self, loop: asyncio.AbstractEventLoop, due: float, engine: int) -> None:
        """Whether an engine with work still gives signs of life. Halted, or where this process slept itself, it starts to wait anew."""
        if self.reason is not None or engine != self._engine:
            return
        now, pause = loop.time(), self._watchdog_seconds / WATCHDOG_LOOKS
        if now - due > pause or self.halted:
            self._sign = now
        silent = now - self._sign
        if self._streams and silent > self._watchdog_seconds:
            text = f"{self.name} has been stuck in a step for {silent:.0f} s, longer than --watchdog-timeout allows"
            self.fail(text, self._failed())
            return
        loop.call_at(now + pause, self._look, loop, now + pause, engine)

    def _receive(self, message: wire.FromEngine) -> None:
        self._sign = asyncio.get_running_loop().time()
        match message:
            case wire.Deltas():
                self.meter.take(message.deltas)
                for delta in message.deltas:
                    if (stream := self._streams.get(delta.rid)) is not None:
                        stream.put(delta)
            case wire.Stats():
                self.meter.told(message.stats, array_load(message.stats.expert_load))
            case wire.Refused():
                self.meter.refuse(message.rid)
                if (stream := self._streams.get(message.rid)) is not None:
                    stream.fail(_queue_full(message.reason) if message.busy else ApiError(400, message.reason))
            case wire.CacheFlushed():
                reply = self._flushes.pop(0)
                if not reply.done():
                    reply.set_result(None)
            case controls.Controlled():
                self._controlled(message)
            case wire.Ready():
                self._loading = asyncio.get_running_loop().create_task(self._become_ready(message.model))
            case wire.Failed():
                self.fail(message.reason, self._failed(message.rank))

    def _controlled(self, answer: controls.Controlled) -> None:
        """The engine has done something, or not; either way it says how it is now."""
        now = asyncio.get_running_loop().time()
        self.paused, self.released = answer.paused, answer.released
        halted = answer.paused or bool(answer.released)
        if halted and self._halted_since is None:
            self._halted_since = now
        elif not halted:
            self._end_halt()
        self.weight_version = answer.weight_version
        reply = self._controls.pop(answer.number)
        if not reply.done():
            reply.set_result(answer)

    def _end_halt(self) -> None:
        if self._halted_since is not None:
            self._halted_before += asyncio.get_running_loop().time() - self._halted_since
            self._halted_since = None

    async def _become_ready(self, info: wire.ModelInfo) -> None:
        try:
            self.model = await asyncio.to_thread(self._load, info)
        except Exception as error:
            if not isinstance(error, ValueError):
                log.exception("the tokenizer of %s cannot be loaded", info.name)
            self.fail(str(error), self._failed())
            return
        self.ready.set()

    def _watch(self, loop: asyncio.AbstractEventLoop, engine: int) -> None:
        """Wait, in a thread, for the end of the process."""
        code = self._process.wait()
        try:
            loop.call_soon_threadsafe(loop.call_later, LAST_WORDS_SECONDS, self._ended, code, engine)
        except RuntimeError:
            assert loop.is_closed(), "the loop refuses calls though it is open"

    def _ended(self, code: int, engine: int) -> None:
        """The process has ended: if it said why, that has arrived by now."""
        if engine != self._engine:
            return
        how = f"exit code {code}" if code >= 0 else f"signal {-code}, {signal.strsignal(-code)}"
        self.fail(f"the engine's process ended without saying why ({how})", self._failed())

    def _failed(self, rank: int | None = None) -> ApiError:
        lost = "" if rank is None else f": rank {rank} is lost"
        return ApiError(500, f"{self.name} failed{lost}", code="engine_failed")


def _burden(request: Request) -> int:
    """What a waiting request holds, in tokens; the rows of a replay count as a token for each so many bytes."""
    return len(request.prompt_token_ids) + (0 if request.replay is None else len(request.replay.data) // REPLAY_BYTES_PER_TOKEN)


def _queue_full(message: str) -> ApiError:
    return ApiError(429, message, code="queue_full")
