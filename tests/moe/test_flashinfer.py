"""The runners over FlashInfer against the reference: each call bound to the signature of every version, and computed by an emulation."""

from __future__ import annotations

import functools
import importlib
import inspect
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from pointsman.kernels import flashinfer as library_door
from pointsman.kernels import library
from pointsman.kernels.capability import describe
from pointsman.kernels.device import Device
from pointsman.kernels.flashinfer import member
from pointsman.kernels.library import FLASHINFER, installed, numbers
from pointsman.layers.moe import MoE
from pointsman.moe import flashinfer_limits as limits
from pointsman.moe import trtllm_layout
from pointsman.moe.candidates import runner_choice, unsupported
from pointsman.moe.capture import RouteStore
from pointsman.moe.flashinfer import CutlassRunner, RoutedTrtllmRunner, TrtllmRunner
from pointsman.moe.router import ROUTERS, RouterInput
from pointsman.moe.routing import Routing, RoutingSpec, route
from pointsman.moe.runner import make_runner
from pointsman.moe.spec import ExpertForm, Share
from pointsman.moe.weights import ExpertWeights
from tests.moe.libraries.flashinfer import PLACES, VERSIONS, Emulation, unshuffled
from tests.moe.libraries.models import NUM_EXPERTS, TOP_K, D, distance, experts, hidden_rows, normal, oracle, routing
from tests.moe.libraries.signatures import known, signature

# Without what the kernels round beyond the reference, the result's rounding to bfloat16 is left (0.0017 of a number on average), and
# weights in bfloat16 where they are packed (as much again). With it, gate and up are rounded to e4m3, by up to 1/16 each.
EXACT, ROUNDED = 0.004, 0.06
# bfloat16 between kernels moves some hidden numbers to the next e4m3, as in runner `triton`, whose bound this is
CUTLASS = 0.045
SPECS = {
    "minimax": RoutingSpec(num_experts=NUM_EXPERTS, top_k=TOP_K, score="sigmoid"),
    "scaled": RoutingSpec(num_experts=NUM_EXPERTS, top_k=TOP_K, score="sigmoid", scale=2.5),
    "grouped": RoutingSpec(num_experts=NUM_EXPERTS, top_k=TOP_K, score="sigmoid", scale=1.5, num_groups=4, top_groups=2),
    "qwen3": RoutingSpec(num_experts=NUM_EXPERTS, top_k=TOP_K, score="softmax"),
    "softmax": RoutingSpec(num_experts=NUM_EXPERTS, top_k=TOP_K, score="softmax", renormalize=False),
}
BLACKWELL = Device(type="cuda", capability=(10, 0), triton=(3, 6))
HOPPER = Device(type="cuda", capability=(9, 0), triton=(3, 6))
FORM = ExpertForm(256, 128, (128, 128))
versions = pytest.mark.parametrize("version", VERSIONS)


@functools.cache
def layer() -> ExpertWeights:
    return experts()


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch, version: str) -> Emulation:
    return Emulation(version).install(monkeypatch)


def there(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    """As if this version were installed."""
    monkeypatch.setattr(library, "installed", lambda names: version)
    monkeypatch.setattr(library_door, "installed", lambda names: version)
    monkeypatch.setattr(limits, "installed", lambda names: version)
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(limits, "torch_cuda", lambda: "13.0")


def rows(x_TD: Tensor, spec: RoutingSpec, routes: RouteStore | None = None, *, biased: bool = True) -> RouterInput:
    gate_ED = normal(spec.num_experts, D, seed=5) * D**-0.5
    bias_E = normal(spec.num_experts, seed=6) / 4 if biased and spec.score == "sigmoid" else None
    return RouterInput(x_TD, gate_ED, bias_E, 1, torch.arange(len(x_TD)).flip(0), routes, None)


def chosen_by_reference(given: RouterInput, spec: RoutingSpec) -> Routing:
    return route(given.x_TD.float() @ given.gate_ED.T, spec, bias_E=given.bias_E)


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


def test_the_library_shuffles_as_we_do() -> None:
    if installed(FLASHINFER) is None:
        pytest.skip("flashinfer-python is not installed")
    utils, moe = importlib.import_module("flashinfer"), importlib.import_module("flashinfer.fused_moe.core")
    matrix = normal(256, 256).to(torch.float8_e4m3fn)
    for tile in 64, 128:
        theirs = utils.shuffle_matrix_a(matrix.view(torch.uint8), tile)
        assert torch.equal(theirs, trtllm_layout.shuffled(matrix.unsqueeze(0), tile)[0].view(torch.uint8))
    theirs = moe.convert_to_block_layout(matrix.view(torch.uint8), 128)
    assert torch.equal(theirs, trtllm_layout.block_major(matrix.unsqueeze(0))[0].view(torch.uint8))
    theirs = utils.shuffle_matrix_a(moe.reorder_rows_for_gated_act_gemm(matrix.view(torch.uint8)), 128)
    assert torch.equal(theirs, trtllm_layout.interleaved(matrix.unsqueeze(0))[0].view(torch.uint8))


@pytest.mark.parametrize("tile", PLACES)
def test_shuffling_is_undone_by_the_documented_places(tile: int) -> None:
    stack = torch.randint(0, 255, (2, 256, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    shuffled = trtllm_layout.shuffled(stack, tile)
    assert not torch.equal(shuffled, stack) and torch.equal(unshuffled(shuffled, tile), stack)


def test_interleaving_alternates_up_and_gate() -> None:
    """For one scale a matrix: rows in turn, then shuffled; undone by the documented places."""
    up, gate = torch.arange(64).repeat(2, 1), torch.arange(64).repeat(2, 1) + 64
    stack = torch.cat([up, gate], 1).to(torch.uint8).unsqueeze(-1)
    rows_EM = unshuffled(trtllm_layout.interleaved(stack), 128).squeeze(-1)
    assert torch.equal(rows_EM[:, 0::2], up.to(torch.uint8)) and torch.equal(rows_EM[:, 1::2], gate.to(torch.uint8))


def test_packing_keeps_ids_and_weights_apart() -> None:
    ids_TK = torch.tensor([[0, 255, 32767], [-1, 3, -1]])
    weights_TK = torch.tensor([[0.0, 1.0, 3.3], [0.5, 1e-30, 2.0]])
    words_TK = trtllm_layout.pack(ids_TK, weights_TK)
    assert words_TK.dtype == torch.int32 and (words_TK >> 16).tolist() == [[0, 255, 32767], [0, 3, 0]]
    bits_TK = (words_TK & 0xFFFF).short().view(torch.bfloat16)
    assert torch.equal(bits_TK, torch.where(ids_TK < 0, 0, weights_TK).bfloat16())
    assert (trtllm_layout.pack(ids_TK[:, :2], weights_TK[:, :2], first=64, nobody=256) >> 16).tolist() == [[64, 319], [256, 67]]


@pytest.mark.parametrize(
    ("spec", "form", "device", "version", "reason"),
    [
        ({}, {}, Device(type="cpu"), "0.7.2", "sm_100 or sm_103; the device is cpu"),
        ({}, {}, HOPPER, "0.7.2", "this one is sm_90"),
        ({}, {}, Device(type="cuda"), "0.7.2", "torch sees none"),
        ({}, {}, BLACKWELL, None, "not installed: pip install 'pointsman\\[flashinfer\\]'"),
        ({}, {}, BLACKWELL, "0.6.7.post3", "0.6.8 or later; 0.6.7.post3 is installed"),
        ({}, {"block": None}, BLACKWELL, "0.7.2", "experts are not FP8"),
        ({}, {"block": (64, 128)}, BLACKWELL, "0.7.2", "have blocks of 64x128"),
        ({}, {"hidden": 320}, BLACKWELL, "0.7.2", "multiples of 128; they are 320 and 128"),
        ({}, {"width": 192}, BLACKWELL, "0.7.2", "multiples of 128; they are 256 and 192"),
        ({"num_experts": 10}, {}, BLACKWELL, "0.7.2", "multiple of 4; the model has 10"),
        ({"num_experts": 8, "top_k": 8}, {}, BLACKWELL, "0.7.2", "must not use all experts"),
        ({"num_experts": 320}, {}, BLACKWELL, "0.6.14", "0.6.16 or later; 0.6.14 is installed"),
        ({"num_experts": 64, "top_k": 33}, {}, BLACKWELL, "0.7.2", "at most 3[23] experts|at most 32 experts"),
    ],
)
def test_limits_of_both(spec: dict, form: dict, device: Device, version: str | None, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there(monkeypatch, version)
    if version is None:
        monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: None)
    model = RoutingSpec(**({"num_experts": 256, "top_k": 8, "score": "sigmoid"} | spec))
    for name in "flashinfer_trtllm", "flashinfer_trtllm_routed":
        with pytest.raises(ValueError, match=f"'{name}' cannot serve here: .*({reason})"):
            runner_choice(name, model, FORM._replace(**form), device=device, dtype="bfloat16").take()


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"num_experts": 1028}, "at most 1024 experts"),
        ({"renormalize": False}, "divides the weights of sigmoid scores by their sum"),
        ({"score": "softmax", "scale": 2.0}, "does not scale the weights of a softmax"),
        ({"score": "softmax", "num_groups": 8, "top_groups": 4}, "by sigmoid scores alone"),
        ({"score": "softmax", "renormalize": False, "top_k": 9}, "at most 8 experts of 256"),
        ({"score": "softmax", "renormalize": False, "num_experts": 512}, "at most 256 experts"),
        ({"scale": 2.5, "top_k": 9}, "at most 8 experts of 256"),
        ({"num_groups": 16, "top_groups": 4}, "4 of up to 8 groups of up to 32 experts; the model has 4 of 16 of 16"),
        ({"num_groups": 8, "top_groups": 5}, "the model has 5 of 8 of 32"),
        ({"num_groups": 4, "top_groups": 2}, "the model has 2 of 4 of 64"),
        ({"num_experts": 64, "num_groups": 8, "top_groups": 1}, "must not use all experts of its groups; they have 8, and it uses 8"),
    ],
)
def test_limits_of_the_kernels_own_choice(spec: dict, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each names what it is; the engine's choice has none of them."""
    there(monkeypatch, "0.7.2")
    model = RoutingSpec(**({"num_experts": 256, "top_k": 8, "score": "sigmoid"} | spec))
    assert reason in str(unsupported("flashinfer_trtllm", model, FORM, BLACKWELL, "bfloat16"))
    assert unsupported("flashinfer_trtllm_routed", model, FORM, BLACKWELL, "bfloat16") is None


def test_limits_of_the_engines_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    there(monkeypatch, "0.7.2")
    assert "at most 2048 experts" in str(
        unsupported("flashinfer_trtllm_routed", RoutingSpec(num_experts=2052, top_k=8, score="sigmoid"), FORM, BLACKWELL, "bfloat16")
    )


def test_limits_of_cutlass(monkeypatch: pytest.MonkeyPatch) -> None:
    there(monkeypatch, "0.7.2")
    spec = SPECS["minimax"]

    def why(form: ExpertForm = FORM, device: Device = HOPPER, dtype: str = "bfloat16") -> str:
        return str(unsupported("flashinfer_cutlass", spec, form, device, dtype))

    assert why() == "None"
    assert "sm_90; this one is sm_100" in why(device=BLACKWELL)
    assert "the dtype is float32" in why(dtype="float32")
    assert "blocks of 128x128" in why(FORM._replace(block=None)) and "they are 256 and 64" in why(FORM._replace(width=64))
    monkeypatch.setattr(limits, "torch_cuda", lambda: "12.6")
    assert "CUDA 12.8 or later; this torch was built for 12.6" in why()
    there(monkeypatch, "0.6.7")
    assert "0.6.8 or later" in why()


def test_every_limit_is_the_librarys(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused, the kernel refuses, too: the emulation raises where the launcher does."""
    emulation = Emulation("0.7.2").install(monkeypatch)
    chosen, x_TD = routing("uneven", 5), hidden_rows(5)
    runner = RoutedTrtllmRunner()
    weights = runner.prepare(experts(num_experts=6), torch.bfloat16)
    assert "multiple of 4" in str(trtllm_limits(6, 3))
    with pytest.raises(RuntimeError, match="divisible by 4"):
        runner(x_TD, chosen, weights)
    assert "all experts" in str(trtllm_limits(4, 4))
    everybody = Routing(torch.arange(4).expand(5, 4).contiguous(), torch.ones(5, 4))
    with pytest.raises(RuntimeError, match="greater than top_k"):
        runner(x_TD, everybody, runner.prepare(experts(num_experts=4), torch.bfloat16))
    assert len(emulation.calls) == 2


def trtllm_limits(num_experts: int, top_k: int) -> str | None:
    return limits.reason_against_trtllm_form(RoutingSpec(num_experts=num_experts, top_k=top_k, score="sigmoid"), FORM)


def test_a_version_that_lacks_what_is_needed_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    emulation = Emulation("0.6.8").install(monkeypatch)
    there(monkeypatch, "0.6.8")
    parameters = signature(known()["flashinfer-python"]["0.6.8"]["functions"]["trtllm_fp8_block_scale_moe"])
    without = parameters.replace(parameters=[p for p in parameters.parameters.values() if p.name != "routing_replay_out"])
    emulation.moe.trtllm_fp8_block_scale_moe = emulation._function("trtllm_fp8_block_scale_moe", without, emulation.fused)
    with pytest.raises(ValueError, match=r"of FlashInfer 0.6.8 has no routing_replay_out; install 0.6.8 or later"):
        TrtllmRunner()
    monkeypatch.delattr(emulation.moe, "cutlass_fused_moe")
    with pytest.raises(ValueError, match=r"FlashInfer 0.6.8 has no cutlass_fused_moe"):
        CutlassRunner()
    with pytest.raises(ValueError, match=r"no RoutingMethodType.Sigmoid; it has Default, "):
        member("RoutingMethodType", "Sigmoid")


def test_methods_are_named_and_numbers_differ() -> None:
    """What is 8 in one version is another method in the next: a number that is kept would be wrong."""
    names = {
        version: {v: n for n, v in known()["flashinfer-python"][version]["enumerations"]["RoutingMethodType"].items()}
        for version in VERSIONS
    }
    assert names["0.6.8"][8] != names["0.7.2"][8]


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
