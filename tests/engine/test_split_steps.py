"""Steps of two ranks as a device launches them, on CPUs in a device's place: the tokens of one rank's torch step.

Lanes that are drawn on the device and lanes that the host draws share steps, experts are given to some, and the next step is launched
before the tokens of the one before are known. Plans go over a socket: who sends one does not wait until it is read.
"""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch

from pointsman import LLM
from pointsman.config import EngineConfig, engine_config
from pointsman.distributed import Mesh
from pointsman.engine import build, engine
from pointsman.engine.assembly import Assembled
from pointsman.engine.executor import Executor, Pending, choose_executor
from pointsman.engine.orders import SIZE, Run, decode_order, encode
from pointsman.step import StepPlan
from tests.distributed.ranks import run_ranks
from tests.engine.replays import rows
from tests.engine.test_device_step import mixed

OPTIONS: dict[str, Any] = {"load_format": "dummy", "cpu_step": "torch", "chunked_prefill_size": 24, "page_size": 4, "num_threads": 1}
Answer = tuple[list[int], np.ndarray, float | None]


def ask(llm: LLM) -> list[Answer]:
    prompts, params = zip(*mixed()[:6], strict=True)
    replays = [rows(30, seed=index) if index % 4 == 1 else None for index in range(len(prompts))]
    with contextlib.closing(llm):
        results = llm.generate(list(prompts), params, replay_routed_experts=replays)
    return [(one.token_ids, one.routed_experts, one.routing_agreement) for result in results for one in result.outputs]


class Telling:
    """Tells the other rank each plan before it runs."""

    def __init__(self, executor: Executor, way: socket.socket) -> None:
        self._executor, self._way = executor, way

    def submit(self, plan: StepPlan) -> Pending:
        self._way.sendall(encode(Run(plan)))
        return self._executor.submit(plan)

    def close(self) -> None:
        self._way.close()
        self._executor.close()


def told(way: BinaryIO) -> StepPlan | None:
    if not (size := way.read(SIZE.size)):
        return None
    order = decode_order(way.read(*SIZE.unpack(size)))
    assert isinstance(order, Run)
    return order.plan


def meet(mesh: Mesh) -> socket.socket:
    """A socket between the two."""
    if mesh.rank == 0:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            mesh.broadcast(torch.tensor([listener.getsockname()[1]]))
            return listener.accept()[0]
    (port,) = mesh.broadcast(torch.zeros(1, dtype=torch.int64)).tolist()
    return socket.create_connection(("127.0.0.1", port))


def drive(mesh: Mesh, folder: str, overlap: bool, want: list[Answer]) -> None:
    way = meet(mesh)
    build.launches_steps = lambda device: True
    options = OPTIONS | {"tp": 2, "ep": mesh.ep, "disable_overlap_schedule": not overlap}
    if mesh.rank == 0:

        def assemble(config: EngineConfig, **_: Any) -> Assembled:
            parts = build.build(config, mesh=mesh, progress=False)
            executor = Telling(choose_executor(parts.runner, overlap=overlap), way)
            return Assembled(parts=parts, executor=executor, weights=parts.weights)

        engine.assemble = assemble
        llm = LLM(folder, progress=False, **options)
        assert llm.engine.step_name == "eager"
        assert llm.engine.choices["tensor_parallel_size"].startswith(
            "attention: 3 of 6 query heads and 1 of 2 key/value heads a rank; experts: "
        )
        got = ask(llm)
        assert [tokens for tokens, _, _ in got] == [tokens for tokens, _, _ in want]
        assert [agreement for _, _, agreement in got] == [agreement for _, _, agreement in want]
        assert all(np.array_equal(mine, theirs) for (_, mine, _), (_, theirs, _) in zip(got, want, strict=True))
    else:
        rank = build.build_rank(engine_config(model_path=folder, **options), mesh, progress=False)
        plans = way.makefile("rb")
        while (plan := told(plans)) is not None:
            rank.runner.launch(plan)


@pytest.fixture(scope="module")
def answers(folder: Path) -> list[Answer]:
    return ask(LLM(str(folder), progress=False, **OPTIONS))


@pytest.mark.parametrize(("ep", "overlap"), [(1, True), (2, True), (2, False)])
def test_two_ranks_say_what_one_says(folder: Path, answers: list[Answer], ep: int, overlap: bool) -> None:
    run_ranks(2, ep, drive, str(folder), overlap, answers)
