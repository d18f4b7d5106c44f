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
from collections.abc import Generator
from typing import TYPE_CHECKING, cast

import uvicorn

from pointsman.config import EngineConfig, ServerConfig
from pointsman.server.access import is_loopback
from pointsman.server.app import Ending, create_app
from pointsman.server.bridge import Bridge
from pointsman.server.connection import MAX_HEAD_BYTES, Connection
from pointsman.server.errors import ApiError
from pointsman.server.fleet import Backend
from pointsman.server.launch import EngineProcess
from pointsman.server.lifetime import MAX_RESTARTS, RESTART_SECONDS, Restarts, first
from pointsman.server.meter import Meter, log_requests_to
from pointsman.server.prompts import ServedModel
from pointsman.server.seats import Seat

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from pointsman.server.replicas import Replicas

CUT_SECONDS = 4
MAX_CONNECTIONS = 8192


class _WebServer(uvicorn.Server):
    """Leaves signals to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


async def run(listener: socket.socket, process: EngineProcess | Replicas, engine: EngineConfig, server: ServerConfig) -> str | None:
    """Serve until the end. Returns why it had to end; None where a signal asked for it."""
    stop, hurry = _signals()
    if server.log_requests:
        log_requests_to(sys.stderr)
    make = functools.partial(_bridge, engine=engine, server=server)
    bridge: Backend = make(process) if isinstance(process, EngineProcess) else process.begin(make)
    if isinstance(bridge, Bridge):
        bridge.start()
    web = _WebServer(_web_config(bridge, engine, server))
    serving = asyncio.create_task(web.serve(sockets=[listener]))
    port = listener.getsockname()[1]
    announcing = asyncio.create_task(_announce(bridge, server, port))
    await first(stop, bridge.gone, serving=serving)
    restarts = Restarts()
    while (
        server.restart_engine
        and bridge.gone.is_set()
        and not stop.is_set()
        and isinstance(bridge, Bridge)
        and isinstance(process, EngineProcess)
        and restarts.allowed(was_ready=bridge.ready.is_set())
        and await _restart(bridge, process, restarts.number)
    ):
        announcing.cancel()
        announcing = asyncio.create_task(_announce(bridge, server, port))
        await first(stop, bridge.gone, serving=serving)
    web.should_exit = True
    reason = bridge.reason
    if reason is None and not stop.is_set():
        reason = "the web server has ended"
    if reason is None:
        # a halted engine ends nothing
        await first(bridge.idle, hurry, bridge.gone, seconds=0 if bridge.halted else server.drain_timeout)
        bridge.fail("a signal", ApiError(503, "the server is shutting down", code="shutting_down"))
    await _finish(web, serving)
    announcing.cancel()
    if isinstance(process, EngineProcess):
        process.ready = reason is None and bridge.ready.is_set()
    else:
        await process.stop()
    return reason


def _bridge(process: EngineProcess | Seat, engine: EngineConfig, server: ServerConfig, name: str = "the engine") -> Bridge:
    """To one engine."""
    load = functools.partial(ServedModel.load, reasoning_parser=server.reasoning_parser, tool_call_parser=server.tool_call_parser)
    max_requests = engine.scheduler.max_running_requests + engine.scheduler.max_queued_requests
    meter = Meter(log_requests=server.log_requests)
    return Bridge(process, load, meter, max_requests=max_requests, watchdog_seconds=server.watchdog_timeout, name=name)


async def _restart(bridge: Bridge, process: EngineProcess, number: int) -> bool:
    """Put another engine in the place of the one that has failed; whether that could be."""
    log.error("%s; it is started anew, %d of %d times in %.0f s", bridge.reason, number, MAX_RESTARTS, RESTART_SECONDS)
    process.end.close()  # here, because the loop watches it
    try:
        await asyncio.to_thread(process.restart)
    except (ValueError, OSError) as error:
        bridge.reason = f"the engine's process cannot be started again: {error}"
        return False
    bridge.revive()
    return True


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


def _web_config(bridge: Backend, engine: EngineConfig, server: ServerConfig) -> uvicorn.Config:
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


async def _announce(bridge: Backend, server: ServerConfig, port: int) -> None:
    await bridge.ready.wait()
    gc.collect()
    gc.freeze()  # what was imported stays, and a collection that walks through it holds up every stream for some 70 ms
    host = f"[{server.host}]" if ":" in server.host else server.host
    if server.api_key is None and not is_loopback(server.host):
        log.warning("everyone who reaches %s can use this server; --api-key keeps it to those who have the key", server.host)
    replicas = "" if isinstance(bridge, Bridge) else f", {len(bridge.meters)} replicas"
    print(f"Pointsman is ready at http://{host}:{port} (model {bridge.served().info.name}{replicas})", flush=True)
