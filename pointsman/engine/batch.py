"""From a plan to flat arrays.

The model knows nothing of requests: it sees rows (token, position, slot) and, for attention, which lane a row belongs to. The
tables behind that live here, one row a lane: pages, how far it is, last sampled token, sampling state. They change only by what a plan
says, in the order of the plans, so that every rank that is sent the same plans holds the same tables.

A step that decodes hundreds of lanes is laid out by a few operations on the tables, and what is there for each lane is kept as long as
the same lanes decode, which is for most steps.

Shape suffixes: T rows of the step, L lanes, P pages of a lane, R rows whose logits are needed, B draws, D decoding lanes, G pages that
tables grow by, F forced rows, N model layers, K experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pointsman.replay import ForcedRows, Ids
from pointsman.sampling.constraint import Constraint
from pointsman.sampling.lane import LaneSampling
from pointsman.step import LaneStart, StepPlan

PENDING = -1

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Draw:
    """A token to be drawn: for which lane, from which row of the logits."""

    lane: int
    row: int
    sampling: LaneSampling


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Consecutive wanted rows, from `first` on, that the prompt tokens `following` come after; and how many likely ones to tell beside."""

    seq: int
    first: int
    following: list[int]
    num_likeliest: int


@dataclass(frozen=True, slots=True)
class Forced:
    """Rows that are forced to use these experts: which, ascending, and the ids, uint8 or uint16."""

    rows_F: Ints
    ids_FNK: Ids

    def spread(self, num_rows: int) -> npt.NDArray[np.int32]:
        """The experts of every row of the step [T, N, K], -1 where they are not given."""
        replay_TNK = np.full((num_rows, *self.ids_FNK.shape[1:]), -1, np.int32)
        replay_TNK[self.rows_F] = self.ids_FNK
        return replay_TNK


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's rows; those of decoding lanes come first, one each.

    Attributes:
        tokens_T, positions_T, lanes_T, slots_T: int64, one entry a row; slot = page * page_size + offset. A token is PENDING where the
            device alone knows it.
        num_decoding: how many of the first rows are a lane's that decodes.
        chunks: (lane, first row, number of rows) of each run of the other rows.
        rows_R: the rows whose logits are needed, ascending.
        draws: the tokens to be drawn, in the plan's order.
        draws_B: their lanes.
        prompts: the rows of rows_R that score prompts.
        places_G, pages_G: what the page tables grew by: places in the whole table, row by row, and the pages in them.
        forced: the rows whose experts are given; None where all route freely.
    """

    tokens_T: Ints
    positions_T: Ints
    lanes_T: Ints
    slots_T: Ints
    num_decoding: int
    chunks: list[tuple[int, int, int]]
    rows_R: Ints
    draws: Sequence[Draw]
    draws_B: Ints
    prompts: list[PromptRows]
    places_G: Ints
    pages_G: Ints
    forced: Forced | None = None

    @property
    def segments(self) -> list[tuple[int, int, int]]:
        """(lane, first row, number of rows) of each run of consecutive rows."""
        return [(lane, row, 1) for row, lane in enumerate(self.lanes_T[: self.num_decoding].tolist())] + self.chunks


class _Decoding(NamedTuple):
    """Lanes that decode in one step after the other, and what is there for them as long as these do."""

    lanes: tuple[int, ...]
    lanes_D: Ints
    rows_D: Ints
    draws: list[Draw]
    replays: bool


NONE: Ints = np.zeros(0, np.int64)


@dataclass
class Lanes:
    """The tables of one rank, a row a lane.

    Attributes:
        length_L: positions that have been fed.
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
    length_L: Ints = field(init=False)
    last_token_L: Ints = field(init=False)
    sampling_L: list[LaneSampling | None] = field(init=False)
    prompt_L: list[tuple[int, ...]] = field(init=False)
    forced_L: list[ForcedRows | None] = field(init=False)

    def __post_init__(self) -> None:
        self.page_table_LP = np.zeros((self.max_lanes, self.max_pages), np.int32)
        self.length_L = np.zeros(self.max_lanes, np.int64)
        self.last_token_L = np.full(self.max_lanes, PENDING, np.int64)
        self.sampling_L = [None] * self.max_lanes
        self.prompt_L = [()] * self.max_lanes
        self.forced_L = [None] * self.max_lanes
        self._decoding = _Decoding((), NONE, NONE, [], False)

    def lay_out(self, plan: StepPlan) -> Batch:
        """Bring the tables up to date with the plan and return its rows."""
        for start in plan.starts:
            self._start(start)
        places_G, pages_G = self._grow(plan)
        decoding = self._those(plan.decoding)
        lanes_D = decoding.lanes_D
        tokens_T, positions_T, lanes_T = self.last_token_L[lanes_D], self.length_L[lanes_D], lanes_D
        self.length_L[lanes_D] += 1
        rows_R, draws, draws_B = decoding.rows_D, decoding.draws, lanes_D
        chunks: list[tuple[int, int, int]] = []
        prompts: list[PromptRows] = []
        if plan.segments:
            chunks = self._chunks(plan)
            tokens = [*chain.from_iterable(segment.tokens for segment in plan.segments)]
            tokens_T = np.concatenate((tokens_T, np.array(tokens, np.int64)))
            starts = [np.arange(segment.start, segment.start + len(segment.tokens)) for segment in plan.segments]
            positions_T = np.concatenate((positions_T, *starts))
            lanes_T = np.concatenate((lanes_D, np.repeat([lane for lane, _, _ in chunks], [length for _, _, length in chunks])))
            more, samples, prompts = self._wanted(plan, chunks)
            rows_R, draws = np.concatenate((rows_R, np.array(more, np.int64))), [*draws, *samples]
            draws_B = np.concatenate((lanes_D, np.array([draw.lane for draw in samples], np.int64)))
        page_T, offset_T = np.divmod(positions_T, self.page_size)
        slots_T = self.page_table_LP[lanes_T, page_T].astype(np.int64) * self.page_size + offset_T
        forced = self._forced(plan, positions_T, chunks) if chunks or decoding.replays else None
        return Batch(
            tokens_T, positions_T, lanes_T, slots_T, len(lanes_D), chunks, rows_R, draws, draws_B, prompts, places_G, pages_G, forced
        )

    def _start(self, start: LaneStart) -> None:
        lane = start.lane
        self.length_L[lane], self.last_token_L[lane] = 0, PENDING
        self.prompt_L[lane] = start.prompt
        self.forced_L[lane] = ForcedRows(start.replays) if start.replays else None
        before = self.sampling_L[lane]
        if before is not None and before.constraint is not None:
            before.constraint.close()
        self.sampling_L[lane] = LaneSampling(start, self.vocab_size, self.eos_token_ids, self.constrain(start))
        self._decoding = _Decoding((), NONE, NONE, [], False)

    def _those(self, lanes: tuple[int, ...]) -> _Decoding:
        """What is there for the lanes that decode. No lane among them has started since it was made."""
        if lanes != self._decoding.lanes:
            draws = [self._draw(lane, row) for row, lane in enumerate(lanes)]
            replays = any(self.forced_L[lane] is not None for lane in lanes)
            self._decoding = _Decoding(lanes, np.array(lanes, np.int64), np.arange(len(lanes)), draws, replays)
        return self._decoding

    def _draw(self, lane: int, row: int) -> Draw:
        sampling = self.sampling_L[lane]
        assert sampling is not None, f"lane {lane} was never started"
        return Draw(lane, row, sampling)

    def _grow(self, plan: StepPlan) -> tuple[Ints, Ints]:
        """Append pages to the tables; where, in the whole table, and which."""
        if not plan.growths and not plan.starts:
            return NONE, NONE
        lanes_G, pages_G = np.array(plan.growths, np.int64).reshape(-1, 2).T
        places = [lanes_G * self.max_pages + self.length_L[lanes_G] // self.page_size]
        pages = [pages_G]
        for segment in plan.segments:
            if segment.pages:
                places.append(np.arange(len(segment.pages)) + segment.lane * self.max_pages)
                pages.append(np.array(segment.pages, np.int64))
        places_G, pages_G = np.concatenate(places), np.concatenate(pages)
        self.page_table_LP.reshape(-1)[places_G] = pages_G
        return places_G, pages_G

    def _chunks(self, plan: StepPlan) -> list[tuple[int, int, int]]:
        chunks, first = [], len(plan.decoding)
        for segment in plan.segments:
            length = len(segment.tokens)
            chunks.append((segment.lane, first, length))
            self.length_L[segment.lane] = segment.start + length
            first += length
        return chunks

    def _forced(self, plan: StepPlan, positions_T: Ints, chunks: list[tuple[int, int, int]]) -> Forced | None:
        rows: list[Ints] = []
        ids: list[Ids] = []
        for lane, first, length in [*((lane, row, 1) for row, lane in enumerate(plan.decoding)), *chunks]:
            replay = self.forced_L[lane]
            if replay is None:
                continue
            start = int(positions_T[first])
            if start >= replay.end:
                self.forced_L[lane] = None
            elif (found := replay.within(start, length)) is not None:
                rows.append(first + found[0])
                ids.append(found[1])
        return Forced(np.concatenate(rows), np.concatenate(ids)) if rows else None

    def _wanted(self, plan: StepPlan, chunks: list[tuple[int, int, int]]) -> tuple[list[int], list[Draw], list[PromptRows]]:
        """Which rows of the chunks are needed, behind one of each decoding lane, and what for."""
        before = len(plan.decoding)
        rows: list[int] = []
        draws: list[Draw] = []
        prompts: list[PromptRows] = []
        for segment, (lane, first, length) in zip(plan.segments, chunks, strict=True):
            if segment.prompt_logits:
                following = list(self.prompt_L[lane][segment.start + 1 : segment.start + length + 1])
                state = self.sampling_L[lane]
                assert state is not None
                prompts.append(PromptRows(segment.seq, before + len(rows), following, state.sampling.prompt_logprobs or 0))
                rows.extend(range(first, first + len(following)))
            if segment.sample:
                draws.append(self._draw(lane, before + len(rows)))
                rows.append(first + length - 1)
        return rows, draws, prompts
