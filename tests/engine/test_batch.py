"""The tables of the lanes, brought up to date step by step, against rows that are laid out from nothing in every step."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pointsman.engine.batch import PENDING, Batch, Lanes
from pointsman.step import LaneStart, StepPlan, StepResult
from tests.scheduler.simulation import Setup, Simulation
from tests.scheduler.test_workloads import requests, setups

VOCAB = 8


class LaidOut(Simulation):
    """A simulation whose plans are laid out, too. Tokens that a device draws are not told to the tables: there they are PENDING."""

    def __init__(self, setup: Setup, *, told: bool) -> None:
        super().__init__(setup)
        self.told = told
        max_pages = -(-setup.max_context // setup.page_size)
        self.lanes = Lanes(setup.max_running, max_pages, setup.page_size, VOCAB, (), lambda start: None)
        self.starts: dict[int, LaneStart] = {}
        self.table = np.zeros(setup.max_running * max_pages, np.int64)

    def plan(self) -> bool:
        if not super().plan():
            return False
        plan, result = self.in_flight[-1]
        self.starts |= {start.lane: start for start in plan.starts}
        batch = self.lanes.lay_out(plan)
        self.check_rows(batch)
        self.check_draws(plan, batch, result)
        self.check_pages(batch)
        self.check_forced(batch)
        self.lanes.last_token_L[batch.draws_B] = result.tokens if self.told else PENDING
        for draw, token in zip(batch.draws, result.tokens, strict=True):
            draw.sampling.commit(token)
        return True

    def check_rows(self, batch: Batch) -> None:
        rows, decoding = (
            [],
            [row for row in self.rank.steps[-1] if row.start >= len(self.starts[row.lane].prompt + self.starts[row.lane].output)],
        )
        for fed in self.rank.steps[-1]:
            lane = self.rank.lanes[fed.lane]
            for position in range(fed.start, fed.start + fed.count):
                token = lane.tokens[position] if self.told or fed not in decoding else PENDING
                rows.append((token, position, fed.lane, self.rank.slot(lane.pages, position)))
        assert [*zip(batch.tokens_T, batch.positions_T, batch.lanes_T, batch.slots_T, strict=True)] == rows
        firsts = itertools.accumulate((fed.count for fed in self.rank.steps[-1]), initial=0)
        assert batch.segments == [(fed.lane, first, fed.count) for fed, first in zip(self.rank.steps[-1], firsts, strict=False)]
        assert batch.num_decoding == len(decoding) and batch.segments[batch.num_decoding :] == batch.chunks

    def check_draws(self, plan: StepPlan, batch: Batch, result: StepResult) -> None:
        """The last row of each that samples, and the rows that prompt tokens follow."""
        scoring = {segment.seq for segment in plan.segments if segment.prompt_logits}
        rows, places, prompts = [], [], []
        for fed, (_, first, count) in zip(self.rank.steps[-1], batch.segments, strict=True):
            if fed.seq in scoring:
                following = self.rank.lanes[fed.lane].start.prompt[fed.start + 1 : fed.start + count + 1]
                prompts.append((fed.seq, len(rows), [*following]))
                rows += range(first, first + len(following))
            if fed.sampled:
                places.append((fed.lane, len(rows)))
                rows.append(first + count - 1)
        assert batch.rows_R.tolist() == rows and len(batch.draws) == len(result.tokens)
        assert [(draw.lane, draw.row) for draw in batch.draws] == places and batch.draws_B.tolist() == [lane for lane, _ in places]
        assert [(entry.seq, entry.first, entry.following) for entry in batch.prompts] == prompts
        for draw in batch.draws:
            start = self.starts[draw.lane]
            num_output = len(self.rank.lanes[draw.lane].tokens) - 1 - len(start.prompt)  # the rank has drawn already
            assert draw.sampling.seed == start.seed and draw.sampling.num_output == num_output

    def check_pages(self, batch: Batch) -> None:
        """A table that is told what each step says it grew by, as a device is, has the pages."""
        self.table[batch.places_G] = batch.pages_G
        for table in (self.table.reshape(self.lanes.page_table_LP.shape), self.lanes.page_table_LP):
            for number, lane in self.rank.lanes.items():
                assert table[number, : len(lane.pages)].tolist() == lane.pages

    def check_forced(self, batch: Batch) -> None:
        """Of two replays with a row for a position the later counts."""
        expected = {}
        for row, (position, lane) in enumerate(zip(batch.positions_T.tolist(), batch.lanes_T.tolist(), strict=True)):
            found = [ids for replay in self.starts[lane].replays if (ids := replay.row(position)) is not None]
            if found:
                expected[row] = [*found[-1]]
        given = {} if batch.forced is None else dict(zip(batch.forced.rows_F.tolist(), batch.forced.ids_FNK.tolist(), strict=True))
        assert {row: ids[0] for row, ids in given.items()} == expected


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_rows_are_those_of_a_layout_from_nothing(data: st.DataObject) -> None:
    setup = data.draw(setups())
    overlap, told = data.draw(st.booleans()), data.draw(st.booleans())
    simulation = LaidOut(setup, told=told)
    for index in range(data.draw(st.integers(1, 8))):
        request = data.draw(requests(f"r{index}", setup.max_context))
        simulation.add(request, tuple(10 * index + choice + 1 for choice in range(request.sampling.n)))
        for _ in range(data.draw(st.integers(0, 6))):
            simulation.step(overlap=overlap)
            if data.draw(st.integers(0, 15)) == 0:
                simulation.abort(f"r{data.draw(st.integers(0, index))}")
    simulation.run(overlap=overlap)
