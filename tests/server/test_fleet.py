"""Several engines behind one set of routes: who is asked, who is told, and what becomes of the rest when one goes."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pointsman.config import EngineConfig
from pointsman.engine.engine import Engine
from pointsman.server.errors import ApiError
from pointsman.server.link import EngineLink, Hello
from tests.exchange import OPTIONS, PROMPT, SHAPE
from tests.server.asking import fault
from tests.server.fake_engine import FakeEngine
from tests.server.replica_threads import LIMIT, TOKEN, Street, client, street

LONG = "so long a beginning that it is worth a way: "


def go(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Where it stands still, the error tells the line."""
    asyncio.run(asyncio.wait_for(test(), 2 * LIMIT))


async def complete(asking: httpx.AsyncClient, prompt: Any, **fields: Any) -> httpx.Response:
    return await asking.post("/v1/completions", json={"prompt": prompt, "max_tokens": 4, **fields})


def counted(town: Street) -> list[int]:
    """Tokens of prompts that each replica has seen."""
    return [meter.num_prompt for meter in town.fleet.meters.values()]


def test_prompts_go_where_their_prefix_is_and_else_where_least_runs(folder: Path) -> None:
    async def test() -> None:
        async with street(2, {"model_path": str(folder)}) as town, client(town) as asking:
            for index in range(3):
                assert (await complete(asking, f"{LONG}{index}")).status_code == 200
            first = counted(town)
            assert first[0] > 0 == first[1]
            # the prompts of one call are placed each by itself
            many = (await complete(asking, [f"{number}{number}{number}" for number in range(8)])).json()
            assert [choice["index"] for choice in many["choices"]] == list(range(8))
            assert [meter.finished["length"] for meter in town.fleet.meters.values()] == [3 + 4, 4]
            assert town.fleet.idle.is_set() and town.fleet.running == 0

    go(test)


def test_a_lost_replica_takes_its_own_requests_and_no_others(folder: Path) -> None:
    async def test() -> None:
        async with street(2, {"model_path": str(folder)}) as town, client(town) as asking:
            streams = [asyncio.create_task(complete(asking, f"{index} ENDLESS", max_tokens=8000)) for index in range(4)]
            while [meter.num_generated > 0 for meter in town.fleet.meters.values()] != [True, True]:
                await asyncio.sleep(0.01)
            town.kill(0)
            await asyncio.wait(streams, return_when=asyncio.FIRST_COMPLETED)
            assert (await asking.post("/abort_request", json={"abort_all": True})).json() == {"aborted": 2}
            replies = await asyncio.gather(*streams)
            lost = [reply for reply in replies if reply.status_code == 500]
            assert len(lost) == 2 and {fault(reply, 500)["message"] for reply in lost} == {"replica 0 failed"}
            assert (await asking.get("/health")).status_code == 200
            told = (await asking.get("/server_info")).json()["replicas"]
            assert [(entry["replica"], entry["state"]) for entry in told] == [(0, "failed"), (1, "ready")]
            assert (await complete(asking, "who is there")).status_code == 200
            await town.come()
            town.fleet._bridges[0].fail("it is gone", ApiError(500, "gone"))  # and the seat has not noticed yet
            assert (await complete(asking, "who is there now")).status_code == 200
            while town.fleet.describe()[0]["state"] != "failed":
                await asyncio.sleep(0.01)
            await town.come()
            assert [entry["state"] for entry in town.fleet.describe()] == ["ready", "ready"]
            before = counted(town)
            await complete(asking, [f"{index} again" for index in range(4)])
            assert all(now > then for now, then in zip(counted(town), before, strict=True))

    go(test)


def test_one_that_is_lost_while_it_is_made_like_the_others_holds_up_nobody(folder: Path) -> None:
    """It is to be paused as they are, and goes without an answer."""

    async def test() -> None:
        async with street(2, {"model_path": str(folder)}) as town, client(town) as asking:
            assert (await post(asking, "pause_generation")).json()["paused"]
            town.kill(1)
            while town.fleet.describe()[1]["state"] != "failed":
                await asyncio.sleep(0.01)
            cut = asyncio.Event()
            loop = asyncio.get_running_loop()

            class Fragile(FakeEngine):
                @property
                def paused(self) -> bool:
                    return False

                @paused.setter
                def paused(self, value: bool) -> None:
                    town.kill(2)
                    loop.call_soon_threadsafe(cut.set)
                    raise EOFError

            town.load = Fragile
            coming = asyncio.create_task(town.come())
            await cut.wait()
            while town.fleet.describe()[1]["state"] != "failed":
                await asyncio.sleep(0.01)
            coming.cancel()
            town.load = FakeEngine
            await town.come()
            assert [entry["state"] for entry in town.fleet.describe()] == ["ready", "ready"]
            assert not (await post(asking, "continue_generation")).json()["paused"]

    go(test)


def test_nobody_is_served_where_none_is_there_and_the_reason_of_the_first_is_told(folder: Path) -> None:
    async def test() -> None:
        town = Street(2, {"model_path": str(folder / "nowhere")})
        town.port = await town.seats.listen("127.0.0.1")
        async with client(town) as asking:
            assert fault(await asking.get("/health"), 503)["code"] == "model_loading"
            coming = asyncio.create_task(town.come())
            await town.fleet.gone.wait()
            coming.cancel()
            assert str(town.fleet.reason).endswith("nowhere is not a folder")
            assert str(town.fleet.reason).startswith("replica 0 (a thread): ")
            assert fault(await complete(asking, "x"), 503)["code"] == "engine_stopped"
        await town.end()

    go(test)


def test_names_aborts_and_caches_are_those_of_all(folder: Path) -> None:
    async def test() -> None:
        async with street(2, {"model_path": str(folder)}) as town, client(town) as asking:
            body = {"text": "ENDLESS", "sampling_params": {"max_new_tokens": 8000, "ignore_eos": True}}
            running = [asyncio.create_task(asking.post("/generate", json=body | {"rid": name})) for name in ("a", "b", "c")]
            while town.fleet.running < 3:
                await asyncio.sleep(0.01)
            assert [entry["running"] for entry in town.fleet.describe()] in ([2, 1], [1, 2])
            for name in ("a", "b", "c"):
                assert fault(await asking.post("/generate", json=body | {"rid": name}), 400)["param"] == "rid"
            assert (await asking.post("/abort_request", json={"rid": "b"})).json() == {"aborted": 1}
            assert (await asking.post("/abort_request", json={"abort_all": True})).json() == {"aborted": 2}
            for reply in await asyncio.gather(*running):
                assert reply.json()["meta_info"]["finish_reason"]["type"] == "abort"
            assert (await asking.post("/flush_cache")).status_code == 200
            assert [engine._flushed for engine in town.engines] == [1, 1]

    go(test)


def test_each_replica_has_its_own_numbers(folder: Path) -> None:
    async def test() -> None:
        async with street(2, {"model_path": str(folder)}) as town, client(town) as asking:
            await complete(asking, [f"{index} and" for index in range(4)])
            while any(meter.load is None or not sum(meter.load.counts) for meter in town.fleet.meters.values()):
                await asyncio.sleep(0.01)
            families = {family.name: family for family in text_string_to_metric_families((await asking.get("/metrics")).text)}
            found = {sample.labels["replica"]: sample.value for sample in families["pointsman:generation_tokens"].samples}
            assert found == {"0": 8.0, "1": 8.0}
            assert {sample.labels["replica"] for sample in families["pointsman:engine_steps"].samples} == {"0", "1"}
            load = (await asking.get("/routing_load")).json()
            each = [meter.load for meter in town.fleet.meters.values()]
            assert sum(map(sum, load["counts"])) == sum(sum(one.counts) for one in each if one is not None)
            assert (await asking.get("/openapi.json")).status_code == 200

    go(test)


@pytest.fixture
def pair(folders: list[Path]) -> Iterator[dict[str, Any]]:
    yield {"model_path": str(folders[0]), **OPTIONS, "cpu_step": "torch", "num_threads": 1}


def real(config: EngineConfig) -> Engine:
    return Engine(config, progress=False)


async def greedy_of(town: Street, asking: httpx.AsyncClient, number: int) -> list[int]:
    """What one replica answers: the others are sent nothing meanwhile."""
    kept = {index: town.fleet._placement._replicas.pop(index) for index in list(town.fleet._placement._replicas) if index != number}
    body = {"input_ids": PROMPT, "sampling_params": {"temperature": 0, "max_new_tokens": 20}}
    answer = (await asking.post("/generate", json=body)).json()
    town.fleet._placement._replicas.update(kept)
    ids: list[int] = answer["output_ids"]
    return ids


async def post(asking: httpx.AsyncClient, path: str, **fields: Any) -> httpx.Response:
    return await asking.post(f"/{path}", json=fields)


def test_weights_change_on_all_replicas_or_on_none(pair: dict[str, Any], folders: list[Path], greedy: list[list[int]]) -> None:
    async def test() -> None:
        async with street(2, pair, real) as town, client(town) as asking:
            assert (await post(asking, "update_weights_from_disk", model_path=str(folders[1]))).json()["weight_version"] == "1"
            assert [await greedy_of(town, asking, number) for number in range(2)] == [greedy[1]] * 2
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(town.engines[1].weights, "from_disk", refuse)
                error = fault(await post(asking, "update_weights_from_disk", model_path=str(folders[2]), weight_version="x"), 400)
            assert error["message"] == "replica 1: no such weights here"
            assert [engine.weight_version for engine in town.engines] == ["1", "1"]
            assert [await greedy_of(town, asking, number) for number in range(2)] == [greedy[1]] * 2
            # in parts, of which the second is refused by all: the first is given up by all
            tensors = {name: tensor for name, tensor in SHAPE.tensors(2).items() if "norm" in name}
            first = await send(asking, tensors, begin="true", final="false")
            assert first.json()["weight_version"] == "1"
            assert fault(await send(asking, {"nothing.like.it": tensors["model.norm.weight"]}, begin="false", final="true"), 400)
            refused = fault(await send(asking, tensors, begin="false", final="true"), 400)
            assert "replica 0: begin is false, but no update has begun" in refused["message"]
            assert (await post(asking, "update_weights_from_disk", model_path=str(folders[2]))).json()["weight_version"] == "2"
            assert [await greedy_of(town, asking, number) for number in range(2)] == [greedy[2]] * 2

    go(test)


def refuse(*_: Any, **__: Any) -> None:
    raise ValueError("no such weights here")


async def send(asking: httpx.AsyncClient, tensors: Any, **query: str) -> httpx.Response:
    from safetensors.torch import save  # noqa: PLC0415 - of torch, where it is needed

    headers = {"content-type": "application/octet-stream"}
    return await asking.post("/update_weights_from_tensor", params=query, content=save(tensors), headers=headers)


def test_one_that_comes_after_an_update_is_kept_out_until_all_are_the_same(
    pair: dict[str, Any], folders: list[Path], greedy: list[list[int]]
) -> None:
    """Even where its weights are called as those of the others are."""

    async def test() -> None:
        async with street(2, pair, real) as town, client(town) as asking:
            await post(asking, "update_weights_from_disk", model_path=str(folders[1]), weight_version="0")
            town.kill(0)
            while town.fleet.describe()[0]["state"] != "failed":
                await asyncio.sleep(0.01)
            await town.come()
            assert town.fleet.describe()[0]["state"].startswith("kept out")
            for _ in range(2):
                answer = await asking.post(
                    "/generate", json={"input_ids": PROMPT, "sampling_params": {"temperature": 0, "max_new_tokens": 20}}
                )
                assert answer.json()["output_ids"] == greedy[1]
            norm = {"model.norm.weight": SHAPE.tensors(0)["model.norm.weight"]}
            assert (await send(asking, norm, weight_version="norm")).status_code == 200
            assert town.fleet.describe()[0]["state"].startswith("kept out")
            await post(asking, "update_weights_from_disk", model_path=str(folders[2]))
            assert [entry["state"] for entry in town.fleet.describe()] == ["ready", "ready"]
            assert [await greedy_of(town, asking, number) for number in range(2)] == [greedy[2]] * 2

    go(test)


def test_pauses_and_memory_are_those_of_all(pair: dict[str, Any], greedy: list[list[int]]) -> None:
    """One that comes meanwhile is halted as the others are; what one has done already is not asked of it again."""

    async def test() -> None:
        async with street(2, pair, real) as town, client(town) as asking:
            assert (await post(asking, "pause_generation")).json()["paused"]
            assert (await post(asking, "release_memory_occupation", tags=["kv_cache"])).json()["released"] == ["kv_cache"]
            town.kill(1)
            while town.fleet.describe()[1]["state"] != "failed":
                await asyncio.sleep(0.01)
            await town.come()
            told = town.fleet.describe()
            assert [entry["paused"] for entry in told] == [True, True]
            assert [list(entry["released"]) for entry in told] == [["kv_cache"]] * 2
            assert fault(await asking.get("/ready"), 503)["code"] == "kv_cache_released"
            assert "released already" in fault(await post(asking, "release_memory_occupation", tags=["kv_cache"]), 400)["message"]
            assert (await post(asking, "resume_memory_occupation")).json()["released"] == []
            assert not (await post(asking, "continue_generation")).json()["paused"]
            assert (await asking.get("/ready")).status_code == 200
            assert [await greedy_of(town, asking, number) for number in range(2)] == [greedy[0]] * 2
            group = {
                "master_address": "127.0.0.1",
                "master_port": 1,
                "rank_offset": 1,
                "world_size": 2,
                "group_name": "g",
                "backend": "gloo",
            }
            message = fault(await post(asking, "init_weights_update_group", **group), 400)["message"]
            assert "cannot be had with --dp" in message and "/update_weights_from_disk" in message

    go(test)


def test_strangers_are_sent_away(folder: Path) -> None:
    async def test() -> None:
        town = Street(1, {"model_path": str(folder)})
        port = await town.seats.listen("127.0.0.1")
        for hello in (Hello(token="s" * 32, place="x"), Hello(token="", place=""), Hello(token=TOKEN, place="x" * 5000)):
            link = await asyncio.to_thread(EngineLink, "127.0.0.1", port, hello, seconds=10)
            with pytest.raises(EOFError):
                await asyncio.to_thread(lambda link=link: link.receive(wait=True))
            link.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()
        assert town.seats.num_arrived == 0
        await town.end()

    go(test)


def test_streams_end_with_who_reads_them(folder: Path) -> None:
    """A client that goes away takes its request with it, on whichever replica."""

    async def test() -> None:
        async with street(2, {"model_path": str(folder)}) as town:
            served = town.fleet.served()
            from pointsman.server import reading  # noqa: PLC0415
            from pointsman.server.protocol import CompletionRequest  # noqa: PLC0415

            form = reading.convert(json.loads('{"prompt": "SLOWLY ENDLESS", "ignore_eos": true}'), CompletionRequest)
            answers = [served.complete(form, f"cmpl-{index}") for index in range(2)]
            streams = [town.fleet.submit(answer.requests, answer.names) for answer in answers]
            await anext(streams[0])
            for stream in streams:
                stream.close()
            assert town.fleet.running == 0 and [entry["running"] for entry in town.fleet.describe()] == [0, 0]
            while [engine._aborted for engine in town.engines] != [1, 1]:
                await asyncio.sleep(0.01)

    go(test)
