"""The runners over FlashInfer against the reference: each call bound to the signature of every version, and computed by an emulation."""

from __future__ import annotations

import functools
import importlib
import inspect
import subprocess
import sys

import pytest
import torch

from pointsman.kernels.capability import describe
from pointsman.kernels.library import FLASHINFER, installed, numbers
from pointsman.layers.moe import MoE
from pointsman.moe import trtllm_layout
from pointsman.moe.candidates import unsupported
from pointsman.moe.capture import RouteStore
from pointsman.moe.flashinfer import CutlassRunner, RoutedTrtllmRunner, TrtllmRunner
from pointsman.moe.router import ROUTERS, RouterInput
from pointsman.moe.routing import Routing
from pointsman.moe.runner import make_runner
from pointsman.moe.spec import Share
from pointsman.moe.weights import ExpertWeights
from tests.moe.libraries.flashinfer import VERSIONS, Emulation
from tests.moe.libraries.models import (
    FORM,
    NUM_EXPERTS,
    SPECS,
    TOP_K,
    D,
    chosen_by_reference,
    distance,
    experts,
    hidden_rows,
    oracle,
    routing,
    rows,
)
from tests.moe.libraries.signatures import known, signature

# Without what the kernels round beyond the reference, the result's rounding to bfloat16 is left (0.0017 of a number on average), and
# weights in bfloat16 where they are packed (as much again). With it, gate and up are rounded to e4m3, by up to 1/16 each.
EXACT, ROUNDED = 0.004, 0.06
# bfloat16 between kernels moves some hidden numbers to the next e4m3, as in runner `triton`, whose bound this is
CUTLASS = 0.045
versions = pytest.mark.parametrize("version", VERSIONS)


@functools.cache
def layer() -> ExpertWeights:
    return experts()


@versions
@pytest.mark.parametrize(
    ("kind", "num_tokens", "layout"),
    [
        ("uneven", 1, "MajorK"),
        ("uneven", 13, "MajorK"),
        ("uneven", 13, "BlockMajorK"),
        ("one expert", 6, "MajorK"),
        ("padding", 5, "MajorK"),
    ],
)
def test_routed_computes_what_the_reference_does(emulated: Emulation, layout: str, kind: str, num_tokens: int) -> None:
    x_TD, chosen, want = (
        hidden_rows(num_tokens),
        routing(kind, num_tokens),
        oracle(hidden_rows(num_tokens), routing(kind, num_tokens), layer()),
    )
    runner = RoutedTrtllmRunner(layout=layout)
    ready = runner.prepare(layer(), torch.bfloat16)
    for emulated.exact, bound in (True, EXACT), (False, ROUNDED):
        got = runner(x_TD, chosen, ready)
        assert got.dtype == torch.bfloat16
        assert distance(got, want) < bound
    assert not got[(chosen.ids_TK < 0).any(-1)].any()
    name, given = emulated.calls[-1]
    assert name == "trtllm_fp8_block_scale_routed_moe" and given["output"].data_ptr() == got.data_ptr()


@versions
@pytest.mark.parametrize(("model", "layout"), [*((model, "MajorK") for model in SPECS), ("minimax", "BlockMajorK")])
def test_fused_chooses_records_and_computes_as_the_reference(emulated: Emulation, layout: str, model: str) -> None:
    spec, x_TD = SPECS[model], hidden_rows(11)
    routes = RouteStore(11, 2, TOP_K, NUM_EXPERTS)
    given = rows(x_TD, spec, routes)
    chosen = chosen_by_reference(given, spec)
    runner = TrtllmRunner(layout=layout)
    ready = runner.prepare(layer(), torch.bfloat16)
    for emulated.exact, bound in (True, EXACT), (False, ROUNDED):
        routes.rows_SLK.fill_(255)
        got = runner(given, spec, ready)
        assert distance(got, oracle(x_TD, chosen, layer())) < bound
        # the zero row ties all experts; others are decided by more than the order of a sum
        assert torch.equal(routes.rows_SLK[given.slots_T, 1].long(), chosen.ids_TK)
        assert (routes.rows_SLK[:, 0] == 255).all()


@versions
def test_a_model_without_a_bias_has_one_of_zeros(emulated: Emulation) -> None:
    spec, x_TD = SPECS["minimax"], hidden_rows(6)
    given = rows(x_TD, spec, biased=False)
    emulated.exact, runner = True, TrtllmRunner()
    got = runner(given, spec, runner.prepare(layer(), torch.bfloat16))
    assert distance(got, oracle(x_TD, chosen_by_reference(given, spec), layer())) < EXACT


@versions
@pytest.mark.parametrize("runner", [TrtllmRunner, RoutedTrtllmRunner])
def test_the_result_has_the_type_of_the_hidden_rows(emulated: Emulation, runner: type) -> None:
    x_TD, made = hidden_rows(4).float(), runner()
    ready = made.prepare(layer(), torch.float32)
    got = made(rows(x_TD, SPECS["minimax"]), SPECS["minimax"], ready) if made.routes_itself else made(x_TD, routing("uneven", 4), ready)
    assert got.dtype == torch.float32 and got.shape == x_TD.shape


@versions
@pytest.mark.parametrize("name", ["flashinfer_trtllm_routed", "flashinfer_trtllm", "flashinfer_cutlass"])
def test_ranks_with_shares_of_the_experts_sum_to_the_whole(name: str, emulated: Emulation) -> None:
    """Three shares, uneven, each as a rank's layer has it; every rank records every expert, and a row that pads has none."""
    emulated.exact = True
    spec, x_TD = SPECS["minimax"], hidden_rows(12)
    given = rows(x_TD, spec)
    slots_T = given.slots_T.clone()
    slots_T[5] = -1
    real = slots_T >= 0
    chosen = chosen_by_reference(given, spec)
    total = torch.zeros(x_TD.shape)
    for first, last in (0, 3), (3, 4), (4, NUM_EXPERTS):
        share = ExpertWeights(*(type(w)(w.data[first:last], w.scale[first:last], w.block, w.parts) for w in layer()))
        runner = make_runner(name, share=Share(first, NUM_EXPERTS))
        own, routes = range(first, last), RouteStore(13, 2, TOP_K, NUM_EXPERTS)
        rank = MoE(1, given.gate_ED, given.bias_E, trtllm_layout.turned(share), spec, ROUTERS["reference"], runner, torch.bfloat16, own)
        total += rank.run(RouterInput(x_TD, given.gate_ED, given.bias_E, 1, slots_T, routes, None, own)).float()
        assert torch.equal(routes.rows_SLK[slots_T[real], 1].long(), chosen.ids_TK[real])
        call = emulated.calls[-1][1]
        if name == "flashinfer_cutlass":
            continue
        assert (call["num_experts"], call["local_expert_offset"], call["local_num_experts"]) == (NUM_EXPERTS, first, last - first)
        if name == "flashinfer_trtllm_routed":
            mine = ((chosen.ids_TK >= first) & (chosen.ids_TK < last))[real].sum()
            words_TK = call["topk_ids"] >> 16
            assert ((words_TK >= first) & (words_TK < last)).sum() == mine, "what others do is chosen, but not here"
    assert name == "flashinfer_trtllm" or not total[~real].any(), "that kernel alone routes what pads"
    want = oracle(x_TD, chosen, layer())
    # the sum of three that were rounded
    assert distance(total[real], want[real]) < (CUTLASS if name == "flashinfer_cutlass" else 2 * EXACT)


@versions
@pytest.mark.parametrize(("kind", "num_tokens"), [("uneven", 1), ("uneven", 13), ("one expert", 6), ("padding", 5)])
def test_cutlass_computes_what_the_reference_does(emulated: Emulation, kind: str, num_tokens: int) -> None:
    x_TD, chosen, runner = hidden_rows(num_tokens), routing(kind, num_tokens), CutlassRunner()
    got = runner(x_TD, chosen, runner.prepare(layer(), torch.bfloat16))
    assert distance(got, oracle(x_TD, chosen, layer())) < CUTLASS
    assert not got[(chosen.ids_TK < 0).any(-1)].any()


@versions
def test_nothing_for_no_tokens(emulated: Emulation) -> None:
    nothing, spec = torch.empty(0, D, dtype=torch.bfloat16), SPECS["minimax"]
    none = Routing(torch.empty(0, TOP_K, dtype=torch.int64), torch.empty(0, TOP_K))
    assert TrtllmRunner()(rows(nothing, spec), spec, trtllm_layout.block_weights(layer(), "MajorK")).shape == (0, D)
    assert RoutedTrtllmRunner()(nothing, none, trtllm_layout.block_weights(layer(), "MajorK")).shape == (0, D)
    assert CutlassRunner()(nothing, none, layer()).shape == (0, D)
    assert not emulated.calls


@versions
def test_arguments_fit_the_installed_library(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where FlashInfer is installed, the signature is that of the library itself, and is the one that is kept here."""
    if installed(FLASHINFER) is None:
        pytest.skip("flashinfer-python is not installed")
    if numbers(str(installed(FLASHINFER))) != numbers(version):
        pytest.skip(f"another version is installed: {installed(FLASHINFER)}")
    real, entry = importlib.import_module("flashinfer.fused_moe"), known()["flashinfer-python"][version]
    emulation = Emulation(version)
    for name in ("trtllm_fp8_block_scale_moe", "trtllm_fp8_block_scale_routed_moe", "cutlass_fused_moe"):
        mine, theirs = signature(entry["functions"][name]), inspect.signature(getattr(real, name))
        assert [(p.name, p.kind, p.default is p.empty) for p in mine.parameters.values()] == [
            (p.name, p.kind, p.default is p.empty) for p in theirs.parameters.values()
        ]
        setattr(
            emulation.moe,
            name,
            emulation._function(name, theirs, getattr(emulation, {"c": "cutlass"}.get(name[0], "routed" if "routed" in name else "fused"))),
        )
    for name in entry["enumerations"]:
        assert {value.name: int(value) for value in getattr(real, name)} == entry["enumerations"][name]
        setattr(emulation.moe, name, getattr(real, name))
    emulation.install(monkeypatch)
    emulation.exact, spec, x_TD = True, SPECS["minimax"], hidden_rows(5)
    for runner in TrtllmRunner(), RoutedTrtllmRunner(layout="BlockMajorK"), CutlassRunner():
        ready, given = runner.prepare(layer(), torch.bfloat16), rows(x_TD, spec)
        chosen = chosen_by_reference(given, spec)
        got = runner(given, spec, ready) if runner.routes_itself else runner(x_TD, chosen, ready)
        assert distance(got, oracle(x_TD, chosen, layer())) < CUTLASS


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [None, "BlockMajorK"])
@pytest.mark.parametrize("kind", [TrtllmRunner, RoutedTrtllmRunner, CutlassRunner])
def test_on_the_hardware(kind: type, layout: str | None) -> None:
    """The library itself, where a GPU is one that it has kernels for: what no emulation can tell."""
    device, spec = torch.device("cuda"), SPECS["minimax"]
    if (why := unsupported(kind.name, spec, FORM, describe(device), "bfloat16")) is not None:
        pytest.skip(why)
    if layout is not None and kind is CutlassRunner:
        pytest.skip("it has one layout")
    weights, made = experts(device="cuda"), kind() if layout is None else kind(layout=layout)
    ready = made.prepare(weights, torch.bfloat16)
    for num_tokens in 1, 13, 300:
        x_TD, routes = hidden_rows(num_tokens).to(device), RouteStore(num_tokens, 2, TOP_K, NUM_EXPERTS, device)
        on_cpu = rows(x_TD.cpu(), spec)
        given = RouterInput(x_TD, on_cpu.gate_ED.to(device), on_cpu.bias_E.to(device), 1, on_cpu.slots_T.to(device), routes, None)
        chosen = Routing(*(part.to(device) for part in chosen_by_reference(on_cpu, spec)))
        got = made(given, spec, ready) if made.routes_itself else made(x_TD, chosen, ready)
        assert distance(got, oracle(x_TD, chosen, weights)) < (CUTLASS if kind is CutlassRunner else ROUNDED)
        if made.routes_itself:
            assert torch.equal(routes.rows_SLK[given.slots_T, 1].sort(-1).values.long(), chosen.ids_TK.sort(-1).values)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [RoutedTrtllmRunner, CutlassRunner])
def test_ranks_sum_to_the_whole_on_the_hardware(kind: type) -> None:
    """Two halves of the experts, each with ids below zero for the other's; a row that pads has no others and comes out as zeros."""
    device = torch.device("cuda")
    if (why := unsupported(kind.name, SPECS["minimax"], FORM, describe(device), "bfloat16")) is not None:
        pytest.skip(why)
    weights, x_TD = experts(device="cuda"), hidden_rows(13).to(device)
    chosen = Routing(*(part.to(device) for part in routing("uneven", 13)))
    chosen.ids_TK[5] = -1
    total_TD = torch.zeros_like(x_TD, dtype=torch.float32)
    for first in 0, NUM_EXPERTS // 2:
        share = Share(first, NUM_EXPERTS)
        made = kind() if kind is CutlassRunner else kind(share=share)
        here = slice(first, first + NUM_EXPERTS // 2)
        half = ExpertWeights(*(type(w)(w.data[here], w.scale[here], w.block, w.parts) for w in weights))
        inside_TK = (chosen.ids_TK >= here.start) & (chosen.ids_TK < here.stop)
        ids_TK = torch.where(inside_TK, chosen.ids_TK - first, -1)
        total_TD += made(x_TD, Routing(ids_TK, chosen.weights_TK), made.prepare(half, torch.bfloat16)).float()
    assert not total_TD[5].any()
    assert distance(total_TD, oracle(x_TD, chosen, weights)) < (CUTLASS if kind is CutlassRunner else ROUNDED)


def test_a_softmax_with_a_bias_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    Emulation("0.7.2").install(monkeypatch)
    given = rows(hidden_rows(3), SPECS["minimax"])
    with pytest.raises(ValueError, match="adds no bias to the scores of a softmax"):
        TrtllmRunner()(given, SPECS["qwen3"], trtllm_layout.block_weights(layer(), "MajorK"))


def test_libraries_are_not_imported_unless_chosen() -> None:
    program = (
        "import sys, pointsman.moe.runner; from pointsman.kernels.device import Device\n"
        "from pointsman.moe.candidates import runner_choice; from pointsman.moe.spec import ExpertForm, RoutingSpec\n"
        "runner_choice('auto', RoutingSpec(num_experts=8, top_k=2, score='sigmoid'), ExpertForm(256, 128, (128, 128)),"
        " device=Device(type='cpu'), dtype='float32').take()\n"
        "assert not {'flashinfer', 'deep_gemm', 'tvm_ffi', 'triton'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
