"""`pointsman serve`: start the engine's process, then this one's web server, and end both.

The engine's process comes first, so that it loads while this one still imports its web framework.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from pointsman.config import EngineConfig, ServerConfig
from pointsman.server.launch import ENGINE, LOG_FORMAT, EngineProcess

BACKLOG = 2048
FILES = 1 << 16


def serve(engine: EngineConfig, server: ServerConfig, *, program: str = ENGINE) -> int:
    """Answer over HTTP until a signal comes or the engine fails. Returns the exit code. For the main thread.

    Args:
        program: what the engine's process runs; tests put another engine there.
    """
    logging.basicConfig(level=server.log_level.upper(), format=LOG_FORMAT)
    _allow_files()
    with _on_signals(signal.default_int_handler):
        try:
            reason = _serve(engine, server, program)
        except KeyboardInterrupt:
            reason = None
    if reason is not None:
        print("pointsman serve:", " ".join(reason.split()), file=sys.stderr, flush=True)
    return 0 if reason is None else 1


def _serve(engine: EngineConfig, server: ServerConfig, program: str) -> str | None:
    """Why the server had to end; None where it was asked to."""
    try:
        listener = _listen(server.host, server.port)
    except OSError as error:
        return f"cannot listen on {server.host} port {server.port}: {error.strerror or error}"
    with listener:
        if engine.parallel.data_parallel_size > 1:
            return _serve_replicas(listener, engine, server)
        try:
            process = EngineProcess(engine, log_level=server.log_level, program=program)
        except (ValueError, OSError) as error:
            return f"the engine's process cannot be started: {error}"
        try:
            # Imported only now: the engine's process is loading meanwhile.
            from pointsman.server.run import run  # noqa: PLC0415

            return asyncio.run(run(listener, process, engine, server))
        finally:
            with _on_signals(signal.SIG_IGN):
                process.stop()


def _serve_replicas(listener: socket.socket, engine: EngineConfig, server: ServerConfig) -> str | None:
    """The same with replicas, each of which is an engine."""
    if server.restart_engine:
        return "--restart-engine is for one engine; with --dp a replica that fails is replaced in any case"
    try:
        # Imported only where they are asked for: Ray may not be there.
        from pointsman.server.replicas import Replicas  # noqa: PLC0415

        replicas = Replicas(engine, log_level=server.log_level)
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        number = engine.parallel.data_parallel_size
        return f"--dp {number} runs replicas through Ray Serve, and Ray is not installed: pip install 'pointsman[ray]'"
    except ValueError as error:
        return str(error)
    from pointsman.server.run import run  # noqa: PLC0415

    return asyncio.run(run(listener, replicas, engine, server))


@contextlib.contextmanager
def _on_signals(handler: Callable[[int, FrameType | None], Any] | int) -> Iterator[None]:
    """Treat SIGINT and SIGTERM this way for a while."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _allow_files() -> None:
    """As many open files as the system lets this process have: every client is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(hard, FILES)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=BACKLOG)
