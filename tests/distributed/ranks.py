"""Ranks for tests: processes that meet over gloo and run one function each.

They are forked from a server that has imported torch once, so that a rank is there in a moment.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from pointsman.distributed import Mesh

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["pointsman.engine.build", __name__])

LIMIT = 120  # seconds after which a rank counts as hanging


def run_ranks(tp: int, ep: int, function: Callable[..., None], *args: Any, timeout: float = 60.0) -> None:
    """Run `function(mesh, *args)` on every rank of a mesh. Raises AssertionError with what the ranks have raised."""
    port, started = 0, []
    for rank in range(tp):
        here, there = _context.Pipe(duplex=False)
        process = _context.Process(target=_rank, args=(there, tp, ep, rank, port, timeout, function, args))
        process.start()
        there.close()
        if rank == 0:  # a port that it has is nobody else's; a socket that listens cannot be handed to a forkserver's child
            port = int(here.recv_bytes())
        started.append((rank, process, here))
    faults = [_fault(rank, process, here) for rank, process, here in started]
    assert not any(faults), "\n".join(fault for fault in faults if fault)


def _rank(there: Connection, tp: int, ep: int, rank: int, port: int, timeout: float, function: Callable[..., None], args: Any) -> None:
    torch.set_num_threads(1)
    listener = None
    if rank == 0:
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        there.send_bytes(str(port).encode())
    try:
        where: dict[str, Any] = {"address": "127.0.0.1", "port": port, "listener": listener, "device": torch.device("cpu")}
        mesh = Mesh.connect(tp=tp, ep=ep, rank=rank, timeout=timeout, **where)
        function(mesh, *args)
        answer = "done"
    except BaseException:  # noqa: BLE001 - whatever it is, the test tells it
        answer = f"rank {rank}:\n{traceback.format_exc()}"
    there.send_bytes(answer.encode())
    os._exit(0)  # nothing of torch's is worth an orderly end


def _fault(rank: int, process: Any, here: Connection) -> str | None:
    try:
        answer = here.recv_bytes().decode() if here.poll(LIMIT) else f"rank {rank} hangs"
    except EOFError:
        answer = f"rank {rank} ended without a word"
    process.kill()
    process.join()
    return None if answer == "done" else answer
