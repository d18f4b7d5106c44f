"""A server whose engine is spread over two processes: it answers, and it ends or begins anew when one of them is lost."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pointsman import tiny
from tests.processes import descendants, wait_gone
from tests.server.conftest import Server, start_server
from tests.server.test_endings import Reader

ENGINE = {"model_path": str(tiny.path()), "load_format": "dummy", "tp": 2, "cpu_step": "torch"}
BODY = {"prompt": "Ann has 3 apples", "max_tokens": 8, "temperature": 0, "return_token_ids": True}


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with start_server(ENGINE, getattr(request, "param", {}), program=None) as server:
        server.wait_ready()
        yield server


def rank_of(server: Server) -> int:
    """The process of its second rank."""
    [rank] = [pid for pid in descendants(server.process.pid) if b"worker_process" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return rank


def ask(server: Server) -> list[int]:
    with server.client() as client:
        answer: dict[str, Any] = client.post("/v1/completions", json=BODY).json()
        ids: list[int] = answer["choices"][0]["token_ids"]
        return ids


def test_a_signal_ends_all_in_order(server: Server) -> None:
    assert len(ask(server)) == 8
    processes = descendants(server.process.pid)
    assert rank_of(server) in processes
    code, errors = server.end()
    assert code == 0 and "Traceback" not in errors
    wait_gone(processes)


def test_none_outlives_a_server_that_is_killed(server: Server) -> None:
    processes = descendants(server.process.pid)
    server.process.kill()
    wait_gone(processes)


def test_a_lost_rank_ends_the_server_and_is_named(server: Server) -> None:
    rank, readers = rank_of(server), [Reader(server, "Ann has", 1900) for _ in range(3)]
    os.kill(rank, signal.SIGKILL)
    told = [reader.last()["error"] for reader in readers]
    assert [(error["code"], error["message"]) for error in told] == [("engine_failed", "the engine failed: rank 1 is lost")] * 3
    code, errors = server.ended()
    assert code == 1
    last = errors.splitlines()[-1]
    assert last.startswith(f"pointsman serve: the engine failed: RankLost: rank 1 (pid {rank}) ended: signal 9, Killed")


@pytest.mark.parametrize("server", [{"restart_engine": True}], indirect=True)
def test_an_engine_begins_anew_when_a_rank_is_lost(server: Server) -> None:
    before, rank, reader = ask(server), rank_of(server), Reader(server, "Ann has", 1900)
    health: list[int] = []

    def look() -> None:
        with server.client() as client:
            while not health or health[-1] == 200 or 503 not in health:
                health.append(client.get("/health").status_code)

    looking = threading.Thread(target=look)
    looking.start()
    os.kill(rank, signal.SIGKILL)
    assert reader.last()["error"]["code"] == "engine_failed"
    assert server.process.stdout is not None
    assert server.process.stdout.readline().startswith("Pointsman is ready")
    looking.join()
    assert httpx.get(server.url + "/health").status_code == 200
    assert ask(server) == before
    other = rank_of(server)
    os.kill(other, signal.SIGKILL)  # while nobody asks
    assert server.process.stdout.readline().startswith("Pointsman is ready")
    assert ask(server) == before
    code, errors = server.end()
    assert code == 0
    for pid, number in ((rank, 1), (other, 2)):
        assert f"RankLost: rank 1 (pid {pid}) ended: signal 9, Killed; it is started anew, {number} of 3 times" in errors
