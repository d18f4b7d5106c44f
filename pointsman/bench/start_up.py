"""From the command to the first token: the real `pointsman serve`, started, asked and ended.

The clock starts before the process does and stops when the first piece of text has come over HTTP. The disk is warm after the
first start, so warm-ups do not count.

The very first run on a machine finds no compiled step. It is had again by starting a copy of the package without what was compiled,
in an environment without the user's cache.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pointsman
from pointsman.bench.machine import here
from pointsman.config import EngineConfig, flags

QUESTION = "What is 17 + 25?"
POLL_SECONDS = 0.01
MOST_SECONDS = 900.0
LEAVE_SECONDS = 10.0
COMPILED = "cpu_step-*.o"


def measure_start_up(engine: dict[str, Any], num_warmups: int, num_iters: int, *, compiles: bool) -> int:
    """Start the server `num_warmups` times for the disk and then `num_iters` times; print the medians.

    Args:
        compiles: its step is compiled for the machine; then the very first run is measured too, once.
    """
    runs = [start_once(engine) for _ in range(num_warmups + num_iters)][num_warmups:]
    ready, first = ([run[index] for run in runs] for index in range(2))
    print(f"command to ready: {statistics.median(ready):.2f} s")
    print(f"command to first token: {statistics.median(first):.2f} s (lowest {min(first):.2f}, highest {max(first):.2f})")
    summary = {
        "bench": "start_up",
        "num_iters": num_iters,
        "ready_s": round(statistics.median(ready), 3),
        "first_token_s": round(statistics.median(first), 3),
        "lowest_s": round(min(first), 3),
        "highest_s": round(max(first), 3),
        "flags": serve_flags(engine),
    }
    if compiles:
        summary["first_run_s"] = round(first_run(engine), 3)
        print(f"command to first token on the very first run, with nothing compiled: {summary['first_run_s']:.2f} s")
    print(json.dumps(summary | here(), allow_nan=False))
    return 0


def serve_flags(engine: dict[str, Any]) -> list[str]:
    """The engine's values as they would be typed."""
    names = {name: entry.names[0] for name, entry in flags(EngineConfig).items()} | {"model": "--model-path"}
    words: list[str] = []
    for name, value in engine.items():
        words += [names[name]] if value is True else [names[name], str(value)]
    return words


def start_once(engine: dict[str, Any], environment: dict[str, str] | None = None) -> tuple[float, float]:
    """Seconds from the command to a healthy server, and to the first text. Raises ValueError if the server ends or never answers."""
    start = time.perf_counter()
    with serving(engine, environment) as port:
        ready = time.perf_counter() - start
        _await_text(port)
        return ready, time.perf_counter() - start


def first_run(engine: dict[str, Any]) -> float:
    """Seconds from the command to the first text where nothing is compiled yet; returns when what was begun to be compiled is."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(pointsman.__file__).parent
        copy = shutil.copytree(package, Path(folder) / package.name, ignore=shutil.ignore_patterns(COMPILED))
        caches = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
        hub = os.environ.get("HF_HOME") or f"{caches}/huggingface"
        before = os.environ.get("PYTHONPATH")
        path = os.pathsep.join([folder, *([before] if before else [])])
        _, first = start_once(engine, os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "XDG_CACHE_HOME": folder, "HF_HOME": hub})
        deadline = time.perf_counter() + MOST_SECONDS
        while not list(copy.rglob(COMPILED)):  # by a process that outlives the server
            if time.perf_counter() > deadline:
                raise ValueError(f"the step was not compiled after {MOST_SECONDS:g} s")
            time.sleep(POLL_SECONDS)
        return first


@contextlib.contextmanager
def serving(engine: dict[str, Any], environment: dict[str, str] | None = None) -> Iterator[int]:
    """A healthy server of ours, and its port. Raises ValueError if it ends first or never is."""
    port = free_port()
    command = [sys.executable, "-m", "pointsman", "serve", "--port", str(port), *serve_flags(engine)]
    with tempfile.TemporaryFile() as output, _running(command, output, environment) as process:
        _await_health(process, port, output, time.perf_counter() + MOST_SECONDS)
        yield port


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _running(command: list[str], output: IO[bytes], environment: dict[str, str] | None) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await_health(process: subprocess.Popen[bytes], port: int, output: IO[bytes], deadline: float) -> None:
    while time.perf_counter() < deadline:
        if process.poll() is not None:
            output.seek(0)
            lines = output.read().decode(errors="replace").strip().splitlines()
            raise ValueError(f"the server ended with code {process.returncode}: {lines[-1] if lines else 'it printed nothing'}")
        if _healthy(port):
            return
        time.sleep(POLL_SECONDS)
    raise ValueError(f"the server was not healthy after {MOST_SECONDS:g} s")


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=MOST_SECONDS)
    with contextlib.closing(connection):
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.HTTPStatus.OK
        except (ConnectionError, http.client.HTTPException):
            return False


def _await_text(port: int) -> None:
    """Ask for a streamed answer and return with its first piece of text."""
    body = json.dumps({"messages": [{"role": "user", "content": QUESTION}], "stream": True, "temperature": 0, "max_tokens": 32})
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=MOST_SECONDS)) as connection:
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != http.HTTPStatus.OK:
            raise ValueError(f"the server answered {response.status}: {response.read().decode(errors='replace')}")
        for line in response:
            if line.startswith(b"data: {") and _text(json.loads(line[len(b"data: ") :])):
                return
    raise ValueError("the answer had no text")


def _text(chunk: dict[str, Any]) -> str:
    delta = chunk["choices"][0]["delta"] if chunk.get("choices") else {}
    return (delta.get("reasoning_content") or "") + (delta.get("content") or "")
