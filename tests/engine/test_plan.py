"""A plan against the engine that is built: what is chosen, what weights take, how much cache there is. Refusals, each for its reason."""

from __future__ import annotations

import contextlib
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from pointsman import LLM, tiny
from pointsman.config import engine_config
from pointsman.engine.build import Parts, build
from pointsman.engine.device import choose_device
from pointsman.engine.device_models import MODELS, model_of
from pointsman.engine.memory import memory_bytes
from pointsman.engine.plan import Plan, make_plan, plan_on
from pointsman.kernels.capability import describe
from pointsman.models import architecture_of
from pointsman.models.backends import take
from pointsman.models.folder import read_json
from pointsman.models.parameters import held
from pointsman.models.sharding import Shard
from pointsman.models.sizes import described
from tests.models.test_architecture import PUBLISHED

M25 = architecture_of(PUBLISHED)


def made(path: Path | None, **options: Any) -> tuple[Plan, Parts]:
    """A plan, and the engine's parts, of one configuration on this CPU."""
    options |= {} if path is None else {"model": str(path), "load_format": "dummy"}
    config = engine_config(device="cpu", **options)
    architecture = architecture_of(read_json(path or tiny.path(), "config.json"))
    device = describe(choose_device("cpu"))
    return make_plan(config, architecture, device, name="cpu", memory_bytes=memory_bytes()), build(config, progress=False)


@pytest.mark.parametrize(
    ("bundled", "options"),
    [
        (True, {}),
        (True, {"dtype": "bfloat16", "kv_cache_dtype": "fp8_e4m3"}),
        (False, {}),
        (False, {"moe_runner_backend": "reference", "fp8_gemm_backend": "reference", "max_total_tokens": 512}),
        (False, {"cpu_step": "torch", "dtype": "float32", "context_length": 100, "page_size": 8}),
    ],
)
def test_what_is_planned_is_what_is_built(folder: Path, bundled: bool, options: dict[str, Any]) -> None:
    plan, parts = made(None if bundled else folder, **options)
    assert plan.refusals == ()
    decoder = parts.weights._decoder
    assert decoder is not None
    assert plan.weights == held(decoder.parameters)
    assert plan.cache == parts.cache and plan.context_length == parts.context_length
    assert plan.choices.moe.chosen == parts.choices["moe_runner_backend"]
    assert plan.choices.dtype == parts.choices["dtype"]
    taken = take(plan.choices, plan.shard)
    assert (taken.linear, taken.attention) == (decoder.backends.linear, decoder.backends.attention)
    assert (taken.glue, taken.router) == (decoder.backends.glue, decoder.backends.router)
    storage = parts.weights._storage
    slots = storage._kv.num_slots
    assert storage._kv.k.nbytes + storage._kv.v.nbytes == slots * plan.token["keys and values"]
    assert storage._routes.rows_SLK.nbytes == slots * plan.token["routing rows"]


def test_the_step_and_the_executor_are_those_that_run() -> None:
    plan, _ = made(None, cpu_step="torch")
    with contextlib.closing(LLM(device="cpu", cpu_step="torch", progress=False)) as llm:
        assert llm.engine.step_name == plan.step.chosen == "torch"
        assert type(llm.engine._executor).__name__.lower() == plan.executor.chosen == "threaded"
    with contextlib.closing(LLM(device="cpu", cpu_step="compiled", disable_overlap_schedule=True, progress=False)) as llm:
        plan, _ = made(None, cpu_step="compiled", disable_overlap_schedule=True)
        assert llm.engine.step_name == plan.step.chosen == "compiled"
        assert type(llm.engine._executor).__name__.lower() == plan.executor.chosen == "inline"


def test_an_engine_says_at_the_start_what_was_decided(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="pointsman.engine.build"):
        plan, _ = made(folder)
    assert plan.short() in caplog.text and "experts cpu" in plan.short() and "0.00 GiB of weights" in plan.short()


def test_minimax_m25_has_the_published_sizes() -> None:
    whole = described(Shard(M25))
    # published: 228.7 billion parameters; by hand: 62 layers of 256 experts of 3 x 3072 x 1536
    assert sum(size.num_elements for size in whole.values()) / 1e9 == pytest.approx(228.7, abs=0.05)
    assert whole["experts"].num_elements == 62 * 256 * 3 * 3072 * 1536
    assert whole["experts"].num_bytes == 62 * 256 * 3 * (3072 * 1536 + 4 * 24 * 12)
    assert whole["embedding"].num_bytes == whole["head"].num_bytes == 200064 * 3072 * 2


@pytest.mark.parametrize(("tp", "ep"), [(2, 1), (4, 1), (4, 2), (8, 8), (16, 2)])
def test_ranks_together_hold_the_model(tp: int, ep: int) -> None:
    whole = described(Shard(M25))
    ranks = [described(Shard(M25, tp, ep, rank)) for rank in range(tp)]
    for kind in ("experts", "embedding", "head"):
        assert sum(rank[kind].num_elements for rank in ranks) == whole[kind].num_elements
        assert ranks[0][kind].num_bytes == max(rank[kind].num_bytes for rank in ranks), "the first rank has the most"
    copies = max(1, tp // 8)
    kv = 62 * 3072 * 2 * 8 * 128
    assert sum(rank["attention"].num_elements for rank in ranks) == whole["attention"].num_elements + (copies - 1) * kv


def test_two_h200_have_the_room_that_another_engine_found_there() -> None:
    """Measured with vLLM on two H200: 107.3 GiB of weights and 304k tokens of FP8 cache a GPU, at 0.9 of the memory."""
    plan = plan_on(engine_config(tp=2, kv_cache_dtype="fp8_e4m3"), M25, MODELS["h200"])
    assert plan.cache is not None and plan.refusals == ()
    assert plan.weight_bytes / 2**30 == pytest.approx(107.3, abs=0.1)
    assert plan.cache.num_tokens == pytest.approx(304_000, rel=0.05)


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("h200", {}, r"124\.\d+ GiB|125\.\d+ GiB hold 214\.32 GiB of weights"),
    ("h200", {"tp": 4, "moe_runner_backend": "cpu"}, "'cpu' cannot serve here: it is made for CPUs; the device is cuda; these can: routed"),
    ("b200", {"tp": 2, "moe_runner_backend": "routed"}, r"compute capability 9\.0; this one has 10\.0"),
    ("h200", {"tp": 4, "attention_backend": "reference", "cuda_graph_max_bs": 8}, "reads its plan from the host"),
    ("h200", {"tp": 4, "fp8_gemm_backend": "cpu"}, "FP8 linear backend 'cpu' cannot serve here"),
    ("h200", {"tp": 4, "dtype": "float32", "moe_runner_backend": "triton"}, "computes in bfloat16; the dtype is float32"),
    ("h200", {"tp": 4, "max_total_tokens": 10**8}, "max_total_tokens is 100000000"),
    ("h200", {"tp": 4, "moe_runner_backend": "flashinfer_trtllm"}, "sm_100"),
]


@pytest.mark.parametrize(("device", "options", "reason"), REFUSALS)
def test_a_plan_that_cannot_be_says_why(device: str, options: dict[str, Any], reason: str) -> None:
    plan = plan_on(engine_config(**options), M25, MODELS[device])
    assert any(re.search(reason, refusal) for refusal in plan.refusals), plan.refusals


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"tp": 3}, "cannot be shared evenly by 3 ranks"),
        ({"tp": 4, "ep": 3}, "expert_parallel_size is 3"),
        ({"cpu_step": "torch"}, "it is for a CPU"),
        ({"context_length": 10**6}, "made for at most 196608 positions"),
        ({"disable_cuda_graph": True, "cuda_graph_max_bs": 8}, "contradict each other"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        plan_on(engine_config(**options), M25, MODELS["h200"])


def test_devices_are_described() -> None:
    for name, model in MODELS.items():
        assert model.name == name and model_of(name) is model
        assert 0 < model.read.value < 1e13 and model.plain.value < 1e16 and model.memory.value > 70 * 2**30
        assert all(figure.source for figure in (model.memory, model.read, model.plain, model.fp8, model.link) if figure is not None)
    cpu = model_of("cpu")
    assert cpu.device == describe(choose_device("cpu")) and cpu.memory.value == memory_bytes() and cpu.fp8 is None
    assert cpu.read.value > 1e8 and cpu.plain.value > 1e8
