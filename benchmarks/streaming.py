"""What the HTTP side costs an engine that streams: 256 answers at 30 steps a second, and the first byte at an idle server.

    python -m benchmarks.streaming [--streams 256] [--steps 600]

A stub stands for the engine (`benchmarks/stub_engine.py`), in the engine's own process, behind the real socket and the real web server. Its
steps wait as for a GPU, or keep one core busy as a model on a CPU does; each is run alone first, in a process of its own with nobody
to tell, and the loss is between the two rates. The client is this process: it reads its sockets every 10 ms, so that it wakes seldom, and
counts events. What it costs is printed, because on two cores it is in the way too.

Where the time goes is told by looking at the web server's main thread (`benchmarks/sampled.py`), in a run of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pointsman.bench.machine import here
from pointsman.engine.processes import command
from pointsman.request import Request, SamplingParams

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "streaming.json"
STEP_SECONDS = 1 / 30
WARM_STEPS = 150
LOOK_SECONDS = 0.01
FIRST_BYTES = 300
QUESTION = (
    "There are 15 boxes with 12 eggs in each. Somebody drops 3 boxes and all of their eggs break. How many eggs are there in total now?"
)
END = b"data: [DONE]\n\n"
LAST = b"0\r\n\r\n"
TICKS = os.sysconf("SC_CLK_TCK")
PARTS = {
    "responses.py:_event": "JSON",
    "server/wire.py": "read the engine's messages",
    "server/bridge.py": "hand them to streams",
    "server/stream.py": "hand them to streams",
    "server/meter.py": "count",
    "server/output.py": "parse thinking and calls",
    "server/tags.py": "parse thinking and calls",
    "server/events.py": "parse thinking and calls",
    "server/chat_answer.py": "shape",
    "server/answers.py": "shape",
    "server/responses.py": "write events",
    "server/connection.py": "write HTTP",
    "uvicorn/": "write HTTP",
    "h11/": "write HTTP",
    "starlette/": "write HTTP",
    "selector_events.py": "write to sockets",
    "selectors.py": "wait for sockets",
    "asyncio/": "wake tasks",
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one run of all streams gave.

    Attributes:
        rate: tokens a second that all clients got, while all streams ran.
        gap_ms: milliseconds between two pieces of one stream, to 10 ms: median and 99th percentile.
        cores: CPU seconds a second of the web server, the engine's process and the client.
    """

    rate: float
    gap_ms: tuple[float, float]
    cores: dict[str, float]


def program(seconds: float, *, busy: bool) -> str:
    return f"from benchmarks.stub_engine import run; sys.exit(run(seconds={seconds!r}, busy={busy}))"


@contextlib.contextmanager
def server(engine: str, streams: int, prelude: str = "") -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server of its own; the process and its port."""
    source = (
        f"{prelude}from pointsman.config import ServerConfig, engine_config; from pointsman.server.serve import serve; "
        f"sys.exit(serve(engine_config(max_running_requests={streams}), ServerConfig(port=0, log_level='warning'), program={engine!r}))"
    )
    process = subprocess.Popen(command(source, [str(ROOT), *sys.path]), stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        yield process, int(line.split(" at ")[1].split(" ")[0].rpartition(":")[2])
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)


def ask(tokens: int) -> bytes:
    body = json.dumps({"messages": [{"role": "user", "content": QUESTION}], "stream": True, "max_tokens": tokens, "ignore_eos": True})
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


def connect(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def read_all(port: int, streams: int, tokens: int, pids: dict[str, int]) -> Run:
    """Ask for so many streams at once and count what comes. Checks that every stream had every token and its end."""
    question, poll = ask(tokens), select.epoll()
    connections = {connection.fileno(): connection for connection in (connect(port) for _ in range(streams))}
    events, tails = dict.fromkeys(connections, 0), dict.fromkeys(connections, b"")
    last: dict[int, float] = {}
    gaps: list[float] = []
    for number, connection in connections.items():
        connection.setblocking(False)
        poll.register(number, select.EPOLLIN)
        connection.sendall(question)
    marks: list[tuple[float, int, dict[str, float]]] = []
    total = running = 0
    left = len(connections)
    while left:
        time.sleep(LOOK_SECONDS)
        for number, _ in poll.poll(0):
            data = connections[number].recv(1 << 16)
            now = time.perf_counter()
            found = data.count(b"\n\n")
            assert data, "a stream ended early"
            if found and not events[number]:
                running += 1
            elif found and running == streams:
                gaps.append(now - last[number])
            last[number] = now
            events[number] += found
            total += found
            tails[number] = (tails[number] + data)[-len(END) - 64 :] if len(data) < len(END) + 64 else data[-len(END) - 64 :]
            if data.endswith(LAST):
                left -= 1
                poll.unregister(number)
                if len(marks) == 1:
                    marks.append((now, total, cpu_seconds(pids)))
            if running == streams and not marks:
                marks.append((now, total, cpu_seconds(pids)))
    for number, connection in connections.items():
        assert events[number] == tokens, f"a stream had {events[number] - 1} events for {tokens} tokens, of which one does not show"
        assert END in tails[number], "a stream did not end as it should"
        connection.close()
    (start, before, spent), (end, after, at_end) = marks
    seconds = end - start
    gaps.sort()
    return Run(
        rate=(after - before) / seconds,
        gap_ms=(1e3 * statistics.median(gaps), 1e3 * gaps[len(gaps) * 99 // 100]),
        cores={name: (at_end[name] - spent[name]) / seconds for name in spent},
    )


def cpu_seconds(pids: dict[str, int]) -> dict[str, float]:
    """CPU time that these processes and this one have used."""
    spent = {}
    for name, pid in pids.items():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        spent[name] = (int(fields[11]) + int(fields[12])) / TICKS
    return spent | {"client": time.process_time()}


def child_of(pid: int) -> int:
    """The engine's process of a server."""
    [child, *_] = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


def alone(seconds: float, streams: int, steps: int, *, busy: bool) -> float:
    """Tokens a second of the stub with nobody to tell."""
    source = f"from benchmarks.streaming import run_alone; run_alone({seconds!r}, {streams}, {steps}, {busy})"
    out = subprocess.run(command(source, [str(ROOT), *sys.path]), stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT).stdout
    return float(out)


def run_alone(seconds: float, streams: int, steps: int, busy: bool) -> None:
    from benchmarks.stub_engine import StubEngine  # noqa: PLC0415 - for the process that `alone` starts

    engine = StubEngine(seconds=seconds, busy=busy)
    for index in range(streams):
        engine.add(Request(rid=str(index), prompt_token_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=steps)))
    start = time.perf_counter()
    while engine.has_work:
        engine.step()
    print(streams * steps / (time.perf_counter() - start))


def served(seconds: float, streams: int, steps: int, *, busy: bool) -> Run:
    with server(program(seconds, busy=busy), streams) as (process, port):
        pids = {"server": process.pid, "engine": child_of(process.pid)}
        read_all(port, streams, WARM_STEPS, pids)
        return read_all(port, streams, steps, pids)


def parts(seconds: float, streams: int, steps: int) -> dict[str, float]:
    """Share of the web server's CPU time by part."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "parts.json"
        prelude = f"from benchmarks.sampled import sample_into; sample_into({str(path)!r}, {PARTS!r}); "
        with server(program(seconds, busy=False), streams, prelude) as (process, port):
            read_all(port, streams, steps, {"server": process.pid})
        shares: dict[str, float] = json.loads(path.read_text())
        return shares


def first_bytes(count: int) -> dict[str, float]:
    """Milliseconds from the question to the first event of an answer, of a server with nothing else to do and a step that takes none."""
    times = []
    with server(program(0.0, busy=False), 8) as (_, port), connect(port) as connection:
        question = ask(1)
        for _ in range(count + 50):
            time.sleep(0.005)
            started = time.perf_counter()
            connection.sendall(question)
            data = connection.recv(1 << 16)
            while b"data: " not in data:
                data += connection.recv(1 << 16)
            times.append(1e3 * (time.perf_counter() - started))
            while not data.endswith(LAST):
                data += connection.recv(1 << 16)
    times = sorted(times[50:])
    return {"median": statistics.median(times), "p99": times[count * 99 // 100]}


def measure(streams: int, steps: int) -> dict[str, Any]:
    results: dict[str, Any] = {"streams": streams, "steps_per_s": round(1 / STEP_SECONDS, 1), "steps": steps, "runs": {}}
    for name, busy in (("waits", False), ("computes", True)):
        before = alone(STEP_SECONDS, streams, 150, busy=busy)
        run = served(STEP_SECONDS, streams, steps, busy=busy)
        after = alone(STEP_SECONDS, streams, 150, busy=busy)
        own = max(before, after)
        results["runs"][name] = {
            "alone_tokens_per_s": own,
            "served_tokens_per_s": run.rate,
            "loss": 1 - run.rate / own,
            "gap_ms_median": run.gap_ms[0],
            "gap_ms_p99": run.gap_ms[1],
            "cores": run.cores,
        }
    results["parts"] = parts(STEP_SECONDS, streams, steps)
    results["first_byte_ms"] = first_bytes(FIRST_BYTES)
    return results


def show(results: dict[str, Any]) -> None:
    print(f"{results['streams']} streams, {results['steps_per_s']:g} steps/s")
    print(f"{'the engine':<12}{'alone':>12}{'served':>12}{'loss':>9}{'gap ms':>9}{'p99':>8}{'server':>9}{'engine':>9}{'client':>9}")
    for name, run in results["runs"].items():
        cores = run["cores"]
        print(
            f"{name:<12}{run['alone_tokens_per_s']:>12,.0f}{run['served_tokens_per_s']:>12,.0f}{100 * run['loss']:>8.2f}%"
            f"{run['gap_ms_median']:>9.1f}{run['gap_ms_p99']:>8.1f}{cores['server']:>9.2f}{cores['engine']:>9.2f}{cores['client']:>9.2f}"
        )
    print("\nthe web server's time")
    for name, share in results["parts"].items():
        print(f"  {name:<28}{100 * share:>6.1f} %")
    first = results["first_byte_ms"]
    print(f"\nfirst byte over the engine's own: median {first['median']:.2f} ms, p99 {first['p99']:.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--steps", type=int, default=600)
    arguments = parser.parse_args()
    results = here() | measure(arguments.streams, arguments.steps)
    show(results)
    RESULT.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
