"""Figures out of stamps; the names and the meaning are those of the field's benchmarks.

* TTFT: from sending a request to its first piece with tokens.
* TPOT: (last piece - first piece) / (tokens - 1), for each request of more than one token.
* ITL: the gaps between pieces (events of the stream), all requests together. A piece may carry several tokens.
* E2EL: from sending to the last piece.

Throughputs are over the whole run. Failed requests count nowhere but in `failed`. Percentiles interpolate linearly.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

from pointsman.bench.serving.query import Outcome

NAMES = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
}


def percentile(ordered: Sequence[float], share: float) -> float:
    """Of sorted values; `share` from 0 to 100."""
    place = (len(ordered) - 1) * share / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def times_of(outcome: Outcome) -> dict[str, list[float]]:
    """The seconds that one answered request adds to each metric."""
    first, last = outcome.piece_s[0], outcome.piece_s[-1]
    times = {
        "ttft": [first - outcome.sent_s],
        "tpot": [],
        "itl": [later - earlier for earlier, later in itertools.pairwise(outcome.piece_s)],
        "e2el": [last - outcome.sent_s],
    }
    if outcome.output_len > 1:
        times["tpot"] = [(last - first) / (outcome.output_len - 1)]
    return times


def is_good(times: dict[str, list[float]], limits_ms: dict[str, float]) -> bool:
    """Whether a request kept every limit."""
    return all(1000 * second <= limit for name, limit in limits_ms.items() for second in times[name])


def summarize(
    outcomes: Sequence[Outcome],
    duration_s: float,
    *,
    percentiles: Sequence[float] = (99.0,),
    goodput_ms: dict[str, float] | None = None,
) -> dict[str, Any]:
    """The figures of a run. Times are in milliseconds; a metric without a single value is left out."""
    answered = [outcome for outcome in outcomes if outcome.error is None]
    each = [times_of(outcome) for outcome in answered]
    inputs, outputs = sum(outcome.input_len for outcome in answered), sum(outcome.output_len for outcome in answered)
    summary: dict[str, Any] = {
        "completed": len(answered),
        "failed": len(outcomes) - len(answered),
        "duration": duration_s,
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(answered) / duration_s,
        "output_throughput": outputs / duration_s,
        "total_token_throughput": (inputs + outputs) / duration_s,
        "mean_concurrency": sum(times["e2el"][0] for times in each) / duration_s,
        "max_concurrency_reached": most_at_once([(outcome.sent_s, outcome.end_s) for outcome in outcomes]),
        "peak_output_throughput": peak_rate(answered),
    }
    if goodput_ms:
        summary["request_goodput"] = sum(is_good(times, goodput_ms) for times in each) / duration_s
    for name in NAMES:
        values = sorted(1000 * second for times in each for second in times[name])
        if values:
            summary |= _spread(name, values, percentiles)
    return summary


def _spread(name: str, ordered: Sequence[float], percentiles: Sequence[float]) -> dict[str, float]:
    figures = {f"mean_{name}_ms": statistics.fmean(ordered), f"median_{name}_ms": percentile(ordered, 50)}
    figures[f"std_{name}_ms"] = statistics.pstdev(ordered)
    return figures | {f"p{share:g}_{name}_ms": percentile(ordered, share) for share in percentiles}


def most_at_once(spans: Sequence[tuple[float, float]]) -> int:
    """The largest number of half-open spans that hold one moment."""
    changes = sorted([(start, 1) for start, _ in spans] + [(end, -1) for _, end in spans])  # at one moment, ends come first
    most = running = 0
    for _, change in changes:
        running += change
        most = max(most, running)
    return most


def peak_rate(outcomes: Sequence[Outcome]) -> float:
    """Most tokens in one second of the run; those of a request are spread evenly over its pieces."""
    tokens: dict[int, float] = {}
    for outcome in outcomes:
        share = outcome.output_len / len(outcome.piece_s)
        for moment in outcome.piece_s:
            tokens[int(moment)] = tokens.get(int(moment), 0.0) + share
    return max(tokens.values(), default=0.0)
