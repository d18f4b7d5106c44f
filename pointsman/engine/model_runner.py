"""One rank's share of a step: rows in, tokens out.

The runner owns what a plan only names: the tables of the lanes and the routing rows, and through its step the weights, keys and
values. A step is a function from a batch to logits, chosen at start-up; the plain torch one is always there, on a CPU the
compiled one takes its place (see `compiled`), and on a device `device_step`.

On a device a step is launched, and its result is what has come back when somebody asks. What it takes to launch the next one stays
on the device, unless the host has a share in this one (`device_sampler`): then it is finished first.

Of several ranks, rank 0 draws the tokens and the others are told which they are: on a device in the order of its work, without the host,
where the device draws. Apart from that all ranks do the same, so plans are launched on each, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pointsman.distributed import Mesh
from pointsman.engine.batch import PENDING, Batch, Lanes
from pointsman.engine.device_sampler import DeviceSampler, Drawing
from pointsman.engine.versions import SlotVersions
from pointsman.layers.context import Span, StepContext
from pointsman.layers.paged_kv import PagedKV
from pointsman.models.decoder import Decoder
from pointsman.moe.capture import Fetch, RouteStore
from pointsman.request import Logprob
from pointsman.sampling.logprobs import prompt_logprobs
from pointsman.sampling.sampler import NO_TOKEN, Drawn, joined, sample
from pointsman.step import StepPlan, StepResult


class Pending(Protocol):
    """A step under way."""

    def result(self) -> StepResult: ...


class Step(Protocol):
    """Runs the rows of a batch: stores their keys, values and routing, and returns logits [R, V] of the rows asked for."""

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
            replay_TNK=None if batch.forced is None else torch.from_numpy(batch.forced.spread(len(batch.tokens_T))),
        )
        return self._decoder.forward(torch.from_numpy(batch.tokens_T), context, torch.from_numpy(batch.rows_R))


class Load(Protocol):
    """Counts how often each expert is used (`moe.load`)."""

    def settle(self) -> None: ...

    def before_step(self) -> None: ...

    def after_step(self, slots_T: npt.NDArray[np.int64]) -> None: ...

    def counts_LE(self) -> npt.NDArray[np.int64]: ...


class _Launched:
    """A step whose result is made when it is first asked for."""

    def __init__(self, finish: Callable[[], StepResult]) -> None:
        self._finish: Callable[[], StepResult] | None = finish
        self._result: StepResult | None = None

    def result(self) -> StepResult:
        if self._finish is not None:
            self._result, self._finish = self._finish(), None
        assert self._result is not None
        return self._result


class ModelRunner:
    """Executes plans, one at a time and in order.

    Args:
        sampler: draws on the device that the step runs on; None where that is the host.
        mesh: the other ranks. Those past the first answer a plan with no more than its tokens, if that, and nobody need ask: launching it
            is all that they have to do.

    Attributes:
        load: how often each expert was used.
        versions: which weights fed each slot.
    """

    def __init__(self, step: Step, lanes: Lanes, routes: RouteStore, load: Load, mesh: Mesh, sampler: DeviceSampler | None = None) -> None:
        self._step: Step | None = step
        self._mesh = mesh
        self._lanes, self._routes, self._sampler = lanes, routes, sampler
        self._unfinished: _Launched | None = None
        self.load = load
        self.versions = SlotVersions(routes.num_slots)

    @property
    def has_step(self) -> bool:
        """Whether plans can be executed; not while memory is released that a step needs."""
        return self._step is not None

    @property
    def step_name(self) -> str:
        return "none" if self._step is None else self._step.name

    @property
    def step_is_final(self) -> bool:
        return self._step is not None and self._step.final

    @property
    def on_device(self) -> bool:
        """Steps are launched on a device, and may be while the one before runs."""
        return self._sampler is not None

    def enter(self, step: Step | None, version: str | None = None) -> None:
        """From the next plan on, this step; with other weights, where there is a version."""
        self._step = step
        if version is not None:
            self.versions.enter(version)

    def drop_step(self) -> None:
        """Let go of the step and of all that it left to be read. The steps that were launched are through, and no sequence runs."""
        if self._unfinished is not None:
            self._unfinished.result()
        self.load.counts_LE()  # what is not counted yet stands in the cache
        self._unfinished = self._step = None

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step. Raises whatever the model raises: such a fault is the engine's, not a request's."""
        return self.launch(plan).result()

    def launch(self, plan: StepPlan) -> Pending:
        """Begin a step; on the host it is through when this returns, but for what is drawn from its logits."""
        if self._unfinished is not None:
            self._unfinished.result()
            self._unfinished = None
        assert self._step is not None, "a plan, but no step"
        batch = self._lanes.lay_out(plan)
        self.load.before_step()
        logits_RV = self._step(batch, self._lanes)
        self.load.after_step(batch.slots_T)
        self.versions.record(batch.slots_T)
        drawing = None
        if self._sampler is not None:
            drawing = self._sampler.draw(logits_RV, batch.draws)
            self._lanes.last_token_L[batch.draws_B[drawing.indices]] = PENDING
        launched = _Launched(lambda: self._finish(plan.index, batch, logits_RV, drawing))
        if batch.prompts or drawing is None or len(drawing.indices) < len(batch.draws):
            self._unfinished = launched
            if self._mesh.rank > 0:
                launched.result()  # what rank 0 draws is waited for now, as rank 0 may wait for us
        return launched

    def _finish(self, index: int, batch: Batch, logits_RV: Tensor, drawing: Drawing | None) -> StepResult:
        drawn = self._drawn(batch, logits_RV, drawing)
        scores = self._score_prompts(batch, logits_RV) if self._mesh.rank == 0 else {}
        final = {at for at, draw in enumerate(batch.draws) if draw.sampling.constraint is not None and draw.sampling.ended}
        return StepResult(index, drawn.tokens, drawn.errors, drawn.logprobs, final, scores)

    def _drawn(self, batch: Batch, logits_RV: Tensor, drawing: Drawing | None) -> Drawn:
        """What the step draws, there and here. Ranks past the first, whom nobody asks, do not wait for what is drawn there."""
        number = len(batch.draws)
        if drawing is None:
            return self._sample(batch, logits_RV, range(number))
        there = drawing.drawn() if self._mesh.rank == 0 else Drawn([NO_TOKEN] * len(drawing.indices), {}, {})
        if len(drawing.indices) == number:
            return there
        drawn_there = set(drawing.indices)
        here = [index for index in range(number) if index not in drawn_there]
        return joined((drawing.indices, there), (here, self._sample(batch, logits_RV, here)))

    def _sample(self, batch: Batch, logits_RV: Tensor, indices: Sequence[int]) -> Drawn:
        """Draw these on the host, or be told what rank 0 has drawn."""
        draws = [batch.draws[index] for index in indices]
        if self._mesh.rank == 0:
            whole = len(draws) == len(batch.rows_R)
            drawn = sample(logits_RV if whole else logits_RV[[draw.row for draw in draws]], [draw.sampling for draw in draws])
            if self._mesh.size > 1:
                self._mesh.broadcast(torch.tensor(drawn.tokens, device=self._mesh.device))
        else:
            drawn = Drawn(self._mesh.broadcast(torch.empty(len(draws), dtype=torch.int64, device=self._mesh.device)).tolist(), {}, {})
            for draw, token in zip(draws, drawn.tokens, strict=True):
                if token != NO_TOKEN:
                    draw.sampling.commit(token)
        lanes_B = batch.draws_B if len(draws) == len(batch.draws) else batch.draws_B[indices]
        self._lanes.last_token_L[lanes_B] = np.maximum(drawn.tokens, 0)  # a lane with an error ends at commit; until then it runs on
        return drawn

    def _score_prompts(self, batch: Batch, logits_RV: Tensor) -> dict[int, list[dict[int, Logprob]]]:
        return {
            rows.seq: prompt_logprobs(
                logits_RV[rows.first : rows.first + len(rows.following)],
                rows.following,
                rows.num_likeliest,
            )
            for rows in batch.prompts
        }

    def routing(self, slots: npt.NDArray[np.int64]) -> Fetch:
        """The experts [len(slots), layers, top_k] of a sequence's positions in these slots.

        They have been computed, and their rows must have come before the next plan is launched.
        """
        return self._routes.fetch(torch.from_numpy(slots))

    def slots(self, pages: list[int], start: int, end: int) -> npt.NDArray[np.int64]:
        """Where the positions from start to end of a sequence are."""
        page_size = self._lanes.page_size
        first = start // page_size
        pages_P = np.asarray(pages[first : -(-end // page_size)], np.int64)
        slots: npt.NDArray[np.int64] = (pages_P[:, None] * page_size + np.arange(page_size)).ravel()
        return slots[start - first * page_size : max(start, end) - first * page_size]

    def agreement(self, pages: list[int], forced: Iterable[tuple[int, int]], num_known: int) -> float | None:
        """The share of (position, layer) choices that free routing would have made alike, over the forced positions that were computed."""
        slots = np.concatenate([np.zeros(0, np.int64), *(self.slots(pages, first, min(last, num_known)) for first, last in forced)])
        if not len(slots):
            return None
        num_alike = int(self._routes.alike(torch.from_numpy(slots)).numpy().sum(dtype=np.int64))
        return num_alike / (len(slots) * self._routes.rows_SLK.shape[1])
