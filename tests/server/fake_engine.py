"""An engine without a model, behind the real socket and the real loop.

It answers every prompt with the same thought and the same sentence, one byte a step; an answer that ignores the end is cut there. Words
in the prompt make it misbehave:

    REFUSE    add raises ValueError        FAULT     the choice ends with an error after two tokens
    CRASH     a step raises                KILL      the process dies at once, without a word
    ENDLESS   tokens until aborted         ABORTED   answers how many requests have been aborted
    SAY x     answers x                    BUSY      add raises QueueFull
    STUCK     a step does not end          FLUSHED   answers how often the cache was flushed
    SLOWLY    steps take 2 ms              UNUSABLE  the grammar is refused
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy

from pointsman.config import EngineConfig
from pointsman.request import ChoiceDelta, EngineStats, FinishReason, Logprob, MemoryTag, QueueFull, Request
from pointsman.server.engine_process import main
from pointsman.text import Detokenizer, Tokenizer

THOUGHT = "2 and 2 – that is 4."
SENTENCE = "The answer is 4."
REPLY = f"{THOUGHT}\n</think>\n\n{SENTENCE}"
CONTEXT = 9000
VOCABULARY = 300
LAYERS, EXPERTS, TOP_K = 3, 8, 2


@dataclasses.dataclass
class _Choice:
    request: Request
    index: int
    tokens: list[int]
    detokenizer: Detokenizer
    text: str
    done: int = 0


def routes_of(token: int) -> list[list[int]]:
    """The experts that a token uses: in each layer two, that tell which it is."""
    firsts = [(token + layer) % EXPERTS for layer in range(LAYERS)]
    return [[first, (first + 1 + token // EXPERTS % (EXPERTS - 1)) % EXPERTS] for first in firsts]


class _Weights:
    """There are none, but they can be released."""

    released: tuple[MemoryTag, ...] = ()

    def restore(self, tags: Sequence[MemoryTag]) -> None:
        self.released = tuple(tag for tag in self.released if tag not in tags)


class FakeEngine:
    """Has what the engine's process uses of an engine."""

    def __init__(self, config: EngineConfig) -> None:
        folder = config.model.model_path or ""
        if not Path(folder).is_dir():
            raise ValueError(f"{folder} is not a folder")
        if config.model.load_format == "dummy":
            raise RuntimeError("secret 1234")
        self.folder = Path(folder)
        self.tokenizer = Tokenizer.load(folder)
        self.architecture = SimpleNamespace(
            name="MiniMaxM2ForCausalLM", vocab_size=VOCABULARY, expert_layers=tuple(range(LAYERS)), num_experts=EXPERTS, top_k=TOP_K
        )
        self.context_length = self.cache_tokens = CONTEXT
        self.model_name = config.model.served_model_name or "fake"
        self.generation_defaults = {"temperature": 0.5, "top_k": 40}
        self._choices: list[_Choice] = []
        self._aborted = 0
        self._num_steps = 0
        self._load = numpy.zeros((LAYERS, EXPERTS), numpy.int64)
        self._flushed = 0
        if config.model.random_seed:
            time.sleep(config.model.random_seed)

        self.weights = _Weights()

    weight_version = "0"
    paused = False

    def release(self, tags: Sequence[MemoryTag]) -> None:
        self.weights.released = (*self.weights.released, *tags)

    @property
    def has_work(self) -> bool:
        return bool(self._choices)

    def settle(self) -> None:
        pass

    def abort_all(self) -> None:
        self._choices.clear()

    def add(self, request: Request) -> None:
        prompt = self.tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False)
        if "REFUSE" in prompt:
            raise ValueError("this prompt is refused")
        if "BUSY" in prompt:
            raise QueueFull("too much to do")
        if "KILL" in prompt:
            os.kill(os.getpid(), signal.SIGKILL)
        said = prompt.partition("SAY ")[2].partition("[e~[")[0]
        reply = str(self._aborted) if "ABORTED" in prompt else str(self._flushed) if "FLUSHED" in prompt else said or REPLY
        if "ENDLESS" in prompt:
            reply = "again " * CONTEXT
        for index in range(request.sampling.n):
            tokens = self.tokenizer.encode(reply) + ([self.tokenizer.token_id("[e~[")] if not request.sampling.ignore_eos else [])
            self._choices.append(_Choice(request, index, tokens, Detokenizer(self.tokenizer, request.prompt_token_ids), prompt))

    def abort(self, rid: str) -> list[ChoiceDelta]:
        """The last two rows of what is aborted are not known."""
        ended = [choice for choice in self._choices if choice.request.rid == rid]
        self._choices = [choice for choice in self._choices if choice.request.rid != rid]
        self._aborted += bool(ended)
        deltas = [
            ChoiceDelta(rid=rid, index=choice.index, finish_reason=FinishReason.ABORT, weight_version=self.weight_version)
            for choice in ended
        ]
        for choice, delta in zip(ended, deltas, strict=True):
            self._route(choice, delta, len(choice.request.prompt_token_ids) + choice.done - 3)
        return deltas

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._choices),
            num_waiting=0,
            cache_usage=0.25,
            num_preemptions=0,
            num_steps=self._num_steps,
            expert_load=self._load.copy(),
        )

    def flush_cache(self) -> None:
        self._flushed += 1

    def step(self) -> list[ChoiceDelta]:
        self._num_steps += 1
        deltas = [self._grow(choice) for choice in self._choices]
        ended = {(delta.rid, delta.index) for delta in deltas if delta.finish_reason is not None}
        if any("STUCK" in choice.text for choice in self._choices):
            time.sleep(60)
        if any("ENDLESS" in choice.text or "SLOWLY" in choice.text for choice in self._choices):
            time.sleep(0.002)
        self._choices = [choice for choice in self._choices if (choice.request.rid, choice.index) not in ended]
        return deltas

    def _grow(self, choice: _Choice) -> ChoiceDelta:
        request, sampling = choice.request, choice.request.sampling
        if choice.done == 2 and "CRASH" in choice.text:
            raise RuntimeError("secret 1234")
        prompt = request.prompt_token_ids
        delta = ChoiceDelta(rid=request.rid, index=choice.index, num_prompt_tokens=len(prompt), num_cached_tokens=len(prompt) // 2)
        delta.weight_version = self.weight_version
        if choice.done == 0 and sampling.prompt_logprobs is not None:
            delta.prompt_logprobs = [None, *(self._entry(token, sampling.prompt_logprobs) for token in prompt[1:])]
        if "UNUSABLE" in choice.text:
            delta.finish_reason, delta.error, delta.refused = FinishReason.ERROR, "the regex cannot be used: no text fits it", True
            return delta
        if choice.done == 2 and "FAULT" in choice.text:
            delta.finish_reason, delta.error = FinishReason.ERROR, "secret 1234"
            return delta
        if sampling.max_tokens != 0:
            self._take(choice, delta)
        limit = len(choice.tokens) if sampling.max_tokens is None else min(sampling.max_tokens, len(choice.tokens))
        if delta.finish_reason is None and choice.done >= limit:
            delta.finish_reason = FinishReason.LENGTH
            delta.text += choice.detokenizer.flush()
        if delta.finish_reason is not None:
            self._route(choice, delta, len(prompt) + choice.done - 1)
        return delta

    def _route(self, choice: _Choice, delta: ChoiceDelta, num_known: int) -> None:
        """Rows as `routes_of` has them, known up to a position; a replay agrees where it has these."""
        sampling, replay = choice.request.sampling, choice.request.replay
        if replay is not None:
            tokens = [*choice.request.prompt_token_ids, *choice.tokens[: choice.done]][:num_known]
            given = [(replay.row(position), routes_of(token)) for position, token in enumerate(tokens)]
            alike = [row[2 * layer : 2 * layer + 2] == bytes(free[layer]) for row, free in given if row for layer in range(LAYERS)]
            delta.routing_agreement = sum(alike) / len(alike) if alike else None
        for token in (*choice.request.prompt_token_ids, *choice.tokens[: choice.done])[:num_known]:
            self._load += numpy.eye(EXPERTS, dtype=numpy.int64)[routes_of(token)].sum(axis=1)
        if sampling.return_routed_experts:
            tokens = [*choice.request.prompt_token_ids, *choice.tokens[: choice.done]]
            rows = numpy.array([routes_of(token) for token in tokens[:-1]], numpy.uint8).reshape(-1, LAYERS, TOP_K)
            delta.routed_experts = rows[sampling.routed_experts_start :]
            missing = (max(num_known - sampling.routed_experts_start, 0), len(delta.routed_experts))
            delta.routed_experts_missing = (missing,) if missing[0] < missing[1] else ()
            delta.weight_versions = ((0, missing[0], self.weight_version),) if missing[0] else ()

    def _take(self, choice: _Choice, delta: ChoiceDelta) -> None:
        token = choice.tokens[choice.done]
        choice.done += 1
        delta.token_ids = [token]
        if choice.request.sampling.logprobs is not None:
            delta.logprobs = [self._entry(token, choice.request.sampling.logprobs)]
        if token == self.tokenizer.token_id("[e~["):
            delta.finish_reason, delta.stop_reason = FinishReason.STOP, token
            return
        delta.text = choice.detokenizer.push(token)

    def _entry(self, token: int, top: int) -> dict[int, Logprob]:
        """The token itself is second best."""
        entry = {token: Logprob(-1.5, 2, self.tokenizer.token_text(token))}
        return entry | {(token + 1 + rank) % 256: Logprob(-0.5 - 1.5 * rank, rank + 1 + (rank > 0)) for rank in range(top)}

    def close(self) -> None:
        print("the engine is closed", file=sys.stderr)


def run() -> int:
    return main(FakeEngine)
