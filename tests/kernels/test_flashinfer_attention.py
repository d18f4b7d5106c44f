"""Attention over FlashInfer against the reference: each call bound to the signature of every version, and computed by an emulation."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pointsman import LLM, SamplingParams, tiny
from pointsman.config import engine_config
from pointsman.engine import build
from pointsman.engine.device_models import MODELS
from pointsman.engine.plan import plan_on
from pointsman.kernels import candidates, flashinfer, library, reference
from pointsman.kernels.candidates import ATTENTIONS, AttentionShape, StepBounds, attention_choice
from pointsman.kernels.capability import describe
from pointsman.kernels.device import Device
from pointsman.kernels.flashinfer_attention import Planner, attention, lay_out_requests
from pointsman.kernels.flashinfer_room import num_requests
from pointsman.kernels.library import FLASHINFER, installed, numbers
from pointsman.kernels.reference import Span
from pointsman.models import architecture_of
from tests.kernels.flashinfer_wrapper import METHODS, NAME, VERSIONS, Emulation

PUBLISHED = Path(__file__).parents[1] / "models" / "minimax_m25.json"
FP8, CPU = torch.float8_e4m3fn, torch.device("cpu")
NAMES = {torch.bfloat16: "bfloat16", FP8: "fp8_e4m3"}
HOPPER = Device(type="cuda", capability=(9, 0), triton=(3, 6))
HEADS = AttentionShape(num_heads=12, num_kv_heads=2, head_dim=64)
# the output is rounded to bfloat16 by either (2^-9 of a number); the kernel rounds what multiplies values besides
EXACT, ROUNDED = 0.003, 0.006
versions = pytest.mark.parametrize("version", VERSIONS)


class Sequences:
    """Lanes with pages in random order, in memory poisoned with NaN: rows of (lane, positions before, new rows)."""

    def __init__(
        self, rows: Sequence[tuple[int, int, int]], shape: AttentionShape, *, page_size: int = 16, kv_dtype: torch.dtype = torch.bfloat16
    ) -> None:
        generator = torch.Generator().manual_seed(len(rows))
        lanes, self.max_pages = max((lane for lane, _, _ in rows), default=0) + 1, 8
        assert all(past + new <= self.max_pages * page_size for _, past, new in rows)
        order = torch.randperm(lanes * self.max_pages, generator=generator)
        self.table_LP = order.view(lanes, self.max_pages).int()
        self.spans, self.lengths, positions = [], [], []
        size = (lanes * self.max_pages, shape.num_kv_heads, page_size, shape.head_dim)
        caches = [torch.full(size, float("nan")) for _ in range(2)]
        for lane, past, new in rows:
            self.spans.append(Span(lane, len(positions), new))
            self.lengths.append(past + new)
            positions += range(past, past + new)
            at = torch.arange(past + new)
            page_T = self.table_LP[lane].long()[at // page_size]
            for cache in caches:
                cache[page_T, :, at % page_size] = torch.randn(past + new, shape.num_kv_heads, shape.head_dim, generator=generator)
        self.k, self.v = (cache.to(kv_dtype) for cache in caches)
        self.positions_T = torch.tensor(positions, dtype=torch.int64)
        self.q_TQC = (2 * torch.randn(len(positions), shape.num_heads, shape.head_dim, generator=generator)).bfloat16()
        self.scale = shape.head_dim**-0.5

    def run(self, planner: Planner, size: int, device: torch.device = CPU) -> Tensor:
        """Planned and run as a step does it, padded with rows of NaN."""
        requests = planner.requests(self.spans, self.lengths, self.table_LP.numpy(), size)
        plan = planner.plan(requests, torch.from_numpy(requests.pages_N).to(device))
        q_TQC = torch.full((size, *self.q_TQC.shape[1:]), float("nan"), dtype=torch.bfloat16)
        q_TQC[: len(self.q_TQC)] = self.q_TQC
        nothing = torch.empty(0)
        return attention(q_TQC.to(device), self.k.to(device), self.v.to(device), plan, nothing, nothing, self.scale).cpu()

    def want(self) -> Tensor:
        return reference.attention(self.q_TQC.float(), self.k, self.v, self.spans, self.positions_T, self.table_LP.long(), self.scale)


STEPS = {
    "decode 1": [(0, 40, 1)],
    "decode": [(2, 0, 1), (0, 31, 1), (1, 32, 1), (3, 100, 1)],
    "prefill": [(1, 0, 33)],
    "after a prefix": [(0, 64, 20)],
    "mixed": [(3, 17, 1), (0, 0, 21), (2, 126, 1), (1, 50, 9)],
    "nothing": [],
}


def planner_of(
    shape: AttentionShape, *, sizes: tuple[int, ...] = (1, 8, 64, 128), page_size: int = 16, kv_dtype: torch.dtype = torch.bfloat16
) -> Planner:
    return Planner(shape, StepBounds(sizes, 4, 8, page_size), torch.bfloat16, kv_dtype, CPU)


def distance(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want).norm() / want.norm())


@versions
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, FP8])
@pytest.mark.parametrize("step", STEPS)
def test_it_attends_as_the_reference_does(step: str, kv_dtype: torch.dtype, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    emulation = Emulation(version).install(monkeypatch)
    planner, sequences = planner_of(HEADS, kv_dtype=kv_dtype), Sequences(STEPS[step], HEADS, kv_dtype=kv_dtype)
    num_rows = len(sequences.positions_T)
    size = next(size for size in (1, 8, 64, 128) if size >= num_rows)
    for emulation.exact, bound in (True, EXACT), (False, ROUNDED):
        got = sequences.run(planner, size)
        assert got.dtype == torch.bfloat16 and not got[num_rows:].any(), "what pads is zero"
        if num_rows:
            assert distance(got[:num_rows], sequences.want()) < bound


@pytest.mark.parametrize("page_size", [1, 7, 16, 64])
@pytest.mark.parametrize(
    "shape", [AttentionShape(48, 8, 128), AttentionShape(3, 1, 128), AttentionShape(4, 4, 64), AttentionShape(17, 1, 256)]
)
def test_groups_heads_and_pages_of_any_size(shape: AttentionShape, page_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    Emulation(VERSIONS[-1], exact=True).install(monkeypatch)
    most = 8 * page_size
    sequences = Sequences([(1, most - 1, 1), (0, 0, min(5, most)), (2, most // 2, 2)], shape, page_size=page_size)
    got = sequences.run(planner_of(shape, page_size=page_size), 64)
    assert distance(got[: len(sequences.positions_T)], sequences.want()) < EXACT


@versions
def test_a_size_keeps_what_a_graph_has_of_it(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of every kind by one object of the library, captured with a step of nothing: the emulation compares what a graph keeps."""
    emulation = Emulation(version, exact=True).install(monkeypatch)
    planner = planner_of(HEADS)
    for step in ("nothing", *STEPS, "decode 1"):
        sequences = Sequences(STEPS[step], HEADS)
        got = sequences.run(planner, 64)
        if sequences.spans:
            assert distance(got[: len(sequences.positions_T)], sequences.want()) < EXACT
    made = [given for name, given in emulation.calls if name == "__init__"]
    assert len(made) == 1
    sequences.run(planner, 8)
    made = [given for name, given in emulation.calls if name == "__init__"]
    assert len(made) == 2 and len({id(given["float_workspace_buffer"]) for given in made}) == 1, "sizes share what they work in"


@given(st.data())
@settings(deadline=None)
def test_requests_are_the_rows_and_pages_of_the_spans(data: st.DataObject) -> None:
    lanes = data.draw(st.permutations(range(5)))[: data.draw(st.integers(0, 5))]
    page_size = data.draw(st.integers(1, 9))
    news = [data.draw(st.integers(1, 7)) for _ in lanes]
    lengths = [new + data.draw(st.integers(0, 30)) for new in news]
    table_LP = np.random.default_rng(0).permutation(5 * 40).reshape(5, 40)
    starts = np.cumsum([0, *news])
    spans = [Span(lane, int(start), new) for lane, start, new in zip(lanes, starts, news, strict=False)]
    size = int(starts[-1]) + data.draw(st.integers(0 if lanes else 1, 6))
    found = lay_out_requests(spans, lengths, table_LP, size, 5, page_size)
    number = num_requests(size, 5)
    assert len(found.rows_B1) == len(found.pages_B1) == number + 1 and len(found.last_B) == number
    assert found.rows_B1[0] == found.pages_B1[0] == 0 and found.rows_B1[-1] == size and found.pages_B1[-1] == len(found.pages_N)
    for index in range(number):
        rows = range(found.rows_B1[index], found.rows_B1[index + 1])
        pages = found.pages_N[found.pages_B1[index] : found.pages_B1[index + 1]]
        if index < len(spans):
            lane, start, new = spans[index]
            assert list(rows) == list(range(start, start + new))
            slots = [int(page) * page_size + offset for page in pages for offset in range(page_size)]
            slots = slots[: (len(pages) - 1) * page_size + int(found.last_B[index])]
            assert slots == [int(table_LP[lane, at // page_size]) * page_size + at % page_size for at in range(lengths[index])]
        else:
            assert len(pages) == found.last_B[index] == 0 and (index == len(spans) or not len(rows)), "those that pad come at once"
    assert found.most_rows == max(news, default=0)
    assert all(part.dtype == np.int32 for part in found[:4])


def there(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    """As if this version were installed."""
    for module in library, flashinfer:
        monkeypatch.setattr(module, "installed", lambda names: version)
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: object())


REASONS: list[tuple[dict[str, Any], str]] = [
    ({"device": Device(type="cpu")}, "compute capability 8.0 or later; the device is cpu"),
    ({"device": Device(type="cuda")}, "torch sees none"),
    ({"device": Device(type="cuda", capability=(7, 5))}, "8.0 or later; this one has 7.5"),
    ({"dtype": "float32"}, "it computes in bfloat16; the model computes in float32"),
    ({"kv_dtype": "float32"}, "bfloat16 or fp8_e4m3; --kv-cache-dtype is float32"),
    ({"shape": AttentionShape(8, 2, 96)}, "heads of 64, 128, 256 channels; this model has 96"),
    ({"shape": AttentionShape(9, 2, 64)}, "as many query heads for each key/value head; here are 9 and 2"),
    ({"version": "0.6.7.post3"}, "0.6.8 or later; 0.6.7.post3 is installed"),
    ({"version": None}, r"not installed: pip install 'pointsman\[flashinfer\]'"),
    ({"invariant": True}, "a row's bits depend there on the rows beside it"),
]


@pytest.mark.parametrize(("change", "reason"), REASONS)
def test_what_it_cannot_do_is_a_reason(change: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where = {"device": HOPPER, "dtype": "bfloat16", "kv_dtype": "fp8_e4m3", "shape": HEADS, "version": "0.7.2", "invariant": False}
    there(monkeypatch, "0.7.2")
    whole = {name: value for name, value in where.items() if name != "version"}
    assert attention_choice("flashinfer", **whole).take() == "flashinfer"
    assert attention_choice("auto", **whole).take() == "triton", "a library is asked for by name"
    where |= change
    there(monkeypatch, where.pop("version"))
    with pytest.raises(ValueError, match=f"'flashinfer' cannot serve here: .*{reason}"):
        attention_choice("flashinfer", **where).take()


def test_a_version_that_lacks_what_is_needed_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    there(monkeypatch, "0.6.8")
    whole = Emulation("0.6.8").signatures
    for method, lacking in ("__init__", "paged_kv_indices_buf"), ("plan", "sm_scale"), ("run", "out"):
        parts = [part for part in whole[method].parameters.values() if part.name != lacking]
        Emulation("0.6.8", signatures=whole | {method: whole[method].replace(parameters=parts)}).install(monkeypatch)
        with pytest.raises(ValueError, match=rf"{NAME}.{method} of FlashInfer 0.6.8 has no {lacking}; install 0.6.8 or later"):
            planner_of(HEADS)
    emulation = Emulation("0.6.8").install(monkeypatch)
    monkeypatch.delattr(emulation.library, NAME)
    with pytest.raises(ValueError, match=f"FlashInfer 0.6.8 has no {NAME}"):
        planner_of(HEADS)


def test_plans_of_another_scale_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    Emulation("0.7.2").install(monkeypatch)
    sequences = Sequences(STEPS["decode"], HEADS)
    sequences.scale = 1.0
    with pytest.raises(AssertionError, match="another scale"):
        sequences.run(planner_of(HEADS), 8)


COMMAND = {"tp": 4, "mem_fraction_static": 0.9, "kv_cache_dtype": "fp8_e4m3", "attention_backend": "flashinfer", "quantization": "fp8"}
COMMAND |= {"moe_runner_backend": "flashinfer_trtllm_routed", "enforce_piecewise_cuda_graph": True}


@pytest.mark.parametrize("device", ["b200", "gb200"])
def test_the_designs_command_has_a_plan_on_blackwell(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing against it where the library is; where it is not, that is all there is against it."""
    architecture = architecture_of(json.loads(PUBLISHED.read_text()))
    monkeypatch.setattr("pointsman.moe.flashinfer_limits.installed", lambda names: "0.7.2")
    there(monkeypatch, "0.7.2")
    plan = plan_on(engine_config(**COMMAND), architecture, MODELS[device])
    assert not plan.refusals and plan.choices.attention.chosen == "flashinfer" and plan.step.chosen == "graphs"
    room = plan.beside["plans of attention"]
    ours = plan_on(engine_config(**COMMAND | {"attention_backend": "triton"}), architecture, MODELS[device])
    # 12 of 48 heads, 512 rows in 64 lanes: tiles of 128 (row, head) of parts in float32, and a sum for each of their rows
    assert room == pytest.approx(12 * (512 * 6 // 128 + 64 + 96) * 128 * 129 * 4, rel=0.7) and "plans of attention" not in ours.beside
    there(monkeypatch, None)
    refusals = plan_on(engine_config(**COMMAND), architecture, MODELS[device]).refusals
    assert len(refusals) == 2 and all("not installed" in refusal for refusal in refusals)


@pytest.mark.parametrize("version", VERSIONS)
def test_signatures_are_those_of_the_installed_library(version: str) -> None:
    if (found := installed(FLASHINFER)) is None or numbers(found) != numbers(version):
        pytest.skip(f"flashinfer-python {version} is not installed")
    real, kept = getattr(importlib.import_module("flashinfer"), NAME), Emulation(version).signatures
    for method in METHODS:
        assert [(p.name, p.kind, p.default is p.empty) for p in kept[method].parameters.values()] == [
            (p.name, p.kind, p.default is p.empty) for p in inspect.signature(getattr(real, method)).parameters.values()
        ]


def test_the_installed_library_takes_what_we_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it that is Python, on a CPU; what it would give to the compiled part is what the emulation was given."""
    if installed(FLASHINFER) is None:
        pytest.skip("flashinfer-python is not installed")
    prefill, plain_empty = importlib.import_module("flashinfer.prefill"), torch.empty
    taken: list[tuple[str, list[Any]]] = []

    class Compiled:
        workspace_size = None

        def plan(self, *arguments: Any) -> list[int]:
            taken.append(("plan", list(arguments)))
            return [0]

        def paged_run(self, *arguments: Any) -> None:
            taken.append(("run", list(arguments)))

    def module(*arguments: Any) -> Compiled:
        assert arguments[:7] == ("fa2", torch.bfloat16, FP8, torch.bfloat16, torch.int32, 64, 64)
        return Compiled()

    def empty(*size: Any, pin_memory: bool = False, **more: Any) -> Tensor:
        return plain_empty(*size, **more)  # without a GPU nothing can be pinned

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(prefill, "get_batch_prefill_module", module)
    planner = planner_of(HEADS, kv_dtype=FP8)
    for step in ("nothing", *STEPS):
        sequences = Sequences(STEPS[step], HEADS, kv_dtype=FP8)
        sequences.run(planner, 64)
        requests = planner.requests(sequences.spans, sequences.lengths, sequences.table_LP.numpy(), 64)
        (_, planned), (_, ran) = taken[-2:]
        lengths = [*sequences.lengths, *[0] * (5 - len(sequences.lengths))]
        assert [part.tolist() for part in planned[3:6]] == [requests.rows_B1.tolist(), requests.pages_B1.tolist(), lengths]
        assert planned[6:15] == [64, 5, 12, 2, 16, True, 64, 64, True]
        assert [part.tolist() for part in ran[6:8]] == [requests.rows_B1.tolist(), requests.pages_B1.tolist()]
        assert ran[8][: len(requests.pages_N)].tolist() == requests.pages_N.tolist() and ran[9].tolist() == requests.last_B.tolist()
        assert ran[12:14] == [1, 1] and sequences.scale in [part for part in ran if isinstance(part, float)], "causal, HND, and the scale"


@pytest.mark.skipif(not list(tiny.path().glob("*.safetensors")), reason="the bundled checkpoint is not there")
@pytest.mark.parametrize("kv_cache_dtype", ["bfloat16", "fp8_e4m3"])
def test_an_engine_answers_over_it(kv_cache_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way on a CPU in a device's place: steps of chunks and decode, padded, in small pages, with a shared prefix."""
    prompts = ["Tom has 3 apples and buys 4 more. How many has he?", "Tom has 3 apples and eats 2.", "What is 12 + 30?"]
    options: dict[str, Any] = {"dtype": "bfloat16", "kv_cache_dtype": kv_cache_dtype, "page_size": 4, "chunked_prefill_size": 20}
    options |= {"max_running_requests": 5, "progress": False, "cpu_step": "torch"}

    def answer(backend: str) -> list[tuple[int, ...]]:
        llm = LLM(attention_backend=backend, **options)
        try:
            params = SamplingParams(temperature=0.0, max_tokens=8)
            return [tuple(output.outputs[0].token_ids) for _ in range(2) for output in llm.generate(prompts, params)]
        finally:
            llm.close()

    want = answer("reference")
    emulation = Emulation(VERSIONS[-1], exact=True).install(monkeypatch)
    monkeypatch.setattr(build, "launches_steps", lambda device: True)
    monkeypatch.setitem(candidates.ATTENTIONS, "flashinfer", lambda *what: None)
    assert answer("flashinfer") == want
    plans = [given for name, given in emulation.calls if name == "plan"]
    assert {len(given["qo_indptr"]) for given in plans} >= {3, 6} and sum(name == "run" for name, _ in emulation.calls) == 6 * len(plans)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, FP8])
def test_on_the_hardware(kv_dtype: torch.dtype) -> None:
    """The library itself, captured with a step of nothing and replayed for each of the others; it compiles for minutes the first time."""
    device, shape = torch.device("cuda"), AttentionShape(48, 8, 128)
    if (why := ATTENTIONS["flashinfer"](describe(device), "bfloat16", shape, NAMES[kv_dtype])) is not None:
        pytest.skip(why)
    planner = Planner(shape, StepBounds((64,), 4, 8, 16), torch.bfloat16, kv_dtype, device)
    q, k, v = (torch.zeros(size, dtype=dtype, device=device) for size, dtype in sizes_on_device(shape, kv_dtype))
    nothing = torch.empty(0)

    def plan(sequences: Sequences) -> Any:
        requests = planner.requests(sequences.spans, sequences.lengths, sequences.table_LP.numpy(), 64)
        return planner.plan(requests, torch.from_numpy(requests.pages_N).to(device))

    empty = plan(Sequences([], shape))
    attention(q, k, v, empty, nothing, nothing, shape.head_dim**-0.5)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(q, k, v, empty, nothing, nothing, shape.head_dim**-0.5)
    for step in STEPS.values():
        sequences = Sequences(step, shape, kv_dtype=kv_dtype)
        num_rows = len(sequences.positions_T)
        plan(sequences)
        q.fill_(float("nan"))[:num_rows] = sequences.q_TQC.to(device)
        for memory, pages in (k, sequences.k), (v, sequences.v):
            memory.view(torch.uint8)[: len(pages)] = pages.to(device).view(torch.uint8)
        graph.replay()
        assert not out[num_rows:].any()
        if num_rows:
            assert distance(out[:num_rows].cpu(), sequences.want()) < ROUNDED


def sizes_on_device(shape: AttentionShape, kv_dtype: torch.dtype) -> list[tuple[tuple[int, ...], torch.dtype]]:
    pages = (32, shape.num_kv_heads, 16, shape.head_dim)
    return [((64, shape.num_heads, shape.head_dim), torch.bfloat16), (pages, kv_dtype), (pages, kv_dtype)]
