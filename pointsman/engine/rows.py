"""The routing rows of sequences: what is kept of those that lose their pages, and what a choice is given at its end.

Rows stand by cache slot (`moe/capture.py`), so they are read while the pages of a sequence are still its own: before the step that follows
a preemption is handed over, and at the end of a choice before the next plan.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from pointsman.engine.model_runner import ModelRunner
from pointsman.engine.versions import Run, clip
from pointsman.replay import keep, rows_of
from pointsman.request import ChoiceDelta
from pointsman.routed_experts import fill_missing
from pointsman.scheduler import Sequence


class RoutingRows:
    """Those of one runner."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._awaited: list[Callable[[], None]] = []

    def keep(self, sequence: Sequence) -> None:
        """Read the rows of a sequence that was just preempted: it computes anew under the same experts."""
        if sequence.kept is None or sequence.num_computed > sequence.kept.end:
            slots = self._slots(sequence)
            rows = self._runner.routing(slots).result().numpy()
            sequence.kept, sequence.kept_versions = keep(rows), self._versions(sequence, slots)
        sequence.tainted = any(number != self._runner.versions.number for _, _, number in sequence.kept_versions)

    def give(self, sequence: Sequence, delta: ChoiceDelta) -> None:
        """Fill in what the last delta of a choice says of its routing, as far as that was asked for; its rows with `settle`."""
        if sequence.request.sampling.return_routed_experts:
            self._give_rows(sequence, delta)
        if (replay := sequence.request.replay) is not None:
            delta.routing_agreement = self._runner.agreement(sequence.pages, replay.forced, sequence.num_computed)

    def settle(self) -> None:
        """Wait for the rows of all that were given any."""
        for complete in self._awaited:
            complete()
        self._awaited.clear()

    def _give_rows(self, sequence: Sequence, delta: ChoiceDelta) -> None:
        """One that is aborted on its way back from a preemption has the rows that were kept, too."""
        start, kept = sequence.request.sampling.routed_experts_start, sequence.kept
        end = max(len(sequence.tokens) - 1, start)
        first = max(start, min(end, sequence.num_computed))
        slots = self._slots(sequence)
        fetch = self._runner.routing(slots[start:first])
        last = first if kept is None else max(first, min(kept.end, end))

        def complete() -> None:
            rows = known = fetch.result().numpy()
            if first < end:
                rows = np.empty((end - start, *known.shape[1:]), known.dtype)
                rows[: len(known)] = known
            if first < last:
                assert kept is not None
                rows[first - start : last - start] = rows_of(kept)[first:last]
            missing = ((last - start, end - start),) if last < end else ()
            fill_missing(rows, missing)
            delta.routed_experts, delta.routed_experts_missing = rows, missing

        self._awaited.append(complete)
        delta.weight_versions = tuple(self._runner.versions.named(clip(self._versions(sequence, slots), start, end), start))

    def _slots(self, sequence: Sequence) -> npt.NDArray[np.int64]:
        """Of all positions that were computed."""
        return self._runner.slots(sequence.pages, 0, sequence.num_computed)

    def _versions(self, sequence: Sequence, slots: npt.NDArray[np.int64]) -> list[Run]:
        """Which weights chose the experts of its positions: what was computed again under rows that were kept, those of the rows."""
        num_known, kept = sequence.num_computed, sequence.kept_versions
        runs = self._runner.versions.runs(slots)
        if not kept:
            return runs
        first, last = min(sequence.num_found, num_known), kept[-1][1]
        return [*clip(runs, 0, first), *clip(kept, first, last), *clip(runs, max(first, last), num_known)]
