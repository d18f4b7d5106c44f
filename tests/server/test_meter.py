"""Counting of requests, tokens and times; what Prometheus reads of it; the log of requests."""

from __future__ import annotations

import io
import itertools
import json
import random

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pointsman.request import ChoiceDelta, EngineStats, FinishReason, Request, SamplingParams
from pointsman.server import meter as meters
from pointsman.server.meter import ExpertLoad, Histogram, Meter, log_requests_to, request_log
from pointsman.server.metrics import expose


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def begin(meter, rid="a", n=1, num_prompt=10):
    meter.begin(Request(rid=rid, prompt_token_ids=(1,) * num_prompt, sampling=SamplingParams(n=n)), f"name of {rid}")


def delta(rid="a", index=0, tokens=1, cached=0, finish=None):
    return ChoiceDelta(rid=rid, index=index, token_ids=[7] * tokens, num_cached_tokens=cached, finish_reason=finish)


def test_a_histogram_counts_what_is_at_most_each_bound():
    random.seed(1)
    bounds = (0.5, 1, 2.5)
    values = [random.choice([0, 0.5, 0.75, 1, 2, 2.5, 9]) for _ in range(200)]
    histogram = Histogram(bounds)
    for value in values:
        histogram.add(value)
    expected = [(str(float(bound)), sum(value <= bound for value in values)) for bound in bounds]
    assert histogram.buckets == [*expected, ("+Inf", 200)]
    assert histogram.sum == pytest.approx(sum(values))


def test_times_of_a_request(clock):
    meter = Meter(clock=clock)
    begin(meter, n=2)
    seen = []
    for step, deltas in enumerate(
        [
            [delta(cached=4)],
            [delta(index=1), delta()],
            [delta(tokens=3)],
            [delta(index=1, finish=FinishReason.STOP), delta(tokens=0, finish=FinishReason.LENGTH)],
        ],
        1,
    ):
        clock.now = 100.0 + step * step
        meter.take(deltas)
        seen.append((meter.first_token.sum, meter.between_tokens.sum))
    meter.end("a")
    assert seen == [(1.0, 0.0), (1.0, 3.0), (1.0, 3.0 + 5.0), (1.0, 3.0 + 5.0 + 12.0)]
    assert sum(meter.first_token.counts) == 1
    assert sum(meter.between_tokens.counts) == 1 + 3 + 1
    assert meter.whole.sum == 16.0
    assert (meter.num_prompt, meter.num_cached, meter.num_generated) == (10, 4, 7)
    assert meter.finished == {"stop": 1, "length": 1, "abort": 0, "error": 0}


def test_who_leaves_early_was_aborted_and_who_is_refused_never_came(clock):
    meter = Meter(clock=clock)
    for rid in "abc":
        begin(meter, rid, n=2)
    meter.take([delta("a", finish=FinishReason.STOP), delta("unknown")])
    meter.refuse("b")
    for rid in "abcc":
        meter.end(rid)
    assert meter.finished == {"stop": 1, "length": 0, "abort": 3, "error": 0}
    assert sum(meter.whole.counts) == 2
    assert (meter.num_prompt, sum(meter.first_token.counts)) == (10, 1)


def test_an_abort_is_no_first_token(clock):
    meter = Meter(clock=clock)
    begin(meter)
    meter.take([delta(tokens=0, finish=FinishReason.ABORT)])
    meter.end("a")
    assert sum(meter.first_token.counts) == 0 and meter.finished["abort"] == 1


def stats(**changes):
    return EngineStats(num_running=3, num_waiting=2, cache_usage=0.25, num_preemptions=5, num_steps=7, expert_load=None, **changes)


def test_imbalance_is_that_of_the_last_minute(clock):
    """Layer 0 is even for an hour, then one of four experts gets everything."""
    meter = Meter(clock=clock)
    counts = [0, 0, 0, 0]
    assert meter.imbalance() == []
    for second in range(0, 3600, 5):
        clock.now = 100.0 + second
        counts = [count + 1 for count in counts] if second < 3000 else [counts[0] + 4, *counts[1:]]
        meter.told(stats(), ExpertLoad(1, 4, counts))
        if second in (0, 2995):
            assert meter.imbalance() == ([1.0] if second else [])
        assert len(meter._snapshots) <= meters.RECENT_SECONDS / meters.SNAPSHOT_SECONDS + 2
    assert meter.imbalance() == [4.0]
    clock.now += meters.RECENT_SECONDS + 1
    assert meter.imbalance() == []


def values(meter):
    """Samples by name, with the label besides the model's after a space."""
    body, content_type = expose({None: meter}, "tiny", (3, 5), "")
    assert content_type.startswith("text/plain")
    samples = [sample for family in text_string_to_metric_families(body.decode()) for sample in family.samples]
    assert all(sample.labels.pop("model_name") == "tiny" for sample in samples)
    return {" ".join([sample.name.removeprefix("pointsman:"), *sample.labels.values()]): sample.value for sample in samples}


def test_prometheus_reads_what_was_counted(clock):
    meter = Meter(clock=clock)
    begin(meter)
    clock.now += 0.03
    meter.take([delta(cached=5)])
    clock.now += 0.001
    meter.take([delta(finish=FinishReason.STOP)])
    meter.end("a")
    assert not any(name.startswith("num_requests") for name in values(meter))
    meter.told(stats(), ExpertLoad(2, 2, [0, 0, 0, 0]))
    meter.told(stats(), ExpertLoad(2, 2, [3, 1, 2, 2]))
    read = values(meter)
    expected = {
        "prompt_tokens_total": 10,
        "generation_tokens_total": 2,
        "prefix_cache_queries_total": 10,
        "prefix_cache_hits_total": 5,
        "cache_hit_rate": 0.5,
        "request_success_total stop": 1,
        "request_success_total abort": 0,
        "num_requests_running": 3,
        "num_requests_waiting": 2,
        "kv_cache_usage_perc": 0.25,
        "num_preemptions_total": 5,
        "engine_steps_total": 7,
        "expert_load_imbalance 3": 1.5,
        "expert_load_imbalance 5": 1.0,
        "time_to_first_token_seconds_count": 1,
        "time_to_first_token_seconds_sum": pytest.approx(0.03),
        "inter_token_latency_seconds_count": 1,
        "inter_token_latency_seconds_sum": pytest.approx(0.001),
        "e2e_request_latency_seconds_count": 1,
        "e2e_request_latency_seconds_sum": pytest.approx(0.031),
    }
    assert {name: read[name] for name in expected} == expected


def test_openmetrics_is_there_for_who_asks_for_it(clock):
    body, content_type = expose({None: Meter(clock=clock)}, "tiny", (0,), "application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text") and body.endswith(b"# EOF\n")


def test_one_line_of_json_for_each_request(clock):
    stream = io.StringIO()
    kept = (request_log.handlers, request_log.level, request_log.propagate)
    log_requests_to(stream)
    try:
        for log_requests in (True, False):
            meter = Meter(log_requests=log_requests, clock=clock)
            begin(meter, n=2)
            clock.now += 1.5
            meter.take([delta(cached=2), delta(index=1, finish=FinishReason.STOP)])
            clock.now += 1
            meter.end("a")
    finally:
        request_log.handlers, request_log.level, request_log.propagate = kept
    (line,) = stream.getvalue().splitlines()
    entry = json.loads(line)
    assert entry.pop("time").endswith("+00:00")
    assert entry == {
        "event": "request",
        "id": "a",
        "rid": "name of a",
        "prompt_tokens": 10,
        "cached_tokens": 2,
        "completion_tokens": 2,
        "finish_reasons": ["stop", "abort"],
        "first_token_seconds": 1.5,
        "seconds": 2.5,
    }


def test_bounds_ascend():
    for bounds in (meters.FIRST_TOKEN_SECONDS, meters.BETWEEN_TOKENS_SECONDS, meters.REQUEST_SECONDS):
        assert all(low < high for low, high in itertools.pairwise(bounds))
