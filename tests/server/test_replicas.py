"""`pointsman serve --dp`: replicas by Ray Serve, and what is refused; what needs no Ray of them is in `test_fleet`."""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from pointsman import tiny
from tests.processes import descendants, wait_gone
from tests.server.conftest import Server, start_server
from tests.server.test_endings import Reader

RAY = importlib.util.find_spec("ray") is not None
# as many as two replicas of two ranks need, whatever the machine has
FOUR_CPUS = "import ray; ray.init(num_cpus=4, include_dashboard=False, logging_level='WARNING'); "
needs_ray = pytest.mark.skipif(not RAY, reason="Ray is not installed; the extra `ray` has it")
ENGINE: dict[str, Any] = {"model_path": str(tiny.path()), "load_format": "dummy", "dp": 2, "cpu_step": "torch"}


def refused(engine: dict[str, Any], server: dict[str, Any]) -> str:
    with start_server(engine, server, program=None) as running:
        code, errors = running.ended()
    assert code == 1
    return errors.splitlines()[-1]


def test_what_replaces_replicas_is_not_asked_for_besides() -> None:
    words = refused(ENGINE, {"restart_engine": True})
    assert words == "pointsman serve: --restart-engine is for one engine; with --dp a replica that fails is replaced in any case"


@pytest.mark.skipif(RAY, reason="Ray is installed")
def test_without_ray_the_extra_is_named() -> None:
    words = refused(ENGINE, {})
    assert words == "pointsman serve: --dp 2 runs replicas through Ray Serve, and Ray is not installed: pip install 'pointsman[ray]'"


@needs_ray
def test_what_a_cluster_cannot_hold_is_refused_with_what_it_has() -> None:
    assert "the ranks of a replica are processes of its host: use 'mp'" in refused(ENGINE | {"distributed_executor_backend": "ray"}, {})
    words = refused(ENGINE | {"dp": 1000}, {})
    assert "could not start 1000 replicas: each needs {'CPU': 1.0}; the cluster has {'CPU': " in words


@needs_ray
def test_one_of_two_is_killed() -> None:
    """Its own answer ends with its name, the other's goes on, another replica comes, and at the end nobody is left."""
    with start_server(ENGINE, {}, program=None) as server:
        assert server.wait_ready().endswith(", 2 replicas)\n")
        readers = [Reader(server, prompt, 1900) for prompt in ("Ann has", "Bob is")]
        with server.client() as client:
            assert [entry["running"] for entry in client.get("/server_info").json()["replicas"]] == [1, 1]
            os.kill(replicas(server.process.pid)[0], signal.SIGKILL)
            while (told := client.get("/server_info").json()["replicas"])[0]["state"] == told[1]["state"] == "ready":
                time.sleep(0.05)
            lost = next(entry["replica"] for entry in told if entry["state"] == "failed")
            assert client.get("/health").status_code == 200
            last = [reader.last() if reader.events[-1] != "data: [DONE]" else None for reader in joined(readers)]
            assert [entry["error"]["message"] for entry in last if entry is not None] == [f"replica {lost} failed"]
            while [entry["state"] for entry in client.get("/server_info").json()["replicas"]] != ["ready", "ready"]:
                time.sleep(0.1)
            body = {"prompt": ["Ann has", "Bob is"], "max_tokens": 8, "temperature": 0}
            assert len(client.post("/v1/completions", json=body).json()["choices"]) == 2
        everybody = descendants(server.process.pid)
        code, errors = server.end()
        assert code == 0 and f"replica {lost} (pid " in errors
        wait_gone(everybody)


@needs_ray
def test_replicas_of_two_ranks_each() -> None:
    """They answer as one engine does, a prompt goes where its beginning is, and a rank that is killed takes its own replica along."""
    body = {"prompt": "Ann has 3 apples", "max_tokens": 8, "temperature": 0, "return_token_ids": True}
    with start_server(ENGINE | {"dp": 1}, {}, program=None) as server:
        server.wait_ready()
        expected = token_ids(server, body)
    with start_server(ENGINE | {"tp": 2, "page_size": 4}, {}, program=None, prelude=FOUR_CPUS) as server:
        assert server.wait_ready().endswith(", 2 replicas)\n")
        assert [token_ids(server, body) for _ in range(2)] == [expected] * 2
        with server.client() as client:
            usage = [client.post("/v1/completions", json=body).json()["usage"]["prompt_tokens_details"] for _ in range(4)]
            assert min(entry["cached_tokens"] for entry in usage) > 0
            readers = [Reader(server, prompt, 1900) for prompt in ("Bob is", "Cid has")]
            assert [entry["running"] for entry in client.get("/server_info").json()["replicas"]] == [1, 1]
            os.kill(ranks(server.process.pid)[0], signal.SIGKILL)
            endings = [reader.events[-1] for reader in joined(readers)]
            assert sorted("failed" in ending for ending in endings) == [False, True]
        everybody = descendants(server.process.pid)
        code, errors = server.end()
        assert code == 0 and "RankLost: rank 1 (pid " in errors
        wait_gone(everybody)


def token_ids(server: Server, body: dict[str, Any]) -> list[int]:
    with server.client() as client:
        found: list[int] = client.post("/v1/completions", json=body).json()["choices"][0]["token_ids"]
        return found


def ranks(pid: int) -> list[int]:
    """Processes of second ranks."""
    return [found for found in descendants(pid) if b"worker_process" in Path(f"/proc/{found}/cmdline").read_bytes()]


def joined(readers: list[Reader]) -> list[Reader]:
    for reader in readers:
        reader.join(60)
    return readers


def replicas(pid: int) -> list[int]:
    """Their processes."""
    return [found for found in descendants(pid) if b"ray::ServeReplica" in Path(f"/proc/{found}/cmdline").read_bytes()]
