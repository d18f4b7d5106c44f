"""One rank's share of a step: rows in, tokens out.

The runner owns what a plan only names: weights, keys and values, routing rows, the tables of the lanes. It runs the rows
through whichever step was chosen at start-up and samples. A step is a function from a batch to logits; the plain torch one is
always there, and on a CPU the compiled one takes its place as soon as it can (see `compiled`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pointsman.engine.batch import Batch, Lanes
from pointsman.layers.attention import PagedKV
from pointsman.layers.context import StepContext
from pointsman.models.decoder import Decoder
from pointsman.moe.capture import RouteStore
from pointsman.sampling.sampler import prompt_logprobs, sample
from pointsman.step import Sampled, StepPlan, StepResult

log = logging.getLogger(__name__)

Step = Callable[[Batch, Lanes], Tensor]


class TorchStep:
    """The model op by op: runs anywhere, and is the oracle of every faster step."""

    def __init__(self, decoder: Decoder, kv: PagedKV, routes: RouteStore) -> None:
        self._decoder, self._kv, self._routes = decoder, kv, routes

    def __call__(self, batch: Batch, lanes: Lanes) -> Tensor:
        context = StepContext(
            positions_T=torch.from_numpy(batch.positions_T),
            slots_T=torch.from_numpy(batch.slots_T),
            segments=batch.segments,
            page_table_LP=torch.from_numpy(lanes.page_table_LP),
            kv=self._kv,
            routes=self._routes,
        )
        return self._decoder.forward(torch.from_numpy(batch.tokens_T), context, torch.from_numpy(batch.rows_R))


class ModelRunner:
    """Executes plans, one at a time and in order."""

    def __init__(self, step: Step, lanes: Lanes, routes: RouteStore, *, replacement: Callable[[], Step | None] | None = None) -> None:
        self._step, self._lanes, self._routes = step, lanes, routes
        self._replacement = replacement

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step. Raises whatever the model raises: such a fault is the engine's, not a request's."""
        if self._replacement is not None and (faster := self._replacement()) is not None:
            self._step, self._replacement = faster, None
        batch = self._lanes.lay_out(plan)
        logits_RV = self._step(batch, self._lanes)
        return StepResult(plan.index, self._sample(plan, batch, logits_RV), self._score_prompts(plan, batch, logits_RV))

    def _sample(self, plan: StepPlan, batch: Batch, logits_RV: Tensor) -> tuple[Sampled, ...]:
        wanting = [segment for segment in plan.segments if segment.sample]
        if not wanting:
            return ()
        states = [self._lanes.sampling_L[segment.lane] for segment in wanting]
        assert all(state is not None for state in states)
        every_row = len(batch.samples) == len(batch.rows_R)
        chosen = sample(logits_RV if every_row else logits_RV[batch.samples], states)  # type: ignore[arg-type]
        for segment, token in zip(wanting, chosen.tokens, strict=True):
            self._lanes.last_token_L[segment.lane] = token
        return tuple(
            Sampled(segment.seq, token, logprobs, error)
            for segment, token, logprobs, error in zip(wanting, chosen.tokens, chosen.logprobs, chosen.errors, strict=True)
        )

    def _score_prompts(self, plan: StepPlan, batch: Batch, logits_RV: Tensor) -> dict[int, list[dict[int, object]]]:
        scores = {}
        for sequence, rows, following in batch.prompts:
            lane = next(segment.lane for segment in plan.segments if segment.seq == sequence)
            state = self._lanes.sampling_L[lane]
            assert state is not None
            scores[sequence] = prompt_logprobs(logits_RV[rows], following, state.params.prompt_logprobs or 0)
        return scores

    def routing(self, pages: list[int], num_rows: int) -> npt.NDArray[np.integer]:
        """The experts of a sequence's first rows, [rows, layers, top_k], copied out of the slots of its pages."""
        positions = np.arange(num_rows)
        page_size = self._lanes.page_size
        slots = np.asarray(pages, np.int64)[positions // page_size] * page_size + positions % page_size
        return self._routes.gather(slots)
