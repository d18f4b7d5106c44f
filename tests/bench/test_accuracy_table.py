"""The table of every way to run a model: what is tried, and that what cannot run is told and not left out."""

import json

import pytest

from pointsman import cli, tiny
from pointsman.bench import accuracy_table
from pointsman.bench.accuracy_table import LAYOUTS, ways
from pointsman.config import KV_DTYPES, MOE_RUNNERS, engine_config


def test_every_runner_cache_type_and_layout_is_tried_once(monkeypatch):
    monkeypatch.setattr(accuracy_table.torch.cuda, "device_count", lambda: 8)
    found = [tuple(way.values()) for way in ways({})]
    assert len(set(found)) == len(found) == (len(MOE_RUNNERS) - 1) * (len(KV_DTYPES) - 1) * len(LAYOUTS)
    for way in ways({}):
        engine_config(**way)


def test_what_is_asked_for_is_kept(monkeypatch):
    monkeypatch.setattr(accuracy_table.torch.cuda, "device_count", lambda: 2)
    found = list(ways({"moe_runner_backend": "cpu", "tensor_parallel_size": 2}))
    assert {way["moe_runner_backend"] for way in found} == {"cpu"}
    assert {(way["tensor_parallel_size"], way["expert_parallel_size"]) for way in found} == {(2, 1)}


@pytest.mark.skipif(not (tiny.path() / "model.safetensors").is_file(), reason="the bundled checkpoint is not there")
def test_a_way_that_runs_has_figures_and_one_that_does_not_its_reason(monkeypatch, capsys):
    monkeypatch.setattr(accuracy_table, "AXES", {"moe_runner_backend": ("cpu", "fused"), "kv_cache_dtype": ("bfloat16",)})
    monkeypatch.setattr(accuracy_table, "LAYOUTS", ((1, 1),))
    assert cli.main("eval table --num-questions 2 --max-tokens 16".split()) == 0  # noqa: SIM905
    out = capsys.readouterr().out
    summary = json.loads(out.splitlines()[-1])
    (row,) = summary["rows"]
    assert (row["moe_runner_backend"], row["model"], row["device"]) == ("cpu", "pointsman-tiny", "cpu")
    assert "gpu" not in summary
    assert all(
        0 <= row[name]["accuracy_95"][0] <= row[name]["accuracy"] <= row[name]["accuracy_95"][1] <= 1 for name in ("arithmetic", "tools")
    )
    ((reason, (refused,)),) = summary["refused"].items()
    assert refused["moe_runner_backend"] == "fused" and "CUDA" in reason
    assert f"1 ways are refused, such as fused bfloat16 1 1: {reason}" in out
