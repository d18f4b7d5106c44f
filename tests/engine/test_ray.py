"""Ranks by Ray: the same answers as by processes, and the loss of one is named."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from pointsman import LLM
from tests.engine.test_ranks import GREEDY, PROMPTS, SHAPE, ask, check, make
from tests.models.checkpoints import write

ray = pytest.importorskip("ray", reason="Ray is not installed; the extra `ray` has it")
# Ray's own clients warn of what they leave open
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    write(folder, SHAPE.config(), SHAPE.tensors(0))
    return folder


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False)
    yield
    ray.shutdown()


def test_actors_answer_as_processes_do(folder: Path) -> None:
    answers = []
    for backend in ("mp", "ray"):
        llm = make(folder, tp=2, distributed_executor_backend=backend)
        answers.append(ask(llm))
        llm.update_weights_from_tensor(SHAPE.tensors(1))
        answers.append(ask(llm))
        llm.close()
    check(answers[2], answers[0])
    check(answers[3], answers[1])
    assert answers[0][0].outputs[0].token_ids != answers[1][0].outputs[0].token_ids


def test_an_actor_that_is_killed_is_named(folder: Path) -> None:
    llm = make(folder, tp=2, distributed_executor_backend="ray")
    pid = pid_of(llm)
    stream = llm.stream(PROMPTS[0], GREEDY.replace(max_tokens=400))
    next(stream)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=rf"^rank 1 \(pid {pid} on .*\) ended: "):
        list(stream)
    llm.close()


def pid_of(llm: LLM) -> int:
    [link] = llm.engine._executor._workers._links  # type: ignore[attr-defined]
    return int(link.started.place.split()[1])


def test_strangers_are_sent_away() -> None:
    from pointsman.engine.ray import HELLO, _admit  # noqa: PLC0415 - where Ray is

    token = "a" * 32
    cases = [(HELLO.pack(b"b" * 32, 1), None), (HELLO.pack(token.encode(), 3), None), (b"GET / HTTP/1.1", None)]
    for data, rank in [*cases, (HELLO.pack(token.encode(), 2), 2)]:
        near, far = socket.socketpair(socket.AF_UNIX)
        with near, far:
            near.sendall(data)
            near.shutdown(socket.SHUT_WR)
            assert _admit(far, token, 2) == rank


def test_a_cluster_that_is_too_small_is_refused_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("pointsman.engine.ray.placement_group")  # nobody waits for room that there cannot be
    with pytest.raises(
        ValueError, match=r"4 ranks need .*'CPU': 1.* each, the first of them on this host; the cluster has .*'CPU': 2.* in all$"
    ):
        make(folder, tp=4, distributed_executor_backend="ray")


def test_a_cluster_whose_room_is_taken_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pointsman.engine.ray.ROOM_SECONDS", 1.0)
    taken = ray.util.placement_group([{"CPU": 1}])
    assert taken.wait(60)
    with pytest.raises(ValueError, match=r"2 ranks need .*; the cluster has .*'CPU': 2.* in all, some of it in use or on hosts"):
        make(folder, tp=2, distributed_executor_backend="ray")
    ray.util.remove_placement_group(taken)
