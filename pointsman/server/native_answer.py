"""The answers to `/generate`, in SGLang's shape.

A stream's event has the whole of one answer so far, not what was added: that is SGLang's form, which costs a long answer its square.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pointsman.request import ChoiceDelta, FinishReason, Logprob, Request
from pointsman.server.answers import LOWEST_LOGPROB
from pointsman.server.routing import Routing
from pointsman.text import Tokenizer

Entry = tuple[float | None, int, str | None]


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Which log-probabilities an answer lists.

    Attributes:
        start: the place in the prompt where they begin, or None where the prompt's are left out.
        top: how many of the likeliest at each place.
        texts: tokens have their text with them.
    """

    start: int | None
    top: int
    texts: bool


@dataclass
class _Item:
    """One answer as it grows."""

    request: Request
    name: str
    listing: Listing | None
    texts: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    cached: int = 0
    input: list[Entry] = field(default_factory=list)
    input_top: list[list[Entry] | None] = field(default_factory=list)
    output: list[Entry] = field(default_factory=list)
    output_top: list[list[Entry] | None] = field(default_factory=list)
    routing: Any = None
    agreement: float | None = None
    finish: dict[str, Any] | None = None
    weight_version: str = ""


class NativeAnswer:
    """The answers to one HTTP request: one or more prompts with n choices each.

    Attributes:
        requests: what the engine is to run, one for each prompt.
        names: of each of them, for `/abort_request`.
        stream: the client wants what there is after each step.
        routing: how routing records are made, where they were asked for.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        names: Sequence[str],
        listings: Sequence[Listing | None],
        *,
        stream: bool,
        single: bool,
        tokenizer: Tokenizer | None,
        routing: Routing | None = None,
    ) -> None:
        self.requests = requests
        self.routing = routing
        self.names = names
        self.stream = stream
        self._tokenizer = tokenizer
        self._items: list[_Item] = []
        self._places: dict[str, int] = {}
        for request, name, listing in zip(requests, names, listings, strict=True):
            self._places[request.rid] = len(self._items)
            self._items += [_Item(request, name, listing) for _ in range(request.sampling.n)]
        self._alone = single and len(self._items) == 1
        self._begun = time.monotonic()

    @property
    def ended(self) -> bool:
        return all(item.finish is not None for item in self._items)

    def take(self, deltas: Sequence[ChoiceDelta]) -> list[dict[str, Any]]:
        """The events for a stream: one for each answer that grew."""
        grown = dict.fromkeys(self._grow(delta) for delta in deltas)
        if not self.stream:
            return []
        return [self._shape(self._items[index]) | ({} if self._alone else {"index": index}) for index in grown]

    def _grow(self, delta: ChoiceDelta) -> int:
        index = self._places[delta.rid] + delta.index
        item = self._items[index]
        item.texts.append(delta.text)
        item.tokens += delta.token_ids
        item.cached = delta.num_cached_tokens
        item.routing, item.agreement, item.weight_version = delta.routed_experts, delta.routing_agreement, delta.weight_version
        item.finish = _finish(delta, len(item.tokens))
        if item.listing is not None:
            self._list(item, item.listing, delta)
        return index

    def last(self) -> None:
        """Nothing ends a stream but its end."""

    def whole(self) -> dict[str, Any] | list[dict[str, Any]]:
        return self._shape(self._items[0]) if self._alone else [self._shape(item) for item in self._items]

    def _shape(self, item: _Item) -> dict[str, Any]:
        information: dict[str, Any] = {
            "id": item.name,
            "finish_reason": item.finish,
            "prompt_tokens": len(item.request.prompt_token_ids),
            "completion_tokens": len(item.tokens),
            "cached_tokens": item.cached,
            "e2e_latency": time.monotonic() - self._begun,
            "weight_version": item.weight_version,
        }
        if item.routing is not None:
            information["routed_experts"] = item.routing
        if item.finish is not None and item.request.replay is not None:
            information["routing_agreement"] = item.agreement
        if item.listing is not None:
            information |= {"input_token_logprobs": item.input, "output_token_logprobs": item.output}
            if item.listing.top:
                information |= {"input_top_logprobs": item.input_top, "output_top_logprobs": item.output_top}
        return {"text": "".join(item.texts), "output_ids": item.tokens, "meta_info": information}

    def _list(self, item: _Item, listing: Listing, delta: ChoiceDelta) -> None:
        if delta.prompt_logprobs is not None and listing.start is not None:
            prompt = item.request.prompt_token_ids[listing.start :]
            for token, entry in zip(prompt, delta.prompt_logprobs[listing.start :], strict=True):
                item.input.append(self._entry(listing, token, entry))
                item.input_top.append(None if entry is None else self._best(listing, entry))
        for token, entry in zip(delta.token_ids, delta.logprobs or (), strict=True):
            item.output.append(self._entry(listing, token, entry))
            item.output_top.append(self._best(listing, entry))

    def _best(self, listing: Listing, entry: Mapping[int, Logprob]) -> list[Entry]:
        best = sorted(entry, key=lambda token: entry[token].rank)[: listing.top]
        return [self._entry(listing, token, entry) for token in best]

    def _entry(self, listing: Listing, token: int, entry: Mapping[int, Logprob] | None) -> Entry:
        text = self._tokenizer.token_text(token) if listing.texts and self._tokenizer is not None else None
        return None if entry is None else max(entry[token].logprob, LOWEST_LOGPROB), token, text


def _finish(delta: ChoiceDelta, num_tokens: int) -> dict[str, Any] | None:
    match delta.finish_reason:
        case None:
            return None
        case FinishReason.STOP:
            return {"type": "stop", "matched": delta.stop_reason}
        case FinishReason.LENGTH:
            return {"type": "length", "length": num_tokens}
        case _:
            return {"type": "abort", "message": "the request was aborted"}
