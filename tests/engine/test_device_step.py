"""The step that is launched on a device, on a CPU in a device's place: the same calls, the same order, copies that copy at once.

The oracle is the torch step, which runs unpadded in the plain order. Where the device step does not pad either, every number must be
the same bits, whatever the engine does meanwhile. Where it pads, torch may pick other kernels for other shapes: the tokens must be equal
and log-probabilities within 2e-3, as in `test_invariance`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from pointsman import LLM, RequestOutput, SamplingParams
from pointsman.distributed import Mesh
from pointsman.engine import build, device_step
from pointsman.engine.batch import NONE, PENDING, Batch, Draw, Forced
from pointsman.engine.device_lanes import DeviceLanes
from pointsman.engine.device_sampler import DeviceSampler, Greedy
from pointsman.engine.device_step import GivenExperts, pad
from pointsman.engine.step_sizes import size_for, step_sizes
from pointsman.sampling.lane import LaneSampling
from pointsman.sampling.sampler import NO_TOKEN, NOT_FINITE
from pointsman.step import LaneStart
from tests.engine.replays import rows
from tests.engine.test_invariance import same, workload

SETUPS: dict[str, dict[str, Any]] = {
    "overlapped": {},
    "plain order": {"disable_overlap_schedule": True},
    "small chunks": {"chunked_prefill_size": 7},
    "tiny cache": {"page_size": 4, "max_total_tokens": 160, "chunked_prefill_size": 48},
    "tiny cache, plain order": {"page_size": 4, "max_total_tokens": 160, "disable_overlap_schedule": True},
}


def mixed() -> list[tuple[list[int], SamplingParams]]:
    """As in `test_invariance`, and as many greedy requests that tell no log-probabilities: those are drawn on the device."""
    requests = [(prompt, params.replace(max_tokens=params.max_tokens // 3)) for prompt, params in workload()[:8]]  # type: ignore[operator]
    bare = [
        (prompt[::-1], SamplingParams(temperature=0.0, max_tokens=40, min_tokens=3 * (index % 2), return_routed_experts=True))
        for index, (prompt, _) in enumerate(requests)
    ]
    return [request for pair in zip(requests, bare, strict=True) for request in pair]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that stands in for a device."""
    monkeypatch.setattr(build, "launches_steps", lambda device: True)


@pytest.fixture
def unpadded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_step, "step_sizes", lambda max_tokens: tuple(range(1, max_tokens + 1)))


def answers(folder: Path, **config: Any) -> tuple[list[RequestOutput], LLM]:
    llm = LLM(str(folder), load_format="dummy", progress=False, cpu_step="torch", **config)
    prompts, params = zip(*mixed(), strict=True)
    replays = [rows(30, seed=index) if index % 4 == 1 else None for index in range(len(prompts))]
    try:
        return llm.generate(list(prompts), params, replay_routed_experts=replays), llm
    finally:
        llm.close()


@pytest.fixture(scope="module", params=SETUPS.values(), ids=SETUPS.keys())
def setup(request: pytest.FixtureRequest) -> dict[str, Any]:
    config: dict[str, Any] = request.param
    return config


@pytest.fixture(scope="module")
def torch_step(folder: Path, setup: dict[str, Any]) -> list[RequestOutput]:
    return answers(folder, **setup)[0]


def test_unpadded_it_is_the_torch_step_bit_by_bit(
    folder: Path, setup: dict[str, Any], torch_step: list[RequestOutput], device: None, unpadded: None
) -> None:
    mine, llm = answers(folder, **setup)
    assert llm.engine.step_name == "eager"
    compare(mine, torch_step, exact=True)
    if "max_total_tokens" in setup:
        assert llm.engine.num_preemptions > 0, "the cache was not small enough to force a preemption"


def test_padding_changes_no_token(folder: Path, setup: dict[str, Any], torch_step: list[RequestOutput], device: None) -> None:
    compare(answers(folder, **setup)[0], torch_step, exact=False)


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_sizes_hold_every_step_and_waste_little(max_tokens: int, num_tokens: int) -> None:
    sizes = step_sizes(max_tokens)
    assert list(sizes) == sorted(set(sizes)) and sizes[-1] == max_tokens
    size = size_for(min(num_tokens, max_tokens), sizes)
    assert min(num_tokens, max_tokens) <= size < 2 * min(num_tokens, max_tokens) + (num_tokens == 1)
    assert size_for(max_tokens + 1, sizes) == max_tokens + 1


@given(st.integers(1, 40), st.integers(0, 24))
def test_padding_leaves_the_rows_and_writes_nowhere(num_rows: int, room: int) -> None:
    rng = np.random.default_rng(num_rows)
    columns = [rng.integers(0, 1 << 40, num_rows) for _ in range(4)]
    batch = Batch(*columns, 0, [(0, 0, num_rows)], np.arange(num_rows), [], NONE, [], NONE, NONE)
    padded = pad(batch, num_rows + room)
    for mine, given_T in zip(padded, columns, strict=True):
        assert np.array_equal(mine[:num_rows], given_T) and len(mine) == num_rows + room
    assert (padded[3][num_rows:] == -1).all()


def test_a_token_that_only_the_device_knows_comes_from_its_lane() -> None:
    lanes = DeviceLanes(4, 8, torch.device("cpu"))
    lanes.last_token_L[:] = torch.tensor([50, 51, 52, 53])
    tokens_T = lanes.fill_in(torch.tensor([7, PENDING, 9, PENDING]), torch.tensor([0, 3, 1, 1]))
    assert tokens_T.tolist() == [7, 53, 9, 51]


@example([(1, [0]), (2, [])])  # one row is no multiple of what arrays are aligned to
@given(st.lists(st.tuples(st.integers(1, 12), st.lists(st.integers(0, 11), unique=True)), min_size=1, max_size=8))
def test_rows_have_the_experts_that_this_step_gives_them(steps: list[tuple[int, list[int]]]) -> None:
    """Steps of any sizes in any order; one without forced rows leaves nothing of those before."""
    given_experts = GivenExperts(12, 3, 2, torch.device("cpu"))
    memory = given_experts.ids_TNK.data_ptr()
    for index, (num_rows, wanted) in enumerate(steps):
        rows_F = np.array(sorted(row for row in wanted if row < num_rows), np.int64)
        ids_FNK = np.random.default_rng(index).integers(0, 300, (len(rows_F), 3, 2)).astype(np.uint16)
        given_experts.send(Forced(rows_F, ids_FNK) if len(rows_F) else None, num_rows)
        want_TNK = torch.full((num_rows, 3, 2), -1)
        want_TNK[rows_F] = torch.from_numpy(ids_FNK.astype(np.int64))
        assert torch.equal(given_experts.ids_TNK[:num_rows].long(), want_TNK)
    assert given_experts.ids_TNK.data_ptr() == memory


@given(st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 99), min_size=1, max_size=3)), max_size=12))
def test_pages_on_the_device_are_those_of_the_host(handed_out: list[tuple[int, list[int]]]) -> None:
    lanes, host_LP = DeviceLanes(4, 64, torch.device("cpu")), np.zeros((4, 64), np.int32)
    length, places, given = [0] * 4, [], []
    for lane, pages in handed_out:
        host_LP[lane, length[lane] : length[lane] + len(pages)] = pages
        places += range(64 * lane + length[lane], 64 * lane + length[lane] + len(pages))
        given += pages
        length[lane] += len(pages)
    for part in (slice(5), slice(5, None)):
        lanes.grow(np.array(places[part], np.int64), np.array(given[part], np.int64))
    assert np.array_equal(lanes.page_table_LP.numpy(), host_LP)


def test_lanes_that_need_the_host_are_left_to_it() -> None:
    """Greedy lanes alone are drawn on the device, and counted at once; what they get is the host sampler's token."""
    logits_RV = torch.randn(6, 40, generator=torch.Generator().manual_seed(3)).round()
    logits_RV[4, 7] = float("nan")
    ways: list[dict[str, Any]] = [{}, {"logprobs": 0}, {"min_tokens": 1}, {"temperature": 1.0}, {}, {"presence_penalty": 1.0}]
    states = [
        LaneSampling(LaneStart(lane, lane, (1,), (), SamplingParams(**{"temperature": 0.0} | way), 5), 40, (2,))
        for lane, way in enumerate(ways)
    ]
    lanes = DeviceLanes(6, 1, torch.device("cpu"))
    drawing = DeviceSampler(lanes, torch.device("cpu"), Greedy(), Mesh.single()).draw(
        logits_RV, [Draw(5 - row, row, state) for row, state in enumerate(states)]
    )
    assert drawing.indices == [0, 4]
    drawn = drawing.drawn()
    assert drawn.tokens == [int(logits_RV[0].argmax()), NO_TOKEN] and drawn.errors == {1: NOT_FINITE}
    assert int(lanes.last_token_L[5]) == drawn.tokens[0] and 0 <= int(lanes.last_token_L[1]) < 40
    assert [state.num_output for state in states] == [1, 0, 0, 0, 1, 0]


def compare(mine: list[RequestOutput], theirs: list[RequestOutput], *, exact: bool) -> None:
    for one, other in zip(mine, theirs, strict=True):
        if one.outputs[0].logprobs is not None:
            same(one, other, exact=exact)
            continue
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        assert one.outputs[0].routing_agreement == other.outputs[0].routing_agreement
        if exact:
            np.testing.assert_array_equal(one.outputs[0].routed_experts, other.outputs[0].routed_experts)
