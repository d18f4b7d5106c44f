"""Weights that a trainer broadcasts to an engine in the caller's own process, over gloo."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pointsman import LLM
from pointsman.distributed import Group, listen
from tests.exchange import SHAPE, Answer, answer, make, silent_port

NEW = SHAPE.tensors(1)


def announced(names: list[str]) -> tuple[list[str], list[str], list[list[int]]]:
    return names, [str(NEW[name].dtype) for name in names], [list(NEW[name].shape) for name in names]


class Trainer:
    """Rank 0, in a thread of its own."""

    def __init__(self) -> None:
        listener = listen("127.0.0.1", 0)
        self.port: int = listener.getsockname()[1]
        here: dict[str, Any] = {"master_address": "127.0.0.1", "master_port": self.port, "timeout": 20}
        self._group = Group(**here, rank=0, world_size=2, name="weight_update_group")
        self._thread = threading.Thread(target=self._group.join, args=[listener])
        self._thread.start()

    def send(self, names: list[str]) -> None:
        self._thread.join()
        self._thread = threading.Thread(target=lambda: self._group.send([NEW[name] for name in names]))
        self._thread.start()


@pytest.fixture
def llm(folders: list[Path]) -> Iterator[LLM]:
    with contextlib.closing(make(folders[0])) as llm:
        yield llm


@pytest.fixture
def trainer(llm: LLM) -> Trainer:
    trainer = Trainer()
    llm.init_weights_update_group("127.0.0.1", trainer.port, backend="gloo", timeout=2)
    return trainer


def test_broadcast_weights_are_those_of_a_fresh_start(llm: LLM, trainer: Trainer, answers: dict[str, list[Answer]]) -> None:
    """In two parts; nothing is in force before the last."""
    names = sorted(NEW)
    parts = names[:10], names[10:]
    for number, part in enumerate(parts):
        trainer.send(part)
        last = number == 1
        version = llm.update_weights_from_distributed(*announced(part), begin=not number, final=last, weight_version="new")
        assert version == llm.weight_version == ("new" if last else "0")
        if not last:
            assert answer(llm) == answers["compiled"][0]
    assert answer(llm) == answers["compiled"][1]
    with pytest.raises(ValueError, match="is in the group 'weight_update_group'; leave that first"):
        llm.init_weights_update_group("127.0.0.1", 1, backend="gloo")
    llm.destroy_weights_update_group()
    with pytest.raises(ValueError, match="in no group"):
        llm.destroy_weights_update_group()


@pytest.mark.parametrize("wrong", [{"model.norm.weight": [31]}, {"zzz": [1]}, "nothing comes"])
def test_an_update_that_fails_leaves_the_old_weights(llm: LLM, trainer: Trainer, answers: dict[str, list[Answer]], wrong: Any) -> None:
    names, dtypes, shapes = ["lm_head.weight"], ["bfloat16"], [[97, 32]]
    if isinstance(wrong, dict):
        ((name, shape),) = wrong.items()
        names, dtypes, shapes = [*names, name], [*dtypes, "bfloat16"], [*shapes, shape]
    with pytest.raises(ValueError, match="broadcast" if isinstance(wrong, str) else names[-1]):
        llm.update_weights_from_distributed(names, dtypes, shapes)
    assert llm.weight_version == "0" and answer(llm) == answers["compiled"][0]
    with pytest.raises(ValueError, match="in no group; it leaves a group when an update fails"):
        llm.update_weights_from_distributed(names, dtypes, shapes)


def test_what_does_not_fit_is_refused(llm: LLM) -> None:
    with pytest.raises(ValueError, match="2 names, 1 dtypes, 1 shapes; there must be one of each"):
        llm.update_weights_from_distributed(["a", "b"], ["bfloat16"], [[1]])
    with pytest.raises(ValueError, match="backend is 'mpi'"):
        llm.init_weights_update_group("127.0.0.1", 1, backend="mpi")
    with silent_port() as port, pytest.raises(ValueError, match="did not come together"):
        llm.init_weights_update_group("127.0.0.1", port, backend="gloo", timeout=1)
