"""Requests of every kind together, free and replayed: each answer is what the request gives alone, bit for bit, and its rows are those of
the reference router.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pointsman import FinishReason
from pointsman.engine.engine import Engine
from pointsman.models.decoder import Decoder
from pointsman.models.loader import load_model
from pointsman.request import ChoiceDelta, Replay, Request
from tests.engine.replays import LAYERS, SHAPE, TOP_K, a_request, alone, drive, model, same, start
from tests.models.checkpoints import Harness, dequantized, write

__all__ = ["alone", "model"]

SETUPS: dict[str, dict[str, Any]] = {
    "overlapped": {"page_size": 4, "chunked_prefill_size": 24},
    "plain order, pages of one": {"page_size": 1, "chunked_prefill_size": 7, "disable_overlap_schedule": True},
    "tiny cache": {"page_size": 4, "max_total_tokens": 140, "chunked_prefill_size": 16},
    "tiny cache, plain order": {"page_size": 8, "max_total_tokens": 140, "disable_overlap_schedule": True},
    "tiny cache, no prefixes": {"page_size": 4, "max_total_tokens": 140, "disable_radix_cache": True},
}


@pytest.fixture(scope="module", params=SETUPS.values(), ids=SETUPS.keys())
def engine(model: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    llm = start(model, **request.param)
    yield llm.engine
    assert bool(llm.engine.num_preemptions) == ("max_total_tokens" in request.param)
    llm.close()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(seed=st.integers(0, 1 << 30))
def test_company_changes_nothing(engine: Engine, alone: Engine, seed: int) -> None:
    """Rows, agreement, tokens, text and log-probabilities of every choice are those of the request alone; aborted, up to what was computed.

    The engine goes on from one example to the next, with what is in its cache.
    """
    rng = np.random.default_rng(seed)
    requests = [a_request(rng, f"{seed}-{index}", alone) for index in range(int(rng.integers(2, 9)))]
    arrivals = [int(rng.integers(0, 12)) for _ in requests]
    aborts = {
        request.rid: arrival + int(rng.integers(1, 40)) for request, arrival in zip(requests, arrivals, strict=True) if rng.random() < 0.25
    }
    heard = drive(engine, requests, aborts, arrivals)
    for request in requests:
        whole = drive(alone, [request], {}, [0])
        for index in range(request.sampling.n):
            same(heard[request.rid, index], whole[request.rid, index], request)


@pytest.mark.parametrize("setup", ["tiny cache", "plain order, pages of one"])
def test_rows_are_what_the_reference_router_gives(model: Path, alone: Engine, tmp_path: Path, setup: str) -> None:
    """Each choice of such workloads once more by the torch decoder, in one piece and in other slots, under the rows that were given alone.

    Everything is float32 here, so that rounding moves scores by some 1e-6: of so many choices of experts none is that close, or one.
    """
    config = {name: value for name, value in SHAPE.config().items() if name not in ("quantization_config", "torch_dtype")}
    write(tmp_path / "float32", config | {"torch_dtype": "float32"}, dequantized(SHAPE.tensors(1), SHAPE.block))
    for name in ("tokenizer.json", "generation_config.json"):
        shutil.copy(model / name, tmp_path / "float32")
    llm = start(tmp_path / "float32", dtype="float32", **SETUPS[setup])
    choices: list[tuple[list[int], Request, ChoiceDelta]] = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        requests = {f"{seed}-{index}": a_request(rng, f"{seed}-{index}", alone) for index in range(10)}
        aborts = {rid: int(rng.integers(2, 30)) for rid in list(requests)[::3]}
        for (rid, _), heard in drive(llm.engine, list(requests.values()), aborts, [0] * 10).items():
            assert heard.last is not None
            choices.append(([*requests[rid].prompt_token_ids, *heard.tokens], requests[rid], heard.last))
    assert bool(llm.engine.num_preemptions) == ("tiny" in setup)
    llm.close()
    expected = routed(load_model(tmp_path / "float32"), [(tokens, request.replay) for tokens, request, _ in choices])
    num_rows = num_equal = num_aborted = 0
    for (_, request, last), rows_RLK in zip(choices, expected, strict=True):
        first, got = request.sampling.routed_experts_start, last.routed_experts
        [(known, _)] = last.routed_experts_missing or [(len(got), 0)]
        num_rows += known
        num_equal += int((rows_RLK[first : first + known] == got[:known]).all((1, 2)).sum())
        num_aborted += known > 0 and last.finish_reason is FinishReason.ABORT
    assert num_aborted > 1 and num_rows > 1500 and num_equal >= num_rows - 1


def routed(decoder: Decoder, many: list[tuple[list[int], Replay | None]]) -> list[np.ndarray]:
    """The experts that the tokens of each use, a lane each."""
    replay_TNK = torch.full((sum(len(tokens) for tokens, _ in many), LAYERS, TOP_K), -1)
    at = 0
    for tokens, replay in many:
        for position in range(len(tokens)):
            if replay is not None and (row := replay.row(position)) is not None:
                replay_TNK[at + position] = torch.tensor(list(row)).view(LAYERS, TOP_K)
        at += len(tokens)
    harness = Harness(decoder, lanes=len(many), max_tokens=144)
    harness.step({lane: tokens for lane, (tokens, _) in enumerate(many)}, replay_TNK)
    return [harness.routes.gather(harness.slots(lane, 0, len(tokens))).numpy() for lane, (tokens, _) in enumerate(many)]
