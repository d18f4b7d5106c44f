"""What the engine adds, in OpenAI's shapes: what chat and completions share.

Each delta becomes a piece, in the shape of a stream's choice. A stream sends the pieces; a whole answer is the pieces of each choice
joined. So both hold the same text, thinking, calls, log-probabilities and usage, because there is one way to make them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pointsman.request import ChoiceDelta, FinishReason, Request
from pointsman.server.routing import Routing

LOWEST_LOGPROB = -9999.0


@dataclass(frozen=True, kw_only=True)
class Form:
    """How an answer is to be written.

    Attributes:
        id: of the answer.
        name: what `/abort_request` calls it: the client's `rid`, or else the id.
        model: its name in the API.
        stream: in pieces.
        include_usage: a stream ends with the usage.
        token_ids: list the tokens of prompt and answer.
        routing: how the routing records of choices are made, where they were asked for.
    """

    id: str
    name: str
    model: str
    stream: bool
    include_usage: bool
    token_ids: bool
    routing: Routing | None = None


@dataclass
class Usage:
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


class OpenAIAnswer:
    """The answer to one HTTP request: one or more prompts with n choices each.

    Attributes:
        requests: what the engine is to run, one for each prompt.
        names: of each of them, for `/abort_request`.
        stream: the client wants pieces.
    """

    kind = ""
    piece_kind = ""

    def __init__(self, form: Form, requests: Sequence[Request]) -> None:
        self.requests = requests
        self.names = [form.name] * len(requests)
        self.stream = form.stream
        self._form = form
        self._envelope = {"id": form.id, "created": int(time.time()), "model": form.model}
        self._places = {request.rid: index * request.sampling.n for index, request in enumerate(requests)}
        self._replayed = {request.rid for request in requests if request.replay is not None}
        self._usage = Usage(prompt=sum(len(request.prompt_token_ids) for request in requests))
        self._pieces: list[list[dict[str, Any]]] = [[] for request in requests for _ in range(request.sampling.n)]
        self._open = set(range(len(self._pieces)))
        self._weight_version = ""

    @property
    def routing(self) -> Routing | None:
        """How routing records are made, where they were asked for."""
        return self._form.routing

    @property
    def ended(self) -> bool:
        """Whether every choice has ended; one may do so before the engine ends it."""
        return not self._open

    def take(self, deltas: Sequence[ChoiceDelta]) -> list[dict[str, Any]]:
        """The chunks for a stream that say what these deltas added."""
        return [chunk for delta in deltas if (chunk := self._chunk(delta)) is not None]

    def _chunk(self, delta: ChoiceDelta) -> dict[str, Any] | None:
        """The chunk for one delta; None where it added nothing that shows."""
        index = self._places[delta.rid] + delta.index
        if index not in self._open:
            return None
        self._usage.add(delta)
        self._weight_version = delta.weight_version
        piece, finish = self._piece(index, delta)
        if finish is not None:
            self._open.discard(index)
        if piece is None:
            return None
        choice = {"index": index, **piece, "finish_reason": finish}
        if self._form.token_ids:
            choice["token_ids"] = delta.token_ids
        if delta.routed_experts is not None:
            choice["routed_experts"] = delta.routed_experts
        if finish is not None and delta.rid in self._replayed:
            choice["routing_agreement"] = delta.routing_agreement
        if not self.stream:
            self._pieces[index].append(choice)
        chunk = {**self._envelope, "object": self.piece_kind, "choices": [choice]}
        if finish is not None:
            chunk["metadata"] = {"weight_version": delta.weight_version}
        return chunk | {"usage": None} if self._form.include_usage else chunk

    def last(self) -> dict[str, Any] | None:
        """The chunk that ends a stream: usage, where it was asked for."""
        if not self._form.include_usage:
            return None
        return {**self._envelope, "object": self.piece_kind, "choices": [], "usage": self._usage.shape()}

    def whole(self) -> dict[str, Any]:
        """The answer in one, once every choice has ended."""
        choices = [self._whole_choice(index, pieces) for index, pieces in enumerate(self._pieces)]
        metadata = {"weight_version": self._weight_version}
        return {**self._envelope, "object": self.kind, "choices": choices, "usage": self._usage.shape(), "metadata": metadata}

    def _whole_choice(self, index: int, pieces: Sequence[dict[str, Any]]) -> dict[str, Any]:
        choice = {"index": index, **self._join(index, pieces), "finish_reason": pieces[-1]["finish_reason"]}
        if self._form.token_ids:
            choice["token_ids"] = [token for piece in pieces for token in piece["token_ids"]]
        if self._form.routing is not None:
            choice["routed_experts"] = pieces[-1]["routed_experts"]
        if "routing_agreement" in pieces[-1]:
            choice["routing_agreement"] = pieces[-1]["routing_agreement"]
        return choice

    def _piece(self, index: int, delta: ChoiceDelta) -> tuple[dict[str, Any] | None, str | None]:
        """What a delta adds to a choice, and why the choice has ended with it."""
        raise NotImplementedError

    def _join(self, index: int, pieces: Sequence[dict[str, Any]]) -> dict[str, Any]:
        raise NotImplementedError


def finish_of(reason: FinishReason | None) -> str | None:
    return None if reason is None else reason.value
