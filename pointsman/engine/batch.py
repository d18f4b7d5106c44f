"""From a plan to flat arrays.

The model knows nothing of requests: it sees rows (token, position, slot) and, for attention, which lane a row belongs to. The
tables behind that live here, one row a lane: pages, last sampled token, sampling state. They change only by what a plan
says, in the order of the plans, so that every rank that is sent the same plans holds the same tables.

Shape suffixes: T rows of the step, L lanes, P pages of a lane, R rows whose logits are needed, F forced rows, N model layers, K experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pointsman.replay import ForcedRows, Ids
from pointsman.sampling.constraint import Constraint
from pointsman.sampling.lane import LaneSampling
from pointsman.step import PENDING, LaneStart, Segment, StepPlan

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Consecutive wanted rows, from `first` on, that the prompt tokens `following` come after."""

    seq: int
    lane: int
    first: int
    following: list[int]


@dataclass(frozen=True, slots=True)
class Forced:
    """Rows that are forced to use these experts: which, ascending, and the ids, uint8 or uint16."""

    rows_F: Ints
    ids_FNK: Ids

    def spread(self, num_rows: int) -> Ints:
        """The experts of every row of the step [T, N, K], -1 where they are not given."""
        replay_TNK = np.full((num_rows, *self.ids_FNK.shape[1:]), -1, np.int64)
        replay_TNK[self.rows_F] = self.ids_FNK
        return replay_TNK


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's rows.

    Attributes:
        tokens_T, positions_T, lanes_T, slots_T: int64, one entry a row; slot = page * page_size + offset. A token is PENDING where the
            device alone knows it.
        segments: (lane, first row, number of rows) of each run of consecutive rows.
        rows_R: the rows whose logits are needed, ascending.
        samples: index into rows_R of each segment that samples, in the plan's order.
        prompts: the rows of rows_R that score prompts.
        growths: (lane, first, pages) of what the page tables grew by.
        forced: the rows whose experts are given; None where all route freely.
    """

    tokens_T: Ints
    positions_T: Ints
    lanes_T: Ints
    slots_T: Ints
    segments: list[tuple[int, int, int]]
    rows_R: Ints
    samples: list[int]
    prompts: list[PromptRows]
    growths: list[tuple[int, int, tuple[int, ...]]]
    forced: Forced | None = None


@dataclass
class Lanes:
    """The tables of one rank, a row a lane.

    Attributes:
        last_token_L: PENDING where none was drawn yet, or where the device drew it and the host need not know.
        constrain: what keeps a sequence that starts to its grammar, if it has one.
    """

    max_lanes: int
    max_pages: int
    page_size: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    constrain: Callable[[LaneStart], Constraint | None]
    page_table_LP: npt.NDArray[np.int32] = field(init=False)
    num_pages_L: list[int] = field(init=False)
    last_token_L: list[int] = field(init=False)
    sampling_L: list[LaneSampling | None] = field(init=False)
    prompt_L: list[tuple[int, ...]] = field(init=False)
    forced_L: list[ForcedRows | None] = field(init=False)

    def __post_init__(self) -> None:
        self.page_table_LP = np.zeros((self.max_lanes, self.max_pages), np.int32)
        self.num_pages_L = [0] * self.max_lanes
        self.last_token_L = [PENDING] * self.max_lanes
        self.sampling_L = [None] * self.max_lanes
        self.prompt_L = [()] * self.max_lanes
        self.forced_L = [None] * self.max_lanes

    def lay_out(self, plan: StepPlan) -> Batch:
        """Bring the tables up to date with the plan and return its rows."""
        for start in plan.starts:
            self.num_pages_L[start.lane] = 0
            self.last_token_L[start.lane] = PENDING
            self.prompt_L[start.lane] = start.prompt
            self.forced_L[start.lane] = ForcedRows(start.replays) if start.replays else None
            self._start_sampling(start)
        tokens: list[int] = []
        positions: list[int] = []
        lanes: list[int] = []
        segments: list[tuple[int, int, int]] = []
        growths = [self._grow(segment) for segment in plan.segments if segment.pages]
        for segment in plan.segments:
            segments.append((segment.lane, len(tokens), len(segment.tokens)))
            tokens.extend(segment.tokens)
            if segment.tokens[-1] == PENDING:
                tokens[-1] = self.last_token_L[segment.lane]
            positions.extend(range(segment.start, segment.start + len(segment.tokens)))
            lanes.extend([segment.lane] * len(segment.tokens))
        positions_T, lanes_T = np.array(positions, np.int64), np.array(lanes, np.int64)
        pages_T = self.page_table_LP[lanes_T, positions_T // self.page_size].astype(np.int64)
        slots_T = pages_T * self.page_size + positions_T % self.page_size
        rows, samples, prompts = self._wanted(plan, segments)
        return Batch(
            np.array(tokens, np.int64),
            positions_T,
            lanes_T,
            slots_T,
            segments,
            np.array(rows, np.int64),
            samples,
            prompts,
            growths,
            self._forced(plan, segments),
        )

    def _start_sampling(self, start: LaneStart) -> None:
        before = self.sampling_L[start.lane]
        if before is not None and before.constraint is not None:
            before.constraint.close()
        self.sampling_L[start.lane] = LaneSampling(start, self.vocab_size, self.eos_token_ids, self.constrain(start))

    def _grow(self, segment: Segment) -> tuple[int, int, tuple[int, ...]]:
        first = self.num_pages_L[segment.lane]
        self.num_pages_L[segment.lane] = first + len(segment.pages)
        self.page_table_LP[segment.lane, first : first + len(segment.pages)] = segment.pages
        return segment.lane, first, segment.pages

    def _forced(self, plan: StepPlan, segments: list[tuple[int, int, int]]) -> Forced | None:
        rows: list[Ints] = []
        ids: list[Ids] = []
        for segment, (lane, first, length) in zip(plan.segments, segments, strict=True):
            replay = self.forced_L[lane]
            if replay is None:
                continue
            if segment.start >= replay.end:
                self.forced_L[lane] = None
            elif (found := replay.within(segment.start, length)) is not None:
                rows.append(first + found[0])
                ids.append(found[1])
        return Forced(np.concatenate(rows), np.concatenate(ids)) if rows else None

    def _wanted(self, plan: StepPlan, segments: list[tuple[int, int, int]]) -> tuple[list[int], list[int], list[PromptRows]]:
        rows: list[int] = []
        samples: list[int] = []
        prompts: list[PromptRows] = []
        for segment, (lane, first, length) in zip(plan.segments, segments, strict=True):
            if segment.prompt_logits:
                following = list(self.prompt_L[lane][segment.start + 1 : segment.start + length + 1])
                prompts.append(PromptRows(segment.seq, lane, len(rows), following))
                rows.extend(range(first, first + len(following)))
            if segment.sample:
                samples.append(len(rows))
                rows.append(first + length - 1)
        return rows, samples, prompts
