"""Pausing, changing weights and freeing memory over HTTP, with the real engine: what waits and goes on, who is told what, what fails."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pointsman import SamplingParams
from pointsman.request import Request
from pointsman.routed_experts import decode_record
from pointsman.server import controls
from pointsman.server.bridge import Bridge
from pointsman.server.errors import ApiError
from pointsman.server.meter import Meter
from pointsman.server.stream import Stream
from tests.exchange import OPTIONS, PROMPT, SHAPE
from tests.server.asking import fault
from tests.server.conftest import Server, start_server

WITH_QUEUE = {**OPTIONS, "max_queued_requests": 6}
RECORD = {"return_routed_experts": True, "routed_experts_format": "record"}


@pytest.fixture(scope="module")
def server(folders: list[Path]) -> Iterator[Server]:
    with start_server({"model_path": str(folders[0]), **WITH_QUEUE}, program=None) as server:
        server.wait_ready()
        yield server


@pytest.fixture
def client(server: Server, folders: list[Path]) -> Iterator[httpx.Client]:
    """Of a server that runs, with the first weights."""
    with server.client() as client:
        yield client
        assert post(client, "pause_generation")["paused"]
        assert post(client, "update_weights_from_disk", model_path=str(folders[0]), weight_version="0")["weight_version"] == "0"
        assert not post(client, "continue_generation")["paused"]


def post(client: httpx.Client, path: str, **fields: Any) -> dict[str, Any]:
    response = client.post(f"/{path}", json=fields)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    assert answer["success"] is True
    return answer


def ask(client: httpx.Client, max_new_tokens: int = 20, **fields: Any) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": max_new_tokens}
    response = client.post("/generate", json={"input_ids": PROMPT, "sampling_params": sampling, **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def version(client: httpx.Client) -> str:
    told: str = client.get("/weight_version").json()["weight_version"]
    assert client.get("/server_info").json()["weight_version"] == told
    return told


def test_an_update_is_in_every_answer(client: httpx.Client, folders: list[Path], greedy: list[list[int]]) -> None:
    assert (ask(client)["output_ids"], version(client)) == (greedy[0], "0")
    assert post(client, "update_weights_from_disk", model_path=str(folders[1]))["weight_version"] == "1"
    answer = ask(client, **RECORD)
    assert (answer["output_ids"], answer["meta_info"]["weight_version"], version(client)) == (greedy[1], "1", "1")
    assert decode_record(answer["meta_info"]["routed_experts"]).weight_versions == ((0, 48, "1"),)
    post(client, "update_weights_from_disk", model_path=str(folders[0]), weight_version="again", flush_cache=False)
    completion = client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 3, "temperature": 0, **RECORD}).json()
    assert completion["metadata"] == {"weight_version": "again"}
    record = decode_record(completion["choices"][0]["routed_experts"])
    assert record.weight_versions == ((0, 28, "1"), (28, 31, "again"))
    with client.stream("POST", "/v1/completions", json={"prompt": PROMPT, "max_tokens": 3, "stream": True}) as lines:
        chunks = [json.loads(line[6:]) for line in lines.iter_lines() if line.startswith("data: {")]
    assert [chunk.get("metadata") for chunk in chunks if chunk["choices"][0]["finish_reason"]] == [{"weight_version": "again"}]


def test_a_pause_keeps_what_comes(client: httpx.Client, folders: list[Path], greedy: list[list[int]]) -> None:
    """The server is alive but not ready; who goes away meanwhile leaves nothing behind."""
    told = {"success": True, "paused": True, "released": [], "weight_version": "0"}
    assert post(client, "pause_generation", mode="in_place") == told
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(ask, client) for _ in range(3)]
        wait_for(client, 3)
        with pytest.raises(httpx.ReadTimeout):
            client.post("/generate", json={"input_ids": PROMPT}, timeout=0.3)
        wait_for(client, 3)
        assert client.get("/health").status_code == 200
        assert fault(client.get("/ready"), 503)["code"] == "paused"
        assert client.get("/server_info").json()["paused"] and not any(future.done() for future in waiting)
        post(client, "update_weights_from_disk", model_path=str(folders[1]), weight_version="b")
        assert client.get("/server_info").json()["paused"] and not any(future.done() for future in waiting)
        post(client, "continue_generation")
        for future in waiting:
            assert future.result()["output_ids"] == greedy[1] and future.result()["meta_info"]["weight_version"] == "b"
    assert client.get("/ready").status_code == 200
    wait_for(client, 0)


@pytest.mark.parametrize("tags", [["weights"], ["kv_cache"], None])
def test_memory_is_released_for_a_time(client: httpx.Client, greedy: list[list[int]], tags: list[str] | None) -> None:
    """Who asks meanwhile waits, and is answered."""
    fields, released = {"tags": tags} if tags else {}, tags or ["weights", "kv_cache"]
    told = post(client, "release_memory_occupation", **fields)
    assert told == {"success": True, "paused": False, "released": released, "weight_version": "0"}
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(ask, client) for _ in range(3)]
        wait_for(client, 3)
        assert client.get("/health").status_code == 200
        assert fault(client.get("/ready"), 503)["code"] == ("memory_released" if tags is None else f"{tags[0]}_released")
        assert client.get("/server_info").json()["released"] == released
        assert "released already" in fault(client.post("/release_memory_occupation", json=fields), 400)["message"]
        assert not any(future.done() for future in waiting)
        assert post(client, "resume_memory_occupation", **fields) == told | {"released": []}
        assert [future.result()["output_ids"] for future in waiting] == [greedy[0]] * 3
    assert client.get("/ready").status_code == 200
    assert "not released" in fault(client.post("/resume_memory_occupation", json=fields), 400)["message"]


def test_memory_is_not_released_under_who_runs(client: httpx.Client) -> None:
    """The pause has to come before the end of the stream; where it is late, once more."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for _ in range(50):
            reading = pool.submit(stream, client, begun := threading.Event(), 450)
            assert begun.wait(30)
            post(client, "pause_generation", mode="keep")
            if client.get("/server_info").json()["running"]:
                break
            post(client, "continue_generation")
        assert "running or kept" in fault(client.post("/release_memory_occupation"), 400)["message"]
        post(client, "pause_generation", mode="retract")
        assert post(client, "release_memory_occupation")["paused"]
        assert post(client, "continue_generation")["released"] == ["weights", "kv_cache"]
        post(client, "resume_memory_occupation")
        assert reading.result()["meta_info"]["completion_tokens"] == 450


def test_weights_that_were_released_may_come_by_an_update(client: httpx.Client, folders: list[Path], greedy: list[list[int]]) -> None:
    post(client, "release_memory_occupation")
    post(client, "update_weights_from_disk", model_path=str(folders[1]), weight_version="new")
    assert fault(client.get("/ready"), 503)["code"] == "kv_cache_released"
    assert post(client, "resume_memory_occupation", tags=["kv_cache"])["weight_version"] == "new"
    assert ask(client)["output_ids"] == greedy[1]


def wait_for(client: httpx.Client, running: int) -> None:
    for _ in range(1000):
        if client.get("/server_info").json()["running"] == running:
            return
        time.sleep(0.01)
    raise AssertionError("nobody came, or nobody left")


def test_while_paused_the_queue_has_its_bound(client: httpx.Client) -> None:
    post(client, "pause_generation", mode="retract")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(ask, client) for _ in range(6)]
        wait_for(client, 6)
        assert fault(client.post("/generate", json={"input_ids": PROMPT}), 429)["code"] == "queue_full"
        post(client, "continue_generation")
        assert len({tuple(future.result()["output_ids"]) for future in waiting}) == 1


@pytest.mark.parametrize("mode", ["abort", "in_place", "keep", "retract"])
def test_streams_under_way(client: httpx.Client, folders: list[Path], mode: str) -> None:
    """The weights change under them: they end, or go on and say so."""
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        reading = [pool.submit(stream, client, begun := threading.Event()) for _ in range(3)]
        assert begun.wait(30)
        assert post(client, "pause_generation", mode=mode)["paused"]
        post(client, "update_weights_from_disk", model_path=str(folders[1]), weight_version="new")
        post(client, "continue_generation")
        for future in reading:
            information = future.result()["meta_info"]
            if information["finish_reason"]["type"] == "abort":
                assert mode == "abort" and information["completion_tokens"] < 150
                continue
            assert information["finish_reason"]["type"] == "length" and information["completion_tokens"] == 150
            record = decode_record(information["routed_experts"])
            known = [name for _, _, name in record.weight_versions]
            assert known in (["0", "new"], ["new"]) or (known == ["0"] and information["weight_version"] == "0")


def stream(client: httpx.Client, begun: threading.Event, max_new_tokens: int = 150) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
    body = {"input_ids": PROMPT, "sampling_params": sampling, "stream": True, **RECORD}
    with client.stream("POST", "/generate", json=body, timeout=120) as lines:
        for line in lines.iter_lines():
            if line.startswith("data: {"):
                begun.set()
                last: dict[str, Any] = json.loads(line[6:])
    return last


def test_updates_while_many_ask(client: httpx.Client, folders: list[Path], greedy: list[list[int]]) -> None:
    """Nobody stops: every answer that one version gave whole is that version's."""
    done = threading.Event()

    def keep_asking(_: int) -> list[dict[str, Any]]:
        found = []
        while not done.is_set():
            found.append(ask(client, cache_salt=str(time.monotonic_ns()), **RECORD))
        return found

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(keep_asking, number) for number in range(3)]
        for number in range(6):
            post(client, "update_weights_from_disk", model_path=str(folders[number % 2]), weight_version=f"{number % 2}.{number}")
            time.sleep(0.05)
        done.set()
        found = [answer for future in asking for answer in future.result()]
    whole = 0
    for answer in found:
        ranges = decode_record(answer["meta_info"]["routed_experts"]).weight_versions
        assert [first for first, _, _ in ranges] == [0, *(last for _, last, _ in ranges[:-1])] and ranges[-1][1] == 48
        if len(ranges) == 1:
            whole += 1
            assert answer["output_ids"] == greedy[int(ranges[0][2].partition(".")[0])]
    assert whole


def test_an_update_that_fails_is_told_and_changes_nothing(
    client: httpx.Client, tmp_path: Path, folders: list[Path], greedy: list[list[int]]
) -> None:
    broken = SHAPE.write(tmp_path / "broken", seed=1)
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:-1])
    fields = {"model_path": str(broken), "weight_version": "broken"}
    assert "not a whole safetensors file" in fault(client.post("/update_weights_from_disk", json=fields), 400)["message"]
    fields["model_path"] = str(tmp_path / "nowhere")
    assert "neither a folder" in fault(client.post("/update_weights_from_disk", json=fields), 400)["message"]
    assert (ask(client)["output_ids"], version(client)) == (greedy[0], "0")


WRONG = [
    ("/pause_generation", {"mode": "wait"}, "mode"),
    ("/pause_generation", {"moode": "abort"}, "moode"),
    ("/continue_generation", {"mode": "abort"}, "mode"),
    ("/continue_generation", {"torch_empty_cache": True}, "torch_empty_cache"),
    ("/release_memory_occupation", {"tags": ["cuda_graph"]}, "tags[0]"),
    ("/release_memory_occupation", {"tags": []}, "tags"),
    ("/resume_memory_occupation", {"tags": "weights"}, "tags"),
    ("/resume_memory_occupation", {"tag": ["weights"]}, "tag"),
    ("/update_weights_from_disk", {}, None),
    ("/update_weights_from_disk", {"model_path": ""}, "model_path"),
    ("/update_weights_from_disk", {"model_path": "x" * 5000}, "model_path"),
    ("/update_weights_from_disk", {"model_path": 3}, "model_path"),
    ("/update_weights_from_disk", {"model_path": "x", "weight_version": ""}, "weight_version"),
    ("/update_weights_from_disk", {"model_path": "x", "weight_version": "x" * 257}, "weight_version"),
    ("/update_weights_from_disk", {"model_path": "x", "flush_cache": 1}, "flush_cache"),
    ("/update_weights_from_disk", {"model_path": "x", "load_format": "dummy"}, "load_format"),
    ("/update_weights_from_disk", {"model_path": "x", "keep_pause": False}, "keep_pause"),
]


@pytest.mark.parametrize(
    ("path", "fields", "values"),
    [
        ("/pause_generation", {"mode": "wait"}, '"abort" or "in_place" or "keep" or "retract"'),
        ("/resume_memory_occupation", {"tags": ["weights", "cuda_graph"]}, '"kv_cache" or "weights"'),
    ],
)
def test_what_a_field_may_be_is_told(client: httpx.Client, path: str, fields: dict[str, Any], values: str) -> None:
    assert values in client.post(path, json=fields).json()["error"]["message"]


@pytest.mark.parametrize(("path", "fields", "named"), WRONG)
def test_what_cannot_be_asked(client: httpx.Client, path: str, fields: dict[str, Any], named: str | None) -> None:
    assert fault(client.post(path, json=fields), 400)["param"] == named
    assert not client.get("/server_info").json()["paused"] and version(client) == "0"


class Owner:
    """Of a stream: how long it has been paused."""

    weight_version = "0"

    def __init__(self, pauses: list[float]) -> None:
        self._pauses = iter(pauses)

    @property
    def halted_seconds(self) -> float:
        return next(self._pauses)

    def forget(self, request: Request) -> None:
        pass

    def abort(self, rid: str, *, tell: bool = False) -> None:
        pass


def test_the_time_of_a_pause_is_not_the_request_s() -> None:
    """The timer looks three times: paused for 0.2 s more, for a moment more, for no more."""

    async def wait() -> float:
        owner = Owner([5.0, 5.2, 5.2, 5.21, 5.21, 5.21])
        with Stream(owner, [Request(rid="a", prompt_token_ids=(1,), sampling=SamplingParams())]) as stream:
            begun = time.monotonic()
            stream.fail_after(0.01, ApiError(504, "late"))
            with pytest.raises(ApiError, match="late"):
                await anext(stream)
            assert list(owner._pauses) == []
            return time.monotonic() - begun

    assert asyncio.run(wait()) >= 0.01 + 0.2 + 0.1


class NoProcess:
    """An engine that never says anything by itself."""

    class end:
        send = staticmethod(lambda message: None)

    def wait(self) -> int:
        raise AssertionError


@pytest.mark.parametrize("paused", [False, True])
def test_a_paused_engine_need_not_give_signs_of_life(paused: bool) -> None:
    async def look() -> str | None:
        loop = asyncio.get_running_loop()
        bridge = Bridge(NoProcess(), lambda info: None, Meter(), max_requests=9, watchdog_seconds=5)  # type: ignore[arg-type]
        bridge.model = object()  # type: ignore[assignment]
        bridge.submit([Request(rid="a", prompt_token_ids=(1,), sampling=SamplingParams())], ["a"])
        asking = asyncio.create_task(bridge.control(controls.Pause(mode="keep")))
        await asyncio.sleep(0)
        bridge._receive(controls.Controlled(number=1, paused=paused, weight_version="0"))
        await asking
        bridge._sign -= 6
        bridge._look(loop, loop.time(), 1)
        return bridge.reason

    assert (asyncio.run(look()) is None) == paused


def test_a_signal_ends_a_paused_server_at_once(folders: list[Path]) -> None:
    """What waits is told, and nobody waits for it to end."""
    with start_server({"model_path": str(folders[0]), **WITH_QUEUE}, {"drain_timeout": 1000}, program=None) as server:
        server.wait_ready()
        with server.client() as client, concurrent.futures.ThreadPoolExecutor(2) as pool:
            post(client, "pause_generation", mode="in_place")
            waiting = pool.submit(client.post, "/generate", json={"input_ids": PROMPT})
            wait_for(client, 1)
            assert server.end(signal.SIGTERM)[0] == 0
            assert fault(waiting.result(), 503)["code"] == "shutting_down"


def test_admin_routes_need_the_admin_key(folders: list[Path]) -> None:
    with start_server({"model_path": str(folders[0]), **WITH_QUEUE}, {"api_key": "sesam", "admin_api_key": "open"}, program=None) as server:
        server.wait_ready()
        with server.client(headers={"authorization": "Bearer sesam"}) as client:
            names = ("pause_generation", "continue_generation", "release_memory_occupation", "resume_memory_occupation")
            for path in (*(f"/{name}" for name in names), "/update_weights_from_disk"):
                fault(client.post(path, json={}), 401)
            assert version(client) == "0"
        with server.client(headers={"authorization": "Bearer open"}) as client:
            assert post(client, "pause_generation")["paused"]
