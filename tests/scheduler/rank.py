"""A rank that remembers instead of computing, and a model that can be run alone.

A slot of the cache holds a fingerprint: of the salt, and of every token up to the one that was fed there, each with the experts that it
was forced to use, if it was. Before a row is answered, every slot of its lane up to it must hold the fingerprint of the lane's own tokens.
A page that was lost, shared too early, written by two or handed on too soon shows here, whatever the scheduler believes. The next token
is a function of all tokens before it and of the seed, so an answer is right only if every row was fed right.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pointsman.request import FinishReason, Logprob, Request
from pointsman.step import LaneStart, Segment, StepPlan, StepResult

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
    sampled: bool = False


@dataclass(frozen=True)
class Fed:
    """What of a sequence was fed in a step: so many tokens from a position on; whether the next was sampled, and whether it began then."""

    seq: int
    lane: int
    start: int
    count: int
    sampled: bool
    began: bool


class Rank:
    """Executes plans in order, and checks every row. `steps`: what each has fed, in the order of its rows."""

    def __init__(self, num_lanes: int, page_size: int) -> None:
        self.num_lanes = num_lanes
        self.page_size = page_size
        self.lanes: dict[int, Lane] = {}
        self.memory: dict[int, int] = {}
        self.written_in: dict[int, int] = {}
        self.steps: list[list[Fed]] = []

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
        assert plan.index == len(self.steps)
        for start in plan.starts:
            assert 0 <= start.lane < self.num_lanes
            self.lanes[start.lane] = Lane(start, requests[start.seq], [*start.prompt, *start.output])
        for number, page in plan.growths:
            assert number in plan.decoding
            self.lanes[number].pages.append(page)
        rows = [self.decode(number) for number in plan.decoding] + [self.check_segment(segment) for segment in plan.segments]
        self.steps.append(rows)
        assert len({row.lane for row in rows}) == len(rows)
        written: set[int] = set()
        for row in rows:
            slots = self.feed(self.lanes[row.lane], row)
            assert not written & slots, "two rows of a step write one slot"
            written |= slots
        tokens: list[int] = []
        errors: dict[int, str] = {}
        logprobs: dict[int, dict[int, Logprob]] = {}
        for row in rows:
            lane, end = self.lanes[row.lane], row.start + row.count
            self.check_memory(lane.request, lane.tokens[:end], lane.pages)
            if row.sampled:
                assert end == len(lane.tokens)
                fingerprint = fingerprints(lane.request, lane.tokens)[-1]
                if fails(fingerprint, lane.start.seed):
                    errors[len(tokens)] = "no finite logit"
                token = self.sample(lane, fingerprint)
                logprobs[len(tokens)] = {token: Logprob(float(fingerprint), 1)}
                tokens.append(token)
        scored = {
            segment.seq: self.prompt_rows(self.lanes[segment.lane], segment.start, segment.start + len(segment.tokens))
            for segment in plan.segments
            if segment.prompt_logits
        }
        return StepResult(plan.index, tokens, errors, logprobs, prompt_logprobs=scored)

    def decode(self, number: int) -> Fed:
        """A lane feeds what it sampled last, which comes after all that was fed."""
        lane = self.lanes[number]
        assert lane.sampled and lane.num_fed == len(lane.tokens) - 1
        return Fed(lane.start.seq, number, lane.num_fed, 1, True, False)

    def check_segment(self, segment: Segment) -> Fed:
        lane = self.lanes[segment.lane]
        assert lane.start.seq == segment.seq and segment.tokens
        assert list(segment.tokens) == lane.tokens[segment.start : segment.start + len(segment.tokens)]
        assert not (segment.pages and lane.pages), "the table of a lane that has just started"
        lane.pages.extend(segment.pages)
        return Fed(segment.seq, segment.lane, segment.start, len(segment.tokens), segment.sample, lane.num_fed is None)

    def feed(self, lane: Lane, row: Fed) -> set[int]:
        end = row.start + row.count
        if lane.num_fed is None:
            assert row.start % self.page_size == 0, "a prefix hit is of whole pages"
        else:
            assert row.start == lane.num_fed
        lane.num_fed = end
        assert len(set(lane.pages)) == len(lane.pages)
        prints = fingerprints(lane.request, lane.tokens[:end])
        slots = {self.slot(lane.pages, position): prints[position] for position in range(row.start, end)}
        self.memory |= slots
        self.written_in |= dict.fromkeys(slots, len(self.steps))
        return set(slots)

    def prompt_rows(self, lane: Lane, start: int, end: int) -> list[dict[int, Logprob]]:
        prints = fingerprints(lane.request, lane.tokens)
        following = range(start, min(end, len(lane.start.prompt) - 1))
        return [{lane.tokens[position + 1]: Logprob(float(prints[position]), 1)} for position in following]

    def sample(self, lane: Lane, fingerprint: int) -> int:
        """After a fault, and after the end of a text, the lane goes on with some token: the host does not know yet."""
        token = next_token(fingerprint, lane.start.seed)
        lane.tokens.append(token)
        lane.sampled = True
        return token
