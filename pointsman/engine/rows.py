"""The routing rows of sequences: what is kept of those that lose their pages, and what a choice is given at its end.

Rows stand by cache slot (`moe/capture.py`), so they are read while the pages of a sequence are still its own: before the step that follows
a preemption is handed over, and at the end of a choice before the next plan.
"""

from __future__ import annotations

from pointsman.engine.model_runner import ModelRunner
from pointsman.engine.versions import Run, clip
from pointsman.replay import keep, rows_of
from pointsman.request import ChoiceDelta
from pointsman.scheduler import Sequence


class RoutingRows:
    """Those of one runner."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner

    def keep(self, sequence: Sequence) -> None:
        """Read the rows of a sequence that was just preempted: it computes anew under the same experts."""
        if sequence.kept is None or sequence.num_computed > sequence.kept.end:
            rows, _ = self._runner.routing(sequence.pages, 0, sequence.num_computed, sequence.num_computed)
            sequence.kept, sequence.kept_versions = keep(rows), self._versions(sequence)
        sequence.tainted = any(number != self._runner.versions.number for _, _, number in sequence.kept_versions)

    def give(self, sequence: Sequence, delta: ChoiceDelta) -> None:
        """Fill in what the last delta of a choice says of its routing, as far as that was asked for."""
        if sequence.request.sampling.return_routed_experts:
            self._give_rows(sequence, delta)
        if (replay := sequence.request.replay) is not None:
            delta.routing_agreement = self._runner.agreement(sequence.pages, replay.forced, sequence.num_computed)

    def _give_rows(self, sequence: Sequence, delta: ChoiceDelta) -> None:
        """One that is aborted on its way back from a preemption has the rows that were kept, too."""
        start, kept = sequence.request.sampling.routed_experts_start, sequence.kept
        end, num_computed = max(len(sequence.tokens) - 1, start), sequence.num_computed
        rows, missing = self._runner.routing(sequence.pages, start, end, num_computed)
        if kept is not None and missing and kept.end > (first := max(start, num_computed)):
            last = min(kept.end, end)
            rows[first - start : last - start] = rows_of(kept)[first:last]
            missing = [(last - start, end - start)] if last < end else []
        delta.routed_experts, delta.routed_experts_missing = rows, tuple(missing)
        delta.weight_versions = tuple(self._runner.versions.named(clip(self._versions(sequence), start, end), start))

    def _versions(self, sequence: Sequence) -> list[Run]:
        """Which weights chose the experts of its positions: what was computed again under rows that were kept, those of the rows."""
        num_known, kept = sequence.num_computed, sequence.kept_versions
        runs = self._runner.version_runs(sequence.pages, num_known)
        if not kept:
            return runs
        first, last = min(sequence.num_found, num_known), kept[-1][1]
        return [*clip(runs, 0, first), *clip(kept, first, last), *clip(runs, max(first, last), num_known)]
