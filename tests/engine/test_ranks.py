"""Several ranks as processes of this machine: the same answers as one, weights on all ranks or none, and the loss of a rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pointsman import LLM, SamplingParams
from pointsman.distributed import Group, listen
from pointsman.engine import orders, processes, spread_weights, workers
from pointsman.engine.control import Control
from pointsman.engine.orders import SIZE
from pointsman.engine.processes import command
from pointsman.engine.workers import RankLost
from pointsman.request import MemoryTag, RequestOutput
from pointsman.update import Update
from tests.models.checkpoints import Shape, write
from tests.processes import children, is_there, wait_gone

SHAPE = Shape(heads=4, kv_heads=2, experts=8, width=32, hidden=32, block=(16, 16))
PROMPTS = [[(7 * index + 3 + number) % 97 for index in range(20 + number)] for number in range(6)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=2, prompt_logprobs=1, return_routed_experts=True)
PARAMS = [GREEDY, GREEDY, *(GREEDY.replace(temperature=1.0, seed=seed, presence_penalty=0.5, n=2) for seed in range(4))]
# sums of two ranks are made in another order than those of one: float32 rounding, of activations of size 1
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    paths = [tmp_path_factory.mktemp(f"weights{seed}") for seed in range(2)]
    for seed, path in enumerate(paths):
        write(path, SHAPE.config(), SHAPE.tensors(seed))
    return paths


def make(folder: Path, **config: Any) -> LLM:
    return LLM(str(folder), progress=False, cpu_step="torch", page_size=4, **config)


def ask(llm: LLM) -> list[RequestOutput]:
    return llm.generate(PROMPTS, PARAMS)


@pytest.fixture(scope="module")
def expected(folders: list[Path]) -> list[list[RequestOutput]]:
    """What one rank answers with either weights."""
    answers = []
    for folder in folders:
        llm = make(folder)
        answers.append(ask(llm))
        llm.close()
    return answers


@pytest.fixture(scope="module")
def llm(folders: list[Path]) -> Iterator[LLM]:
    llm = make(folders[0], tp=2)
    yield llm
    llm.close()


def check(found: list[RequestOutput], expected: list[RequestOutput]) -> None:
    for here, there in zip(found, expected, strict=True):
        for one, other in zip(here.outputs, there.outputs, strict=True):
            assert one.token_ids == other.token_ids
            assert np.array_equal(one.routed_experts, other.routed_experts)
            assert [list(entry) for entry in one.logprobs or ()] == [list(entry) for entry in other.logprobs or ()]
            near = [[item.logprob for entry in choice.logprobs or () for item in entry.values()] for choice in (one, other)]
            assert near[0] == pytest.approx(near[1], abs=TOLERANCE)
        scored = [
            [item.logprob for entry in (output.prompt_logprobs or ())[1:] for item in (entry or {}).values()] for output in (here, there)
        ]
        assert scored[0] == pytest.approx(scored[1], abs=TOLERANCE)


def test_two_ranks_answer_as_one(llm: LLM, expected: list[list[RequestOutput]]) -> None:
    check(ask(llm), expected[0])


def test_so_they_do_without_overlap_and_in_small_chunks(folders: list[Path], expected: list[list[RequestOutput]]) -> None:
    llm = make(folders[0], tp=2, disable_overlap_schedule=True, chunked_prefill_size=16)
    check(ask(llm), expected[0])
    llm.close()


def test_all_ranks_have_new_weights_and_the_old_ones_again(llm: LLM, folders: list[Path], expected: list[list[RequestOutput]]) -> None:
    assert llm.update_weights_from_disk(str(folders[1]), weight_version="new") == "new"
    check(ask(llm), expected[1])
    llm.update_weights_from_tensor(SHAPE.tensors(0))
    check(ask(llm), expected[0])


TAGS: list[list[MemoryTag] | None] = [None, ["kv_cache"], ["weights"]]


@pytest.mark.parametrize("tags", TAGS)
def test_memory_is_released_and_had_again(llm: LLM, folders: list[Path], expected: list[list[RequestOutput]], tags: Any) -> None:
    llm.update_weights_from_disk(str(folders[0]))
    llm.release_memory_occupation(tags)
    llm.resume_memory_occupation(tags)
    check(ask(llm), expected[0])


def test_a_rank_that_cannot_read_new_weights_keeps_all_from_having_them(
    llm: LLM, folders: list[Path], expected: list[list[RequestOutput]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm.update_weights_from_disk(str(folders[0]), weight_version="before")
    with monkeypatch.context() as patch:
        patch.setattr(spread_weights.orders, "FromDisk", lambda path: orders.LeaveGroup("x"))
        with pytest.raises(ValueError, match="rank 1: group_name is 'x', but this engine is in no group"):
            llm.update_weights_from_disk(str(folders[1]))
    assert llm.engine.weight_version == "before"
    check(ask(llm), expected[0])
    with pytest.raises(ValueError, match=r"config\.json"):
        llm.update_weights_from_disk(str(tmp_path))
    check(ask(llm), expected[0])
    llm.update_weights_from_disk(str(folders[1]))
    check(ask(llm), expected[1])


def test_a_part_that_one_rank_refuses_ends_the_update_on_all(llm: LLM, folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    llm.update_weights_from_disk(str(folders[0]))
    weights, tensors = llm.engine.weights, SHAPE.tensors(1)
    with monkeypatch.context() as patch:
        patch.setattr(spread_weights, "save", lambda tensors: b"no safetensors file")
        with pytest.raises(ValueError, match="rank 1: this is not a whole safetensors file"):
            weights.from_tensors(tensors, Update(final=False))
    with pytest.raises(ValueError, match="no update has begun"):
        weights.from_tensors(tensors, Update(begin=False))


def test_all_ranks_are_in_the_group_of_a_trainer(llm: LLM, folders: list[Path], expected: list[list[RequestOutput]]) -> None:
    """The trainer dies at last: the update fails, all leave the group, and the weights before go on serving."""
    llm.update_weights_from_disk(str(folders[0]))
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    here: dict[str, Any] = {"master_address": "127.0.0.1", "master_port": port, "name": "trainers", "timeout": 10.0}
    weights, tensors = llm.engine.weights, SHAPE.tensors(1)
    with pytest.raises(ValueError, match="world_size is 2; the 2 ranks of this engine take the ranks 1 to 2"):
        weights.join_group(Group(rank=1, world_size=2, **here))
    trainer = Group(rank=0, world_size=3, **here)
    with ThreadPoolExecutor(1) as beside:
        joining = beside.submit(trainer.join, listener)
        weights.join_group(Group(rank=1, world_size=3, **here))
        joining.result()
        announced = [(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in tensors.items()]
        sending = beside.submit(trainer.send, list(tensors.values()))
        fresh = weights.from_group(announced, "trainers")
        sending.result()
    assert fresh is not None
    Control(llm.engine).install(fresh)
    check(ask(llm), expected[1])
    del trainer, joining, sending
    with pytest.raises(ValueError, match="trainers"):
        weights.from_group(announced, "trainers")
    with pytest.raises(ValueError, match="this engine is in no group"):
        weights.leave_group("trainers")
    check(ask(llm), expected[1])


def ranks() -> list[int]:
    """Processes of ranks that this one has started."""
    return [pid for pid in children(os.getpid()) if b"worker_process" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.fixture
def own(folders: list[Path]) -> Iterator[tuple[LLM, int]]:
    """An engine to be broken, and the process of its second rank."""
    before = ranks()
    llm = make(folders[0], tp=2)
    [pid] = set(ranks()) - set(before)
    yield llm, pid
    llm.close()
    assert not is_there(pid)


def test_a_rank_that_is_killed_is_named(own: tuple[LLM, int]) -> None:
    llm, pid = own
    stream = llm.stream(PROMPTS[0], GREEDY.replace(max_tokens=400))
    next(stream)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(RankLost, match=rf"^rank 1 \(pid {pid}\) ended: signal 9, Killed$"):
        list(stream)


def test_a_rank_that_stands_still_is_named(own: tuple[LLM, int], monkeypatch: pytest.MonkeyPatch) -> None:
    llm, pid = own
    monkeypatch.setattr(workers, "SILENT_SECONDS", 2.5)
    stream = llm.stream(PROMPTS[0], GREEDY.replace(max_tokens=400))
    next(stream)
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(RankLost, match=rf"^rank 1 \(pid {pid}\) gave no sign of life"):
        list(stream)


@pytest.mark.parametrize("data", [SIZE.pack(5) + b"\xc1abcd", SIZE.pack(1) + b"\x93"])
def test_garbage_ends_a_rank(own: tuple[LLM, int], data: bytes) -> None:
    llm, pid = own
    [link] = llm.engine._executor._workers._links  # type: ignore[attr-defined]
    link.channel.send(data)
    with pytest.raises(RankLost, match=rf"^rank 1 \(pid {pid}\) failed: ValueError: this is no message of the protocol"):
        ask(llm)


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("sys.exit(7)", "ended: exit code 7"),
        ("import os; os.kill(os.getpid(), 11)", "ended: signal 11, Segmentation fault"),
        ("import time; time.sleep(60)", "gave no sign of life"),
        (r"import os, time; os.write({descriptor}, b'\1\0\0\0\xc1'); time.sleep(60)", "was cut off: this is no message"),
        (r"import os, time; os.write({descriptor}, b'\xff\xff\xff\xff'); time.sleep(60)", "was cut off: a message of 4294967295 bytes"),
    ],
)
def test_a_rank_that_does_not_start_is_named(folders: list[Path], monkeypatch: pytest.MonkeyPatch, program: str, words: str) -> None:
    monkeypatch.setattr(processes, "PROGRAM", program)
    monkeypatch.setattr(workers, "START_SECONDS", 1.0)
    before = ranks()
    with pytest.raises(RankLost, match=rf"^rank 1 \(pid \d+\) {words}"):
        make(folders[0], tp=2)
    assert ranks() == before


def test_ranks_end_with_a_parent_that_is_killed(folders: list[Path]) -> None:
    model = f"LLM({str(folders[0])!r}, progress=False, tp=4)"
    program = f"import time; from pointsman import LLM; llm = {model}; print('!', flush=True); time.sleep(99)"
    process = subprocess.Popen(command(program, sys.path), stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"!\n"
    started = children(process.pid)
    assert len(started) == 3
    process.kill()
    process.communicate()
    wait_gone(started)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"distributed_executor_backend": "uni"},
            "distributed_executor_backend 'uni' cannot serve here: it is one rank, and tensor_parallel_size is 2",
        ),
        ({"dp": 2}, "data_parallel_size is 2; this is one engine"),
        ({"distributed_executor_backend": "gpu"}, "it must be one of auto, uni, mp, ray"),
    ],
)
def test_what_cannot_be(folders: list[Path], config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(folders[0], tp=2, **config)
