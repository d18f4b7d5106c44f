"""Memory that an engine frees for a time: it is gone, nothing that waits is lost, and then the answers are a fresh engine's."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pointsman import LLM, FinishReason
from pointsman.engine.control import Control
from pointsman.request import ChoiceDelta, MemoryTag, Request
from pointsman.routed_experts import decode_record, encode
from tests.exchange import PARAMS, PROMPT, SHAPE, Answer, answer, make
from tests.models.checkpoints import Shape

BOTH: list[MemoryTag] = ["weights", "kv_cache"]
TAGS: list[list[MemoryTag] | None] = [["weights"], ["kv_cache"], BOTH, None]


@pytest.fixture
def llm(folders: list[Path]) -> Iterator[LLM]:
    llm = make(folders[0])
    yield llm
    llm.close()


@pytest.mark.parametrize("tags", TAGS)
@pytest.mark.parametrize("step", ["torch", "compiled"])
@pytest.mark.parametrize("disable_overlap_schedule", [False, True])
def test_afterwards_an_engine_is_as_a_fresh_one(
    folders: list[Path],
    answers: dict[str, list[Answer]],
    tags: list[MemoryTag] | None,
    step: str,
    disable_overlap_schedule: bool,
) -> None:
    """Twice. Prefixes stay cached where only the weights had gone, for they are the same ones again."""
    llm = make(folders[0], cpu_step=step, disable_overlap_schedule=disable_overlap_schedule)
    expected = [answer(llm), answer(llm)][tags == ["weights"]]
    for _ in range(2):
        llm.release_memory_occupation(tags)
        assert llm.engine.weights.released == tuple(tags or BOTH) and llm.engine.step_name == "none"
        assert llm.engine.scheduler.usage == 0.0
        llm.resume_memory_occupation(tags)
        assert llm.engine.weights.released == () and llm.engine.step_name == step
        assert llm.generate(list(PROMPT), PARAMS.replace(max_tokens=1))[0].num_cached_tokens == (28 if tags == ["weights"] else 0)
        if tags != ["weights"]:
            llm.engine.flush_cache()
        assert answer(llm) == expected
        assert llm.weight_version == "0"
    assert tags == ["weights"] or expected == answers[step][0]
    llm.close()


def tensors_alive() -> dict[int, int]:
    """Bytes of every storage that a tensor is in, by its address."""
    gc.collect()
    found = [thing.untyped_storage() for thing in gc.get_objects() if type(thing) is torch.Tensor]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def parameter_bytes(shape: Shape) -> int:
    """Of a checkpoint's tensors as they are in memory: norms, router and bias in float32."""
    total = 0
    for name, tensor in shape.tensors(0).items():
        wide = "norm" in name or "gate" in name or "bias" in name
        total += tensor.numel() * (4 if wide else tensor.element_size())
    return total


@pytest.mark.parametrize("step", ["torch", "compiled"])
@pytest.mark.parametrize("tags", [["weights"], ["kv_cache"], BOTH])
def test_memory_is_gone(folders: list[Path], step: str, tags: list[MemoryTag]) -> None:
    """The oracle is arithmetic over shapes. The compiled step, which holds copies of the weights and addresses of the cache, ends too."""
    llm = make(folders[0], cpu_step=step, max_total_tokens=4096)
    llm.generate(list(PROMPT), PARAMS)
    of_step = weakref.ref(llm.engine._runner._step)
    packed = weakref.ref(llm.engine._runner._step._step) if step == "compiled" else of_step  # type: ignore[union-attr]
    before = sum(tensors_alive().values())
    llm.release_memory_occupation(tags)
    freed = before - sum(tensors_alive().values())
    assert of_step() is None and packed() is None
    cache = 4096 * (2 * SHAPE.layers * SHAPE.kv_heads * SHAPE.head_dim * 2 + SHAPE.layers * SHAPE.top_k + 2)
    wanted = ("kv_cache" in tags) * cache + ("weights" in tags) * parameter_bytes(SHAPE)
    if step == "compiled":
        assert freed == wanted + 512 * SHAPE.rotary_dim * 4  # sines and cosines of all positions
    else:
        assert freed >= wanted  # it has other forms of the weights, too
    llm.resume_memory_occupation(tags)
    llm.close()


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.parametrize("step", ["torch", "compiled"])
def test_the_process_is_smaller(tmp_path: Path, step: str) -> None:
    """By nine tenths, at least, of what a large cache, written once, and the checkpoint take."""
    shape = Shape(block=(32, 32), hidden=256, width=256, experts=24, vocab=4096)
    llm = make(shape.write(tmp_path / "large", seed=0), cpu_step=step, max_total_tokens=1 << 16)
    for memory in (llm.engine.weights._storage._kv.k, llm.engine.weights._storage._kv.v):
        memory.fill_(1)
    llm.generate(list(PROMPT), PARAMS)
    weights, cache = parameter_bytes(shape), (1 << 16) * 2 * shape.layers * shape.kv_heads * shape.head_dim * 2
    before = resident_bytes()
    llm.release_memory_occupation(["kv_cache"])
    between = resident_bytes()
    assert before - between >= 0.9 * cache
    llm.release_memory_occupation(["weights"])
    assert between - resident_bytes() >= 0.9 * weights
    llm.close()


@pytest.mark.parametrize("tags", TAGS)
def test_what_comes_meanwhile_is_queued(llm: LLM, answers: dict[str, list[Answer]], tags: list[MemoryTag] | None) -> None:
    engine = llm.engine
    llm.release_memory_occupation(tags)
    for rid in ("a", "b"):
        engine.add(Request(rid=rid, prompt_token_ids=PROMPT, sampling=PARAMS))
    assert not engine.has_work and engine.step() == [] and engine.num_waiting == 2
    with pytest.raises(RuntimeError, match=r"released; call resume_memory_occupation first"):
        llm.generate(list(PROMPT), PARAMS)
    assert [delta.finish_reason for delta in engine.abort("b")] == [FinishReason.ABORT]
    llm.pause_generation("in_place")
    llm.continue_generation()
    assert engine.step() == [] and engine.num_waiting == 1
    llm.pause_generation("in_place")
    llm.resume_memory_occupation(tags)
    assert not engine.has_work
    llm.continue_generation()
    deltas = []
    while engine.has_work:
        deltas += engine.step()
    assert [token for delta in deltas for token in delta.token_ids] == answers["compiled"][0].token_ids


def test_what_was_sent_back_to_the_queue_goes_on(llm: LLM, answers: dict[str, list[Answer]]) -> None:
    engine, control = llm.engine, Control(llm.engine)
    engine.add(Request(rid="a", prompt_token_ids=PROMPT, sampling=PARAMS))
    deltas = [delta for _ in range(6) for delta in engine.step()]
    for release in (lambda: None, lambda: control.pause("keep")):
        release()
        with pytest.raises(ValueError, match="1 sequences are running or kept; pause with mode 'abort' or 'retract'"):
            control.release_memory()
        assert engine.weights.released == ()
    control.pause("retract")
    control.release_memory()
    control.resume()
    control.resume_memory()
    while engine.has_work:
        deltas += engine.step()
    assert [token for delta in deltas for token in delta.token_ids] == answers["compiled"][0].token_ids
    assert [entry for delta in deltas for entry in delta.logprobs or ()] == answers["compiled"][0].logprobs
    assert deltas[-1].routed_experts.tolist() == answers["compiled"][0].routed_experts


def test_a_record_tells_what_is_missing_and_which_weights_chose(llm: LLM) -> None:
    """Two steps of eight tokens are computed of the prompt; the others are never known. It is a replay, too."""
    small = make(llm.engine.folder, chunked_prefill_size=8, disable_overlap_schedule=True)
    record = small.record(next(_aborted(small, steps=2)))
    assert record.missing == ((16, len(PROMPT) - 1),) and record.weight_versions == ((0, 16, "0"),)
    assert decode_record(encode(record)).missing == record.missing
    full = llm.generate(list(PROMPT), PARAMS)[0].outputs[0]
    assert np.array_equal(record.rows_RLK[:16], full.routed_experts[:16])
    again = llm.generate(list(PROMPT), PARAMS, replay_routed_experts=llm.record(full))[0].outputs[0]
    assert again.routing_agreement == 1.0 and llm.record(again).missing == () == tuple(again.routed_experts_missing)
    with pytest.raises(ValueError, match="this choice has no rows; ask with return_routed_experts=True"):
        llm.record(llm.generate(list(PROMPT), PARAMS.replace(return_routed_experts=False))[0].outputs[0])
    small.close()


def _aborted(llm: LLM, *, steps: int) -> Iterator[ChoiceDelta]:
    llm.engine.add(Request(rid="a", prompt_token_ids=PROMPT, sampling=PARAMS))
    for _ in range(steps):
        llm.engine.step()
    yield from llm.engine.abort("a")[-1:]


def test_sent_back_and_aborted_while_memory_is_released(llm: LLM, answers: dict[str, list[Answer]]) -> None:
    """It has the rows that were kept of it."""
    engine, control = llm.engine, Control(llm.engine)
    engine.add(Request(rid="a", prompt_token_ids=PROMPT, sampling=PARAMS))
    for _ in range(6):
        engine.step()
    control.pause("retract")
    control.release_memory()
    (delta,) = engine.abort("a")[-1:]
    rows = delta.routed_experts.tolist()
    assert delta.finish_reason is FinishReason.ABORT and delta.routed_experts_missing == ()
    assert rows == answers["compiled"][0].routed_experts[: len(rows)] and len(rows) >= len(PROMPT)


@pytest.mark.parametrize("tags", [["weights"], BOTH])
@pytest.mark.parametrize("how", ["disk", "tensors"])
@pytest.mark.parametrize("step", ["torch", "compiled"])
def test_a_full_update_takes_the_place_of_what_was_released(
    folders: list[Path], answers: dict[str, list[Answer]], tags: list[MemoryTag], how: str, step: str
) -> None:
    """It need not come before the cache. Afterwards what is released and had again is what the folder read last has, by its name."""
    llm = make(folders[0], cpu_step=step)
    llm.release_memory_occupation(tags)
    some = {name: tensor for name, tensor in SHAPE.tensors(1).items() if "layers.1" not in name}
    with pytest.raises(ValueError, match=r"model\.layers\.1\..* is missing, and the weights before are released"):
        llm.update_weights_from_tensor(some)
    assert "weights" in llm.engine.weights.released
    if how == "disk":
        llm.update_weights_from_disk(str(folders[1]), weight_version="new")
    else:
        llm.update_weights_from_tensor(SHAPE.tensors(1), weight_version="new")
    if "kv_cache" in tags:
        assert llm.engine.weights.released == ("kv_cache",)
        llm.resume_memory_occupation(["kv_cache"])
    assert llm.weight_version == "new" and answer(llm) == answers[step][1]
    llm.release_memory_occupation(["weights"])
    llm.resume_memory_occupation(["weights"])
    version, which = ("new", 1) if how == "disk" else ("0", 0)
    assert llm.weight_version == version
    assert llm.generate(list(PROMPT), PARAMS)[0].num_cached_tokens == (28 if how == "disk" else 0)
    llm.engine.flush_cache()
    assert answer(llm) == answers[step][which]
    llm.close()


@pytest.mark.parametrize("order", [["weights", "kv_cache"], ["kv_cache", "weights"]])
def test_one_after_the_other(llm: LLM, answers: dict[str, list[Answer]], order: list[MemoryTag]) -> None:
    for tag in order:
        llm.release_memory_occupation([tag])
    for number, tag in enumerate(order, 1):
        llm.resume_memory_occupation([tag])
        assert llm.engine.halted == (number == 1)
    assert answer(llm) == answers["compiled"][0]


def test_what_cannot_be(llm: LLM) -> None:
    known = re.escape("it must be a list of 'weights' or 'kv_cache'")
    for wrong in (["cuda_graph"], ["weights", "x"], [], "weights", [3]):
        for ask in (llm.release_memory_occupation, llm.resume_memory_occupation):
            with pytest.raises(ValueError, match=f"tags has .*{known}"):
                ask(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not released: weights, kv_cache; tags may name what is: nothing"):
        llm.resume_memory_occupation()
    llm.release_memory_occupation(["kv_cache"])
    with pytest.raises(ValueError, match="released already: kv_cache"):
        llm.release_memory_occupation()
    with pytest.raises(ValueError, match="not released: weights; tags may name what is: kv_cache"):
        llm.resume_memory_occupation()
    assert llm.engine.weights.released == ("kv_cache",)


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_a_folder_that_is_not_what_it_was(tmp_path: Path, folders: list[Path], answers: dict[str, list[Answer]], damage: str) -> None:
    """Other weights under the old name would be a lie; an update helps."""
    folder = SHAPE.write(tmp_path / "there", seed=0)
    llm = make(folder)
    llm.release_memory_occupation()
    if damage == "changed":
        SHAPE.write(folder, seed=1)
    else:
        folder.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is not what it was when its weights were read; bring new ones by an update"):
        llm.resume_memory_occupation()
    assert llm.engine.weights.released == ("weights", "kv_cache")
    llm.update_weights_from_disk(str(folders[1]))
    llm.resume_memory_occupation(["kv_cache"])
    assert answer(llm) == answers["compiled"][1] and llm.weight_version == "1"
    llm.close()
