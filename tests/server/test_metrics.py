"""What a running server says of itself: metrics, the dashboard and the document that name them, the log of requests."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pointsman.server import engine_process, wire
from pointsman.server.engine_process import Reporter
from pointsman.server.meter import ExpertLoad, Meter
from pointsman.server.metrics import expose
from tests.server.asking import chat, complete
from tests.server.conftest import start_server
from tests.server.test_meter import stats

DOCS = Path(__file__).parents[2] / "docs"
NAME = re.compile(r"pointsman:\w+")


def read(client: httpx.Client) -> dict[str, float]:
    """Samples by name and labels but for the model's."""
    response = client.get("/metrics")
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/plain")
    samples = [sample for family in text_string_to_metric_families(response.text) for sample in family.samples]
    return {
        " ".join([sample.name, *(sample.labels[name] for name in sorted(sample.labels) if name != "model_name")]): sample.value
        for sample in samples
    }


def wait_for(client: httpx.Client, name: str, value: float) -> dict[str, float]:
    for _ in range(200):
        samples = read(client)
        if samples.get(name) == value:
            return samples
        time.sleep(0.02)
    raise AssertionError(f"{name} is {samples.get(name)}, never {value}")


def test_what_was_asked_is_counted(folder: Path) -> None:
    with start_server({"model_path": str(folder), "served_model_name": "fake"}, {"log_requests": True}) as server:
        server.wait_ready()
        with server.client() as client:
            before = wait_for(client, "pointsman:num_requests_running", 0)
            assert before["pointsman:request_success_total stop"] == before["pointsman:generation_tokens_total"] == 0
            usages = [chat(client).json()["usage"], complete(client, prompt=["hello", "you"], n=2, max_tokens=5).json()["usage"]]
            assert complete(client, prompt="REFUSE").status_code == 400
            with client.stream(
                "POST", "/v1/completions", json={"prompt": "ENDLESS", "max_tokens": 8000, "stream": True, "rid": "mine"}
            ) as lines:
                reading = lines.iter_lines()
                next(reading)
                wait_for(client, "pointsman:num_requests_running", 1)
            samples = wait_for(client, "pointsman:request_success_total abort", 1)
            wait_for(client, "pointsman:num_requests_running", 0)
        code, errors = server.end()
    assert code == 0
    assert samples["pointsman:request_success_total stop"] == 1
    assert samples["pointsman:request_success_total length"] == 4
    assert samples["pointsman:prompt_tokens_total"] == sum(usage["prompt_tokens"] for usage in usages) + len("ENDLESS")
    generated = sum(usage["completion_tokens"] for usage in usages)
    assert samples["pointsman:generation_tokens_total"] > generated
    assert samples["pointsman:time_to_first_token_seconds_count"] == samples["pointsman:e2e_request_latency_seconds_count"] == 4
    assert samples["pointsman:inter_token_latency_seconds_count"] == samples["pointsman:generation_tokens_total"] - 6
    assert samples["pointsman:kv_cache_usage_perc"] == 0.25
    entries = [json.loads(line) for line in errors.splitlines() if line.startswith("{")]
    assert [entry["finish_reasons"] for entry in entries] == [["stop"], ["length"] * 2, ["length"] * 2, ["abort"]]
    assert entries[0]["completion_tokens"] == usages[0]["completion_tokens"] and entries[0]["rid"].startswith("chatcmpl-")
    assert entries[-1]["rid"] == "mine"
    assert "hello" not in errors


def full() -> set[str]:
    """Every name that a server that has worked exposes."""
    meter = Meter()
    for counts in ([0, 0], [3, 1]):
        meter.told(stats(), ExpertLoad(1, 2, counts))
    return set(NAME.findall(re.sub(r"^#.*$", "", expose({None: meter}, "x", (0,), "")[0].decode(), flags=re.MULTILINE)))


def test_the_dashboard_names_what_is_there() -> None:
    dashboard = json.loads((DOCS / "grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [entry["query"]["query"] for entry in dashboard["templating"]["list"] if entry["type"] == "query"]
    named = {name for query in queries for name in NAME.findall(query)}
    assert named and named <= full()
    plain = {re.sub(r"_(bucket|sum|count)$", "", name) for name in full()}
    assert {re.sub(r"_bucket$", "", name) for name in named} == plain, "a metric that no panel shows"


def test_the_document_lists_what_is_there() -> None:
    listed = set(re.findall(r"^\| `(pointsman:\w+)`", (DOCS / "metrics.md").read_text(), re.MULTILINE))
    assert listed == {re.sub(r"_(bucket|sum|count)$", "", name) for name in full()}


def test_the_engine_reports_when_something_changed_and_not_too_often(monkeypatch: pytest.MonkeyPatch) -> None:
    now, sent = [50.0], []
    monkeypatch.setattr(engine_process, "time", SimpleNamespace(monotonic=lambda: now[0]))
    end = SimpleNamespace(send=lambda message: sent.append(now[0]))
    reporter = Reporter(SimpleNamespace(stats=stats), end)  # type: ignore[arg-type]
    assert reporter.wait_ms() == 0
    for tick in range(1024):
        now[0] = 50 + tick / 1024
        reporter.changed = True
        reporter.report()
    assert sent == [50, 50.25, 50.5, 50.75]
    assert reporter.wait_ms() == 1
    now[0] = 51.0
    reporter.report()
    assert reporter.wait_ms() is None and len(sent) == 5
    now[0] = 60.0
    reporter.report()
    assert len(sent) == 5
    assert isinstance(wire.decode_from_engine(wire.encode(wire.Stats(stats()))), wire.Stats)
