"""Weights in flight on a real GPU, with CUDA graphs: the bundled checkpoint and a small random one, and others of the same sizes.

The oracle is an engine that was started from the other checkpoint. All engines are deterministic, so that answers are compared bit for
bit. What is measured on the way is printed as lines of JSON.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pointsman import LLM, SamplingParams, tiny
from pointsman.engine.control import Control
from pointsman.models.parameters import held
from pointsman.request import ChoiceDelta, Request
from pointsman.update import Update
from tests.models.checkpoints import Shape, write

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SMALL = Shape(block=(128, 128), layers=3, hidden=512, heads=8, kv_heads=2, head_dim=128, rotary_dim=64, experts=32, top_k=4, width=256)
OPTIONS: dict[str, Any] = {"cuda_graph_max_bs": 16, "chunked_prefill_size": 128, "max_total_tokens": 1 << 16, "max_running_requests": 32}
PROMPTS = [[(7 * index * index + 3 * length) % 97 for index in range(length)] for length in (5, 29, 64, 200)]
PARAMS = SamplingParams(temperature=0.0, max_tokens=24, logprobs=0, return_routed_experts=True, ignore_eos=True)
TRAINER = """
import sys, torch
from safetensors.torch import load_file
from pointsman.distributed import Group, listen
torch.cuda.set_device(1)
torch.zeros(1, device="cuda")
listener = listen("127.0.0.1", 0)
port = listener.getsockname()[1]
print("here", port, flush=True)
group = Group(master_address="127.0.0.1", master_port=port, rank=0, world_size=2, name="weights", backend="nccl", timeout=40)
group.join(listener)
tensors = {name: tensor.cuda() for name, tensor in sorted(load_file(sys.argv[1]).items())}
print("joined", flush=True)
for line in sys.stdin:
    group.send(list(tensors.values()))
    print("sent", flush=True)
"""


def told(**figures: Any) -> None:
    print(json.dumps(figures), flush=True)


def other(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Other weights of the same sizes: scales and norms are drawn anew around what they are."""
    generator = torch.Generator().manual_seed(1)
    changed = {}
    for name, tensor in tensors.items():
        loud = "norm" in name or name.endswith("_scale_inv")
        noise = 1 + 0.3 * torch.randn(tensor.shape, generator=generator) if loud else 1
        changed[name] = (tensor.float() * noise).to(tensor.dtype) if loud else tensor
    return changed


def bundled(path: Path) -> list[Path]:
    """The bundled checkpoint and one of other weights, without tokenizers."""
    tensors = load_file(next(tiny.path().glob("*.safetensors")))
    config = json.loads((tiny.path() / "config.json").read_text())
    write(path / "0", config, tensors)
    write(path / "1", config, other(tensors))
    return [path / "0", path / "1"]


@pytest.fixture(scope="module", params=["bundled", "small"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    path = tmp_path_factory.mktemp(request.param)
    if request.param == "bundled":
        return bundled(path)
    return [SMALL.write(path / str(seed), seed=seed) for seed in range(2)]


def make(folder: Path, **options: Any) -> LLM:
    return LLM(str(folder), device="cuda", progress=False, enable_deterministic_inference=True, **OPTIONS, **options)


def answers(llm: LLM) -> list[tuple[Any, ...]]:
    """All that is told of the prompts; never from the cache, for what is found there is not computed."""
    llm.engine.flush_cache()
    return [
        (choice.outputs[0].token_ids, choice.outputs[0].logprobs, choice.outputs[0].routed_experts.tolist())
        for choice in llm.generate(PROMPTS, PARAMS)
    ]


@pytest.fixture(scope="module")
def fresh(folders: list[Path]) -> list[list[tuple[Any, ...]]]:
    found = []
    for folder in folders:
        with contextlib.closing(make(folder)) as llm:
            assert llm.engine.step_name == "graphs"
            found.append(answers(llm))
    assert found[0] != found[1]
    return found


@pytest.fixture(scope="module")
def engine(folders: list[Path]) -> Iterator[LLM]:
    with contextlib.closing(make(folders[0])) as llm:
        yield llm


@pytest.fixture
def llm(engine: LLM, folders: list[Path]) -> LLM:
    """With the first checkpoint's weights."""
    if engine.weight_version != "0":
        engine.update_weights_from_disk(str(folders[0]), weight_version="0")
    return engine


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def test_from_disk_and_from_tensors(llm: LLM, folders: list[Path], fresh: list[Any]) -> None:
    assert answers(llm) == fresh[0]
    begin = time.perf_counter()
    llm.update_weights_from_disk(str(folders[1]), weight_version="disk")
    disk_s = time.perf_counter() - begin
    assert llm.engine.step_name == "graphs" and answers(llm) == fresh[1]
    begin = time.perf_counter()
    llm.update_weights_from_tensor(tensors_of(folders[0]), weight_version="tensors")
    told(test="update", disk_s=disk_s, tensors_s=time.perf_counter() - begin)
    assert answers(llm) == fresh[0]
    llm.update_weights_from_tensor({name: tensor.cuda() for name, tensor in tensors_of(folders[1]).items()})
    assert answers(llm) == fresh[1]


@pytest.mark.parametrize("damage", ["missing", "nan", "step"])
def test_a_failed_update_changes_nothing(
    llm: LLM, folders: list[Path], fresh: list[Any], tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folders[1], broken)
    tensors = tensors_of(folders[1])
    if damage == "missing":
        del tensors["model.norm.weight"]
    elif damage == "nan":
        tensors["lm_head.weight"].view(-1)[5] = float("nan")
    else:

        def fail(*_: Any, **__: Any) -> Any:
            raise ValueError("no graph today")

        monkeypatch.setattr(llm.engine.weights, "_make_step", fail)
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(ValueError, match={"missing": "missing", "nan": "NaN", "step": "no graph"}[damage]):
        llm.update_weights_from_disk(str(broken))
    assert llm.weight_version == "0" and answers(llm) == fresh[0]


@pytest.mark.parametrize("tags", [["weights"], ["kv_cache"], ["weights", "kv_cache"]])
def test_memory_falls_and_comes_back(llm: LLM, fresh: list[Any], tags: Any) -> None:
    """The device has back what the tensors take that were released, at least nine tenths of it."""

    def used() -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return total - free

    storage, decoder = llm.engine.weights._storage, llm.engine.weights._decoder
    kv, routes = storage._kv, storage._routes
    sizes = {"kv_cache": kv.k.nbytes + kv.v.nbytes + routes.rows_SLK.nbytes + routes.alike_S.nbytes}
    sizes["weights"] = sum(size.num_bytes for size in held(decoder.parameters).values())
    del decoder
    tensors = sum(sizes[tag] for tag in tags)
    before, allocated = used(), torch.cuda.memory_allocated()
    llm.release_memory_occupation(tags)
    without, less = used(), torch.cuda.memory_allocated()
    llm.resume_memory_occupation(tags)
    after = used()
    told(
        test="release", tags=tags, before=before, without=without, after=after, allocated=allocated, allocated_without=less, tensors=tensors
    )
    assert allocated - less >= 0.9 * tensors and before - without >= 0.9 * tensors
    assert abs(after - before) <= 0.1 * (before - without) + (64 << 20)
    assert answers(llm) == fresh[0]


def test_updates_while_requests_are_in_flight(llm: LLM, folders: list[Path], fresh: list[Any]) -> None:
    """As a server does it: read aside, entered between two steps. Whoever saw one version only has its answer."""
    engine, control = llm.engine, Control(llm.engine)
    deltas: list[ChoiceDelta] = []
    stalls, number, num_updates = [], 0, 0
    reading: threading.Thread | None = None
    found: list[Any] = []
    begin = time.monotonic()
    while num_updates < 5 or engine.has_work:
        if engine.scheduler.num_running + engine.num_waiting < 12 and num_updates < 5:
            engine.add(Request(rid=f"{number}", prompt_token_ids=tuple(PROMPTS[number % 4]), sampling=PARAMS))
            number += 1
        deltas += engine.step()
        if reading is None and num_updates < 5:
            version = f"{(num_updates + 1) % 2}.{num_updates}"
            folder = str(folders[(num_updates + 1) % 2])
            reading = threading.Thread(target=lambda: found.append(engine.weights.from_disk(folder, Update(weight_version=version))))  # noqa: B023
            reading.start()
        elif reading is not None and not reading.is_alive():
            now = time.perf_counter()
            control.install(found.pop())
            stalls.append(time.perf_counter() - now)
            reading, num_updates = None, num_updates + 1
    whole = 0
    for rid in range(number):
        mine = [delta for delta in deltas if delta.rid == f"{rid}"]
        if len({delta.weight_version for delta in mine}) == 1 and len(mine[-1].weight_versions) == 1:
            which = int(mine[-1].weight_version.partition(".")[0])
            tokens = [token for delta in mine for token in delta.token_ids]
            assert (tokens, mine[-1].routed_experts.tolist()) == (fresh[which][rid % 4][0], fresh[which][rid % 4][2])
            whole += 1
    told(test="in flight", requests=number, whole=whole, updates=num_updates, stalls_s=stalls, seconds=time.monotonic() - begin)
    assert 0 < whole < number


def test_a_replay_is_used_under_other_weights_too(llm: LLM, folders: list[Path], fresh: list[Any]) -> None:
    records = [torch.tensor(rows).to(torch.uint8).numpy() for _, _, rows in fresh[0]]
    llm.engine.flush_cache()
    again = llm.generate(PROMPTS, PARAMS, replay_routed_experts=records)
    agreement = [result.outputs[0].routing_agreement for result in again]
    same = [result.outputs[0].logprobs == answer[1] for result, answer in zip(again, fresh[0], strict=True)]
    assert agreement == [1.0] * 4 and [result.outputs[0].token_ids for result in again] == [answer[0] for answer in fresh[0]]
    far = max(
        abs(mine[token].logprob - theirs[token].logprob)
        for result, answer in zip(again, fresh[0], strict=True)
        for token, mine, theirs in zip(answer[0], result.outputs[0].logprobs or [], answer[1], strict=True)
    )
    assert far < 1e-4
    llm.update_weights_from_disk(str(folders[1]))
    forced = llm.generate(PROMPTS, PARAMS, replay_routed_experts=records)
    for result, rows in zip(forced, records, strict=True):
        assert result.outputs[0].routed_experts.tolist() == rows.tolist()
    others = [result.outputs[0].routing_agreement for result in forced]
    told(test="replay", same_bits=same, most_difference=far, agreement=agreement, agreement_under_other_weights=others)
    assert max(others) < 1


@contextlib.contextmanager
def trainer(folder: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that has started, imports and all, and is about to join at the port at which it listens."""
    command = [sys.executable, "-c", TRAINER, str(folder / "model.safetensors")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process, int(hear(process, "here"))
    finally:
        process.kill()
        process.communicate()


def hear(process: subprocess.Popen[str], word: str) -> str:
    """Wait for a word, and return what stands behind it; NCCL has lines of its own to say where it is told to."""
    assert process.stdout is not None
    for line in process.stdout:
        first, _, rest = line.strip().partition(" ")
        if first == word:
            return rest
    raise AssertionError(f"the trainer ended without {word!r}")


def announced(tensors: dict[str, Tensor]) -> tuple[list[str], list[str], list[list[int]]]:
    names = sorted(tensors)
    return names, [str(tensors[name].dtype) for name in names], [list(tensors[name].shape) for name in names]


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_from_a_trainer_on_another_gpu(llm: LLM, folders: list[Path], fresh: list[Any]) -> None:
    """Over NCCL."""
    tensors = tensors_of(folders[1])
    with trainer(folders[1]) as (process, port):
        assert process.stdin is not None
        llm.init_weights_update_group("127.0.0.1", port, group_name="weights", timeout=40)
        hear(process, "joined")
        seconds = []
        for version in ("a", "b"):
            process.stdin.write("go\n")
            process.stdin.flush()
            begin = time.perf_counter()
            llm.update_weights_from_distributed(*announced(tensors), group_name="weights", weight_version=version)
            seconds.append(time.perf_counter() - begin)
            hear(process, "sent")
            assert llm.weight_version == version and answers(llm) == fresh[1]
            llm.update_weights_from_disk(str(folders[0]), weight_version="0")
        llm.destroy_weights_update_group("weights")
    told(test="nccl", seconds=seconds, tensors=len(tensors), bytes=sum(tensor.nbytes for tensor in tensors.values()))


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_trainer_that_is_killed(llm: LLM, folders: list[Path], fresh: list[Any]) -> None:
    """Nothing comes, and the engine gives up on it. The time limit is short, and begins when the trainer has started."""
    tensors = tensors_of(folders[1])
    with trainer(folders[1]) as (process, port):
        llm.init_weights_update_group("127.0.0.1", port, group_name="weights", timeout=6)
        hear(process, "joined")
        process.kill()
        begin = time.perf_counter()
        with pytest.raises(ValueError, match="broadcast in the group 'weights' failed"):
            llm.update_weights_from_distributed(*announced(tensors), group_name="weights")
        told(test="nccl, trainer killed", seconds=time.perf_counter() - begin)
    assert llm.weight_version == "0" and answers(llm) == fresh[0]
