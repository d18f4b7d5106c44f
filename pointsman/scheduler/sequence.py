"""One choice of a request on its way, and what a step adds to it.

Three numbers say how far a sequence is. `num_computed` positions have their keys and values in the cache, as far as results
tell; `num_planned` is what it will be once the plans in flight are done; `num_pending` tokens are being chosen by those plans.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import takewhile

import msgspec

from pointsman.request import FinishReason, Logprob, Replay, Request


@dataclass(eq=False, slots=True, kw_only=True)
class Sequence:
    """One choice of a request.

    Attributes:
        number: unique while the engine lives; later arrivals have larger ones.
        index: which of the request's choices.
        limit: it ends when prompt and output together have so many tokens.
        tokens: prompt and output.
        num_cached: tokens of the prompt that were found in the prefix cache when it first ran.
        pages: where its keys and values are, in order. When the sequence finishes or is preempted they go to others, but the
            list stays as it was until the next plan is made.
        num_shared: this many of the first pages are the prefix tree's own.
        cacheable: the pages may go into the prefix tree; false for those from before a reset of it.
        lane: where it runs; None while it waits and after it ends.
        num_prompt_rows: rows of prompt log-probabilities handed out so far.
        num_wanted: pages that it lacked when it was last refused a start; 0 before.
        left: the pages that it had when it was last preempted, each with its generation.
        num_found: of its positions, how many were in the prefix cache when it last started.
        kept: the experts that its first positions used before it was preempted; it recomputes those positions under them.
        kept_versions: (first, after the last, number of the weights) of the rows that are kept.
        tainted: some of these rows were chosen by other weights than those that compute now, so its pages are no prefix for others.
        replayed: what stands for its first tokens in the prefix tree, where the request has a replay.
    """

    number: int
    request: Request
    index: int
    seed: int
    limit: int
    tokens: list[int]
    num_computed: int = 0
    num_cached: int = 0
    pages: list[int] = field(default_factory=list)
    lane: int | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_preemptions: int = 0
    num_planned: int = 0
    num_pending: int = 0
    num_shared: int = 0
    cacheable: bool = True
    num_prompt_rows: int = 0
    num_wanted: int = 0
    left: list[tuple[int, int]] = field(default_factory=list)
    num_found: int = 0
    kept: Replay | None = None
    kept_versions: list[tuple[int, int, int]] = field(default_factory=list)
    tainted: bool = False
    replayed: list[int] = field(default_factory=list)
    num_prompt: int = field(init=False)
    order: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.num_prompt = len(self.request.prompt_token_ids)
        self.order = (-self.request.priority, self.number)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def keys(self) -> list[int]:
        """What stands for its tokens in the prefix tree: keys and values depend on a token and on the experts it is forced to use.

        So a token with a row of a replay is another than the same token without, or with another row. Nothing changes for rows that
        were kept over a preemption: that routing was free.
        """
        replay = self.request.replay
        if replay is None:
            return self.tokens
        for position in range(len(self.replayed), len(self.tokens)):
            token, row = self.tokens[position], replay.row(position)
            self.replayed.append(token if row is None else _forced_key(token, row))
        return self.replayed

    @property
    def replays(self) -> tuple[Replay, ...]:
        """The experts that its positions are to use."""
        return tuple(replay for replay in (self.kept, self.request.replay) if replay is not None)

    @property
    def wants_prompt_rows(self) -> bool:
        """Rows of prompt log-probabilities are still to be computed: one for each prompt token but the first."""
        return self.request.sampling.prompt_logprobs is not None and self.num_prompt_rows < self.num_prompt - 1

    def own(self, dated: list[tuple[int, int]]) -> list[int]:
        """Of pages with their generations those at the front that it left itself when it was preempted."""
        pairs = zip(dated, self.left, strict=False)
        return [page for (page, _), _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]

    def more_prompt_rows(self, rows: list[dict[int, Logprob]], start: int) -> list[dict[int, Logprob]]:
        """Of the rows from `start` on those not handed out before: after a preemption the prompt is computed again."""
        more = rows[self.num_prompt_rows - start :]
        self.num_prompt_rows += len(more)
        return more

    def ending(self, eos: frozenset[int], final: bool = False) -> tuple[FinishReason, int | None] | None:
        """Why the last token ends the sequence, and the stop token where the request named it; None if it goes on.

        A final token is one behind which there can be no other.
        """
        sampling, token = self.request.sampling, self.tokens[-1]
        if (token in eos or token in sampling.stop_token_ids) and (final or self.num_output >= sampling.min_tokens):
            if token in eos and (final or not sampling.ignore_eos):
                return FinishReason.STOP, None
            if token in sampling.stop_token_ids:
                return FinishReason.STOP, token
        return (FinishReason.LENGTH, None) if len(self.tokens) >= self.limit else None


def _forced_key(token: int, row: bytes) -> int:
    """A number below every token's, the same for the same token and row alone."""
    return -1 - int.from_bytes(blake2b(token.to_bytes(8, "little") + row, digest_size=16).digest(), "little")


def check_replay(request: Request, limit: int) -> None:
    """Raises ValueError where a replay has rows of positions that are never fed: the last token of an output is not."""
    if request.replay is None:
        return
    num_prompt = len(request.prompt_token_ids)
    if (end := request.replay.end) > (most := max(num_prompt, limit - 1)):
        raise ValueError(
            f"replay_routed_experts has rows up to position {end - 1}; with a prompt of {num_prompt} tokens and at most"
            f" {limit - num_prompt} of output the last one that is fed is {most - 1}"
        )


def limit_of(request: Request, max_context: int, room: int) -> int:
    """Tokens of prompt and output together at which the request ends, in a context and a cache of so many tokens.

    The last token is never fed, so it needs no place in the cache. An output without a limit of its own goes to the end of the
    context, or of the cache where that is smaller; one with a limit must fit the cache, and ends with the context.

    Raises:
        ValueError: the request could not run even alone.
    """
    num_prompt, max_tokens = len(request.prompt_token_ids), request.sampling.max_tokens
    shortest = num_prompt + (0 if max_tokens == 0 else 1)
    if shortest > max_context:
        raise ValueError(
            f"the prompt has {num_prompt} tokens; with {shortest - num_prompt} of output that is more than the context of {max_context}"
        )
    limit = min(max_context, max(room + 1, shortest) if max_tokens is None else num_prompt + max_tokens)
    if (needed := max(num_prompt, limit - 1)) > room:
        raise ValueError(
            f"the prompt has {num_prompt} tokens and max_tokens is {max_tokens}: {needed} tokens to keep are more than "
            f"the {room} that the cache holds"
        )
    return limit


class Advance(msgspec.Struct, gc=False):
    """What one step added to one sequence: a token, rows of prompt log-probabilities, its end, or several of these."""

    sequence: Sequence
    token: int | None = None
    logprobs: Mapping[int, Logprob] | None = None
    prompt_logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
