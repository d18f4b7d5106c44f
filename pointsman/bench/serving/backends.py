"""How a query is put to each kind of endpoint, and what the events of its answer mean.

What counts as tokens is what a person would see grow: text, reasoning and tool calls alike. A benchmark that looks at the final
answer's text alone sees the whole thinking of a model as its time to first token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from pointsman.bench.serving.events import EventReader
from pointsman.bench.serving.query import Outcome, Query

END = b"[DONE]"
MAX_ERROR = 300


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What all queries of a run have in common.

    Attributes:
        model: its name in the API; None leaves it out.
        temperature: None leaves it to the server.
        extra: further fields of the body, which win over all others.
    """

    model: str | None
    temperature: float | None = 0.0
    ignore_eos: bool = False
    return_routed_experts: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Backend:
    """One kind of endpoint: its path, the body of a query, and the meaning of an event, which is written into the outcome.

    `read` returns the number of new tokens that the event brings, 0 where it brings none.
    """

    path: str
    body: Callable[[Query, Wish], dict[str, Any]]
    read: Callable[[bytes, Outcome], int]


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[msgspec.Raw] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    routed_experts: Any = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


class _Meta(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reason: Any = None
    routed_experts: Any = None


class _Native(msgspec.Struct):
    text: str | None = None
    output_ids: list[int] | None = None
    meta_info: _Meta | None = None
    error: Any = None


_chunk = msgspec.json.Decoder(_Chunk)
_native = msgspec.json.Decoder(_Native)


class AnswerFault(ValueError):
    """The server answered with an error, or with something that is not its API."""


class StreamTaker:
    """Takes the body of an answer as it comes and writes what it means into an outcome, each event that brings tokens with its moment."""

    def __init__(self, backend: Backend, outcome: Outcome, clock: Callable[[], float]) -> None:
        self._events = EventReader()
        self._read = backend.read
        self._outcome = outcome
        self._clock = clock

    def __call__(self, piece: bytes) -> None:
        """Raises AnswerFault."""
        now = self._clock()
        for event in self._events.feed(piece):
            if event == END:
                continue
            try:
                tokens = self._read(event, self._outcome)
            except msgspec.MsgspecError as error:
                raise AnswerFault(f"an event is not what it should be ({error}): {shorten(event)}") from None
            if tokens:
                self._outcome.piece_s.append(now)
                self._outcome.counted += tokens


def shorten(body: bytes) -> str:
    """The start of a body, for an error message."""
    return body[:MAX_ERROR].decode(errors="replace")


def error_of(body: bytes) -> str:
    """What the body of a failed answer says, in OpenAI's shape or not."""
    try:
        content = msgspec.json.decode(body)
    except msgspec.MsgspecError:
        return shorten(body) or "it says nothing"
    error = content.get("error", content) if isinstance(content, dict) else content
    return str(error.get("message", error) if isinstance(error, dict) else error)[:MAX_ERROR]


def _common(query: Query, wish: Wish) -> dict[str, Any]:
    body: dict[str, Any] = {} if wish.model is None else {"model": wish.model}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    if wish.temperature is not None:
        body["temperature"] = wish.temperature
    if wish.ignore_eos:
        body["ignore_eos"] = True
    if wish.return_routed_experts:
        body["return_routed_experts"] = True
    if query.stop:
        body["stop"] = list(query.stop)
    return body


def _completions_body(query: Query, wish: Wish) -> dict[str, Any]:
    if query.messages is not None:
        raise ValueError("the dataset has conversations, which --backend openai cannot ask; use --backend openai-chat")
    prompt = query.text if query.text is not None else list(query.ids or ())
    return _common(query, wish) | {"prompt": prompt, "max_tokens": query.output_len} | wish.extra


def _chat_body(query: Query, wish: Wish) -> dict[str, Any]:
    if query.ids is not None:
        raise ValueError("--backend openai-chat takes no token ids; leave out --tokenize-prompt")
    messages = query.messages or [{"role": "user", "content": query.text}]
    return _common(query, wish) | {"messages": messages, "max_completion_tokens": query.output_len} | wish.extra


def _native_body(query: Query, wish: Wish) -> dict[str, Any]:
    if query.messages is not None:
        raise ValueError("the dataset has conversations, which --backend generate cannot ask; use --backend openai-chat")
    sampling: dict[str, Any] = {"max_new_tokens": query.output_len}
    if wish.temperature is not None:
        sampling["temperature"] = wish.temperature
    if wish.ignore_eos:
        sampling["ignore_eos"] = True
    if query.stop:
        sampling["stop"] = list(query.stop)
    prompt = {"text": query.text} if query.text is not None else {"input_ids": list(query.ids or ())}
    body = prompt | {"sampling_params": sampling, "stream": True}
    if wish.return_routed_experts:
        body["return_routed_experts"] = True
    return body | wish.extra


def _read_chunk(event: bytes, outcome: Outcome) -> int:
    chunk = _chunk.decode(event)
    if chunk.error is not None:
        raise AnswerFault(error_of(event))
    if chunk.usage is not None:
        outcome.prompt_tokens, outcome.output_tokens = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
    tokens = 0
    for choice in chunk.choices or ():
        if choice.finish_reason is not None:
            outcome.finish_reason = choice.finish_reason
        if choice.routed_experts is not None:
            outcome.routing = choice.routed_experts
        text = choice.text if choice.delta is None else _text_of(choice.delta)
        if text:
            outcome.texts.append(text)
        if choice.token_ids:
            tokens += len(choice.token_ids)
        elif text or (choice.delta is not None and choice.delta.tool_calls):
            tokens += 1
    return tokens


def _text_of(delta: _Delta) -> str:
    return (delta.reasoning_content or delta.reasoning or "") + (delta.content or "")


def _read_native(event: bytes, outcome: Outcome) -> int:
    """An event of `/generate` has the whole answer so far; how many tokens it has says what is new."""
    answer = _native.decode(event)
    if answer.error is not None:
        raise AnswerFault(error_of(event))
    outcome.texts = [answer.text or ""]
    meta = answer.meta_info or _Meta()
    outcome.prompt_tokens = meta.prompt_tokens
    if meta.finish_reason is not None:
        reason = meta.finish_reason
        outcome.finish_reason = str(reason.get("type")) if isinstance(reason, dict) else str(reason)
    if meta.routed_experts is not None:
        outcome.routing = meta.routed_experts
    total = meta.completion_tokens if meta.completion_tokens is not None else len(answer.output_ids or ())
    outcome.output_tokens = total
    return max(total - outcome.counted, 0)


BACKENDS = {
    "openai": Backend("/v1/completions", _completions_body, _read_chunk),
    "openai-chat": Backend("/v1/chat/completions", _chat_body, _read_chunk),
    "generate": Backend("/generate", _native_body, _read_native),
}
