"""Figures against brute force over synthetic logs, with numpy's percentiles as the oracle."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.bench.serving.metrics import is_good, most_at_once, peak_rate, percentile, summarize, times_of
from pointsman.bench.serving.query import Outcome, Query

SECONDS = st.floats(0, 50).map(lambda value: round(value, 3))


@st.composite
def outcomes(draw):
    query = Query(text="x", input_len=draw(st.integers(1, 100)), output_len=200)
    sent = draw(SECONDS)
    if draw(st.integers(0, 4)) == 0:
        return Outcome(query=query, sent_s=sent, end_s=sent + 1, error="it failed")
    gaps = draw(st.lists(st.floats(0, 2), min_size=1, max_size=8))
    pieces = list(sent + np.cumsum(gaps))
    said = draw(st.none() | st.integers(1, 40))
    return Outcome(query=query, sent_s=sent, piece_s=pieces, end_s=pieces[-1] + 0.5, counted=len(pieces), output_tokens=said)


LOGS = st.lists(outcomes(), min_size=1, max_size=12)


@given(LOGS, st.floats(0.1, 100), st.lists(st.sampled_from([0.0, 50.0, 90.0, 99.0, 99.9, 100.0]), min_size=1, unique=True))
def test_figures_are_those_of_brute_force(log, duration, shares):
    summary = summarize(log, duration, percentiles=shares)
    good = [outcome for outcome in log if outcome.error is None]
    tokens = [outcome.counted if outcome.output_tokens is None else outcome.output_tokens for outcome in good]
    assert summary["completed"] + summary["failed"] == len(log)
    assert summary["total_input_tokens"] == sum(outcome.query.input_len for outcome in good)
    assert summary["total_output_tokens"] == sum(tokens)
    assert summary["request_throughput"] == pytest.approx(len(good) / duration)
    assert summary["output_throughput"] == pytest.approx(sum(tokens) / duration)
    assert summary["total_token_throughput"] == pytest.approx((summary["total_input_tokens"] + sum(tokens)) / duration)
    expected = {"ttft": [], "tpot": [], "itl": [], "e2el": []}
    for outcome, count in zip(good, tokens, strict=True):
        times = np.asarray(outcome.piece_s)
        expected["ttft"].append(times[0] - outcome.sent_s)
        expected["e2el"].append(times[-1] - outcome.sent_s)
        expected["itl"].extend(np.diff(times))
        if count > 1:
            expected["tpot"].append((times[-1] - times[0]) / (count - 1))
    for name, values in expected.items():
        assert (f"mean_{name}_ms" in summary) == bool(values)
        if not values:
            continue
        milliseconds = 1000 * np.asarray(values)
        assert summary[f"mean_{name}_ms"] == pytest.approx(milliseconds.mean())
        assert summary[f"median_{name}_ms"] == pytest.approx(np.median(milliseconds))
        assert summary[f"std_{name}_ms"] == pytest.approx(milliseconds.std(), abs=1e-6)
        for share in shares:
            assert summary[f"p{share:g}_{name}_ms"] == pytest.approx(np.percentile(milliseconds, share))


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.floats(0, 100))
def test_percentiles_are_numpys(values, share):
    assert percentile(sorted(values), share) == pytest.approx(np.percentile(values, share), abs=1e-6)


@given(LOGS, st.dictionaries(st.sampled_from(["ttft", "tpot", "itl", "e2el"]), st.floats(0, 3000), min_size=1))
def test_goodput_counts_requests_of_which_every_time_keeps_its_limit(log, limits):
    summary = summarize(log, 2.0, goodput_ms=limits)
    good = 0
    for outcome in log:
        if outcome.error is None:
            times = times_of(outcome)
            assert is_good(times, limits) == all(max(times[name], default=0) * 1000 <= limit for name, limit in limits.items())
            good += is_good(times, limits)
    assert summary["request_goodput"] == good / 2.0


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)).map(lambda span: (span[0], span[0] + span[1])), max_size=12))
def test_the_most_at_once_is_that_of_counting_every_moment(spans):
    counted = max((sum(start <= moment < end for start, end in spans) for moment in range(32)), default=0)
    assert most_at_once(spans) == counted


@given(LOGS)
def test_the_best_second_is_that_of_counting_every_second(log):
    good = [outcome for outcome in log if outcome.error is None]
    seconds = [
        sum(outcome.output_len / len(outcome.piece_s) for outcome in good for moment in outcome.piece_s if int(moment) == second)
        for second in range(80)
    ]
    assert peak_rate(good) == pytest.approx(max(seconds, default=0))


def test_a_run_without_answers_has_counts_and_no_times():
    summary = summarize([Outcome(query=Query(text="x", input_len=1, output_len=1), error="no")], 1.0)
    assert (summary["completed"], summary["failed"], summary["output_throughput"]) == (0, 1, 0.0)
    assert not any(name.endswith("_ms") for name in summary)
