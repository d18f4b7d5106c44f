"""The numbers of `meter`, as Prometheus reads them.

Names follow vLLM's and, where it has none, SGLang's, with our prefix: a dashboard made for either needs little more than the prefix
changed. docs/metrics.md lists them. Everything is computed when it is asked for, out of counters that cost nothing until then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from pointsman.request import EngineStats
from pointsman.server.meter import Histogram, Meter

PREFIX = "pointsman:"
LABEL = "model_name"
REPLICA = "replica"


class _Numbers(Collector):
    """All metrics of one server: of its engine, or of each replica under its name."""

    def __init__(self, meters: Mapping[str | None, Meter], model: str, layers: Sequence[int]) -> None:
        self._meters = list(meters.values())
        self._labels = [LABEL] if None in meters else [LABEL, REPLICA]
        self._values = [[model] if name is None else [model, name] for name in meters]
        self._layers = layers

    def collect(self) -> Iterator[Metric]:
        yield self._histogram("time_to_first_token_seconds", "From a request to its first token", lambda meter: meter.first_token)
        yield self._histogram("inter_token_latency_seconds", "From one token of an answer to the next", lambda meter: meter.between_tokens)
        yield self._histogram("e2e_request_latency_seconds", "From a request to the end of its last answer", lambda meter: meter.whole)
        yield self._counter("prompt_tokens", "Tokens of prompts", lambda meter: meter.num_prompt)
        yield self._counter("generation_tokens", "Tokens of answers", lambda meter: meter.num_generated)
        looked_up = "Tokens of prompts that were looked up in the prefix cache"
        yield self._counter("prefix_cache_queries", looked_up, lambda meter: meter.num_prompt)
        yield self._counter("prefix_cache_hits", "Tokens of prompts that were found in the prefix cache", lambda meter: meter.num_cached)
        hit_rate = "Share of prompt tokens found in the prefix cache so far"
        yield self._gauge("cache_hit_rate", hit_rate, lambda meter: meter.num_cached / (meter.num_prompt or 1))
        ended = CounterMetricFamily(f"{PREFIX}request_success", "Answers by why they ended", labels=[*self._labels, "finished_reason"])
        for values, meter in zip(self._values, self._meters, strict=True):
            for reason, count in meter.finished.items():
                ended.add_metric([*values, reason], count)
        yield ended
        if any(meter.stats is not None for meter in self._meters):
            yield from self._engine()

    def _engine(self) -> Iterator[Metric]:
        """What engines have told; nothing of one before it has."""
        yield self._gauge("num_requests_running", "Answers that are being computed", _told(lambda stats: stats.num_running))
        yield self._gauge("num_requests_waiting", "Answers that wait for a place", _told(lambda stats: stats.num_waiting))
        usage = "Share of the cache that running requests hold, 0 to 1"
        yield self._gauge("kv_cache_usage_perc", usage, _told(lambda stats: stats.cache_usage))
        preempted = "Times that an answer had to give its place in the cache to others"
        yield self._counter("num_preemptions", preempted, _told(lambda stats: stats.num_preemptions))
        yield self._counter("engine_steps", "Steps of the engine", _told(lambda stats: stats.num_steps))
        help_text = "Load of the busiest expert over the mean, in the last minute; 1 is even"
        balance = GaugeMetricFamily(f"{PREFIX}expert_load_imbalance", help_text, labels=[*self._labels, "layer"])
        for values, meter in zip(self._values, self._meters, strict=True):
            for layer, ratio in zip(self._layers, meter.imbalance(), strict=False):  # none where no token passed
                balance.add_metric([*values, str(layer)], ratio)
        yield balance

    def _gauge(self, name: str, help_text: str, value_of: Callable[[Meter], float | None]) -> Metric:
        return self._filled(GaugeMetricFamily(PREFIX + name, help_text, labels=self._labels), value_of)

    def _counter(self, name: str, help_text: str, value_of: Callable[[Meter], float | None]) -> Metric:
        return self._filled(CounterMetricFamily(PREFIX + name, help_text, labels=self._labels), value_of)

    def _filled(self, family: GaugeMetricFamily | CounterMetricFamily, value_of: Callable[[Meter], float | None]) -> Metric:
        for values, meter in zip(self._values, self._meters, strict=True):
            if (value := value_of(meter)) is not None:
                family.add_metric(values, value)
        return family

    def _histogram(self, name: str, help_text: str, histogram_of: Callable[[Meter], Histogram]) -> Metric:
        family = HistogramMetricFamily(PREFIX + name, help_text, labels=self._labels)
        for values, meter in zip(self._values, self._meters, strict=True):
            histogram = histogram_of(meter)
            family.add_metric(values, histogram.buckets, histogram.sum)
        return family


def _told(value_of: Callable[[EngineStats], float]) -> Callable[[Meter], float | None]:
    """Of what the engine has told; None before it has."""
    return lambda meter: None if meter.stats is None else value_of(meter.stats)


def expose(meters: Mapping[str | None, Meter], model: str, layers: Sequence[int], accept: str) -> tuple[bytes, str]:
    """All metrics, in the text form that suits an Accept header, and what to call that form.

    Args:
        meters: by the replica's name; None is the one engine of a server without replicas.
        layers: those that have experts.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Numbers(meters, model, layers))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type
