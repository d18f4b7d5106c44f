"""An engine without a model whose steps take a set time, behind the real loop and the real socket.

A step of it either waits, as for a GPU, or keeps one core busy for that time, as a model on a CPU would. Every choice gets one token a
step: a thought, the end of thinking, an answer that goes on to the limit. Every token shows but the one that ends thinking.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from pointsman import tiny
from pointsman.config import EngineConfig
from pointsman.request import ChoiceDelta, EngineStats, FinishReason, Request
from pointsman.server.engine_process import main
from pointsman.text import Tokenizer

LAYERS, EXPERTS, TOP_K = 62, 256, 8
CONTEXT = 1 << 16
THOUGHT = "First I count the boxes, then the eggs in each of them, and multiply."
ANSWER = " There are 15 boxes with 12 eggs in each, which makes 180 eggs in total."


@dataclass
class _Choice:
    request: Request
    index: int
    words: Iterator[tuple[int, str]]
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = self.request.sampling.max_tokens or 1


class StubEngine:
    """What the engine's process uses of an engine.

    Args:
        seconds: what a step takes.
        busy: it computes for so long, and does not wait.
    """

    def __init__(self, *, seconds: float, busy: bool) -> None:
        self._seconds = seconds
        self._busy = busy
        self.folder = tiny.path()
        self.tokenizer = Tokenizer.load(self.folder)
        self.architecture = SimpleNamespace(
            name="MiniMaxM2ForCausalLM",
            vocab_size=self.tokenizer.vocab_size,
            expert_layers=tuple(range(LAYERS)),
            num_experts=EXPERTS,
            top_k=TOP_K,
        )
        self.context_length = self.cache_tokens = CONTEXT
        self.model_name = "stub"
        self.generation_defaults: dict[str, Any] = {}
        self._thought = self._words(f"{THOUGHT}</think>")
        self._answer = self._words(ANSWER)
        self._choices: dict[tuple[str, int], _Choice] = {}
        self._num_steps = 0
        self._load = np.zeros((LAYERS, EXPERTS), np.int64)

    @property
    def has_work(self) -> bool:
        return bool(self._choices)

    def add(self, request: Request) -> None:
        for index in range(request.sampling.n):
            words = itertools.chain(self._thought, itertools.cycle(self._answer))
            self._choices[request.rid, index] = _Choice(request, index, words)

    def abort(self, rid: str) -> list[ChoiceDelta]:
        gone = [key for key in self._choices if key[0] == rid]
        for key in gone:
            del self._choices[key]
        return [ChoiceDelta(rid=rid, index=index, finish_reason=FinishReason.ABORT) for _, index in gone]

    def step(self) -> list[ChoiceDelta]:
        end = (time.thread_time() if self._busy else time.perf_counter()) + self._seconds
        self._num_steps += 1
        deltas = [self._grow(choice) for choice in list(self._choices.values())]
        if self._busy:
            while time.thread_time() < end:
                pass
        else:
            time.sleep(max(0.0, end - time.perf_counter()))
        return deltas

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._choices),
            num_waiting=0,
            cache_usage=0.25,
            num_preemptions=0,
            num_steps=self._num_steps,
            expert_load=self._load,
        )

    def close(self) -> None:
        """Nothing to close."""

    def _words(self, text: str) -> list[tuple[int, str]]:
        return [(token, self.tokenizer.token_text(token)) for token in self.tokenizer.encode(text)]

    def _grow(self, choice: _Choice) -> ChoiceDelta:
        token, text = next(choice.words)
        choice.left -= 1
        delta = ChoiceDelta(rid=choice.request.rid, index=choice.index, token_ids=[token], text=text)
        delta.num_prompt_tokens = len(choice.request.prompt_token_ids)
        if not choice.left:
            delta.finish_reason = FinishReason.LENGTH
            del self._choices[choice.request.rid, choice.index]
        return delta


def run(*, seconds: float, busy: bool) -> int:
    """The engine's process."""

    def load(config: EngineConfig) -> Any:
        return StubEngine(seconds=seconds, busy=busy)

    return main(load)
