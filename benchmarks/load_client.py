"""What the load client can time: streams and tokens a second on one core, against a stub server in another process.

    python -m benchmarks.load_client [--streams 1 64 256 1024] [--rate 60000] [--client httpx]

The stub sends every stream its next token in turn, as an OpenAI server would write it, at the rate asked for. A client keeps up as long
as it times as many tokens as are sent and its own event loop is not late; where it is busy and gets less than half of them, higher rates
are left out. With `--client httpx` a plain loop over httpx's lines
is measured instead, which is the reason for a client of our own.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Coroutine, Iterator
from multiprocessing.connection import Connection
from typing import Any

from pointsman.bench.machine import here
from pointsman.bench.serving.backends import BACKENDS, Wish
from pointsman.bench.serving.http import HttpClient, Origin
from pointsman.bench.serving.load import LATE_SECONDS, Load, Run
from pointsman.bench.serving.metrics import percentile
from pointsman.bench.serving.query import Query

TOKENS = 100
TICK_SECONDS = 0.005
BUSY = 0.8
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = (
    b'data: {"id":"cmpl-0123456789abcdef","object":"text_completion","created":1764000000,"model":"stub","choices":'
    b'[{"index":0,"text":" token","logprobs":null,"finish_reason":null}]}\n\n'
)
CHUNK = b"%x\r\n%s\r\n" % (len(EVENT), EVENT)
END = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


class Stub(asyncio.Protocol):
    """Answers every request with TOKENS events, one whenever its turn comes."""

    streams: list[list[Any]]
    rate = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if b"POST /" in data:  # behind the body of the request before, where this process was late to read that
            self.transport.write(HEAD)  # type: ignore[attr-defined]
            self.streams.append([self.transport, TOKENS])


async def pace(streams: list[list[Any]]) -> None:
    """Give streams their next tokens in turn, `Stub.rate` a second over all."""
    due, turn = 0.0, 0
    last = time.perf_counter()
    while True:
        await asyncio.sleep(TICK_SECONDS)
        now, rate = time.perf_counter(), Stub.rate
        due, last = due + rate * (now - last), now
        due = min(due, rate * 0.1)  # a stall is not made up for in one burst
        while due >= 1 and streams:
            turn = (turn + 1) % len(streams)
            stream = streams[turn]
            stream[0].write(CHUNK)
            stream[1] -= 1
            due -= 1
            if not stream[1]:
                stream[0].write(END)
                streams[turn] = streams[-1]
                streams.pop()


def serve(other: Connection) -> None:
    """The stub's process, on the last core: says its port, and then hears the rate of each load."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

    async def run() -> None:
        Stub.streams = []
        loop = asyncio.get_running_loop()
        server = await loop.create_server(Stub, "127.0.0.1", 0)
        loop.add_reader(other.fileno(), lambda: setattr(Stub, "rate", other.recv()))
        other.send(server.sockets[0].getsockname()[1])
        await pace(Stub.streams)

    asyncio.run(run())


async def ours(port: int, streams: int, requests: int) -> Run:
    load = Load(client=HttpClient(Origin("127.0.0.1", port)), backend=BACKENDS["openai"], wish=Wish(model="stub"), max_concurrency=streams)
    try:
        return await load.run([Query(text="x", input_len=1, output_len=TOKENS)] * requests, [0.0] * requests)
    finally:
        load.client.close()


async def with_httpx(port: int, streams: int, requests: int) -> Run:
    """The same load through httpx: events are lines, each parsed and stamped."""
    import httpx  # noqa: PLC0415 - of the tests; only this comparison needs it

    from pointsman.bench.serving.load import Effort, watch_delay  # noqa: PLC0415
    from pointsman.bench.serving.query import Outcome  # noqa: PLC0415

    turns, effort = asyncio.Semaphore(streams), Effort()
    outcomes = [Outcome(query=Query(text="x", input_len=1, output_len=TOKENS)) for _ in range(requests)]

    async def one(client: Any, outcome: Outcome) -> None:
        async with turns, client.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json={"prompt": "x"}) as response:
            outcome.sent_s = time.perf_counter() - start
            async for line in response.aiter_lines():
                if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["text"]:
                    outcome.piece_s.append(time.perf_counter() - start)
                    outcome.counted += 1
        outcome.end_s = time.perf_counter() - start

    watch = asyncio.create_task(watch_delay(effort))
    start, spent = time.perf_counter(), time.process_time()
    limits = httpx.Limits(max_connections=streams, max_keepalive_connections=streams)
    async with httpx.AsyncClient(limits=limits, timeout=None) as client:
        await asyncio.gather(*(one(client, outcome) for outcome in outcomes))
    duration = time.perf_counter() - start
    effort.busy_share = (time.process_time() - spent) / duration
    watch.cancel()
    return Run(outcomes=outcomes, duration_s=duration, effort=effort)


CLIENTS: dict[str, Callable[[int, int, int], Coroutine[Any, Any, Run]]] = {"ours": ours, "httpx": with_httpx}


@contextlib.contextmanager
def stub() -> Iterator[tuple[int, Connection]]:
    """A stub's port, and where it is told the rate."""
    here_end, there_end = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(there_end,), daemon=True)
    process.start()
    try:
        yield here_end.recv(), here_end
    finally:
        process.terminate()
        process.join()


def measure(server: tuple[int, Connection], client: str, streams: int, rate: float, seconds: float) -> dict[str, Any]:
    """One load: what was timed, and what it cost."""
    port, told = server
    told.send(rate)
    requests = max(streams, round(rate * seconds / TOKENS))
    run = asyncio.run(CLIENTS[client](port, streams, requests))
    assert all(outcome.error is None and outcome.counted == TOKENS for outcome in run.outcomes)
    tokens = sum(outcome.counted for outcome in run.outcomes)
    late = percentile(sorted(run.effort.late_s), 99)
    return {
        "client": client,
        "streams": streams,
        "asked_tokens_per_s": rate,
        "tokens_per_s": round(tokens / run.duration_s),
        "busy_share": round(run.effort.busy_share, 3),
        "us_per_token": round(1e6 * run.effort.busy_share * run.duration_s / tokens, 2),
        "p99_late_ms": round(1000 * late, 2),
        "keeps_up": run.effort.busy_share < BUSY and late < LATE_SECONDS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64, 256, 1024])
    parser.add_argument("--rate", type=float, nargs="+", default=[10_000.0, 30_000.0, 1e6], help="tokens a second; 1e6: as many as can be")
    parser.add_argument("--client", nargs="+", default=["ours", "httpx"], choices=CLIENTS)
    parser.add_argument("--seconds", type=float, default=0.7, help="of each load, at the rate asked for and at most 60,000 tokens a second")
    arguments = parser.parse_args()
    rows = []
    print(f"{'client':<8}{'streams':>8}{'asked/s':>12}{'tokens/s':>12}{'busy':>8}{'us/token':>10}{'late p99 ms':>13}")
    with stub() as server:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # after the stub has started, which would have that core alone, too
        for client, streams in itertools.product(arguments.client, arguments.streams):
            for rate in sorted(arguments.rate):
                row = measure(server, client, streams, rate, arguments.seconds * min(1.0, 60_000 / rate))
                rows.append(row)
                print(
                    f"{client:<8}{streams:>8}{rate:>12,.0f}{row['tokens_per_s']:>12,}{100 * row['busy_share']:>7.0f}%"
                    f"{row['us_per_token']:>10.2f}{row['p99_late_ms']:>13.2f}",
                    flush=True,
                )
                if row["tokens_per_s"] < 0.5 * rate and row["busy_share"] > BUSY:
                    break  # more would only queue
    print(json.dumps({"bench": "load_client", "rows": rows} | here()))


if __name__ == "__main__":
    main()
