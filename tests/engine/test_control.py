"""Pausing an engine and changing its weights: what is asked afterwards gets what a fresh engine gives, bit for bit, and a change
that fails is no change. What is under way when the weights change is compared with a model that is exchanged at the same token."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pointsman import LLM, FinishReason, SamplingParams
from pointsman.engine.control import Control
from pointsman.engine.engine import Engine
from pointsman.models.loader import load_model
from pointsman.request import ChoiceDelta, PauseMode, Request
from pointsman.update import Update
from tests.exchange import PARAMS, PROMPT, SCORED, SHAPE, Answer, answer, make
from tests.models.checkpoints import Harness, write


@pytest.fixture
def llm(folders: list[Path]) -> Iterator[LLM]:
    llm = make(folders[0])
    yield llm
    llm.close()


@pytest.mark.parametrize("step", ["torch", "compiled"])
@pytest.mark.parametrize("disable_overlap_schedule", [False, True])
def test_after_an_update_an_engine_is_as_a_fresh_one(
    folders: list[Path], scored: dict[str, list[Answer]], step: str, disable_overlap_schedule: bool
) -> None:
    others = set(threading.enumerate())  # of engines that other tests have left, which may end meanwhile
    llm = make(folders[0], cpu_step=step, disable_overlap_schedule=disable_overlap_schedule)
    assert answer(llm, SCORED) == scored[step][0]
    before = len(set(threading.enumerate()) - others)
    assert llm.weight_version == "0"
    for version, which in enumerate((1, 2, 2, 0), 1):
        assert llm.update_weights_from_disk(str(folders[which])) == str(version) == llm.weight_version
        assert answer(llm, SCORED) == scored[step][which]
        output = llm.generate(list(PROMPT), PARAMS)[0].outputs[0]
        assert output.weight_versions == [(0, len(PROMPT) + 13, str(version))] and output.weight_version == str(version)
    assert len(set(threading.enumerate()) - others) == before
    llm.close()


def test_versions_are_given_or_counted(llm: LLM, folders: list[Path]) -> None:
    wanted = [("step 7", "step 7"), (None, "2"), ("41", "41"), (None, "42"), ("²", "²"), (None, "6")]
    for given, expected in wanted:
        assert llm.update_weights_from_disk(str(folders[1]), weight_version=given) == expected
    for wrong in ("", "x" * 257, 7):
        with pytest.raises(ValueError, match="weight_version"):
            llm.update_weights_from_disk(str(folders[1]), weight_version=wrong)  # type: ignore[arg-type]
    assert llm.weight_version == "6"


def lacks(folder: Path) -> None:
    change(folder, lambda tensors: tensors.pop("model.layers.1.self_attn.q_proj.weight"))


def misshapen(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))


def mistyped(folder: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    change(folder, lambda tensors: tensors.update({name: tensors[name].float()}))


def surplus(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({"model.layers.0.extra.weight": torch.ones(3)}))


def not_a_number(folder: Path) -> None:
    change(folder, lambda tensors: tensors["lm_head.weight"].view(-1)[-1:].fill_(float("nan")))


def not_a_number_in_fp8(folder: Path) -> None:
    name = "model.layers.1.block_sparse_moe.experts.7.w2.weight"
    change(folder, lambda tensors: tensors[name].view(torch.uint8).view(-1)[:1].fill_(0xFF))


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def other_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 3, "rope_theta": 77}))


def unknown_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"secret_scale": 3}))


def truncated(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def gone(folder: Path) -> None:
    shutil.rmtree(folder)


BREAKS = {
    lacks: r"model\.layers\.1\.self_attn\.q_proj\.weight is missing",
    misshapen: r"model\.norm\.weight is \[31\] where \[32\] belongs",
    mistyped: "q_proj.weight is F32 where F8_E4M3 belongs",
    surplus: "model.layers.0.extra.weight does not belong",
    not_a_number: "lm_head.weight has numbers that are NaN",
    not_a_number_in_fp8: "experts.7.w2.weight has numbers that are NaN",
    other_config: "another model's checkpoint: rope_theta is 77.0 where the model that serves has 5000000.0; top_k is 3 .* has 2",
    unknown_config: "secret_scale",
    truncated: "not a whole safetensors file",
    empty: "not a whole safetensors file",
    gone: "neither a folder nor",
}


@pytest.mark.parametrize("step", ["torch", "compiled"])
@pytest.mark.parametrize("damage", BREAKS, ids=lambda damage: damage.__name__)
def test_an_update_that_fails_changes_nothing(
    tmp_path: Path, folders: list[Path], scored: dict[str, list[Answer]], step: str, damage: Callable[[Path], None]
) -> None:
    """Neither the weights nor what is under way, nor the cache."""
    llm = make(folders[0], cpu_step=step)
    llm.generate(list(PROMPT), PARAMS)
    broken = SHAPE.write(tmp_path / "broken", seed=1)
    damage(broken)
    llm.engine.add(Request(rid="under way", prompt_token_ids=PROMPT, sampling=PARAMS))
    deltas = [*llm.engine.step(), *llm.engine.step()]
    with pytest.raises(ValueError, match=BREAKS[damage]):
        llm.update_weights_from_disk(str(broken), abort_all_requests=True)
    deltas += drive(llm.engine)
    assert deltas[0].num_cached_tokens == 28
    assert [token for delta in deltas for token in delta.token_ids] == scored[step][0][0]
    assert llm.weight_version == "0" and answer(llm, SCORED) == scored[step][0]
    llm.close()


def drive(engine: Engine) -> list[ChoiceDelta]:
    deltas = []
    while engine.has_work:
        deltas += engine.step()
    return deltas


def start(engine: Engine, steps: int, params: SamplingParams = PARAMS) -> list[ChoiceDelta]:
    engine.add(Request(rid="a", prompt_token_ids=PROMPT, sampling=params))
    return [delta for _ in range(steps) for delta in engine.step()]


def tokens(deltas: list[ChoiceDelta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


@pytest.mark.parametrize("mode", ["in_place", "keep", "retract"])
@pytest.mark.parametrize("steps", range(0, 9, 2))
@pytest.mark.parametrize("disable_overlap_schedule", [False, True])
def test_a_pause_is_not_seen_in_the_answer(folders: list[Path], mode: PauseMode, steps: int, disable_overlap_schedule: bool) -> None:
    """Not in a bit of it, for the compiled step computes each row alike whatever shares the step. Chunks of 8, so that some pauses come
    amid the prompt. What is added meanwhile waits and is answered."""
    llm = make(folders[0], chunked_prefill_size=8, disable_overlap_schedule=disable_overlap_schedule)
    engine, control = llm.engine, Control(llm.engine)
    expected = llm.generate(list(PROMPT), PARAMS)[0].outputs[0]
    engine.flush_cache()
    deltas = start(engine, steps)
    control.pause(mode)
    deltas += drive(engine)
    engine.add(Request(rid="b", prompt_token_ids=PROMPT[:5], sampling=PARAMS))
    assert not engine.has_work and engine.step() == [] and engine.num_waiting == 1 + (mode == "retract" or not steps)
    assert engine.scheduler.num_running == (mode != "retract" and steps > 0)
    control.pause("in_place")
    control.resume()
    control.resume()
    deltas += drive(engine)
    mine = [delta for delta in deltas if delta.rid == "a"]
    assert tokens(mine) == expected.token_ids
    assert [entry for delta in mine for entry in delta.logprobs or ()] == expected.logprobs
    assert np.array_equal(mine[-1].routed_experts, expected.routed_experts)
    assert len(tokens([delta for delta in deltas if delta.rid == "b"])) == 14
    llm.close()


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_a_pause_that_aborts(llm: LLM, steps: int) -> None:
    engine, control = llm.engine, Control(llm.engine)
    expected = llm.generate(list(PROMPT), PARAMS)[0].outputs[0]
    deltas = start(engine, steps, PARAMS.replace(n=2, temperature=0.0))
    control.pause()
    deltas += drive(engine)
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == [FinishReason.ABORT] * 2
    for index in range(2):
        own = tokens([delta for delta in deltas if delta.index == index])
        assert own == expected.token_ids[: len(own)]
    assert not engine.has_work and engine.scheduler.usage == 0.0
    with pytest.raises(RuntimeError, match="paused"):
        llm.generate(list(PROMPT), PARAMS)
    control.resume()
    assert llm.generate(list(PROMPT), PARAMS)[0].outputs[0].token_ids == expected.token_ids


def test_a_mode_that_there_is_not(llm: LLM) -> None:
    with pytest.raises(ValueError, match="mode is 'wait'; it must be one of 'abort', 'in_place', 'keep', 'retract'"):
        llm.pause_generation("wait")  # type: ignore[arg-type]
    assert not llm.engine.paused


@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize("steps", [1, 4, 9])
@pytest.mark.parametrize("disable_overlap_schedule", [False, True])
def test_what_is_under_way_goes_on_with_the_new_weights(
    folders: list[Path], paused: bool, steps: int, disable_overlap_schedule: bool
) -> None:
    """The oracle is one cache under two models. Logits of both are sums of the same numbers in the same order but for the number
    of rows a step has, which torch may add up otherwise: greedy tokens are compared, and log-probabilities to 1e-4."""
    llm = make(folders[0], cpu_step="torch", disable_overlap_schedule=disable_overlap_schedule)
    engine, control = llm.engine, Control(llm.engine)
    deltas = start(engine, steps)
    if paused:
        control.pause("in_place")
    control.update_weights_from_disk(str(folders[1]))
    engine.add(Request(rid="b", prompt_token_ids=PROMPT[:5], sampling=PARAMS))
    control.resume()
    deltas = [delta for delta in [*deltas, *drive(engine)] if delta.rid == "a"]
    num_old = len(tokens([delta for delta in deltas if delta.weight_version == "0"]))
    assert num_old == (steps if disable_overlap_schedule else steps + 1)
    harness = Harness(load_model(folders[0], progress=False), dtype=torch.bfloat16)
    logits = harness.step({0: list(PROMPT)})[0][-1]
    for number, delta in enumerate(deltas):
        (token,), (entry,) = delta.token_ids, delta.logprobs or ()
        assert token == int(logits.argmax())
        assert entry[token].logprob == pytest.approx(float(logits.log_softmax(-1)[token]), abs=1e-4)
        if number + 1 == num_old:
            harness.decoder = load_model(folders[1], progress=False)
        logits = harness.step({0: [token]})[0][-1]
    num_rows = len(PROMPT) + 13
    assert deltas[-1].weight_versions == ((0, len(PROMPT) + num_old - 1, "0"), (len(PROMPT) + num_old - 1, num_rows, "1"))
    slots = harness.slots(0, 0, num_rows)
    assert np.array_equal(harness.routes.gather(slots).numpy(), deltas[-1].routed_experts)
    llm.close()


@pytest.mark.parametrize("flush_cache", [False, True])
def test_a_prefix_of_other_weights_says_so(llm: LLM, folders: list[Path], flush_cache: bool) -> None:
    first = llm.generate(list(PROMPT), PARAMS)[0]
    llm.update_weights_from_disk(str(folders[1]), flush_cache=flush_cache, weight_version="new")
    second = llm.generate(list(PROMPT), PARAMS)[0]
    num_rows = len(PROMPT) + 13
    if flush_cache:
        assert second.num_cached_tokens == 0 and second.outputs[0].weight_versions == [(0, num_rows, "new")]
        return
    assert second.num_cached_tokens == 28
    assert second.outputs[0].weight_versions == [(0, 28, "0"), (28, num_rows, "new")]
    assert np.array_equal(second.outputs[0].routed_experts[:28], first.outputs[0].routed_experts[:28])
    later = llm.generate(list(PROMPT), PARAMS.replace(routed_experts_start=20))[0]
    assert later.outputs[0].weight_versions == [(0, 8, "0"), (8, num_rows - 20, "new")]


def test_an_update_can_end_what_is_under_way(llm: LLM, folders: list[Path], scored: dict[str, list[Answer]]) -> None:
    deltas = start(llm.engine, 4)
    llm.update_weights_from_disk(str(folders[1]), abort_all_requests=True)
    deltas += drive(llm.engine)
    assert deltas[-1].finish_reason is FinishReason.ABORT and {delta.weight_version for delta in deltas} == {"0"}
    assert answer(llm, SCORED) == scored["compiled"][1]


def test_files_may_be_written_otherwise(tmp_path: Path, folders: list[Path], scored: dict[str, list[Answer]]) -> None:
    """The same numbers, some in a wider type: the step is another then, and the answer the same but for rounding of what is summed."""
    tensors = {name: tensor.float() if tensor.dtype == torch.bfloat16 else tensor for name, tensor in SHAPE.tensors(1).items()}
    write(tmp_path / "wide", SHAPE.config() | {"torch_dtype": "float32"}, tensors)
    llm = make(folders[0], cpu_step="torch")
    llm.update_weights_from_disk(str(tmp_path / "wide"))
    fresh = make(tmp_path / "wide", cpu_step="torch")
    assert answer(llm, SCORED) == answer(fresh, SCORED)
    assert answer(llm, SCORED)[0] == scored["torch"][1][0]
    llm.close()
    fresh.close()


@pytest.mark.parametrize("flush_cache", [False, True])
def test_what_goes_back_to_the_queue_keeps_its_rows(llm: LLM, folders: list[Path], flush_cache: bool) -> None:
    """It computes again under the experts that it had, with the new weights, and says by which weights they were chosen. What it
    computes so is no prefix for others: these get what a fresh engine gives."""
    engine, control = llm.engine, Control(llm.engine)
    expected = llm.generate(list(PROMPT), PARAMS)[0].outputs[0]
    engine.flush_cache()
    deltas = start(engine, 6)
    control.pause("retract")
    control.update_weights_from_disk(str(folders[1]), Update(flush_cache=flush_cache))
    control.resume()
    deltas += drive(engine)
    num_old = len(tokens([delta for delta in deltas if delta.weight_version == "0"]))
    num_rows, num_kept = len(PROMPT) + 13, len(PROMPT) + num_old - 1
    assert 0 < num_old < 14 and tokens(deltas)[:num_old] == expected.token_ids[:num_old]
    assert deltas[-1].weight_versions == ((0, num_kept, "0"), (num_kept, num_rows, "1"))
    assert np.array_equal(deltas[-1].routed_experts[:num_kept], expected.routed_experts[:num_kept])
    fresh = make(folders[1])
    other = llm.generate(list(PROMPT), PARAMS.replace(max_tokens=1))[0]
    assert other.num_cached_tokens == (0 if flush_cache else 28)
    if flush_cache:
        assert other.outputs[0].logprobs == fresh.generate(list(PROMPT), PARAMS.replace(max_tokens=1))[0].outputs[0].logprobs
    else:
        assert other.outputs[0].weight_versions == [(0, 28, "0"), (28, 29, "1")]
    fresh.close()


def test_an_abort_while_it_waits_to_compute_again(llm: LLM, folders: list[Path]) -> None:
    """The rows that were kept, with their versions; one abort comes before it starts again, one amid."""
    for steps in (0, 1):
        engine, control = llm.engine, Control(llm.engine)
        version = llm.weight_version
        deltas = start(engine, 6)
        control.pause("retract")
        control.update_weights_from_disk(str(folders[1]))
        control.resume()
        deltas += [delta for _ in range(steps) for delta in engine.step()]
        deltas += engine.abort("a")
        num_kept = len(PROMPT) + len(tokens([delta for delta in deltas if delta.weight_version == version])) - 1
        assert deltas[-1].weight_versions[0] == (0, num_kept, version) and deltas[-1].routed_experts_missing == ()
        drive(engine)


def test_who_comes_back_goes_on_from_its_own_pages(folders: list[Path]) -> None:
    """Another answer's pages of the same tokens, under weights called otherwise, are no prefix for what this one has drawn."""
    with contextlib.closing(make(folders[0])) as llm:
        llm.generate(list(PROMPT), PARAMS)
        llm.update_weights_from_disk(str(folders[0]), flush_cache=False, weight_version="new")
        llm.engine.add(Request(rid="a", prompt_token_ids=PROMPT, sampling=PARAMS))
        deltas = [delta for _ in range(9) for delta in llm.engine.step()]
        control = Control(llm.engine)
        control.pause("retract")
        control.resume()
        while llm.engine.has_work:
            deltas += llm.engine.step()
        assert llm.engine.num_preemptions == 1 and all(delta.weight_version == "new" for delta in deltas)
        first_drawn_at = len(PROMPT) - 1
        assert deltas[-1].weight_versions == ((0, first_drawn_at, "0"), (first_drawn_at, len(PROMPT) + PARAMS.max_tokens - 1, "new"))


def test_who_comes_back_knows_its_pages_from_those_written_anew(folders: list[Path]) -> None:
    """Others evict its pages under other weights, and one computes the same tokens into pages of the same numbers. Its rows are those that
    its tokens were drawn under, and what it computes again is compared with an engine that was never disturbed."""
    with contextlib.closing(make(folders[0], max_total_tokens=48, disable_overlap_schedule=True)) as llm:
        engine, control = llm.engine, Control(llm.engine)
        engine.add(Request(rid="a", prompt_token_ids=PROMPT, sampling=PARAMS, priority=-1))
        deltas = [delta for _ in range(9) for delta in engine.step()]
        old = tokens(deltas)
        control.pause("retract")
        [waiting] = engine.scheduler.sequences
        control.update_weights_from_disk(str(folders[1]), Update(flush_cache=False))
        last = PARAMS.replace(max_tokens=0, logprobs=None)
        same = (*PROMPT, *old[:-1])
        for index, prompt in enumerate(((5,) * 48, (*same, *(9,) * (48 - len(same))))):
            engine.add(Request(rid=f"{index}", prompt_token_ids=prompt, sampling=last))
        control.resume()
        pages = list(waiting.pages)
        found: list[int] = []
        while waiting.lane is None:
            radix = engine.scheduler._radix
            assert radix is not None
            found = radix.match(same, "")
            others = engine.step()
            deltas += [delta for delta in others if delta.rid == "a"]
        assert found and found == pages[: len(found)], "the case is not there"
        deltas += [delta for delta in drive(engine) if delta.rid == "a"]
        num_kept = len(PROMPT) + len(old) - 1
        assert deltas[-1].weight_versions == ((0, num_kept, "0"), (num_kept, len(PROMPT) + PARAMS.max_tokens - 1, "1"))
    with contextlib.closing(make(folders[0])) as llm:
        expected = llm.generate(list(PROMPT), PARAMS)[0].outputs[0]
    assert old == expected.token_ids[: len(old)]
    assert np.array_equal(deltas[-1].routed_experts[:num_kept], expected.routed_experts[:num_kept])
