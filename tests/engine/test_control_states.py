"""Everything that can be done to an engine, in any order, beside a model of it.

The checkpoints differ in all their weights, and each has a routing bias that makes it choose two experts which no other one chooses. So a
routing row tells by itself whose weights made it, and the record's word for that is checked row by row. A token whose rows are all of
one checkpoint is the one that a fresh engine of that checkpoint draws, with the same log-probabilities, bit for bit.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from pointsman import LLM, FinishReason, SamplingParams
from pointsman.engine.control import Control
from pointsman.request import ChoiceDelta, MemoryTag, PauseMode, Request
from pointsman.update import Update
from tests.models.checkpoints import Shape, write

SHAPE = Shape(block=(16, 16))
NUM_CHECKPOINTS = 3
MAX_TOKENS = 12
MOST_REQUESTS = 7
BASE = tuple((7 * index + 3) % 97 for index in range(29))
PROMPTS = (BASE, BASE[:9], (*BASE[:16], 5, 6, 7), BASE[3:20], BASE[:1])
OPTIONS: dict[str, Any] = {"cpu_step": "compiled", "page_size": 4, "chunked_prefill_size": 8, "max_total_tokens": 88, "context_length": 64}
# sampled and not drawn as integers: hypothesis mixes constants of whatever modules are loaded into those
WHICH = st.sampled_from(range(NUM_CHECKPOINTS))
LENGTHS = st.sampled_from([MAX_TOKENS, 5, 1])
TAGS = st.sampled_from([["weights"], ["kv_cache"], ["weights", "kv_cache"]])


def tensors_of(which: int) -> dict[str, torch.Tensor]:
    """Scores are below 1, so that the bias alone decides which two experts are used."""
    tensors = dict(SHAPE.tensors(which))
    for name, tensor in tensors.items():
        if name.endswith("e_score_correction_bias"):
            tensors[name] = torch.zeros_like(tensor)
            tensors[name][2 * which : 2 * which + 2] = 10.0
    return tensors


class Checkpoints:
    """The folders, one that is broken, and what a fresh engine of each answers."""

    def __init__(self, path: Path) -> None:
        self.folders = [path / str(which) for which in range(NUM_CHECKPOINTS)]
        for which, folder in enumerate(self.folders):
            write(folder, SHAPE.config(), tensors_of(which))
        self.broken = path / "broken"
        shutil.copytree(self.folders[1], self.broken)
        file = self.broken / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        self.answers = [self._answers(folder) for folder in self.folders]

    @staticmethod
    def _answers(folder: Path) -> list[tuple[list[int], list[Any]]]:
        llm = LLM(str(folder), progress=False, disable_radix_cache=True, **OPTIONS)
        params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, logprobs=2)
        outputs = [llm.generate([list(prompt)], params)[0].outputs[0] for prompt in PROMPTS]
        llm.close()
        return [(output.token_ids, output.logprobs or []) for output in outputs]


@dataclass
class Asked:
    """A choice of a request, and what has come of it."""

    prompt: int
    max_tokens: int
    deltas: list[ChoiceDelta] = field(default_factory=list)


class Machine(RuleBasedStateMachine):
    def __init__(self, llm: LLM, checkpoints: Checkpoints, seen: Counter[str]) -> None:
        super().__init__()
        self.engine, self.checkpoints, self.seen = llm.engine, checkpoints, seen
        self.control = Control(llm.engine)
        self.asked: dict[tuple[str, int], Asked] = {}
        self.paused = False
        self.released: set[MemoryTag] = set()
        self.num_updates = 0
        self.version = self.control.update_weights_from_disk(str(checkpoints.folders[0]), Update(weight_version="0.0"))
        self.source = self.version

    def take(self, deltas: list[ChoiceDelta]) -> None:
        for delta in deltas:
            asked = self.asked[delta.rid, delta.index]
            asked.deltas.append(delta)
            if delta.finish_reason is not None:
                del self.asked[delta.rid, delta.index]
                self.check(asked)

    def check(self, asked: Asked) -> None:
        """An answer that has ended."""
        last, prompt = asked.deltas[-1], PROMPTS[asked.prompt]
        tokens = [token for delta in asked.deltas for token in delta.token_ids]
        entries = [entry for delta in asked.deltas for entry in delta.logprobs or ()]
        said_by = [delta.weight_version for delta in asked.deltas for _ in delta.token_ids]
        if last.finish_reason is FinishReason.ABORT:
            assert len(tokens) <= asked.max_tokens
        else:
            assert last.finish_reason is FinishReason.LENGTH and len(tokens) == asked.max_tokens
        num_rows = len(prompt) + len(tokens) - 1
        rows = last.routed_experts
        num_known = num_rows if not last.routed_experts_missing else last.routed_experts_missing[0][0]
        assert last.finish_reason is FinishReason.ABORT or num_known == num_rows
        names = [name for first, end, name in last.weight_versions for _ in range(first, end)]
        firsts = [first for first, _, _ in last.weight_versions]
        assert len(names) == num_known and firsts == sorted(firsts)
        makers = [int(name.partition(".")[0]) for name in names]
        for maker, row in zip(makers, rows[:num_known].tolist(), strict=True):
            assert all(set(experts) == {2 * maker, 2 * maker + 1} for experts in row)
        for index, (token, entry, name) in enumerate(zip(tokens, entries, said_by, strict=True)):
            drawn_at = len(prompt) - 1 + index
            assert name == names[drawn_at]
            if len(set(makers[: drawn_at + 1])) == 1:
                expected = self.checkpoints.answers[makers[0]][asked.prompt]
                assert (token, entry) == (expected[0][index], expected[1][index])
        self.seen["mixed"] += len(set(makers)) > 1
        self.seen["alike"] += len(set(makers)) == 1 and last.finish_reason is FinishReason.LENGTH

    @precondition(lambda self: len(self.asked) < MOST_REQUESTS)
    @rule(prompts=st.lists(st.sampled_from(range(len(PROMPTS))), min_size=1, max_size=4), max_tokens=LENGTHS, n=st.sampled_from([1, 2]))
    def ask(self, prompts: list[int], max_tokens: int, n: int) -> None:
        for prompt in prompts:
            self.add(prompt, max_tokens, n)

    def add(self, prompt: int, max_tokens: int, n: int) -> None:
        self.seen["requests"] += 1
        rid = str(self.seen["requests"])
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, n=n, logprobs=2, return_routed_experts=True)
        self.engine.add(Request(rid=rid, prompt_token_ids=PROMPTS[prompt], sampling=params))
        self.asked |= {(rid, index): Asked(prompt, max_tokens) for index in range(n)}

    @rule(count=st.sampled_from([4, 1, 9]))
    def step(self, count: int) -> None:
        """There is something to do, whatever rules hypothesis leaves out of a run."""
        if not self.asked:
            self.ask([0, 2, 3], MAX_TOKENS, 1)
        for _ in range(count):
            self.take(self.engine.step())

    @precondition(lambda self: self.engine.halted)
    @rule(count=st.sampled_from([4, 1, 9]))
    def serve(self, count: int) -> None:
        """Whatever stands in the way of it."""
        if self.released:
            self.have_again(list(self.released))
        self.go_on()
        self.step(count)

    @precondition(lambda self: self.asked)
    @rule(which=st.sampled_from(range(100)))
    def abort(self, which: int) -> None:
        rid = list(self.asked)[which % len(self.asked)][0]
        self.take(self.engine.abort(rid))
        assert all(name != rid for name, _ in self.asked)

    @precondition(lambda self: self.asked)
    @rule(mode=st.sampled_from(["retract", "keep", "in_place", "abort"]))
    def pause(self, mode: PauseMode) -> None:
        self.seen["sent back"] += mode == "retract" and self.engine.scheduler.num_running > 0
        self.control.pause(mode)
        self.paused = True
        if mode == "abort":
            self.take(self.engine.step())
            assert not self.asked
        elif mode == "retract":
            assert self.engine.scheduler.num_running == 0

    @precondition(lambda self: not self.engine.halted)
    @rule(count=st.sampled_from([3, 1, 7]))
    def send_back(self, count: int) -> None:
        """Most likely amid something."""
        self.step(count)
        self.pause("retract")

    @rule()
    def go_on(self) -> None:
        self.control.resume()
        self.paused = False

    @rule(
        which=WHICH,
        from_disk=st.booleans(),
        flush_cache=st.booleans(),
        abort_all_requests=st.sampled_from([False] * 4 + [True]),
    )
    def update(self, which: int, from_disk: bool, flush_cache: bool, abort_all_requests: bool) -> None:
        self.num_updates += 1
        self.version = f"{which}.{self.num_updates}"
        update = Update(flush_cache=flush_cache, abort_all_requests=abort_all_requests, weight_version=self.version)
        if from_disk:
            self.control.update_weights_from_disk(str(self.checkpoints.folders[which]), update)
            self.source = self.version
        else:
            self.control.update_weights_from_tensor(tensors_of(which), update)
        self.seen["updates in place of a return"] += "weights" in self.released
        self.released.discard("weights")

    @precondition(lambda self: not self.engine.halted)
    @rule(which=WHICH, count=st.sampled_from([3, 1, 7]), flush_cache=st.booleans())
    def update_amid(self, which: int, count: int, flush_cache: bool) -> None:
        """And what is under way goes on."""
        self.step(count)
        self.update(which, True, flush_cache, False)
        self.step(count)

    @rule(how=st.sampled_from(["file", "name", "number"]), abort_all_requests=st.booleans())
    def broken_update(self, how: str, abort_all_requests: bool) -> None:
        tensors = tensors_of(1)
        if how == "name":
            tensors["model.extra.weight"] = torch.ones(3)
        tensors["model.norm.weight"] = torch.full((SHAPE.hidden,), float("nan"))
        with pytest.raises(ValueError, match=r"not a whole safetensors file|does not belong|NaN"):
            if how == "file":
                self.control.update_weights_from_disk(str(self.checkpoints.broken), Update(abort_all_requests=abort_all_requests))
            else:
                self.control.update_weights_from_tensor(tensors, Update(abort_all_requests=abort_all_requests))

    @rule(tags=TAGS)
    def release(self, tags: list[MemoryTag]) -> None:
        if self.released & set(tags):
            with pytest.raises(ValueError, match="released already"):
                self.control.release_memory(tags)
            return
        try:
            self.control.release_memory(tags)
        except ValueError as error:
            assert "sequences are running or kept" in str(error) and self.engine.scheduler.num_running and not self.released
            return
        self.released |= set(tags)
        self.seen["releases while some wait"] += bool(self.asked)

    @rule(tags=TAGS)
    def have_again(self, tags: list[MemoryTag]) -> None:
        if not set(tags) <= self.released:
            with pytest.raises(ValueError, match="not released"):
                self.control.resume_memory(tags)
            return
        self.control.resume_memory(tags)
        self.released -= set(tags)
        if "weights" in tags:
            self.seen["returns to what was before"] += self.version != self.source
            self.version = self.source

    @precondition(lambda self: not self.released)
    @rule(which=WHICH, flush_cache=st.booleans())
    def back_to_the_folder(self, which: int, flush_cache: bool) -> None:
        """Tensors are lost with their memory."""
        self.update(which, False, flush_cache, False)
        self.pause("retract")
        self.release(["weights"])
        self.have_again(["weights"])

    @invariant()
    def state(self) -> None:
        engine = self.engine
        assert engine.weight_version == self.version and engine.paused == self.paused
        assert set(engine.weights.released) == self.released
        assert engine.halted == (self.paused or bool(self.released))
        assert not (self.released and engine.scheduler.num_running)

    def teardown(self) -> None:
        """Nobody is lost, and no page."""
        self.control.resume()
        if self.released:
            self.control.resume_memory(list(self.released))
        while self.engine.has_work:
            self.take(self.engine.step())
        assert not self.asked and self.engine.num_waiting == 0 and self.engine.scheduler.num_running == 0
        assert self.engine.scheduler.usage == 0.0


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(params=[False, True])
def llm(checkpoints: Checkpoints, request: pytest.FixtureRequest) -> Iterator[LLM]:
    llm = LLM(str(checkpoints.folders[0]), progress=False, disable_overlap_schedule=request.param, **OPTIONS)
    yield llm
    llm.close()


def test_in_any_order(llm: LLM, checkpoints: Checkpoints) -> None:
    seen: Counter[str] = Counter()
    run_state_machine_as_test(
        lambda: Machine(llm, checkpoints, seen),
        settings=settings(
            max_examples=40, stateful_step_count=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
        ),
    )
    wanted = ("mixed", "alike", "updates in place of a return", "releases while some wait", "returns to what was before", "sent back")
    assert all(seen[name] for name in wanted), seen
