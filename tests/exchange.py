"""Checkpoints of one architecture that take each other's place, and what fresh engines of them answer: for tests of weights in flight."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pointsman import LLM, SamplingParams
from tests.models.checkpoints import Shape

SHAPE = Shape(block=(16, 16))
PROMPT = tuple((7 * index + 3) % 97 for index in range(29))
PARAMS = SamplingParams(temperature=0.0, max_tokens=14, logprobs=3, return_routed_experts=True)
SCORED = PARAMS.replace(prompt_logprobs=1)
OPTIONS: dict[str, Any] = {"cpu_step": "compiled", "page_size": 4}
NUM_GREEDY = 20


class Answer(NamedTuple):
    """All that an answer says but the names of the weights."""

    token_ids: list[int]
    logprobs: Any
    prompt_logprobs: Any
    routed_experts: list[Any]


@contextlib.contextmanager
def silent_port() -> Iterator[int]:
    """A port of this machine that nobody else gets meanwhile, and at which nobody answers."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def make(folder: Path, **options: Any) -> LLM:
    return LLM(str(folder), **{"progress": False, **OPTIONS, **options})


def answer(llm: LLM, params: SamplingParams = PARAMS) -> Answer:
    result = llm.generate(list(PROMPT), params)[0]
    output = result.outputs[0]
    return Answer(output.token_ids, output.logprobs, result.prompt_logprobs, output.routed_experts.tolist())


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three checkpoints, one in several files."""
    path = tmp_path_factory.mktemp("exchanged")
    return [SHAPE.write(path / str(seed), seed=seed, shards=1 + seed) for seed in range(3)]


def _first(folders: list[Path], params: SamplingParams) -> dict[str, list[Answer]]:
    """What a fresh engine of each checkpoint answers first, by the step."""
    found: dict[str, list[Answer]] = {}
    for step in ("torch", "compiled"):
        for folder in folders:
            with contextlib.closing(make(folder, cpu_step=step)) as llm:
                found.setdefault(step, []).append(answer(llm, params))
    return found


@pytest.fixture(scope="session")
def answers(folders: list[Path]) -> dict[str, list[Answer]]:
    return _first(folders, PARAMS)


@pytest.fixture(scope="session")
def scored(folders: list[Path]) -> dict[str, list[Answer]]:
    """The same with the prompt's log-probabilities."""
    return _first(folders, SCORED)


@pytest.fixture(scope="session")
def greedy(folders: list[Path]) -> list[list[int]]:
    """The first NUM_GREEDY tokens of each checkpoint."""
    found = []
    for folder in folders:
        with contextlib.closing(make(folder)) as llm:
            found.append(llm.generate(list(PROMPT), PARAMS.replace(max_tokens=NUM_GREEDY))[0].outputs[0].token_ids)
    return found
