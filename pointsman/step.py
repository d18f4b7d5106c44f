"""What the scheduler tells a rank to do, and what the rank answers.

A plan is small and made of integers, because it crosses to every rank: it names what changed since the plan before (which
sequence took a lane, which pages its table grew by) and the tokens of prompts to feed. A *lane* is a row of the rank's own tables: page
table, how far it is, last sampled token, sampling state. So of a lane that decodes there is nothing to say but that it does: the rank feeds
what it sampled there last, at the position that comes next. The host can plan such a step before it has seen that token.

What a plan is made of are structs that cross as arrays, without the names of their fields, and what is there for each lane of each step
is a number and not an object.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import msgspec

from pointsman.request import Logprob, Replay, SamplingParams


class LaneStart(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A sequence takes a lane.

    Attributes:
        output: not empty when it comes back after a preemption.
        replays: experts that its positions shall use, whenever they are fed; where two have a row for one position, the later.
    """

    lane: int
    seq: int
    prompt: tuple[int, ...]
    output: tuple[int, ...]
    sampling: SamplingParams
    seed: int
    replays: tuple[Replay, ...] = ()


class Segment(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """Consecutive known tokens of one sequence, fed in this step: a part of a prompt, or of what comes back after a preemption.

    Attributes:
        lane: where the sequence lives on the rank.
        seq: the sequence's number, unique while the engine lives.
        start: position of the first token; keys and values of all positions before it are in the cache.
        pages: the lane's page table, when it has just started; else empty.
        sample: choose the next token from the last row's logits.
        prompt_logits: return the log-probability of the prompt token that follows each row.
    """

    lane: int
    seq: int
    start: int
    tokens: tuple[int, ...]
    pages: tuple[int, ...]
    sample: bool
    prompt_logits: bool = False


class StepPlan(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One step of the engine: lanes to set up, then rows to run.

    Attributes:
        decoding: lanes that feed the token that they sampled last, and sample the next; their rows come first, in this order.
        growths: (lane, page) to append to the page tables of those lanes before the step runs.
        segments: whose rows follow.
    """

    index: int
    starts: tuple[LaneStart, ...]
    decoding: tuple[int, ...]
    growths: tuple[tuple[int, int], ...]
    segments: tuple[Segment, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.decoding) + sum(len(segment.tokens) for segment in self.segments)


@dataclass(frozen=True, slots=True)
class StepResult:
    """The answer to the plan of the same index.

    Attributes:
        tokens: those that were chosen, for the plan's decoding lanes and then for its segments with `sample`, in the plan's order. The
            other fields but the last name them by their index.
        errors: what went wrong with a token, which ends its sequence alone.
        logprobs: of tokens whose sequences asked for them.
        final: tokens that complete a grammar.
        prompt_logprobs: sequence number to one entry for each row of its segment that a prompt token follows.
    """

    index: int
    tokens: Sequence[int]
    errors: Mapping[int, str] = field(default_factory=dict)
    logprobs: Mapping[int, Mapping[int, Logprob]] = field(default_factory=dict)
    final: AbstractSet[int] = frozenset()
    prompt_logprobs: Mapping[int, list[dict[int, Logprob]]] = field(default_factory=dict)
