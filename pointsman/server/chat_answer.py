"""An assistant's turn, as `/v1/chat/completions` has it: thinking, answer and tool calls apart."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pointsman.request import ChoiceDelta, FinishReason, Logprob, Request
from pointsman.server.answers import LOWEST_LOGPROB, Form, OpenAIAnswer, finish_of
from pointsman.server.events import ContentDelta, Event, ReasoningDelta, ToolArgumentsDelta, ToolCallEnd, ToolCallStart
from pointsman.server.output import OutputParser, Reasoning
from pointsman.text import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a turn's text is read.

    Attributes:
        reasoning: how thinking is told from the answer, or None where it is not.
        tools: what the model was offered.
        opened: the prompt ends inside the thinking.
        stream_reasoning: thinking streams as it comes, not in one piece when it has ended.
        parallel: the turn may have several calls; if not, it ends with the first.
    """

    reasoning: Reasoning | None
    tools: Sequence[dict[str, Any]] | None
    opened: bool
    stream_reasoning: bool = True
    parallel: bool = True


class _Turn:
    """One choice as it grows."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._parser = OutputParser(reading.reasoning, reading.tools, opened=reading.opened)
        self._held: list[str] = []
        self.begun = False
        self.num_reasoning_tokens = 0

    @property
    def answered(self) -> bool:
        """Whether the answer has begun, so that it is a text even if an empty one."""
        return self._parser.answered and not self._parser.num_calls

    def read(self, delta: ChoiceDelta) -> tuple[dict[str, Any], str | None]:
        """What a delta adds, in the shape of a stream's delta, and why the turn has ended with it."""
        thought = self._parser.thinking
        events = self._parser.push(delta.text)
        if thought or self._parser.thinking:
            self.num_reasoning_tokens += len(delta.token_ids)
        if delta.finish_reason is not None:
            events += self._parser.finish(delta.finish_reason)
        finish = finish_of(delta.finish_reason)
        if delta.finish_reason is FinishReason.STOP and self._parser.num_calls:
            finish = "tool_calls"
        if not self._reading.parallel and (end := _end_of_first_call(events)):
            events, finish = events[:end], "tool_calls"
        if not self._reading.stream_reasoning:
            events = self._whole_reasoning(events, ended=finish is not None)
        return _shape(events), finish

    def _whole_reasoning(self, events: Sequence[Event], *, ended: bool) -> list[Event]:
        """The same events, with thinking held back until it has ended."""
        kept: list[Event] = [event for event in events if not isinstance(event, ReasoningDelta)]
        self._held += [event.text for event in events if isinstance(event, ReasoningDelta)]
        if self._held and (ended or not self._parser.thinking):
            kept.insert(0, ReasoningDelta("".join(self._held)))
            self._held.clear()
        return kept


class ChatAnswer(OpenAIAnswer):
    """An assistant's turn, in one or several choices."""

    kind = "chat.completion"
    piece_kind = "chat.completion.chunk"

    def __init__(self, form: Form, requests: Sequence[Request], reading: Reading, tokenizer: Tokenizer) -> None:
        super().__init__(form, requests)
        self._splits = reading.reasoning == "minimax"
        self._turns = [_Turn(reading) for _ in range(requests[0].sampling.n)]
        self._tokenizer = tokenizer
        self._logprobs = requests[0].sampling.logprobs
        self._prompt: Sequence[int] | None = requests[0].prompt_token_ids if form.token_ids else None

    def _chunk(self, delta: ChoiceDelta) -> dict[str, Any] | None:
        chunk = super()._chunk(delta)
        if chunk is not None and self.stream and self._prompt is not None:
            chunk, self._prompt = chunk | {"prompt_token_ids": self._prompt}, None
        return chunk

    def whole(self) -> dict[str, Any]:
        return super().whole() | ({} if self._prompt is None else {"prompt_token_ids": self._prompt})

    def _piece(self, index: int, delta: ChoiceDelta) -> tuple[dict[str, Any] | None, str | None]:
        turn = self._turns[index]
        before = turn.num_reasoning_tokens
        added, finish = turn.read(delta)
        self._usage.reasoning += turn.num_reasoning_tokens - before
        logprobs = self._tokens(delta) if self._logprobs is not None else None
        if not added and not logprobs and not self._form.token_ids and finish is None:
            return None, None
        if not turn.begun:
            turn.begun = True
            added = {"role": "assistant", **added}
        return {"delta": added, "logprobs": {"content": logprobs} if logprobs else None}, finish

    def _tokens(self, delta: ChoiceDelta) -> list[dict[str, Any]]:
        listed = []
        for token, entry in zip(delta.token_ids, delta.logprobs or [], strict=True):
            best = sorted(entry.items(), key=lambda item: item[1].rank)[: self._logprobs]
            listed.append(self._token(token, entry[token]) | {"top_logprobs": [self._token(*item) for item in best]})
        return listed

    def _token(self, token: int, entry: Logprob) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(token)
        return {"token": data.decode(errors="replace"), "logprob": max(entry.logprob, LOWEST_LOGPROB), "bytes": list(data)}

    def _join(self, index: int, pieces: Sequence[dict[str, Any]]) -> dict[str, Any]:
        added = [piece["delta"] for piece in pieces]
        reasoning = "".join(entry.get("reasoning_content", "") for entry in added)
        content = "".join(entry.get("content", "") for entry in added)
        message: dict[str, Any] = {"role": "assistant", "content": content if content or self._turns[index].answered else None}
        if self._splits:
            message["reasoning_content"] = reasoning or None
        if calls := _joined_calls(added):
            message["tool_calls"] = calls
        tokens = [token for piece in pieces if piece["logprobs"] for token in piece["logprobs"]["content"]]
        return {"message": message, "logprobs": None if self._logprobs is None else {"content": tokens}}


def _end_of_first_call(events: Sequence[Event]) -> int:
    """The place after the event that ends the first whole call; 0 where there is none."""
    ends = (place for place, event in enumerate(events, 1) if isinstance(event, ToolCallEnd) and event.complete)
    return next(ends, 0)


def _shape(events: Sequence[Event]) -> dict[str, Any]:
    """Events as a stream's delta. Calls have a place each, in the order in which they come."""
    added: dict[str, Any] = {}
    calls: dict[int, dict[str, Any]] = {}
    for event in events:
        match event:
            case ReasoningDelta(text):
                added["reasoning_content"] = added.get("reasoning_content", "") + text
            case ContentDelta(text):
                added["content"] = added.get("content", "") + text
            case ToolCallStart(index, name):
                function = {"name": name, "arguments": ""}
                calls[index] = {"index": index, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
            case ToolArgumentsDelta(index, text):
                call = calls.setdefault(index, {"index": index, "function": {"arguments": ""}})
                call["function"]["arguments"] += text
            case ToolCallEnd():
                pass
    if calls:
        added["tool_calls"] = list(calls.values())
    return added


def _joined_calls(added: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The calls that these deltas add up to."""
    pieces = [piece for entry in added for piece in entry.get("tool_calls", ())]
    arguments: dict[int, list[str]] = {}
    for piece in pieces:
        arguments.setdefault(piece["index"], []).append(piece["function"]["arguments"])
    return [
        {"id": piece["id"], "type": piece["type"], "function": piece["function"] | {"arguments": "".join(arguments[piece["index"]])}}
        for piece in pieces
        if "id" in piece
    ]
