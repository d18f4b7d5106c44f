"""The numbers of `meter`, as Prometheus reads them.

Names follow vLLM's and, where it has none, SGLang's, with our prefix: a dashboard made for either needs little more than the prefix
changed. docs/metrics.md lists them. Everything is computed when it is asked for, out of counters that cost nothing until then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from pointsman.server.meter import Histogram, Meter

PREFIX = "pointsman:"
LABEL = "model_name"


class _Numbers(Collector):
    """All metrics of one server."""

    def __init__(self, meter: Meter, model: str, layers: Sequence[int]) -> None:
        self._meter = meter
        self._model = model
        self._layers = layers

    def collect(self) -> Iterator[Metric]:
        meter = self._meter
        yield self._histogram("time_to_first_token_seconds", "From a request to its first token", meter.first_token)
        yield self._histogram("inter_token_latency_seconds", "From one token of an answer to the next", meter.between_tokens)
        yield self._histogram("e2e_request_latency_seconds", "From a request to the end of its last answer", meter.whole)
        yield self._counter("prompt_tokens", "Tokens of prompts", meter.num_prompt)
        yield self._counter("generation_tokens", "Tokens of answers", meter.num_generated)
        yield self._counter("prefix_cache_queries", "Tokens of prompts that were looked up in the prefix cache", meter.num_prompt)
        yield self._counter("prefix_cache_hits", "Tokens of prompts that were found in the prefix cache", meter.num_cached)
        yield self._gauge(
            "cache_hit_rate", "Share of prompt tokens found in the prefix cache so far", meter.num_cached / (meter.num_prompt or 1)
        )
        ended = CounterMetricFamily(f"{PREFIX}request_success", "Answers by why they ended", labels=[LABEL, "finished_reason"])
        for reason, count in meter.finished.items():
            ended.add_metric([self._model, reason], count)
        yield ended
        yield from self._engine()

    def _engine(self) -> Iterator[Metric]:
        """What the engine has told; nothing before it has."""
        stats = self._meter.stats
        if stats is None:
            return
        yield self._gauge("num_requests_running", "Answers that are being computed", stats.num_running)
        yield self._gauge("num_requests_waiting", "Answers that wait for a place", stats.num_waiting)
        yield self._gauge("kv_cache_usage_perc", "Share of the cache that running requests hold, 0 to 1", stats.cache_usage)
        yield self._counter("num_preemptions", "Times that an answer had to give its place in the cache to others", stats.num_preemptions)
        yield self._counter("engine_steps", "Steps of the engine", stats.num_steps)
        help_text = "Load of the busiest expert over the mean, in the last minute; 1 is even"
        balance = GaugeMetricFamily(f"{PREFIX}expert_load_imbalance", help_text, labels=[LABEL, "layer"])
        for layer, ratio in zip(self._layers, self._meter.imbalance(), strict=False):  # none where no token passed
            balance.add_metric([self._model, str(layer)], ratio)
        yield balance

    def _gauge(self, name: str, help_text: str, value: float) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, help_text, labels=[LABEL])
        family.add_metric([self._model], value)
        return family

    def _counter(self, name: str, help_text: str, value: float) -> Metric:
        family = CounterMetricFamily(PREFIX + name, help_text, labels=[LABEL])
        family.add_metric([self._model], value)
        return family

    def _histogram(self, name: str, help_text: str, histogram: Histogram) -> Metric:
        family = HistogramMetricFamily(PREFIX + name, help_text, labels=[LABEL])
        family.add_metric([self._model], histogram.buckets, histogram.sum)
        return family


def expose(meter: Meter, model: str, layers: Sequence[int], accept: str) -> tuple[bytes, str]:
    """All metrics, in the text form that suits an Accept header, and what to call that form; `layers` are those that have experts."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Numbers(meter, model, layers))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type
