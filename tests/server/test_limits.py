"""What a client cannot do: hold a connection for nothing, send without end, read without end, wait without end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from uvicorn.server import ServerState

from pointsman.server import serve
from pointsman.server.connection import Connection
from tests.server.asking import chat, complete, events, fault
from tests.server.conftest import Server, start_server
from tests.server.test_endings import Reader

HURRIED = (
    "import pointsman.server.connection as c, pointsman.server.responses as r, pointsman.server.stream as s; "
    "c.LOOK_SECONDS = 0.05; c.HEAD_SECONDS = 0.4; c.STALL_SECONDS = 0.6; r.BODY_SECONDS = 0.4; r.MAX_READING_BYTES = 1 << 20; "
    "s.MAX_BACKLOG = 20000; "
)
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


@pytest.fixture(scope="module")
def hurried(folder: Path) -> Iterator[Server]:
    """A server that does not wait long for clients."""
    with start_server({"model_path": str(folder)}, {"request_timeout": 1.0}, prelude=HURRIED) as server:
        server.wait_ready()
        yield server


@contextlib.contextmanager
def connect(server: Server) -> Iterator[socket.socket]:
    port = int(server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        yield connection


class Transport:
    """What a connection asks of asyncio's."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"socket": self._end, "peername": self._end.getpeername(), "sockname": self._end.getsockname()}.get(name, default)

    def close(self) -> None:
        """The test closes it."""


def test_small_writes_do_not_wait_for_the_client() -> None:
    """Sockets are made as the server makes them: asyncio leaves these as they are."""

    async def delay() -> int:
        with serve._listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
            end, _ = listener.accept()
            with end:
                made = Connection(uvicorn.Config(lambda scope: None, log_config=None), ServerState(), {})
                made.connection_made(Transport(end))  # type: ignore[arg-type]  # all that is asked of it
                made.connection_lost(None)
                return end.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    assert asyncio.run(delay())


def read_all(connection: socket.socket) -> bytes:
    """All that comes until the server ends the connection."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            data += part
    return data


@pytest.mark.parametrize("sent", [b"", b"GET /health HT", HEAD, b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"])
def test_a_connection_that_asks_nothing_is_closed(hurried: Server, sent: bytes) -> None:
    with connect(hurried) as connection:
        connection.sendall(sent)
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 200" if sent.endswith(b"\r\n\r\n") else b"")


def test_a_body_that_does_not_come(hurried: Server) -> None:
    with connect(hurried) as connection:
        connection.sendall(HEAD + b'content-length: 100\r\n\r\n{"prompt":')
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 408 ") and b"the body took longer" in answer


def test_too_many_long_bodies(hurried: Server) -> None:
    body = json.dumps({"prompt": "x" * (2 << 20)}).encode()
    with hurried.client() as client:
        response = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        assert fault(response, 429)["code"] == "queue_full"
        assert complete(client).status_code == 200


def test_a_head_that_is_too_long(hurried: Server) -> None:
    with connect(hurried) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * 100_000)
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"].startswith("Invalid HTTP")


@pytest.mark.parametrize(
    "data", [b"\x00\x01\x02\x03" * 100, b"GARBAGE\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00"]
)
def test_what_is_not_http(hurried: Server, data: bytes) -> None:
    with connect(hurried) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        assert read_all(connection)[:13] in (b"", b"HTTP/1.1 400 ")
    assert httpx.get(f"{hurried.url}/health").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long(hurried: Server, stream: bool) -> None:
    with hurried.client() as client:
        response = complete(client, prompt="ENDLESS", max_tokens=5000, stream=stream)
        if stream:
            error = json.loads(response.text.strip().split("\n\n")[-1].removeprefix("data: "))["error"]
        else:
            error = fault(response, 504)
            assert response.headers["x-should-retry"] == "false"
        assert error["code"] == "request_timeout" and "--request-timeout" in error["message"]
        assert client.get("/server_info").json()["running"] == 0


def test_a_client_that_does_not_read(hurried: Server) -> None:
    """It fills its buffers, then it is cut off, and what it asked for has ended."""
    files = Path(f"/proc/{hurried.process.pid}/fd")
    with connect(hurried) as connection, hurried.client() as client:
        client.get("/health")
        before = len(list(files.iterdir()))
        flood(connection)
        for _ in range(200):
            time.sleep(0.05)
            if len(list(files.iterdir())) < before and client.get("/server_info").json()["running"] == 0:
                break
        else:
            raise AssertionError("it is still connected")


def flood(connection: socket.socket) -> None:
    """Ask for more than the buffers on the way hold, and read nothing."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    body = json.dumps({"text": "x" * 8000, "stream": True, "return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 8})
    connection.sendall(HEAD.replace(b"/v1/completions", b"/generate") + f"content-length: {len(body)}\r\n\r\n{body}".encode())


def test_a_client_that_reads_too_slowly(hurried: Server) -> None:
    """More waits for it than is kept for one client."""
    fields: dict[str, Any] = {"logprobs": 64, "stream": True, "max_tokens": 3000, "n": 4}
    with hurried.client() as client, client.stream("POST", "/v1/completions", json={"prompt": "SAY " + "x" * 3000, **fields}) as response:
        time.sleep(0.5)
        last = [line for line in response.iter_lines() if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "slow_client"


def test_a_stuck_engine_ends_the_server(folder: Path) -> None:
    with start_server({"model_path": str(folder)}, {"watchdog_timeout": 1.5}) as server:
        server.wait_ready()
        with server.client() as client:
            assert complete(client).status_code == 200
            time.sleep(2.0)
            assert complete(client).status_code == 200
            assert fault(complete(client, prompt="STUCK"), 500)["code"] == "engine_failed"
        code, errors = server.ended()
    assert code == 1
    assert errors.splitlines()[-1].startswith("pointsman serve: the engine has been stuck in a step for ")


def test_a_server_that_was_asleep_does_not_take_its_engine_for_stuck(folder: Path) -> None:
    with start_server({"model_path": str(folder)}, {"watchdog_timeout": 1.5}) as server:
        server.wait_ready()
        reader = Reader(server, "ENDLESS")
        server.process.send_signal(signal.SIGSTOP)
        time.sleep(2.0)
        server.process.send_signal(signal.SIGCONT)
        time.sleep(0.3)
        with server.client() as client:
            assert client.post("/abort_request", json={"abort_all": True}).json() == {"aborted": 1}
        reader.join(30)
        assert server.end()[0] == 0


def test_running_answers_may_finish(folder: Path) -> None:
    """After a signal, what runs goes on, and nothing new is taken."""
    with start_server({"model_path": str(folder)}, {"drain_timeout": 20.0}) as server:
        server.wait_ready()
        said = "SLOWLY " * 60
        with server.client() as client:
            body = {"prompt": f"SAY {said}", "stream": True, "max_tokens": 1000}
            with client.stream("POST", "/v1/completions", json=body) as response:
                lines = response.iter_lines()
                next(lines)
                server.process.send_signal(signal.SIGTERM)
                time.sleep(0.3)
                with pytest.raises(httpx.ConnectError):
                    httpx.get(f"{server.url}/health")
                chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        assert server.ended() == (0, "the engine is closed\n")


def test_answers_that_do_not_finish_in_time_are_cut(folder: Path) -> None:
    with start_server({"model_path": str(folder)}, {"drain_timeout": 0.3}) as server:
        server.wait_ready()
        reader = Reader(server, "ENDLESS")
        assert server.end() == (0, "the engine is closed\n")
    assert reader.last()["error"]["code"] == "shutting_down"


def test_a_client_that_does_not_read_does_not_keep_the_server(folder: Path) -> None:
    prelude = "import pointsman.server.run as r; r.CUT_SECONDS = 0.5; "
    with start_server({"model_path": str(folder)}, {"drain_timeout": 0.2}, prelude=prelude) as server:
        server.wait_ready()
        with connect(server) as connection:
            flood(connection)
            time.sleep(1)
            assert server.end()[0] == 0


def test_the_longest_that_is_allowed(hurried: Server) -> None:
    """Values at their bounds are taken."""
    with hurried.client() as client:
        fields: dict[str, Any] = {"stop": ["x" * 1024] * 64, "logprobs": 64, "max_tokens": 2, "cache_salt": "x" * 256, "rid": "x" * 128}
        assert complete(client, **fields).status_code == 200
        fields = {"n": 128, "max_tokens": 1, "temperature": 100, "top_k": 1 << 20, "logit_bias": {str(token): -100 for token in range(300)}}
        assert len(chat(client, **fields).json()["choices"]) == 128
        assert len(events(complete(client, prompt=["x"] * 1024, max_tokens=1, stream=True))) == 1024
