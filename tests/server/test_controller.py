"""Weights that change while steps run, where steps are launched on a device: a CPU stands in for it, and launches are watched.

The step of new weights may only be made by the thread that steps, and when no step is under way: else what was launched meanwhile would
be captured into its graphs.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pointsman import LLM
from pointsman.engine import build, weights
from pointsman.engine.model_runner import ModelRunner, Pending, Step
from pointsman.request import ChoiceDelta, Request
from pointsman.server import controls
from pointsman.server.controller import Controller
from pointsman.step import StepPlan, StepResult
from pointsman.update import Update
from tests.exchange import PARAMS, PROMPT, SHAPE, answer
from tests.models.conftest import _one_thread

__all__ = ["_one_thread"]

BOTH: Any = ["weights", "kv_cache"]


class Launched:
    """A step under way, until its result is there."""

    def __init__(self, watch: Watch, pending: Pending) -> None:
        self._watch, self._pending = watch, pending
        watch.num_under_way += 1

    def result(self) -> StepResult:
        result = self._pending.result()
        self._watch.num_under_way -= 1
        return result


class Watch:
    """Sees what is launched and what is made, and can hold up reading and let making fail."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.num_under_way = self.num_made = 0
        self.reading = threading.Event()
        self.reading.set()
        self.fault: Exception | None = None

    def made(self) -> None:
        assert threading.get_ident() == self.thread, "a step is made beside the steps"
        assert self.num_under_way == 0, "a step is made while another is under way"
        self.num_made += 1
        if self.fault is not None:
            raise self.fault


class End:
    """Of the engine's process: what it has sent."""

    def __init__(self) -> None:
        self.sent: list[controls.Controlled] = []

    def send(self, message: controls.Controlled) -> None:
        self.sent.append(message)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    watch = Watch()
    launch, make, load = ModelRunner.launch, build.make_device_step, weights.load_decoder

    def watched_launch(runner: ModelRunner, plan: StepPlan) -> Pending:
        return Launched(watch, launch(runner, plan))

    def watched_make(*args: Any, **options: Any) -> Step:
        watch.made()
        return make(*args, **options)

    def held_up(*args: Any, **options: Any) -> Any:
        watch.reading.wait()
        return load(*args, **options)

    monkeypatch.setattr(build, "launches_steps", lambda device: True)
    monkeypatch.setattr(ModelRunner, "launch", watched_launch)
    monkeypatch.setattr(build, "make_device_step", watched_make)
    monkeypatch.setattr(weights, "load_decoder", held_up)
    return watch


def make(folder: Path) -> LLM:
    return LLM(str(folder), progress=False, cpu_step="torch", page_size=4, max_total_tokens=640)


@pytest.fixture
def llm(watch: Watch, folders: list[Path]) -> Iterator[LLM]:
    with contextlib.closing(make(folders[0])) as llm:
        yield llm


class Serving:
    """The loop of the engine's process, as far as it matters here."""

    def __init__(self, llm: LLM) -> None:
        self.engine, self.end = llm.engine, End()
        self.controller = Controller(llm.engine, self.end)  # type: ignore[arg-type]
        self.deltas: list[ChoiceDelta] = []

    def ask(self, rid: str) -> None:
        self.engine.add(Request(rid=rid, prompt_token_ids=PROMPT, sampling=PARAMS.replace(max_tokens=60)))

    def turn(self) -> None:
        self.controller.look()
        if self.engine.has_work:
            self.deltas += self.engine.step()

    def until_told(self, message: controls.Control) -> controls.Controlled:
        self.controller.take(message)
        while not self.end.sent:
            self.turn()
        return self.end.sent.pop()

    def drain(self) -> list[int]:
        while self.engine.has_work:
            self.turn()
        return [token for delta in self.deltas for token in delta.token_ids]


def update(folder: Path, version: str | None = None) -> controls.UpdateFromDisk:
    return controls.UpdateFromDisk(model_path=str(folder), update=Update(weight_version=version))


def test_a_step_is_made_when_none_is_under_way(llm: LLM, watch: Watch, folders: list[Path]) -> None:
    """Steps run while the checkpoint is read, and one is in flight when that has come."""
    serving = Serving(llm)
    serving.ask("a")
    serving.turn()
    watch.reading.clear()
    serving.controller.take(update(folders[1], "new"))
    for _ in range(5):
        serving.turn()
    assert not serving.end.sent and watch.num_under_way == 1 and watch.num_made == 1
    watch.reading.set()
    while not serving.end.sent and serving.engine.has_work:
        serving.turn()
    assert serving.end.sent.pop().error is None and watch.num_made == 2
    serving.drain()
    versions = [delta.weight_version for delta in serving.deltas]
    assert versions == sorted(versions, key=["0", "new"].index) and versions.count("0") >= 6
    with contextlib.closing(make(folders[1])) as fresh:
        assert answer(llm) == answer(fresh)


def test_a_step_that_cannot_be_made_changes_nothing(llm: LLM, watch: Watch, folders: list[Path]) -> None:
    expected = llm.generate(list(PROMPT), PARAMS.replace(max_tokens=60))[0].outputs[0].token_ids
    llm.engine.flush_cache()
    serving = Serving(llm)
    serving.ask("a")
    serving.turn()
    watch.fault = MemoryError("no room for a graph")
    told = serving.until_told(update(folders[1]))
    assert told.status == 500 and "MemoryError" in str(told.error) and told.weight_version == "0"
    assert serving.drain() == expected and watch.num_made == 2
    watch.fault = None
    assert serving.until_told(update(folders[1])).weight_version == "1"


def test_weights_that_are_held_are_put_in_force_or_dropped(llm: LLM, folders: list[Path]) -> None:
    before, serving = answer(llm), Serving(llm)
    held = update(folders[1], "new")
    held.hold = True
    for _ in range(2):
        assert serving.until_told(held).weight_version == "0"
        assert serving.until_told(update(folders[2])).status == 409  # the one or the other comes first
        assert serving.until_told(controls.Drop()).error is None
        assert serving.until_told(controls.Install(weight_version="new")).status == 409
        llm.engine.flush_cache()
        assert answer(llm) == before
    serving.until_told(held)
    assert serving.until_told(controls.Install(weight_version="newer")).weight_version == "newer"
    with contextlib.closing(make(folders[1])) as fresh:
        assert answer(llm) == answer(fresh)
    assert serving.until_told(controls.Drop()).error is None  # there is nothing
    assert serving.until_told(update(folders[2])).weight_version == "2"


@pytest.mark.parametrize("tags", [["weights"], ["kv_cache"], BOTH])
def test_memory_that_cannot_come_back_stays_away(llm: LLM, watch: Watch, tags: Any) -> None:
    expected = answer(llm)
    serving = Serving(llm)
    assert serving.until_told(controls.Release(tags=tags)).released == tuple(tags)
    watch.fault = MemoryError("no room for a graph")
    assert serving.until_told(controls.Resume(tags=None if tags == BOTH else tags)).status == 500
    told = serving.until_told(controls.Pause(mode="keep"))
    assert told.released == tuple(tags) == llm.engine.weights._gone()
    watch.fault = None
    serving.until_told(controls.Continue())
    assert serving.until_told(controls.Resume(tags=tags)).released == ()
    llm.engine.flush_cache()
    assert answer(llm) == expected


def test_what_is_released_comes_by_an_update_in_parts(llm: LLM, watch: Watch, folders: list[Path]) -> None:
    """The cache comes last, and the step is made with it."""
    llm.release_memory_occupation()
    tensors = SHAPE.tensors(1)
    llm.update_weights_from_tensor(tensors)
    assert watch.num_made == 1 and llm.engine.weights.released == ("kv_cache",)
    llm.resume_memory_occupation(["kv_cache"])
    with contextlib.closing(make(folders[1])) as fresh:
        assert answer(llm) == answer(fresh)
    assert watch.num_made == 3
