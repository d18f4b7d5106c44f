"""What tests of replay share: a model that other experts change visibly, rows, requests of every kind and what came of them.

The oracle of a request is the same one alone: in the plain order, without a prefix cache and in one chunk.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pointsman import LLM, FinishReason, SamplingParams
from pointsman.engine.engine import Engine
from pointsman.replay import replay_of
from pointsman.request import ChoiceDelta, Request
from pointsman.routed_experts import RoutedExperts
from tests.models.checkpoints import Shape

LAYERS, EXPERTS, TOP_K = 3, 10, 3
SHAPE = Shape(layers=LAYERS, hidden=64, experts=EXPERTS, top_k=TOP_K, width=32, vocab=288, block=(32, 16))
SIZES: dict[str, Any] = {"layers": range(LAYERS), "num_experts": EXPERTS, "top_k": TOP_K}
PROMPT = tuple(range(40, 70))
PARAMS = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, return_routed_experts=True, logprobs=1)
ALONE: dict[str, Any] = {"disable_radix_cache": True, "disable_overlap_schedule": True, "chunked_prefill_size": 256}


def start(model: Path, step: str = "compiled", **config: Any) -> LLM:
    return LLM(str(model), progress=False, cpu_step=step, context_length=256, **config)


@pytest.fixture(scope="module")
def model(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights so large that other experts give other keys, values and tokens, which dummy ones do not; and the tokenizer of bytes."""
    path = SHAPE.write(tmp_path_factory.mktemp("replay") / "model", seed=1)
    shutil.copy(folder / "tokenizer.json", path)
    shutil.copy(folder / "generation_config.json", path)
    return path


def rows(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    drawn = [[rng.permutation(EXPERTS)[:TOP_K] for _ in range(LAYERS)] for _ in range(count)]
    return np.array(drawn, np.uint8).reshape(count, LAYERS, TOP_K)


@dataclass
class Heard:
    """What came of one choice."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[Any] = field(default_factory=list)
    prompt_logprobs: Any = None
    last: ChoiceDelta | None = None

    def take(self, delta: ChoiceDelta) -> None:
        self.tokens += delta.token_ids
        self.text += delta.text
        self.logprobs += delta.logprobs or []
        self.prompt_logprobs = delta.prompt_logprobs or self.prompt_logprobs
        if delta.finish_reason is not None:
            assert self.last is None
            self.last = delta


def drive(engine: Engine, requests: list[Request], aborts: dict[str, int], arrivals: list[int]) -> dict[tuple[str, int], Heard]:
    """Add each request at its step, abort some at theirs, and run to the end."""
    heard = {(request.rid, index): Heard() for request in requests for index in range(request.sampling.n)}
    step = 0
    while step <= max([*arrivals, *aborts.values()]) or engine.has_work:
        for request, arrival in zip(requests, arrivals, strict=True):
            if arrival == step:
                engine.add(request)
        deltas = [delta for rid, at in aborts.items() if at == step for delta in engine.abort(rid)]
        for delta in deltas + (engine.step() if engine.has_work else []):
            heard[delta.rid, delta.index].take(delta)
        step += 1
    return heard


def a_request(rng: np.random.Generator, rid: str, alone: Engine) -> Request:
    """Of every kind: short, long, with a common prefix, several choices, stop strings, scored, free, or replayed in one way or another."""
    shared = np.random.default_rng(0).integers(0, 256, 40).tolist()
    prompt = shared[: int(rng.integers(0, 40))] + rng.integers(0, 256, int(rng.integers(1, 40))).tolist()
    params = SamplingParams(
        n=int(rng.choice([1, 1, 1, 2, 3])),
        max_tokens=int(rng.integers(0, 61)),
        temperature=float(rng.choice([0.0, 1.0])),
        seed=int(rng.integers(0, 1000)),
        stop=(chr(int(rng.integers(97, 123))),) if rng.random() < 0.3 else (),
        logprobs=1,
        prompt_logprobs=0 if rng.random() < 0.2 else None,
        return_routed_experts=True,
        routed_experts_start=int(rng.integers(0, len(prompt) + 1)) if rng.random() < 0.3 else 0,
    )
    request = Request(rid=rid, prompt_token_ids=tuple(prompt), sampling=params)
    most, kind = max(len(prompt), len(prompt) + (params.max_tokens or 0) - 1), rng.random()
    if kind < 0.35:
        return request
    if kind < 0.5:
        free = drive(alone, [request], {}, [0])[rid, 0]
        assert free.last is not None
        record = RoutedExperts(rows_RLK=free.last.routed_experts, num_experts=EXPERTS, start=params.routed_experts_start, layers=(0, 1, 2))
    else:
        first = int(rng.integers(0, most + 1))
        count = int(rng.integers(0, most - first + 1))
        cuts = np.sort(rng.integers(0, count + 1, 2)).tolist()
        missing = (tuple(cuts),) if cuts[0] < cuts[1] and rng.random() < 0.5 else ()
        # few seeds, so that records have beginnings in common
        record = RoutedExperts(
            rows_RLK=rows(most, int(rng.integers(0, 2)))[first : first + count],
            num_experts=EXPERTS,
            start=first,
            layers=(0, 1, 2),
            missing=missing,
        )
    return Request(rid=rid, prompt_token_ids=tuple(prompt), sampling=params, replay=replay_of(record, **SIZES))


@pytest.fixture(scope="module")
def alone(model: Path) -> Iterator[Engine]:
    llm = start(model, **ALONE)
    yield llm.engine
    llm.close()


def same(got: Heard, want: Heard, request: Request) -> None:
    assert got.last is not None and want.last is not None
    count, start = len(got.tokens), request.sampling.routed_experts_start
    assert (got.tokens, got.logprobs) == (want.tokens[:count], want.logprobs[:count])
    length = max(len(request.prompt_token_ids) + count - 1 - start, 0)
    assert got.last.routed_experts.shape == (length, LAYERS, TOP_K)
    if got.last.finish_reason is not FinishReason.ABORT:
        assert (count, got.text, got.last.finish_reason) == (len(want.tokens), want.text, want.last.finish_reason)
        assert got.prompt_logprobs == want.prompt_logprobs
        assert got.last.routing_agreement == want.last.routing_agreement
        assert not got.last.routed_experts_missing
    known = length
    if got.last.routed_experts_missing:
        [(known, end)] = got.last.routed_experts_missing
        assert end == length
    assert np.array_equal(got.last.routed_experts[:known], want.last.routed_experts[:known])
