"""What the scheduler tells a rank to do, and what the rank answers.

A plan is small and made of integers, because it crosses to every rank: it names what changed since the plan before (which
sequence took a lane, which pages its table grew by) and the tokens to feed. A *lane* is a row of the rank's own tables: page
table, last sampled token, sampling state. A token that the step in flight is still choosing is written PENDING: the rank takes
it from the lane's last sample, so that the host can plan a step before it has seen the one before.

What a plan is made of are structs that cross as arrays, without the names of their fields: hundreds of them are made, written and read
in each step, at a fifth of what dataclasses cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from pointsman.request import Logprob, Replay, SamplingParams

PENDING = -1


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
    """Consecutive tokens of one sequence, fed in this step.

    Attributes:
        lane: where the sequence lives on the rank.
        seq: the sequence's number, unique while the engine lives.
        start: position of the first token; keys and values of all positions before it are in the cache.
        tokens: what to feed; at most the last is PENDING.
        pages: pages to append to the lane's page table before the step runs (all of them when the lane has just started).
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
    """One step of the engine: lanes to set up, then rows to run. Decode segments come first."""

    index: int
    starts: tuple[LaneStart, ...]
    segments: tuple[Segment, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(segment.tokens) for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Sampled:
    """The token chosen for one segment that asked. `final`: it completes a grammar. `error` ends that sequence alone."""

    seq: int
    token: int
    logprobs: Mapping[int, Logprob] | None = None
    error: str | None = None
    final: bool = False


@dataclass(frozen=True, slots=True)
class StepResult:
    """The answer to the plan of the same index.

    Attributes:
        sampled: one entry for each segment with `sample`, in the plan's order.
        prompt_logprobs: sequence number to one entry for each row of its segment that a prompt token follows.
    """

    index: int
    sampled: tuple[Sampled, ...]
    prompt_logprobs: Mapping[int, list[dict[int, Logprob]]] = field(default_factory=dict)
