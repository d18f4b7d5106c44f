"""A plan against the engine that is built: what is chosen, what weights take, how much cache there is. Refusals, each for its reason."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from pointsman import LLM, tiny
from pointsman.config import engine_config
from pointsman.distributed import peer_memory
from pointsman.engine import candidates, device_models
from pointsman.engine.build import Parts, build
from pointsman.engine.compiled import _pack
from pointsman.engine.device import choose_device
from pointsman.engine.device_models import MODELS, Figure, model_of
from pointsman.engine.memory import memory_bytes
from pointsman.engine.plan import Plan, make_plan, plan_on, rates_of
from pointsman.kernels.capability import describe
from pointsman.kernels.cpu_pack import PackedLinear
from pointsman.kernels.device import Device
from pointsman.kernels.triton_support import OLDEST
from pointsman.layers.moe import MoE
from pointsman.models import architecture_of
from pointsman.models.backends import take
from pointsman.models.decoder import Decoder
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
    if plan.step.chosen == "torch":
        decoder.prepare()
        assert sum(plan.forms.values()) == again(decoder)
    assert plan.cache == parts.cache and plan.context_length == parts.context_length
    assert plan.choices.moe.chosen == parts.choices["moe_runner_backend"]
    assert plan.choices.attention.chosen == parts.choices["attention_backend"]
    assert plan.choices.dtype == parts.choices["dtype"]
    taken = take(plan.choices, plan.shard)
    assert (taken.linear, taken.attention) == (decoder.backends.linear, decoder.backends.attention)
    assert (taken.glue, taken.router) == (decoder.backends.glue, decoder.backends.router)
    storage = parts.weights._storage
    slots = storage._kv.num_slots
    assert storage._kv.k.nbytes + storage._kv.v.nbytes == slots * plan.token["keys and values"]
    assert storage._routes.rows_SLK.nbytes == slots * plan.token["routing rows"]


def again(decoder: Decoder) -> int:
    """Bytes of what implementations have made of the weights, as far as it is not the same memory."""
    found = 0
    for part in decoder._parts():
        ready = part.prepare()
        for made, own in zip(*((ready, part.weights) if isinstance(part, MoE) else ([ready], [part.weight])), strict=True):
            found += made.data.nbytes if made.data.data_ptr() != own.data.data_ptr() else 0
    return found


def test_what_the_compiled_step_packs_is_foreseen() -> None:
    """Within what panels are padded by."""
    plan, parts = made(None, cpu_step="compiled")
    decoder = parts.weights._decoder
    packed = _pack(decoder, len_positions=1)
    arrays = [
        array for linear in vars(packed).values() if isinstance(linear, PackedLinear) for array in (linear.values_PK, linear.scales_PB)
    ]
    real = sum(array.nbytes for array in arrays) + packed.embed.nbytes
    assert plan.forms.keys() == {"packed"}
    assert plan.forms["packed"] == pytest.approx(real, rel=0.02)


def test_ranks_on_one_cpu_share_its_memory_and_its_rates() -> None:
    cpu = dataclasses.replace(model_of("cpu"), memory=Figure(2.0**28, "made up"))
    plan = plan_on(engine_config(tp=2), architecture_of(read_json(tiny.path(), "config.json")), cpu)
    assert plan.cache is not None
    held = plan.cache.num_bytes + plan.weight_bytes + sum(plan.forms.values())
    assert 0 <= 0.5 * 2**27 - held < plan.cache.page_size * plan.cache.bytes_per_token
    assert cpu.cached_read is not None and cpu.cache is not None
    assert rates_of(plan, cpu).read == (cpu.cached_read if cpu.cache.value >= 2 * plan.weight_bytes else cpu.read).value / 2
    far = dataclasses.replace(cpu, cache=Figure(2.0**20, "made up"))
    assert rates_of(plan, far).read == cpu.read.value / 2


@pytest.mark.parametrize(
    ("options", "ranks", "sums"),
    [
        ({}, "uni", None),
        ({"tp": 2}, "mp", "mailboxes"),
        ({"tp": 8}, "mp", "mailboxes"),
        ({"tp": 16}, "mp", "nccl"),
        ({"tp": 4, "dtype": "float32"}, "mp", "nccl"),
    ],
)
def test_what_ranks_are_and_what_adds_up_over_them(options: dict[str, Any], ranks: str, sums: str | None) -> None:
    plan = plan_on(engine_config(**options), M25, MODELS["h200"])
    assert plan.ranks.chosen == ranks and (None if plan.sums is None else plan.sums.chosen) == sums
    cpu = plan_on(engine_config(tp=2), M25, dataclasses.replace(MODELS["h200"], device=Device(type="cpu")))
    assert cpu.sums is not None and cpu.sums.chosen == "gloo" and cpu.sums.reasons["nccl"] == "it connects GPUs"
    assert candidates.MOST_MAILBOX_RANKS == peer_memory.MOST_RANKS


def test_an_executor_that_has_nothing_to_run_is_refused() -> None:
    for options, reason in (
        ({"distributed_executor_backend": "ray"}, "there is one rank"),
        ({"tp": 2, "dp": 2, "distributed_executor_backend": "ray"}, "(the ranks of a replica are processes of its host|is one engine)"),
        ({"tp": 2, "distributed_executor_backend": "uni"}, "it is one rank, and tensor_parallel_size is 2; 'mp' runs several"),
    ):
        assert any(re.search(reason, refusal) for refusal in plan_on(engine_config(**options), M25, MODELS["h200"]).refusals)
        with pytest.raises(ValueError, match=reason):
            LLM(progress=False, **options)


def test_what_is_noted_beside_the_choices() -> None:
    few, fused = (plan_on(engine_config(tp=4, **options), M25, MODELS["h200"]).notes for options in ({}, {"moe_runner_backend": "fused"}))
    assert any("682 rows" in note for note in few) and "Experts can be given to replay." in few and "496 bytes a token" in few[0]
    assert any("fused cannot be given experts to replay; routed can" in note for note in fused)


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


@pytest.mark.parametrize(
    ("capability", "runner", "others"),
    [
        ((7, 5), "reference", "reference"),
        ((8, 0), "triton", "triton"),
        ((8, 6), "triton", "triton"),
        ((8, 9), "triton", "triton"),
        ((9, 0), "routed", "triton"),
        ((10, 0), "triton", "triton"),
    ],
)
def test_auto_takes_what_the_device_can(capability: tuple[int, int], runner: str, others: str) -> None:
    device = Device(type="cuda", capability=capability, triton=OLDEST)
    plan = plan_on(engine_config(tp=4, kv_cache_dtype="fp8_e4m3"), M25, dataclasses.replace(MODELS["a100"], device=device))
    chosen = plan.choices
    assert chosen.moe.chosen == runner
    assert {chosen.linear.chosen, chosen.attention.chosen, chosen.glue.chosen, chosen.router.chosen} == {others}


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("h200", {}, r"214\.32 GiB of weights, .* do not fit in 12[45]\.\d+ GiB"),
    ("h200", {"tp": 4, "moe_runner_backend": "cpu"}, "'cpu' cannot serve here: it is made for CPUs; the device is cuda; these can: routed"),
    ("b200", {"tp": 2, "moe_runner_backend": "routed"}, r"compute capability 9\.0; this one has 10\.0"),
    ("h200", {"tp": 4, "attention_backend": "reference", "cuda_graph_max_bs": 8}, "reads its plan from the host"),
    ("h200", {"tp": 4, "fp8_gemm_backend": "cpu"}, "FP8 linear backend 'cpu' cannot serve here"),
    ("h200", {"tp": 4, "dtype": "float32", "moe_runner_backend": "triton"}, "computes in bfloat16; the dtype is float32"),
    ("h200", {"tp": 4, "max_total_tokens": 10**8}, "max_total_tokens is 100000000"),
    ("h200", {"tp": 4, "moe_runner_backend": "flashinfer_trtllm"}, "sm_100"),
    ("h200", {"tp": 4, "disable_flashinfer_autotune": True}, "the MoE runner is 'routed', which is not tuned: leave it out"),
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


def test_a_driver_alone_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch, too, has to see it; and then it has its own memory and the rates of its kind."""
    monkeypatch.setattr(device_models, "driver_sees_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert model_of("auto").name == "cpu"
    with pytest.raises(ValueError, match="torch sees no CUDA device; name one that is not here: a100"):
        model_of("cuda")
    found = types.SimpleNamespace(name="NVIDIA H200", total_memory=1.4e11, multi_processor_count=120)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    here = model_of("auto")
    assert here == model_of("cuda") and (here.name, here.memory.value, here.num_processors) == ("h200", 1.4e11, 120)
    assert here.device.capability == (9, 0) and here.read == MODELS["h200"].read and here.link == MODELS["h200"].link
    found.name, found.total_memory = "NVIDIA A100-SXM4-80GB", 8.5e10
    assert model_of("auto").name == "a100"
    for found.name, found.total_memory in (("NVIDIA A100-PCIE-40GB", 4.2e10), ("NVIDIA L40S", 4.8e10)):
        with pytest.raises(ValueError, match=rf"the rates of a {found.name} are not known; name a device that is: a100, .*, cpu"):
            model_of("auto")
