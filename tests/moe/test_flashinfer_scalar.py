"""`flashinfer_trtllm` with one FP8 scale a matrix, static: bound to the signatures of each version, and computed by the emulation."""

from __future__ import annotations

import functools
import importlib
import inspect

import pytest
import torch

from pointsman.kernels import flashinfer as library_door
from pointsman.kernels import library
from pointsman.kernels.capability import describe
from pointsman.kernels.device import Device
from pointsman.kernels.library import FLASHINFER, installed, numbers
from pointsman.kernels.weight import FP8, Weight
from pointsman.layers.moe import MoE
from pointsman.moe import flashinfer_limits as limits
from pointsman.moe.candidates import unsupported
from pointsman.moe.capture import RouteStore
from pointsman.moe.flashinfer_scalar import ScalarTrtllmRunner, one_scale
from pointsman.moe.router import ROUTERS, RouterInput
from pointsman.moe.routing import Routing
from pointsman.moe.runner import make_runner, takes_up_first
from pointsman.moe.spec import Share
from pointsman.moe.trtllm_layout import turned
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
    hidden_rows,
    oracle,
    rows,
    scalar_experts,
    static_oracle,
)
from tests.moe.libraries.signatures import known, signature

BROKEN = "0.6.8"
WHOLE = tuple(version for version in VERSIONS if version != BROKEN)
versions = pytest.mark.parametrize("version", WHOLE)
# The result is rounded to bfloat16 (0.0017 of a number on average), and sums in another order move some hidden numbers to the next e4m3,
# by 1/8 of it; with the kernel's own roundings a choice's weight and output are bfloat16 as well.
EXACT, ROUNDED = 0.004, 0.006
# one scale for all rows and one for all hidden numbers of an expert, beside one for each 128: random rows have few small numbers
REFERENCE = 0.06
BLACKWELL = Device(type="cuda", capability=(10, 0), triton=(3, 6))


@functools.cache
def layer() -> ExpertWeights:
    return scalar_experts()


def test_scales_are_all_unlike() -> None:
    """So that none can stand for another."""
    both, down = layer()
    scales = [*one_scale(both.scale[:, :1]), *one_scale(both.scale[:, 1:]), *one_scale(down.scale), *down.input_scale.flatten()]
    assert len({float(scale) for scale in scales}) == 4 * NUM_EXPERTS and both.input_scale.unique().numel() == 2 * NUM_EXPERTS


@versions
@pytest.mark.parametrize("model", SPECS)
def test_it_chooses_records_and_computes_by_the_scales_of_the_checkpoint(emulated: Emulation, model: str) -> None:
    spec, x_TD = SPECS[model], hidden_rows(11)
    routes = RouteStore(11, 2, TOP_K, NUM_EXPERTS)
    given = rows(x_TD, spec, routes)
    chosen = chosen_by_reference(given, spec)
    runner = ScalarTrtllmRunner()
    ready = runner.prepare(layer(), torch.bfloat16)
    for emulated.exact, bound in (True, EXACT), (False, ROUNDED):
        routes.rows_SLK.fill_(255)
        got = runner(given, spec, ready)
        assert distance(got, static_oracle(x_TD, chosen, layer())) < bound
        assert 0.01 < distance(got, oracle(x_TD, chosen, layer())) < REFERENCE
        assert torch.equal(routes.rows_SLK[given.slots_T, 1].long(), chosen.ids_TK) and (routes.rows_SLK[:, 0] == 255).all()
    name, call = emulated.calls[-1]
    assert name == "trtllm_fp8_per_tensor_scale_moe" and call["output"].data_ptr() == got.data_ptr()


@versions
def test_what_calibration_did_not_see_saturates(emulated: Emulation) -> None:
    spec, x_TD = SPECS["minimax"], 3 * hidden_rows(9)
    given, runner = rows(x_TD, spec), ScalarTrtllmRunner()
    got = runner(given, spec, runner.prepare(layer(), torch.bfloat16))
    assert emulated.calls[-1][1]["hidden_states"].float().abs().max() == 448 and got.isfinite().all()
    assert distance(got, static_oracle(x_TD, chosen_by_reference(given, spec), layer())) < ROUNDED


@versions
def test_other_types_and_nothing(emulated: Emulation) -> None:
    spec, runner = SPECS["minimax"], ScalarTrtllmRunner()
    ready = runner.prepare(layer(), torch.float32)
    got = runner(rows(hidden_rows(4).float(), spec), spec, ready)
    assert got.dtype == torch.float32 and got.shape == (4, D)
    calls = len(emulated.calls)
    assert runner(rows(torch.empty(0, D), spec), spec, ready).shape == (0, D) and len(emulated.calls) == calls


@versions
def test_ranks_with_shares_of_the_experts_sum_to_the_whole(emulated: Emulation) -> None:
    """Each rounds the rows by the largest scale of its own experts."""
    emulated.exact = True
    spec, x_TD = SPECS["minimax"], hidden_rows(12)
    given = rows(x_TD, spec)
    chosen = chosen_by_reference(given, spec)
    total, want = torch.zeros(x_TD.shape), torch.zeros(x_TD.shape)
    for first, last in (0, 3), (3, 4), (4, NUM_EXPERTS):
        part = (slice(first, last),)
        share = ExpertWeights(*(Weight(w.data[part], w.scale[part], w.block, w.parts, w.input_scale[part]) for w in layer()))
        runner = make_runner("flashinfer_trtllm", share=Share(first, NUM_EXPERTS), input_scales=True)
        assert takes_up_first(runner)
        own, routes = range(first, last), RouteStore(12, 2, TOP_K, NUM_EXPERTS)
        rank = MoE(1, given.gate_ED, given.bias_E, turned(share), spec, ROUTERS["reference"], runner, torch.bfloat16, own)
        total += rank.run(RouterInput(x_TD, given.gate_ED, given.bias_E, 1, given.slots_T, routes, None, own)).float()
        assert torch.equal(routes.rows_SLK[given.slots_T, 1].long(), chosen.ids_TK)
        mine = (chosen.ids_TK >= first) & (chosen.ids_TK < last)
        ids_TK, weights_TK = torch.where(mine, chosen.ids_TK - first, 0), torch.where(mine, chosen.weights_TK, 0)
        want += static_oracle(x_TD, Routing(ids_TK, weights_TK), share)
    assert distance(total, want) < 2 * EXACT  # the sum of three that were rounded


@versions
def test_ranks_with_shares_of_the_width_sum_to_the_whole(emulated: Emulation) -> None:
    """The rows are rounded alike on both, and each hidden number as it is on one."""
    emulated.exact = True
    spec, x_TD = SPECS["minimax"], hidden_rows(7)
    given, (both, down), total = rows(x_TD, spec), scalar_experts(width=256), torch.zeros(7, D)
    for rank in range(2):
        mine, blocks = [slice(half + 128 * rank, half + 128 * rank + 128) for half in (0, 256)], [rank, 2 + rank]
        numbers = torch.cat([both.data.view(torch.uint8)[:, part] for part in mine], 1).view(FP8)
        columns = down.data.view(torch.uint8)[..., mine[0]].contiguous().view(FP8)
        gate_up = Weight(numbers, both.scale[:, blocks].contiguous(), both.block, (128, 128), both.input_scale)
        output = Weight(columns, down.scale[..., [rank]].contiguous(), down.block, down.parts, down.input_scale)
        runner = ScalarTrtllmRunner()
        total += runner(given, spec, runner.prepare(ExpertWeights(gate_up, output), torch.bfloat16)).float()
    assert distance(total, static_oracle(x_TD, chosen_by_reference(given, spec), ExpertWeights(both, down))) < 2 * EXACT


def there(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    for module in (library, library_door, limits):
        monkeypatch.setattr(module, "installed", lambda names: version)
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: object())


def test_a_version_whose_call_is_not_whole_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its function takes what it is given, and its kernel an argument more than that gives it."""
    spec, form = SPECS["minimax"], FORM._replace(input_scales=True)
    there(monkeypatch, "0.6.8.post1")
    why = str(unsupported("flashinfer_trtllm", spec, form, BLACKWELL, "bfloat16"))
    assert "scales of activations it needs flashinfer 0.6.9 or later; 0.6.8.post1 is installed. flashinfer_trtllm_routed makes" in why
    assert unsupported("flashinfer_trtllm_routed", spec, form, BLACKWELL, "bfloat16") is None
    assert unsupported("flashinfer_trtllm", spec, FORM, BLACKWELL, "bfloat16") is None
    there(monkeypatch, "0.6.9")
    assert unsupported("flashinfer_trtllm", spec, form, BLACKWELL, "bfloat16") is None
    Emulation(BROKEN).install(monkeypatch)
    runner = ScalarTrtllmRunner()
    with pytest.raises(RuntimeError, match="number of arguments"):
        runner(rows(hidden_rows(3), spec), spec, runner.prepare(layer(), torch.bfloat16))


def test_a_version_without_the_record_of_choices_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    emulation = Emulation("0.7.2").install(monkeypatch)
    there(monkeypatch, "0.7.2")
    name = "trtllm_fp8_per_tensor_scale_moe"
    parameters = signature(known()["flashinfer-python"]["0.7.2"]["functions"][name])
    without = parameters.replace(parameters=[p for p in parameters.parameters.values() if p.name != "routing_replay_out"])
    setattr(emulation.moe, name, emulation._function(name, without, emulation.scalar))
    with pytest.raises(ValueError, match=r"of FlashInfer 0.7.2 has no routing_replay_out"):
        ScalarTrtllmRunner()


@versions
def test_arguments_fit_the_installed_library(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if installed(FLASHINFER) is None:
        pytest.skip("flashinfer-python is not installed")
    if numbers(str(installed(FLASHINFER))) != numbers(version):
        pytest.skip(f"another version is installed: {installed(FLASHINFER)}")
    name, emulation = "trtllm_fp8_per_tensor_scale_moe", Emulation(version)
    theirs = inspect.signature(getattr(importlib.import_module("flashinfer.fused_moe"), name))
    mine = signature(known()["flashinfer-python"][version]["functions"][name])
    assert [(p.name, p.kind, p.default is p.empty) for p in mine.parameters.values()] == [
        (p.name, p.kind, p.default is p.empty) for p in theirs.parameters.values()
    ]
    setattr(emulation.moe, name, emulation._function(name, theirs, emulation.scalar))
    emulation.install(monkeypatch)
    spec, runner = SPECS["minimax"], ScalarTrtllmRunner()
    given = rows(hidden_rows(5), spec)
    got = runner(given, spec, runner.prepare(layer(), torch.bfloat16))
    assert distance(got, static_oracle(given.x_TD, chosen_by_reference(given, spec), layer())) < ROUNDED


@pytest.mark.gpu
def test_on_the_hardware() -> None:
    """The library itself, where a GPU is one that it has kernels for."""
    device, spec = torch.device("cuda"), SPECS["minimax"]
    if (why := unsupported("flashinfer_trtllm", spec, FORM._replace(input_scales=True), describe(device), "bfloat16")) is not None:
        pytest.skip(why)
    moved = [Weight(w.data.to(device), w.scale.to(device), w.block, w.parts, w.input_scale.to(device)) for w in layer()]
    runner = ScalarTrtllmRunner()
    ready = runner.prepare(ExpertWeights(*moved), torch.bfloat16)
    for num_tokens in 1, 13, 300:
        routes = RouteStore(num_tokens, 2, TOP_K, NUM_EXPERTS, device)
        here = rows(hidden_rows(num_tokens), spec)
        gate_ED, bias_E, slots_T = (part.to(device) for part in (here.gate_ED, here.bias_E, here.slots_T))
        given = RouterInput(here.x_TD.to(device), gate_ED, bias_E, 1, slots_T, routes, None)
        got = runner(given, spec, ready).cpu()
        assert distance(got, static_oracle(here.x_TD, chosen_by_reference(here, spec), layer())) < 2 * ROUNDED
        chosen = routes.rows_SLK[given.slots_T, 1].cpu().long()
        assert torch.equal(chosen.sort(-1).values, chosen_by_reference(here, spec).ids_TK.sort(-1).values)
