"""One rank's share of a step: rows in, tokens out.

The runner owns what a plan only names: the tables of the lanes and the routing rows, and through its step the weights, keys and
values. A step is a function from a batch to logits, chosen at start-up; the plain torch one is always there, and on a CPU the
compiled one takes its place (see `compiled`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pointsman.engine.batch import Batch, Forced, Lanes
from pointsman.layers.context import Span, StepContext
from pointsman.layers.paged_kv import PagedKV
from pointsman.models.decoder import Decoder
from pointsman.moe.capture import RouteStore
from pointsman.moe.load import ExpertLoad
from pointsman.request import Logprob
from pointsman.routed_experts import fill_missing
from pointsman.sampling.lane import LaneSampling
from pointsman.sampling.logprobs import prompt_logprobs
from pointsman.sampling.sampler import sample
from pointsman.step import Sampled, StepPlan, StepResult


class Step(Protocol):
    """Runs the rows of a batch: stores their keys, values and routing, and returns float32 logits [R, V] of the rows asked for."""

    @property
    def name(self) -> str: ...

    @property
    def final(self) -> bool: ...

    def __call__(self, batch: Batch, lanes: Lanes) -> Tensor: ...


class TorchStep:
    """The model op by op: runs anywhere, and is the oracle of every faster step."""

    name = "torch"
    final = True

    def __init__(self, decoder: Decoder, kv: PagedKV, routes: RouteStore) -> None:
        self._decoder, self._kv, self._routes = decoder, kv, routes

    @torch.inference_mode()
    def __call__(self, batch: Batch, lanes: Lanes) -> Tensor:
        spans = [Span(*segment) for segment in batch.segments]
        context = StepContext(
            positions_T=torch.from_numpy(batch.positions_T),
            slots_T=torch.from_numpy(batch.slots_T),
            attention_plan=self._decoder.plan_attention(spans, len(batch.tokens_T)),
            page_table_LP=torch.from_numpy(lanes.page_table_LP),
            kv=self._kv,
            routes=self._routes,
            replay_TNK=None if batch.forced is None else torch.from_numpy(_replay(batch.forced, len(batch.tokens_T))),
        )
        return self._decoder.forward(torch.from_numpy(batch.tokens_T), context, torch.from_numpy(batch.rows_R))


def _replay(forced: Forced, num_rows: int) -> npt.NDArray[np.int64]:
    """The experts of every row, -1 where they are not given."""
    replay_TNK = np.full((num_rows, *forced.ids_FNK.shape[1:]), -1, np.int64)
    replay_TNK[forced.rows_F] = forced.ids_FNK
    return replay_TNK


class ModelRunner:
    """Executes plans, one at a time and in order.

    Attributes:
        load: how often each expert was used.
    """

    def __init__(self, step: Step, lanes: Lanes, routes: RouteStore, load: ExpertLoad) -> None:
        self._step, self._lanes, self._routes = step, lanes, routes
        self.load = load

    @property
    def step_name(self) -> str:
        return self._step.name

    @property
    def step_is_final(self) -> bool:
        return self._step.final

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step. Raises whatever the model raises: such a fault is the engine's, not a request's."""
        batch = self._lanes.lay_out(plan)
        self.load.before_step()
        logits_RV = self._step(batch, self._lanes)
        self.load.after_step(batch.slots_T)
        return StepResult(plan.index, self._sample(plan, batch, logits_RV), self._score_prompts(batch, logits_RV))

    def _sample(self, plan: StepPlan, batch: Batch, logits_RV: Tensor) -> tuple[Sampled, ...]:
        wanting = [segment for segment in plan.segments if segment.sample]
        if not wanting:
            return ()
        every_row = len(batch.samples) == len(batch.rows_R)
        lanes = [self._sampling(segment.lane) for segment in wanting]
        drawn = sample(logits_RV if every_row else logits_RV[batch.samples], lanes)
        logprobs: Sequence[Any] = drawn.logprobs or [None] * len(wanting)
        for segment, token in zip(wanting, drawn.tokens, strict=True):
            self._lanes.last_token_L[segment.lane] = max(token, 0)  # a lane with an error ends at commit; until then it runs on
        return tuple(
            Sampled(segment.seq, token, logprobs[row], drawn.errors.get(row), lanes[row].ended)
            for row, (segment, token) in enumerate(zip(wanting, drawn.tokens, strict=True))
        )

    def _sampling(self, lane: int) -> LaneSampling:
        state = self._lanes.sampling_L[lane]
        assert state is not None, f"lane {lane} was never started"
        return state

    def _score_prompts(self, batch: Batch, logits_RV: Tensor) -> dict[int, list[dict[int, Logprob]]]:
        return {
            rows.seq: prompt_logprobs(
                logits_RV[rows.first : rows.first + len(rows.following)],
                rows.following,
                self._sampling(rows.lane).sampling.prompt_logprobs or 0,
            )
            for rows in batch.prompts
        }

    def routing(self, pages: list[int], start: int, end: int, num_known: int) -> tuple[npt.NDArray[np.integer[Any]], list[tuple[int, int]]]:
        """The experts of a sequence's positions from start to end, and which of these rows are missing.

        Rows [end - start, layers, top_k] are copied out of the slots of the pages; positions from num_known on were never computed.
        """
        slots = self._slots(pages, start, min(end, num_known))
        known: npt.NDArray[np.integer[Any]] = self._routes.gather(torch.from_numpy(slots)).numpy()
        if len(known) == end - start:
            return known, []
        rows = np.empty((end - start, *known.shape[1:]), known.dtype)
        missing = [(len(known), len(rows))]
        rows[: len(known)] = known
        fill_missing(rows, missing)
        return rows, missing

    def _slots(self, pages: list[int], start: int, end: int) -> npt.NDArray[np.int64]:
        positions, page_size = np.arange(start, max(start, end)), self._lanes.page_size
        slots: npt.NDArray[np.int64] = np.asarray(pages, np.int64)[positions // page_size] * page_size + positions % page_size
        return slots

    def agreement(self, pages: list[int], forced: Iterable[tuple[int, int]], num_known: int) -> float | None:
        """The share of (position, layer) choices that free routing would have made alike, over the forced positions that were computed."""
        slots = np.concatenate([np.zeros(0, np.int64), *(self._slots(pages, first, min(last, num_known)) for first, last in forced)])
        if not len(slots):
            return None
        num_alike = int(self._routes.alike_S.numpy()[slots].sum(dtype=np.int64))
        return num_alike / (len(slots) * self._routes.rows_SLK.shape[1])
