"""The life of the web server: it opens at once, says when the engine is ready, and ends for one of three reasons.

A signal is a wish: running answers may finish (`--drain-timeout`), a second signal takes even that. The end of the engine is a failure:
every client is told, then the server ends too. And the web server may end by itself, which nothing here makes it do.
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


class _WebServer(uvicorn.Server):
    """Leaves signals to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


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
    events = [asyncio.create_task(event.wait()) for event in (stop, bridge.gone)]
    announcing = asyncio.create_task(_announce(bridge, server, listener.getsockname()[1]))
    await asyncio.wait((serving, *events), return_when=asyncio.FIRST_COMPLETED)
    web.should_exit = True
    reason = bridge.reason
    if reason is None and not stop.is_set():
        reason = "the web server has ended"
    if reason is None:
        # a halted engine ends nothing
        await _first(bridge.idle, hurry, bridge.gone, seconds=0 if bridge.halted else server.drain_timeout)
        bridge.fail("a signal", ApiError(503, "the server is shutting down", code="shutting_down"))
    await _finish(web, serving)
    for task in (*events, announcing):
        task.cancel()
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


async def _first(*events: asyncio.Event, seconds: float) -> None:
    """Wait for any of these, and not longer than this."""
    tasks = [asyncio.create_task(event.wait()) for event in events]
    await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
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
