"""The life of the web server: it opens at once, says when the engine is ready, and ends for one of three reasons.

A signal is a wish: running answers may finish for a moment, a second signal takes even that. The end of the engine is a failure:
every client is told, then the server ends too. And the web server may end by itself, which nothing here makes it do.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import logging
import signal
import socket
from collections.abc import Generator

import uvicorn

from pointsman.config import EngineConfig, ServerConfig
from pointsman.server.app import Ending, create_app
from pointsman.server.bridge import Bridge
from pointsman.server.launch import EngineProcess
from pointsman.server.prompts import ServedModel
from pointsman.server.protocol import ApiError

log = logging.getLogger(__name__)

DRAIN_SECONDS = 2.0
CUT_SECONDS = 4


class _WebServer(uvicorn.Server):
    """Leaves signals to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


async def run(listener: socket.socket, process: EngineProcess, engine: EngineConfig, server: ServerConfig) -> str | None:
    """Serve until the end. Returns why it had to end; None where a signal asked for it."""
    stop, hurry = _signals()
    load = functools.partial(ServedModel.load, reasoning_parser=server.reasoning_parser)
    limits = engine.scheduler
    bridge = Bridge(process, load, max_requests=limits.max_running_requests + limits.max_queued_requests)
    if server.tool_call_parser is not None:
        log.warning("--tool-call-parser has no effect in this version: requests with tools are refused")
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
        await _first(bridge.idle, hurry, bridge.gone)
        bridge.fail("a signal", ApiError(503, "the server is shutting down", code="shutting_down"))
    await serving
    for task in (*events, announcing):
        task.cancel()
    process.ready = process.ready or bridge.ready.is_set()
    return reason


def _signals() -> tuple[asyncio.Event, asyncio.Event]:
    """Set by the first SIGINT or SIGTERM, and by the second."""
    stop, hurry = asyncio.Event(), asyncio.Event()

    def take() -> None:
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, take)
    return stop, hurry


async def _first(*events: asyncio.Event) -> None:
    """Wait for any of these, and not longer than running answers are given to finish."""
    tasks = [asyncio.create_task(event.wait()) for event in events]
    await asyncio.wait(tasks, timeout=DRAIN_SECONDS, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


def _web_config(bridge: Bridge, engine: EngineConfig, server: ServerConfig) -> uvicorn.Config:
    return uvicorn.Config(
        Ending(create_app(bridge, server, engine), bridge),
        log_config=None,
        log_level="debug" if server.log_level == "debug" else "warning",
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=CUT_SECONDS,
    )


async def _announce(bridge: Bridge, server: ServerConfig, port: int) -> None:
    await bridge.ready.wait()
    host = f"[{server.host}]" if ":" in server.host else server.host
    if server.api_key is None and not _loopback(server.host):
        log.warning("everyone who reaches %s can use this server; --api-key keeps it to those who have the key", server.host)
    print(f"Pointsman is ready at http://{host}:{port} (model {bridge.served().info.name})", flush=True)


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
