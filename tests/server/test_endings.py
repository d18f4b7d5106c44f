"""How a server begins and ends: ready, asked to stop, or broken. It never hangs and never leaves its engine behind."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from pointsman.server.lifetime import MAX_RESTARTS, RESTART_SECONDS, Restarts
from tests.processes import listening
from tests.server.conftest import Server, start_server


class Reader(threading.Thread):
    """A client with an endless stream open: the events it has read when the stream ends."""

    def __init__(self, server: Server, prompt: str, max_tokens: int = 5000) -> None:
        super().__init__()
        self.events: list[str] = []
        self.begun = threading.Event()
        self._client = server.client()
        self._body = {"prompt": prompt, "stream": True, "max_tokens": max_tokens, "ignore_eos": True}
        self.start()
        assert self.begun.wait(30)

    def run(self) -> None:
        with self._client as client, client.stream("POST", "/v1/completions", json=self._body) as response:
            for line in response.iter_lines():
                self.events.extend([line] if line else [])
                self.begun.set()

    def last(self) -> dict[str, Any]:
        self.join(30)
        assert not self.is_alive()
        return json.loads(self.events[-1].removeprefix("data: "))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_both_in_order(folder: Path, number: int) -> None:
    with start_server({"model_path": str(folder)}) as server:
        assert server.wait_ready() == f"Pointsman is ready at {server.url} (model fake)\n"
        assert server.end(number) == (0, "the engine is closed\n")


def test_a_signal_while_loading(folder: Path) -> None:
    with start_server({"model_path": str(folder), "random_seed": 60}) as server:
        while not (ports := listening(server.process.pid)):
            assert server.process.poll() is None
            time.sleep(0.01)
        url = f"http://127.0.0.1:{ports[0]}"
        response = httpx.get(url + "/health", timeout=30)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "model_loading")
        assert httpx.get(url + "/ready").status_code == 503
        assert httpx.post(url + "/v1/completions", json={"prompt": "x"}).status_code == 503
        assert server.end() == (0, "")


def test_a_signal_cuts_streams_that_do_not_end(folder: Path) -> None:
    with start_server({"model_path": str(folder)}) as server:
        server.wait_ready()
        reader = Reader(server, "ENDLESS")
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        assert server.end(signal.SIGINT) == (0, "the engine is closed\n")
        assert reader.last()["error"]["message"] == "the server is shutting down"


@pytest.mark.parametrize(("prompt", "words"), [("CRASH", "the engine failed: RuntimeError: secret 1234"), ("KILL", "(signal 9")])
def test_an_engine_that_breaks_ends_everything(folder: Path, prompt: str, words: str) -> None:
    with start_server({"model_path": str(folder)}) as server:
        server.wait_ready()
        reader = Reader(server, "ENDLESS")
        with server.client() as client:
            response = client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 9})
        assert (response.status_code, response.json()["error"]["message"]) == (500, "the engine failed")
        assert reader.last() == response.json()
        code, errors = server.ended()
        assert code == 1
        assert errors.splitlines()[-1].startswith("pointsman serve: ") and words in errors.splitlines()[-1]
        assert ("Traceback" in errors) == (prompt == "CRASH")


def test_an_engine_that_cannot_start(tmp_path: Path, folder: Path) -> None:
    with start_server({"model_path": str(tmp_path / "nothing")}) as server:
        assert server.ended() == (1, f"pointsman serve: {tmp_path / 'nothing'} is not a folder\n")
        assert server.output == ""
    with start_server({"model_path": str(folder), "load_format": "dummy"}) as server:
        code, errors = server.ended()
        assert code == 1
        assert errors.splitlines()[-1] == "pointsman serve: the engine could not start: RuntimeError: secret 1234"


def test_an_engine_that_is_no_program(folder: Path) -> None:
    with start_server({"model_path": str(folder)}, program="sys.exit(7)") as server:
        assert server.ended() == (1, "pointsman serve: the engine's process ended without saying why (exit code 7)\n")


def test_a_port_that_is_taken(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with start_server({"model_path": str(folder)}, {"port": port}) as server:
            code, errors = server.ended()
    assert code == 1
    assert errors.startswith(f"pointsman serve: cannot listen on 127.0.0.1 port {port}: Address already in use")


def test_the_engine_does_not_outlive_a_server_that_is_killed(folder: Path) -> None:
    with start_server({"model_path": str(folder)}) as server:
        server.wait_ready()
        server.process.kill()
        assert server.ended() == (-signal.SIGKILL, "the engine is closed\n")


def test_an_engine_that_breaks_is_started_anew_so_many_times(folder: Path) -> None:
    with start_server({"model_path": str(folder)}, {"restart_engine": True}) as server:
        server.wait_ready()
        for number in range(3):
            reader = Reader(server, "ENDLESS")
            with server.client() as client:
                response = client.post("/v1/completions", json={"prompt": "KILL" if number else "CRASH", "max_tokens": 9})
                assert (response.status_code, response.json()["error"]["code"]) == (500, "engine_failed")
                assert reader.last() == response.json()
                assert server.process.stdout is not None
                assert server.process.stdout.readline() == f"Pointsman is ready at {server.url} (model fake)\n"
                answer = client.post("/v1/completions", json={"prompt": "SAY hello", "max_tokens": 9}).json()
                assert answer["choices"][0]["text"] == "hello"
        with server.client() as client:
            assert client.post("/v1/completions", json={"prompt": "CRASH", "max_tokens": 9}).status_code == 500
        code, errors = server.ended()
    assert code == 1
    assert errors.splitlines()[-1].startswith("pointsman serve: the engine failed: RuntimeError")
    assert [f"{number} of 3" in errors for number in (1, 2, 3)] == [True] * 3


def test_restarts_are_counted_over_a_time() -> None:
    now = 0.0
    restarts = Restarts(lambda: now)
    assert not restarts.allowed(was_ready=False)
    assert [restarts.allowed(was_ready=index == 0) for index in range(MAX_RESTARTS + 1)] == [True] * MAX_RESTARTS + [False]
    now = RESTART_SECONDS
    assert restarts.allowed(was_ready=False) and restarts.number == 1


def test_an_engine_that_cannot_start_is_not_started_anew(tmp_path: Path) -> None:
    with start_server({"model_path": str(tmp_path / "nothing")}, {"restart_engine": True}) as server:
        assert server.ended() == (1, f"pointsman serve: {tmp_path / 'nothing'} is not a folder\n")
