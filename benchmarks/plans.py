"""What it costs to tell the other ranks a plan.

    python -m benchmarks.plans [--sequences 1 64 256 1024] [--ranks 1 3 7] [--output FILE]

Plans are those of decoding: a token and, for one sequence in 16, a page each. Every other rank is a process that reads and decodes them
as a real one does, and says so. Microseconds a plan: `make` it, `send` it to all ranks (encoded once), `decode` it;
and `arrive`, from before it is encoded until the last rank has said that it has it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from pointsman.bench.machine import here
from pointsman.engine.channel import Channel
from pointsman.engine.orders import MAX_BYTES, SIZE, Answer, Leave, Run, decode_order, encode
from pointsman.engine.processes import command
from pointsman.step import StepPlan

PLANS = 300


def plan(index: int, sequences: int) -> StepPlan:
    growths = [(lane, 7 * lane) for lane in range(0, sequences, 16)]
    return StepPlan(index, (), tuple(range(sequences)), tuple(growths), ())


def answer(descriptor: int) -> None:
    """Another rank: reads plans, and says of each that it is there."""
    channel = Channel(socket.socket(fileno=descriptor), most=MAX_BYTES)
    while not isinstance(order := decode_order(channel.receive()), Leave):
        assert isinstance(order, Run)
        channel.send(encode(Answer(order.plan.index)))


@contextlib.contextmanager
def ranks(number: int) -> Iterator[list[Channel]]:
    channels, processes = [], []
    for _ in range(number):
        ours, theirs = socket.socketpair()
        with theirs:
            program = f"from benchmarks.plans import answer; answer({theirs.fileno()})"
            processes.append(subprocess.Popen(command(program, sys.path), pass_fds=[theirs.fileno()]))
        channels.append(Channel(ours, most=MAX_BYTES))
    yield channels
    for channel, process in zip(channels, processes, strict=True):
        channel.send(encode(Leave()))
        process.wait()
        channel.close()


def measure(channels: list[Channel], sequences: int) -> dict[str, float]:
    """Medians, in microseconds."""
    times: dict[str, list[float]] = {"make": [], "send": [], "decode": [], "arrive": []}
    for index in range(PLANS):
        begin = time.perf_counter()
        order = Run(plan(index, sequences))
        made = time.perf_counter()
        data = encode(order)
        for channel in channels:
            channel.send(data)
        sent = time.perf_counter()
        for channel in channels:
            channel.receive()
        arrived = time.perf_counter()
        decode_order(memoryview(data)[SIZE.size :])
        decoded = time.perf_counter()
        for name, taken in zip(times, (made - begin, sent - made, decoded - arrived, arrived - made), strict=True):
            times[name].append(1e6 * taken)
    return {name: round(statistics.median(values), 1) for name, values in times.items()} | {"bytes": len(data)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 64, 256, 1024])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 3, 7], help="ranks past the first")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = []
    for number in options.ranks:
        with ranks(number) as channels:
            for sequences in options.sequences:
                rows.append({"ranks": number, "sequences": sequences, **measure(channels, sequences)})
                print("  ".join(f"{name} {value:>8}" for name, value in rows[-1].items()), flush=True)
    record = {"benchmark": "plans", "rows": rows, **here()}
    if options.output:
        options.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
