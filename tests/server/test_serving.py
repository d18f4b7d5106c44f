"""A running server as a whole: many clients, clients that go, clients of others."""

from __future__ import annotations

import concurrent.futures
import json
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.server.asking import complete, events, fault, generate
from tests.server.conftest import start_server
from tests.server.fake_engine import CONTEXT


def test_models_and_information(client: httpx.Client) -> None:
    [card] = client.get("/v1/models").json()["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == ("fake", "model", CONTEXT)
    assert client.get("/v1/models/fake").json() == card
    assert fault(client.get("/v1/models/other/one"), 404)["code"] == "model_not_found"
    assert client.get("/health").status_code == 200
    assert client.get("/ready").status_code == 200
    info = client.get("/server_info").json()
    assert info["model"]["architecture"] == "MiniMaxM2ForCausalLM"
    assert info["engine"]["scheduler"]["max_running_requests"] == 64


def test_a_fault_in_a_stream_is_its_last_event(client: httpx.Client) -> None:
    lines = complete(client, prompt="FAULT", stream=True).text.strip().split("\n\n")
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["message"] == "the engine could not finish this request"
    assert "secret" not in "".join(lines)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_takes_its_request_with_it(client: httpx.Client, stream: bool) -> None:
    before = int(complete(client, prompt="ABORTED").json()["choices"][0]["text"])
    body = {"prompt": "ENDLESS", "max_tokens": 5000, "stream": stream}
    if stream:
        with client.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json=body, timeout=httpx.Timeout(10, read=0.2))
    for _ in range(200):
        if int(complete(client, prompt="ABORTED").json()["choices"][0]["text"]) == before + 1:
            break
        time.sleep(0.02)
    assert client.get("/server_info").json()["running"] == 0
    assert int(complete(client, prompt="ABORTED").json()["choices"][0]["text"]) == before + 1


def test_many_streams_at_once(client: httpx.Client) -> None:
    def one(number: int) -> str:
        chunks = events(complete(client, prompt=f"SAY number {number}", stream=True, max_tokens=30))
        return "".join(chunk["choices"][0]["text"] for chunk in chunks)

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        assert list(pool.map(one, range(72))) == [f"number {number}" for number in range(72)]


def test_too_many_requests(folder: Path) -> None:
    engine = {"model_path": str(folder), "max_running_requests": 1, "max_queued_requests": 1}
    body = {"prompt": "ENDLESS", "max_tokens": 5000, "stream": True}
    with start_server(engine) as server:
        server.wait_ready()
        with server.client() as client, client.stream("POST", "/v1/completions", json=body):
            response = complete(client, prompt=["a", "b"])
            assert fault(response, 429)["code"] == "queue_full"
            assert response.headers["retry-after"]


def test_the_http_side_never_imports_the_tensor_library() -> None:
    source = "import sys, pointsman.server.run, pointsman.server.serve; print('torch' in sys.modules, 'numpy' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert result.stdout.split() == ["False", "False"]


def test_requests_are_ended_by_name(client: httpx.Client) -> None:
    """A request that is aborted ends at once, for whoever reads it, with what there is."""

    def endless(rid: str, stream: bool) -> httpx.Response:
        return complete(client, prompt="ENDLESS", max_tokens=5000, rid=rid, stream=stream)

    before = num_begun(client)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(endless, *case) for case in (("one", True), ("two", False), ("three", False))]
        wait_for(client, 3)
        while num_begun(client) < before + 3:
            time.sleep(0.01)
        assert fault(complete(client, rid="one"), 400)["param"] == "rid"
        assert client.post("/abort_request", json={"rid": "nobody"}).json() == {"aborted": 0}
        assert client.post("/abort_request", json={"rid": "one"}).json() == {"aborted": 1}
        assert events(waiting[0].result())[-1]["choices"][0]["finish_reason"] == "abort"
        assert client.post("/abort_request", json={"abort_all": True}).json() == {"aborted": 2}
        for answer in waiting[1:]:
            [choice] = answer.result().json()["choices"]
            assert choice["finish_reason"] == "abort" and choice["text"]
            assert ("again " * CONTEXT).startswith(choice["text"])
    assert client.get("/server_info").json()["running"] == 0
    assert complete(client, rid="one").status_code == 200
    assert fault(client.post("/abort_request", json={}), 400)["param"] == "rid"


def test_each_of_a_batch_is_ended_by_its_name(client: httpx.Client) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        fields = {"text": ["ENDLESS", "ENDLESS"], "rid": ["one", "two"], "sampling_params": {"max_new_tokens": 5000}}
        waiting = pool.submit(generate, client, **fields)
        wait_for(client, 2)
        assert client.post("/abort_request", json={"rid": "two"}).json() == {"aborted": 1}
        wait_for(client, 1)
        assert client.post("/abort_request", json={"rid": "one"}).json() == {"aborted": 1}
        answers = waiting.result().json()
    assert [answer["meta_info"]["finish_reason"]["type"] for answer in answers] == ["abort", "abort"]
    assert answers[0]["meta_info"]["completion_tokens"] >= answers[1]["meta_info"]["completion_tokens"]


def num_begun(client: httpx.Client) -> int:
    """How many requests have had a token so far."""
    [line] = [line for line in client.get("/metrics").text.splitlines() if "time_to_first_token_seconds_count" in line]
    return int(float(line.rpartition(" ")[2]))


def wait_for(client: httpx.Client, running: int) -> None:
    """Until so many requests run; whether they have said something is another question."""
    for _ in range(500):
        if client.get("/server_info").json()["running"] == running:
            return
        time.sleep(0.01)
    raise AssertionError(f"never {running} requests at once")


def test_the_cache_is_flushed(client: httpx.Client) -> None:
    before = int(complete(client, prompt="FLUSHED").json()["choices"][0]["text"])
    assert client.post("/flush_cache").json() == {"flushed": True}
    assert client.post("/flush_cache", json={}).json() == {"flushed": True}
    assert int(complete(client, prompt="FLUSHED").json()["choices"][0]["text"]) == before + 2
    assert fault(client.post("/flush_cache", json={"x": 1}), 400)
    assert fault(client.get("/flush_cache"), 405)
