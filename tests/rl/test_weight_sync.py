"""Weights from a trainer into a running server: by HTTP and over a process group, and what happens when either end fails."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save

from pointsman.distributed import Group, listen
from pointsman.rl.weight_sync import SyncFailed, WeightSync, published_names
from tests.exchange import OPTIONS, PROMPT, SHAPE, silent_port
from tests.models import families
from tests.models.checkpoints import Shape
from tests.server.asking import fault
from tests.server.conftest import Server, start_server

OLD, NEW = SHAPE.tensors(0), SHAPE.tensors(1)
HEAD = {"lm_head.weight": NEW["lm_head.weight"]}


@pytest.fixture(scope="module")
def server(folders: list[Path]) -> Iterator[Server]:
    with start_server({"model_path": str(folders[0]), **OPTIONS}, {"admin_api_key": "open"}, program=None) as server:
        server.wait_ready()
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client(headers={"authorization": "Bearer open"}) as client:
        yield client


@pytest.fixture
def sync(server: Server) -> Iterator[WeightSync]:
    sync = WeightSync(server.url, "open", bucket_bytes=20000)
    sync.push(OLD, version="0")
    yield sync
    sync.disconnect()


def ask(client: httpx.Client) -> dict[str, Any]:
    response = client.post("/generate", json={"input_ids": PROMPT, "sampling_params": {"temperature": 0, "max_new_tokens": 20}})
    answer: dict[str, Any] = response.json()
    return answer


@pytest.mark.parametrize("by_group", [False, True])
def test_pushed_weights_serve(client: httpx.Client, sync: WeightSync, greedy: list[list[int]], by_group: bool) -> None:
    assert (ask(client)["output_ids"], sync.version) == (greedy[0], "0")
    if by_group:
        sync.connect()
    assert sync.push(NEW) == "1" == sync.version
    answer = ask(client)
    assert (answer["output_ids"], answer["meta_info"]["weight_version"]) == (greedy[1], "1")
    assert sync.push(iter(OLD.items()), version="step 7", flush_cache=False, abort_all_requests=True) == "step 7"
    client.post("/flush_cache")
    assert ask(client)["output_ids"] == greedy[0]
    sync.push(NEW, dtype=torch.bfloat16)
    assert ask(client)["output_ids"] == greedy[1]


@pytest.mark.parametrize("by_group", [False, True])
def test_what_the_server_refuses_is_raised(client: httpx.Client, sync: WeightSync, greedy: list[list[int]], by_group: bool) -> None:
    """In the last bucket, when the others have come; a group has ended with that, and another can be made."""
    broken = NEW | {"zzz": torch.ones(3)}
    for _ in range(2):
        if by_group:
            sync.connect(timeout=5)
        with pytest.raises(SyncFailed, match="zzz does not belong to this model"):
            sync.push(broken)
        assert (ask(client)["output_ids"], sync.version) == (greedy[0], "0")
    with pytest.raises(SyncFailed, match="no tensors"):
        sync.push({})


def test_a_key_is_needed(server: Server) -> None:
    with pytest.raises(SyncFailed, match="admin API key"):
        WeightSync(server.url).push(HEAD)
    with pytest.raises(SyncFailed, match="does not answer"):
        WeightSync("http://127.0.0.1:1").push(HEAD)


def test_pausing(client: httpx.Client, sync: WeightSync) -> None:
    sync.pause("keep")
    assert client.get("/server_info").json()["paused"]
    sync.resume()
    assert not client.get("/server_info").json()["paused"]


@pytest.mark.parametrize("tags", [(), ("weights",), ("kv_cache",), ("kv_cache", "weights")])
def test_memory_is_released_and_had_again(client: httpx.Client, sync: WeightSync, greedy: list[list[int]], tags: tuple[Any, ...]) -> None:
    """Weights are then those of the folder that the server began with, whatever was pushed since."""
    sync.push(NEW, version="pushed")
    sync.release_memory(*tags)
    assert set(client.get("/server_info").json()["released"]) == set(tags or ("weights", "kv_cache"))
    with pytest.raises(SyncFailed, match="released already"):
        sync.release_memory(*tags)
    version = sync.resume_memory(*tags)
    assert client.get("/server_info").json()["released"] == []
    assert version == sync.version == ("pushed" if tags == ("kv_cache",) else "0")
    client.post("/flush_cache")
    assert ask(client)["output_ids"] == greedy[version == "pushed"]
    with pytest.raises(SyncFailed, match="not released"):
        sync.resume_memory(*tags)


@pytest.mark.parametrize("by_group", [False, True])
def test_pushed_weights_take_the_place_of_released_ones(
    client: httpx.Client, sync: WeightSync, greedy: list[list[int]], by_group: bool
) -> None:
    if by_group:
        sync.connect()
    sync.release_memory()
    assert sync.push(NEW, version="pushed") == "pushed"
    assert client.get("/server_info").json()["released"] == ["kv_cache"]
    sync.resume_memory("kv_cache")
    assert ask(client)["output_ids"] == greedy[1]


def join(client: httpx.Client, port: int, timeout: float) -> httpx.Response:
    body = {"master_address": "127.0.0.1", "master_port": port, "world_size": 2, "backend": "gloo", "timeout": timeout}
    return client.post("/init_weights_update_group", json=body)


def test_a_trainer_that_never_comes(client: httpx.Client, sync: WeightSync, greedy: list[list[int]]) -> None:
    """Others are answered meanwhile, and a second update is told to wait."""
    done: list[httpx.Response] = []
    with silent_port() as port:
        joining = threading.Thread(target=lambda: done.append(join(client, port, 2)))
        joining.start()
        while not done:
            assert ask(client)["output_ids"] == greedy[0]
        joining.join()
    assert "did not come together" in fault(done[0], 400)["message"]
    assert sync.push(HEAD, version="h") == "h"


def test_a_port_that_is_taken(sync: WeightSync) -> None:
    with silent_port() as port, pytest.raises(SyncFailed, match=f"cannot listen on 127.0.0.1 port {port}: .*in use"):
        sync.connect(master_port=port)


def test_a_trainer_that_dies(client: httpx.Client, sync: WeightSync, greedy: list[list[int]]) -> None:
    """It has joined and announced, and sends nothing."""
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    trainer = Group(master_address="127.0.0.1", master_port=port, rank=0, world_size=2, name="weight_update_group", timeout=30)
    meeting = threading.Thread(target=trainer.join, args=[listener])
    meeting.start()
    assert join(client, port, 2).status_code == 200
    meeting.join()
    body = {"names": ["lm_head.weight"], "dtypes": ["bfloat16"], "shapes": [[97, 32]]}
    error = fault(client.post("/update_weights_from_distributed", json=body), 400)
    assert "broadcast" in error["message"] and "no more use" in error["message"]
    assert (ask(client)["output_ids"], sync.version) == (greedy[0], "0")
    assert "in no group" in fault(client.post("/update_weights_from_distributed", json=body), 400)["message"]
    assert "in no group" in fault(client.post("/destroy_weights_update_group", json={}), 400)["message"]


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("init_weights_update_group", {"backend": "mpi"}, "backend"),
    ("init_weights_update_group", {"master_port": 0}, "master_port"),
    ("init_weights_update_group", {"rank_offset": 2}, "rank_offset"),
    ("init_weights_update_group", {"world_size": 1}, "world_size"),
    ("init_weights_update_group", {"timeout": 1e9}, "timeout"),
    ("update_weights_from_distributed", {"names": ["x"], "dtypes": [], "shapes": [[1]]}, "dtypes"),
    ("update_weights_from_distributed", {"names": ["x"], "dtypes": ["float32"], "shapes": [[1], [2]]}, "names"),
    ("update_weights_from_distributed", {"names": ["x"], "dtypes": ["float32"], "shapes": [[-1]]}, "shapes[0][0]"),
    ("update_weights_from_distributed", {"names": ["x"], "dtypes": ["float32"], "shapes": [[1]], "load_format": "x"}, "load_format"),
    ("update_weights_from_tensor", {"serialized_named_tensors": "?"}, "serialized_named_tensors"),
    ("update_weights_from_tensor", {"serialized_named_tensors": []}, "serialized_named_tensors"),
    ("update_weights_from_tensor", {"serialized_named_tensors": "", "quantise": True}, "quantise"),
    ("destroy_weights_update_group", {"group_name": ""}, "group_name"),
]


@pytest.mark.parametrize(("path", "fields", "named"), WRONG)
def test_what_cannot_be_asked(client: httpx.Client, path: str, fields: dict[str, Any], named: str) -> None:
    if path.startswith("init"):
        fields = {"master_address": "127.0.0.1", "master_port": 9, "world_size": 2, "backend": "gloo"} | fields
    assert fault(client.post(f"/{path}", json=fields), 400)["param"] == named


def test_tensors_as_json_and_as_they_are(client: httpx.Client, sync: WeightSync, greedy: list[list[int]]) -> None:
    data = save(NEW)
    text = base64.b64encode(data).decode()
    answer = client.post("/update_weights_from_tensor", json={"serialized_named_tensors": [text], "weight_version": "j"}).json()
    assert answer == {"success": True, "paused": False, "released": [], "weight_version": "j"} and ask(client)["output_ids"] == greedy[1]
    binary = {"content-type": "application/octet-stream"}
    sync.push(OLD)
    url = "/update_weights_from_tensor?weight_version=b&final=true"
    assert client.post(url, content=data, headers=binary).json()["weight_version"] == "b"
    assert ask(client)["output_ids"] == greedy[1]
    for query, named in (("final=1", "final"), ("x=1", "x"), ("serialized_named_tensors=1&begin=maybe", "begin")):
        assert fault(client.post(f"/update_weights_from_tensor?{query}", content=data, headers=binary), 400)["param"] == named
    assert "safetensors" in fault(client.post(url, content=b"\x80\x04N.", headers=binary), 400)["message"]
    fault(client.post(url, content=data, headers={"content-type": "text/plain"}), 415)


def test_a_hugging_face_model_has_published_names(folders: list[Path]) -> None:
    """Its state in memory, renamed, is the checkpoint that it was read from."""
    transformers = pytest.importorskip("transformers")
    plain = Shape().tensors(3)
    config = transformers.MiniMaxM2Config(
        **{name: value for name, value in Shape().config().items() if name not in ("auto_map", "architectures")}
    )
    model = transformers.MiniMaxM2ForCausalLM(config)
    state = dict(model.state_dict())
    found = dict(published_names(state))
    assert found.keys() == plain.keys()
    assert {name: tensor.shape for name, tensor in found.items()} == {name: tensor.shape for name, tensor in plain.items()}
    layer = "model.layers.0."
    stack = state[layer + "mlp.experts.gate_up_proj"]
    assert torch.equal(found[layer + "block_sparse_moe.experts.3.w1.weight"], stack[3, :24])
    assert torch.equal(found[layer + "block_sparse_moe.experts.3.w3.weight"], stack[3, 24:])


@pytest.mark.parametrize("name", ["qwen, dense layers", "mixtral", "glm"])
def test_other_models_names_are_those_they_save(name: str, tmp_path: Path) -> None:
    model = families.model_of(name)
    saved = load_file(families.save(model, tmp_path) / "model.safetensors")
    found = dict(published_names(model.state_dict(), model.config.model_type))
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[key], tensor.float()) for key, tensor in saved.items())
    with pytest.raises(ValueError, match="'llama'; names are known of minimax_m2"):
        dict(published_names({}, "llama"))
