"""The life of the web server: it opens at once, says when the engine is ready, and ends for one of three reasons.

A signal is a wish: running answers may finish (`--drain-timeout`), a second signal takes even that. The end of the engine is a failure:
every client is told, then the server ends too, or with `--restart-engine` starts another, unless that has failed too often. And the web
server may end by itself, which nothing here makes it do.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Generator
from typing import cast

import uvicorn

from pointsman.config import EngineConfig, ServerConfig
from pointsman.server.access import is_loopback
from pointsman.server.app import Ending, create_app
from pointsman.server.bridge import Bridge
from pointsman.server.connection import MAX_HEAD_BYTES, Connection
from pointsman.server.errors import ApiError
from pointsman.server.launch import EngineProcess
from pointsman.server.meter import Meter, log_requests_to
from pointsman.server.prompts import ServedModel

log = logging.getLogger(__name__)

CUT_SECONDS = 4
MAX_CONNECTIONS = 8192
MAX_RESTARTS = 3
RESTART_SECONDS = 600.0


class _WebServer(uvicorn.Server):
    """Leaves signals to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class Restarts:
    """How often an engine that was ready once is started anew: so many times in so many seconds, and then no more."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._times: list[float] = []
        self._ever_ready = False

    def allowed(self, *, was_ready: bool) -> bool:
        """Whether to start another after one has failed, which counts as one. One that never was ready would fail again."""
        self._ever_ready = self._ever_ready or was_ready
        now = self._clock()
        self._times = [time for time in self._times if now - time < RESTART_SECONDS]
        if not self._ever_ready or len(self._times) >= MAX_RESTARTS:
            return False
        self._times.append(now)
        return True

    @property
    def number(self) -> int:
        """How many there have been of late."""
        return len(self._times)


async def run(listener: socket.socket, process: EngineProcess, engine: EngineConfig, server: ServerConfig) -> str | None:
    """Serve until the end. Returns why it had to end; None where a signal asked for it."""
    stop, hurry = _signals()
    load = functools.partial(ServedModel.load, reasoning_parser=server.reasoning_parser, tool_call_parser=server.tool_call_parser)
    max_requests = engine.scheduler.max_running_requests + engine.scheduler.max_queued_requests
    if server.log_requests:
        log_requests_to(sys.stderr)
    meter = Meter(log_requests=server.log_requests)
    bridge = Bridge(process, load, meter, max_requests=max_requests, watchdog_seconds=server.watchdog_timeout)
    bridge.start()
    web = _WebServer(_web_config(bridge, engine, server))
    serving = asyncio.create_task(web.serve(sockets=[listener]))
    port = listener.getsockname()[1]
    announcing = asyncio.create_task(_announce(bridge, server, port))
    await _first(stop, bridge.gone, serving=serving)
    restarts = Restarts() if server.restart_engine else None
    while bridge.gone.is_set() and not stop.is_set() and restarts is not None and restarts.allowed(was_ready=bridge.ready.is_set()):
        log.error("%s; it is started anew, %d of %d times in %.0f s", bridge.reason, restarts.number, MAX_RESTARTS, RESTART_SECONDS)
        announcing.cancel()
        process.end.close()  # here, because the loop watches it
        try:
            await asyncio.to_thread(process.restart)
        except (ValueError, OSError) as error:
            bridge.reason = f"the engine's process cannot be started again: {error}"
            break
        bridge.revive()
        announcing = asyncio.create_task(_announce(bridge, server, port))
        await _first(stop, bridge.gone, serving=serving)
    web.should_exit = True
    reason = bridge.reason
    if reason is None and not stop.is_set():
        reason = "the web server has ended"
    if reason is None:
        # a halted engine ends nothing
        await _first(bridge.idle, hurry, bridge.gone, seconds=0 if bridge.halted else server.drain_timeout)
        bridge.fail("a signal", ApiError(503, "the server is shutting down", code="shutting_down"))
    await _finish(web, serving)
    announcing.cancel()
    process.ready = reason is None and bridge.ready.is_set()
    return reason


async def _finish(web: _WebServer, serving: asyncio.Task[None]) -> None:
    """Wait for the last bytes to leave, and not for clients that do not read them."""
    await asyncio.wait((serving,), timeout=CUT_SECONDS)
    for connection in list(web.server_state.connections):
        cast(Connection, connection).transport.abort()
    await serving


def _signals() -> tuple[asyncio.Event, asyncio.Event]:
    """Set by the first SIGINT or SIGTERM, and by the second."""
    stop, hurry = asyncio.Event(), asyncio.Event()

    def take() -> None:
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, take)
    return stop, hurry


async def _first(*events: asyncio.Event, serving: asyncio.Task[None] | None = None, seconds: float | None = None) -> None:
    """Wait for any of these, and not longer than this."""
    tasks = [asyncio.create_task(event.wait()) for event in events]
    await asyncio.wait([*tasks, *([serving] if serving else [])], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


def _web_config(bridge: Bridge, engine: EngineConfig, server: ServerConfig) -> uvicorn.Config:
    return uvicorn.Config(
        Ending(create_app(bridge, server, engine), bridge),
        log_config=None,
        log_level="debug" if server.log_level == "debug" else "warning",
        access_log=False,
        lifespan="off",
        http=Connection,
        ws="none",
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        limit_concurrency=MAX_CONNECTIONS,
        server_header=False,
        proxy_headers=False,
    )


async def _announce(bridge: Bridge, server: ServerConfig, port: int) -> None:
    await bridge.ready.wait()
    gc.collect()
    gc.freeze()  # what was imported stays, and a collection that walks through it holds up every stream for some 70 ms
    host = f"[{server.host}]" if ":" in server.host else server.host
    if server.api_key is None and not is_loopback(server.host):
        log.warning("everyone who reaches %s can use this server; --api-key keeps it to those who have the key", server.host)
    print(f"Pointsman is ready at http://{host}:{port} (model {bridge.served().info.name})", flush=True)
