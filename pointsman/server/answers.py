"""What the engine adds, in OpenAI's shapes.

Each delta becomes a piece, in the shape of a stream's choice. A stream sends the pieces; a whole answer is the pieces of each choice
joined. So both hold the same text, thinking, log-probabilities and usage, because there is one way to make them.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pointsman.request import ChoiceDelta, FinishReason, Logprob, Request
from pointsman.server.parsers import ReasoningParser
from pointsman.text import Tokenizer

LOWEST_LOGPROB = -9999.0


@dataclass
class _Count:
    """Tokens of a whole answer."""

    prompt: int = 0
    completion: int = 0
    reasoning: int = 0
    cached: dict[str, int] = field(default_factory=dict)

    def add(self, delta: ChoiceDelta) -> None:
        self.completion += len(delta.token_ids)
        if delta.index == 0:
            self.cached[delta.rid] = delta.num_cached_tokens

    def shape(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached.values())},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning},
        }


class Answer:
    """The answer to one HTTP request: one or more prompts with n choices each.

    Attributes:
        requests: what the engine is to run, one for each prompt.
        stream: the client wants pieces.
    """

    kind = ""
    piece_kind = ""

    def __init__(self, rid: str, model: str, requests: Sequence[Request], *, stream: bool, include_usage: bool) -> None:
        self.requests = requests
        self.stream = stream
        self._envelope = {"id": rid, "created": int(time.time()), "model": model}
        self._include_usage = include_usage
        self._first = {request.rid: index * request.sampling.n for index, request in enumerate(requests)}
        self._count = _Count(prompt=sum(len(request.prompt_token_ids) for request in requests))
        self._pieces: list[list[dict[str, Any]]] = [[] for request in requests for _ in range(request.sampling.n)]

    def take(self, delta: ChoiceDelta) -> dict[str, Any] | None:
        """The chunk for a stream that says what this delta added; None where it added nothing that shows."""
        self._count.add(delta)
        index = self._first[delta.rid] + delta.index
        piece = self._piece(index, delta)
        if piece is None:
            return None
        choice = {"index": index, **piece, "finish_reason": _finish(delta.finish_reason)}
        if not self.stream:
            self._pieces[index].append(choice)
        chunk = {**self._envelope, "object": self.piece_kind, "choices": [choice]}
        return chunk | {"usage": None} if self._include_usage else chunk

    def last(self) -> dict[str, Any] | None:
        """The chunk that ends a stream: usage, where it was asked for."""
        if not self._include_usage:
            return None
        return {**self._envelope, "object": self.piece_kind, "choices": [], "usage": self._count.shape()}

    def whole(self) -> dict[str, Any]:
        """The answer in one, once every choice has ended."""
        choices = [self._join(index, pieces) | {"finish_reason": pieces[-1]["finish_reason"]} for index, pieces in enumerate(self._pieces)]
        return {**self._envelope, "object": self.kind, "choices": choices, "usage": self._count.shape()}

    def _piece(self, index: int, delta: ChoiceDelta) -> dict[str, Any] | None:
        raise NotImplementedError

    def _join(self, index: int, pieces: Sequence[dict[str, Any]]) -> dict[str, Any]:
        raise NotImplementedError


class ChatAnswer(Answer):
    """An assistant's turn.

    Args:
        parsers: one for each choice, or None where thinking is not split off.
    """

    kind = "chat.completion"
    piece_kind = "chat.completion.chunk"

    def __init__(
        self,
        rid: str,
        model: str,
        requests: Sequence[Request],
        *,
        stream: bool,
        include_usage: bool,
        parsers: Sequence[ReasoningParser] | None,
        tokenizer: Tokenizer,
    ) -> None:
        super().__init__(rid, model, requests, stream=stream, include_usage=include_usage)
        self._parsers = parsers
        self._tokenizer = tokenizer
        self._logprobs = requests[0].sampling.logprobs
        self._begun: set[int] = set()

    def _piece(self, index: int, delta: ChoiceDelta) -> dict[str, Any] | None:
        added = self._split(index, delta)
        logprobs = self._tokens(delta) if self._logprobs is not None else None
        if not added and not logprobs and delta.finish_reason is None:
            return None
        if index not in self._begun:
            self._begun.add(index)
            added = {"role": "assistant", **added}
        return {"delta": added, "logprobs": {"content": logprobs} if logprobs else None}

    def _split(self, index: int, delta: ChoiceDelta) -> dict[str, str]:
        """Thinking and answer, as far as this delta has any. A token counts as thinking up to the closing tag."""
        if self._parsers is None:
            return {"content": delta.text} if delta.text else {}
        parser = self._parsers[index]
        thought = parser.thinking
        part = parser.feed(delta.text)
        reasoning, content = part.reasoning, part.content
        if thought or parser.thinking:
            self._count.reasoning += len(delta.token_ids)
        if delta.finish_reason is not None:
            rest = parser.finish()
            reasoning, content = reasoning + rest.reasoning, content + rest.content
        return {name: text for name, text in (("reasoning_content", reasoning), ("content", content)) if text}

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
        tokens = [token for piece in pieces if piece["logprobs"] for token in piece["logprobs"]["content"]]
        answered = self._parsers is None or self._parsers[index].answered
        message = {"role": "assistant", "content": content if answered else None}
        if self._parsers is not None:
            message["reasoning_content"] = reasoning or None
        return {"index": index, "message": message, "logprobs": None if self._logprobs is None else {"content": tokens}}


class CompletionAnswer(Answer):
    """The continuation of each prompt.

    Args:
        texts: what to put before each prompt's choices (the prompt itself, for echo), or None.
    """

    kind = "text_completion"
    piece_kind = "text_completion"

    def __init__(
        self,
        rid: str,
        model: str,
        requests: Sequence[Request],
        *,
        stream: bool,
        include_usage: bool,
        texts: Sequence[str] | None,
        tokenizer: Tokenizer | None,
    ) -> None:
        super().__init__(rid, model, requests, stream=stream, include_usage=include_usage)
        sampling = requests[0].sampling
        self._echo = texts
        self._prompts = [request.prompt_token_ids for request in requests for _ in range(sampling.n)]
        self._choices_per_prompt = sampling.n
        self._logprobs = sampling.logprobs
        self._rulers = [_Ruler(tokenizer, sampling.skip_special_tokens) for _ in self._prompts] if tokenizer else []
        self._begun: set[int] = set()

    def _piece(self, index: int, delta: ChoiceDelta) -> dict[str, Any] | None:
        text = delta.text
        tokens: list[int] = delta.token_ids
        entries: list[dict[int, Logprob] | None] = list(delta.logprobs or [])
        if index not in self._begun:
            self._begun.add(index)
            if self._echo is not None:
                text = self._echo[index // self._choices_per_prompt] + text
                tokens = [*self._prompts[index], *tokens]
                entries = [*(delta.prompt_logprobs or []), *entries]
        logprobs = self._rulers[index].shape(tokens, entries, self._logprobs) if self._logprobs is not None and tokens else None
        if not text and not logprobs and delta.finish_reason is None:
            return None
        return {"text": text, "logprobs": logprobs}

    def _join(self, index: int, pieces: Sequence[dict[str, Any]]) -> dict[str, Any]:
        logprobs: dict[str, list[Any]] | None = None
        if self._logprobs is not None:
            shaped = [piece["logprobs"] for piece in pieces if piece["logprobs"]]
            logprobs = {name: [entry for part in shaped for entry in part[name]] for name in _Ruler.NAMES}
        return {"index": index, "text": "".join(piece["text"] for piece in pieces), "logprobs": logprobs}


class _Ruler:
    """Lists tokens the way completions do, and where in the text each begins."""

    NAMES = ("text_offset", "token_logprobs", "tokens", "top_logprobs")

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0

    def shape(self, tokens: Sequence[int], entries: Sequence[dict[int, Logprob] | None], top: int) -> dict[str, list[Any]]:
        listed: dict[str, list[Any]] = {name: [] for name in self.NAMES}
        for token, entry in zip(tokens, entries, strict=True):
            listed["text_offset"].append(self._offset)
            if token not in self._skipped:
                self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(token)))
            listed["tokens"].append(self._name(token))
            listed["token_logprobs"].append(None if entry is None else max(entry[token].logprob, LOWEST_LOGPROB))
            listed["top_logprobs"].append(None if entry is None else self._best(entry, top))
        return listed

    def _best(self, entry: dict[int, Logprob], top: int) -> dict[str, float]:
        best = sorted(entry.items(), key=lambda item: item[1].rank)[:top]
        return {self._name(token): max(item.logprob, LOWEST_LOGPROB) for token, item in best}

    def _name(self, token: int) -> str:
        """A token's text; bytes that are not text alone are spelt out, so that different tokens keep different names."""
        data = self._tokenizer.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finish(reason: FinishReason | None) -> str | None:
    return None if reason is None else reason.value
