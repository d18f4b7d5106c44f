"""A rank that remembers instead of computing, and a model that can be run alone.

A slot of the cache holds a fingerprint: of the salt, and of every token up to the one that was fed there, each with the experts that it
was forced to use, if it was. Before a row is answered, every slot of its lane up to it must hold the fingerprint of the lane's own tokens.
A page that was lost, shared too early, written by two or handed on too soon shows here, whatever the scheduler believes. The next token
is a function of all tokens before it and of the seed, so an answer is right only if every row was fed right.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pointsman.request import FinishReason, Logprob, Request
from pointsman.step import PENDING, LaneStart, Sampled, Segment, StepPlan, StepResult

VOCAB = 7
EOS = 0
STOP_PAIR = (3, 3)
"""What a request with stop strings ends on, as if the two tokens spelt the string."""


def fingerprints(request: Request, tokens: list[int]) -> list[int]:
    """One for each token: of the salt and all tokens up to it, with the rows of the replay."""
    prints, last = [], sum(map(ord, request.cache_salt))
    for position, token in enumerate(tokens):
        row = None if request.replay is None else request.replay.row(position)
        last = hash((last, token) if row is None else (last, token, int.from_bytes(row, "little")))
        prints.append(last)
    return prints


def next_token(fingerprint: int, seed: int) -> int:
    return hash((fingerprint, seed, 17)) % VOCAB


def fails(fingerprint: int, seed: int) -> bool:
    """A negative seed makes a fault likely."""
    return seed < 0 and hash((fingerprint, seed, 23)) % 11 == 0


@dataclass(frozen=True)
class Answer:
    """What a choice must come to."""

    output: list[int]
    reason: FinishReason
    stop_reason: int | str | None = None


def run_alone(request: Request, seed: int, max_context: int, room: int) -> Answer:
    """The oracle: one sequence, no scheduler, no cache."""
    sampling, prompt = request.sampling, list(request.prompt_token_ids)
    most = max_context - len(prompt)
    most = min(most, room + 1 - len(prompt)) if sampling.max_tokens is None else min(most, sampling.max_tokens)
    output: list[int] = []
    while len(output) < most:
        fingerprint = fingerprints(request, prompt + output)[-1]
        if fails(fingerprint, seed):
            return Answer(output, FinishReason.ERROR)
        token = next_token(fingerprint, seed)
        output.append(token)
        if len(output) >= sampling.min_tokens:
            if token == EOS and not sampling.ignore_eos:
                return Answer(output, FinishReason.STOP)
            if token in sampling.stop_token_ids:
                return Answer(output, FinishReason.STOP, token)
            if len(output) < most and sampling.stop and tuple(output[-2:]) == STOP_PAIR:
                return Answer(output, FinishReason.STOP, sampling.stop[0])
    return Answer(output, FinishReason.LENGTH)


@dataclass
class Lane:
    start: LaneStart
    request: Request
    tokens: list[int]
    pages: list[int] = field(default_factory=list)
    num_fed: int | None = None
    last_sample: int | None = None


class Rank:
    """Executes plans in order, and checks every row."""

    def __init__(self, num_lanes: int, page_size: int) -> None:
        self.num_lanes = num_lanes
        self.page_size = page_size
        self.lanes: dict[int, Lane] = {}
        self.memory: dict[int, int] = {}
        self.written_in: dict[int, int] = {}
        self.num_plans = 0

    def slot(self, pages: list[int], position: int) -> int:
        return pages[position // self.page_size] * self.page_size + position % self.page_size

    def check_memory(self, request: Request, tokens: list[int], pages: list[int]) -> None:
        """The slots hold the keys and values of exactly these tokens."""
        for position, fingerprint in enumerate(fingerprints(request, tokens)):
            assert self.memory[self.slot(pages, position)] == fingerprint, f"position {position} is not as it was written"

    def plans(self, pages: list[int], num_tokens: int) -> list[int]:
        """Which plan wrote each of the first positions: what another wrote there of the same tokens is not the same."""
        return [self.written_in[self.slot(pages, position)] for position in range(num_tokens)]

    def execute(self, plan: StepPlan, requests: dict[int, Request]) -> StepResult:
        assert plan.index == self.num_plans
        self.num_plans += 1
        for start in plan.starts:
            assert 0 <= start.lane < self.num_lanes
            self.lanes[start.lane] = Lane(start, requests[start.seq], [*start.prompt, *start.output])
        assert len({segment.lane for segment in plan.segments}) == len(plan.segments)
        written: set[int] = set()
        for segment in plan.segments:
            slots = self.feed(self.lanes[segment.lane], segment)
            assert not written & slots, "two rows of a step write one slot"
            written |= slots
        sampled: list[Sampled] = []
        prompt_logprobs: dict[int, list[dict[int, Logprob]]] = {}
        for segment in plan.segments:
            lane, end = self.lanes[segment.lane], segment.start + len(segment.tokens)
            self.check_memory(lane.request, lane.tokens[:end], lane.pages)
            if segment.prompt_logits:
                prompt_logprobs[segment.seq] = self.prompt_rows(lane, segment.start, end)
            if segment.sample:
                assert end == len(lane.tokens)
                sampled.append(self.sample(lane))
        return StepResult(plan.index, tuple(sampled), prompt_logprobs)

    def feed(self, lane: Lane, segment: Segment) -> set[int]:
        assert lane.start.seq == segment.seq and segment.tokens
        assert PENDING not in segment.tokens[:-1]
        if segment.tokens[-1] == PENDING:
            assert lane.last_sample is not None
        tokens = [lane.last_sample if token == PENDING else token for token in segment.tokens]
        end = segment.start + len(tokens)
        assert tokens == lane.tokens[segment.start : end]
        if lane.num_fed is None:
            assert segment.start % self.page_size == 0, "a prefix hit is of whole pages"
        else:
            assert segment.start == lane.num_fed
        lane.num_fed = end
        lane.pages.extend(segment.pages)
        assert len(set(lane.pages)) == len(lane.pages)
        prints = fingerprints(lane.request, lane.tokens[:end])
        slots = {self.slot(lane.pages, position): prints[position] for position in range(segment.start, end)}
        self.memory |= slots
        self.written_in |= dict.fromkeys(slots, self.num_plans)
        return set(slots)

    def prompt_rows(self, lane: Lane, start: int, end: int) -> list[dict[int, Logprob]]:
        prints = fingerprints(lane.request, lane.tokens)
        following = range(start, min(end, len(lane.start.prompt) - 1))
        return [{lane.tokens[position + 1]: Logprob(float(prints[position]), 1)} for position in following]

    def sample(self, lane: Lane) -> Sampled:
        """After a fault, and after the end of a text, the lane goes on with some token: the host does not know yet."""
        fingerprint = fingerprints(lane.request, lane.tokens)[-1]
        token = next_token(fingerprint, lane.start.seed)
        lane.tokens.append(token)
        lane.last_sample = token
        error = "no finite logit" if fails(fingerprint, lane.start.seed) else None
        return Sampled(lane.start.seq, token, {token: Logprob(float(fingerprint), 1)}, error)
