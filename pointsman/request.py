"""What is asked of the engine and what it answers.

Plain data that every layer may hold: no tensors, no clock. Values are checked here, once,
so that a request that reaches the scheduler is one that can be run: every number is bounded, and an error names the value
and what would be right.

Hundreds of `ChoiceDelta` are made, sent and read in each step, so that one is a struct, at a tenth of what a dataclass costs, and crosses
without the fields that have nothing to say.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

import msgspec

from pointsman.grammar import Grammar

MAX_CHOICES = 128
MAX_LOGPROBS = 64
MAX_STOPS = 64
MAX_STOP_LENGTH = 1024
MAX_LOGIT_BIAS = 1024
MAX_TOP_K = 1 << 20
MAX_POSITION = 1 << 30
FIRST_VERSION = "0"

PauseMode = Literal["abort", "in_place", "keep", "retract"]
"""What becomes of requests when the engine is paused: they end, stay as they are (under either name), or go back to the queue."""

MemoryTag = Literal["weights", "kv_cache"]
"""What an engine can be without for a time: the weights, or the cache of keys, values and routing rows."""


class QueueFull(ValueError):
    """More is waiting than the engine is set up for; the same request may be taken later."""


class RequestFailed(RuntimeError):
    """The engine gave up on a request and lives on; the message has its name and the reason."""


class FinishReason(StrEnum):
    """Why a choice ended: a stop token or string, the token limit, an abort by the client, or a fault of the engine."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when a choice ends.

    Attributes:
        n: choices per prompt; each is sampled on its own.
        max_tokens: most tokens to generate; None runs to the end of the context.
        min_tokens: no stop token, string or end-of-text before this many tokens.
        temperature: 0 is greedy.
        top_k: keep the k likeliest tokens; 0 or -1 keeps all.
        top_p: keep the likeliest tokens whose probabilities reach p.
        min_p: keep tokens at least this share as likely as the likeliest.
        repetition_penalty: divides (positive) or multiplies (negative) the logits of tokens in prompt or output; 1 is off.
        presence_penalty: subtracted once from the logits of tokens in the output.
        frequency_penalty: subtracted once per occurrence in the output.
        logit_bias: token id to a number added to its logit.
        seed: the same seed gives the same answer whatever else runs; None draws one.
        stop: strings that end the text.
        stop_token_ids: token ids that end the text, besides the model's own.
        ignore_eos: go on past the model's end-of-text tokens.
        grammar: what the text must look like (`pointsman.grammar`); it then ends when that is complete, and only a stop string or
            the token limit can end it before. Where nothing but the end can follow, min_tokens and ignore_eos give way.
        logprobs: return the log-probability of each generated token and of this many of the likeliest.
        prompt_logprobs: the same for the prompt's tokens.
        include_stop_str_in_output: keep the stop string at the end of the text.
        skip_special_tokens: leave special tokens out of the text.
        return_routed_experts: return the experts each fed token used, [rows, layers that have experts, top_k].
        routed_experts_start: leave out the rows of positions before this one; at most the length of the prompt.

    Raises:
        ValueError: a value is out of range; the message names it and the range.
    """

    n: int = 1
    max_tokens: int | None = 128
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    grammar: Grammar | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    return_routed_experts: bool = False
    routed_experts_start: int = 0

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        set_(self, "stop_token_ids", tuple(self.stop_token_ids))
        set_(self, "top_k", 0 if self.top_k == -1 else self.top_k)
        set_(self, "logit_bias", dict(self.logit_bias))
        self._check_counts()
        self._check_numbers()
        self._check_stops()
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise ValueError(f"grammar is {self.grammar!r:.80}; it must be a pointsman.grammar.Grammar or None")

    def _check_counts(self) -> None:
        _whole("n", self.n, 1, MAX_CHOICES)
        if self.max_tokens is not None:
            _whole("max_tokens", self.max_tokens, 0, 1 << 30)
            _whole("min_tokens", self.min_tokens, 0, self.max_tokens)
        _whole("min_tokens", self.min_tokens, 0, 1 << 30)
        _whole("top_k", self.top_k, 0, MAX_TOP_K)
        _whole("routed_experts_start", self.routed_experts_start, 0, 1 << 30)
        if self.routed_experts_start and not self.return_routed_experts:
            raise ValueError(f"routed_experts_start is {self.routed_experts_start}; it needs return_routed_experts")
        if self.seed is not None:
            _whole("seed", self.seed, -(1 << 63), (1 << 64) - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 0, MAX_LOGPROBS)

    def _check_numbers(self) -> None:
        _real("temperature", self.temperature, 0.0, 100.0)
        _real("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _real("min_p", self.min_p, 0.0, 1.0)
        _real("repetition_penalty", self.repetition_penalty, 0.0, 10.0, open_low=True)
        _real("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _real("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise ValueError(f"logit_bias names {len(self.logit_bias)} tokens; at most {MAX_LOGIT_BIAS} are allowed")
        for token, bias in self.logit_bias.items():
            _whole("logit_bias token id", token, 0, 1 << 31)
            _real(f"logit_bias[{token}]", bias, -100.0, 100.0)

    def _check_stops(self) -> None:
        for name in ("stop", "stop_token_ids"):
            if len(getattr(self, name)) > MAX_STOPS:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries; at most {MAX_STOPS} are allowed")
        for text in self.stop:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_LENGTH:
                raise ValueError(f"stop {text!r:.80} must be a string of 1 to {MAX_STOP_LENGTH} characters")
        for token in self.stop_token_ids:
            _whole("stop_token_ids entry", token, 0, 1 << 31)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0 or self.top_k == 1

    def replace(self, **changes: Any) -> SamplingParams:
        return dataclasses.replace(self, **changes)


def _whole(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; it must be a whole number from {low} to {high}")


def _real(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or not (low < value if open_low else low <= value) or value > high:  # type: ignore[operator]
        raise ValueError(f"{name} is {value!r}; it must be a number {'above' if open_low else 'from'} {low:g} to {high:g}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """Experts that tokens shall use instead of those that the router would choose: rows of ids, as plain data.

    Row r is of the token at position start + r of prompt and output together. `pointsman.replay` makes one of a routing record, and
    checks the ids.

    Attributes:
        start: position of the first row.
        shape: rows, layers, experts a token.
        data: the ids in C order, a byte each, or two, little endian, for models of more than 256 experts.
        missing: half-open ranges of rows that are none, ascending and apart: those positions route freely.

    Raises:
        ValueError: the fields do not fit each other.
    """

    start: int = 0
    shape: tuple[int, int, int]
    data: bytes = field(repr=False)
    missing: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        _whole("start", self.start, 0, MAX_POSITION)
        for size in self.shape:
            _whole("shape", size, 0, MAX_POSITION)
        if len(self.data) not in ((size := math.prod(self.shape)), 2 * size):
            raise ValueError(f"data has {len(self.data)} bytes; shape {list(self.shape)} has {size} of one byte or two")
        before = 0
        for first, last in self.missing:
            if not before <= first < last <= self.shape[0]:
                raise ValueError(f"missing has ({first}, {last}); ranges must ascend, be apart and lie within {self.shape[0]} rows")
            before = last

    @property
    def end(self) -> int:
        """The position after the last row's."""
        return self.start + self.shape[0]

    @property
    def forced(self) -> Iterator[tuple[int, int]]:
        """Half-open ranges of the positions that have a row."""
        first = 0
        for gap, after in (*self.missing, (self.shape[0], 0)):
            if first < gap:
                yield self.start + first, self.start + gap
            first = after

    def row(self, position: int) -> bytes | None:
        """The ids of a position; None where it routes freely."""
        row = position - self.start
        if not 0 <= row < self.shape[0]:
            return None
        gap = bisect_right(self.missing, row, key=lambda missing: missing[0]) - 1
        if gap >= 0 and row < self.missing[gap][1]:
            return None
        size = len(self.data) // self.shape[0]
        return self.data[row * size : (row + 1) * size]


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt on its way through the engine.

    Attributes:
        rid: the client's or the server's name for it, unique among the requests in flight.
        prompt_token_ids: at least one token.
        replay: the experts that its tokens, and those of each of its choices, shall use; None routes freely.
        priority: larger runs first; equal ones in the order of arrival.
        cache_salt: prompts share cached prefixes only under the same salt.
    """

    rid: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    replay: Replay | None = None
    priority: int = 0
    cache_salt: str = ""

    def __post_init__(self) -> None:
        if not self.prompt_token_ids:
            raise ValueError("the prompt is empty; it must have at least one token")
        if (start := self.sampling.routed_experts_start) > len(self.prompt_token_ids):
            raise ValueError(f"routed_experts_start is {start}; it must be at most {len(self.prompt_token_ids)}, the length of the prompt")


@dataclass(frozen=True, slots=True)
class Logprob:
    """One candidate token: its natural log-probability under the model (before penalties, bias and temperature), and its rank from 1."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(kw_only=True, slots=True)
class CompletionOutput:
    """One choice.

    Attributes:
        routed_experts: a numpy array [prompt + output - 1 - start, layers, top_k], when asked for.
        routed_experts_missing: half-open ranges of its rows that are not known, because the choice was aborted before; what stands in
            them means nothing.
        routing_agreement: of a replay, the share of (token, layer) choices that free routing would have made alike: the same set of
            experts, given the forced routing of all layers and tokens before. None where no position was forced.
        weight_version: of the weights that were in force at its end.
        weight_versions: (first row, row after the last, version) of the rows of routed_experts.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    routed_experts: Any = None
    routed_experts_missing: list[tuple[int, int]] = field(default_factory=list)
    routing_agreement: float | None = None
    weight_version: str = ""
    weight_versions: list[tuple[int, int, str]] = field(default_factory=list)

    @property
    def cumulative_logprob(self) -> float | None:
        if self.logprobs is None:
            return None
        return sum(entry[token].logprob for token, entry in zip(self.token_ids, self.logprobs, strict=True))


@dataclass(kw_only=True, slots=True)
class RequestOutput:
    """A prompt and its choices. `prompt_logprobs[0]` is None: nothing precedes the first token."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    finished: bool = False


class ChoiceDelta(msgspec.Struct, kw_only=True, omit_defaults=True, gc=False):
    """What one step added to one choice.

    Attributes:
        text: whole characters only; text that may still become a stop string is held back.
        token_ids: the tokens of this step; `logprobs` has one entry for each, when asked for.
        prompt_logprobs: with the first delta of a request that asked: one entry for each prompt token, None for the first.
        routed_experts: with the last delta, when asked for and the engine has not given up on the choice: a numpy array
            [prompt + output - 1 - start, layers, top_k].
        routed_experts_missing: half-open ranges of its rows that are not known, because the choice was aborted before.
        routing_agreement: with the last delta of a replay: see `CompletionOutput`.
        weight_versions: (first row, row after the last, version of the weights that computed them) of the rows that are known.
        weight_version: of the weights that were in force in this step.
        error: why the engine gave up on this choice, with finish reason ERROR.
        refused: it never began with the request, and the error is meant for whoever asked: the grammar could not be used.
    """

    rid: str
    index: int
    text: str = ""
    token_ids: list[int] = []
    logprobs: list[dict[int, Logprob]] | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    routed_experts: Any = None
    routed_experts_missing: tuple[tuple[int, int], ...] = ()
    routing_agreement: float | None = None
    weight_versions: tuple[tuple[int, int, str], ...] = ()
    weight_version: str = ""
    error: str | None = None
    refused: bool = False


@dataclass(kw_only=True, slots=True)
class EngineStats:
    """What the engine is doing now, and what it has done since it started.

    Attributes:
        num_running: sequences that have a lane.
        num_waiting: sequences that wait for one.
        cache_usage: share of the cache that sequences hold; pages that are only cached do not count.
        num_preemptions: how often a running sequence had to give its pages to others.
        num_steps: steps whose results are in.
        expert_load: a numpy array [layers, experts] of int64: how many tokens used each expert.
    """

    num_running: int
    num_waiting: int
    cache_usage: float
    num_preemptions: int
    num_steps: int
    expert_load: Any
