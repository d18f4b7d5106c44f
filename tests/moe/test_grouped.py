"""The GPU runners against the reference runner, kernels and all: in Triton's interpreter, or on the GPU where there is one.

Outputs and buffers are poisoned: torch fills what it hands out with NaN.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pointsman.kernels.candidates import VARIES
from pointsman.kernels.device import Device
from pointsman.kernels.reference import quantize_weight
from pointsman.kernels.tiles import Shape, Tile, Tiles, load_tables, rule
from pointsman.kernels.unsummed import summed
from pointsman.kernels.weight import Weight
from pointsman.moe import grouped
from pointsman.moe.candidates import reason_against_form, runner_choice, unsupported
from pointsman.moe.grouped import RoutedRunner, TritonRunner
from pointsman.moe.reference import ReferenceRunner
from pointsman.moe.router import ROUTERS, RouterInput, Wanted
from pointsman.moe.routing import Routing, RoutingSpec
from pointsman.moe.runner import make_runner, route_and_run
from pointsman.moe.spec import ExpertForm
from pointsman.moe.weights import ExpertWeights, stack_experts
from tests.kernels.interpreter import correct

correct()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_EXPERTS, TOP_K, D, WIDTH = 4, 3, 256, 128
RUNNERS = {"triton": TritonRunner, "routed": RoutedRunner}
# routed rounds where the reference does: what differs is the result's rounding to bfloat16, whose error is 0.0017 of a number at
# most on average. triton rounds gate, up and a choice's output to bfloat16 too, which moves some hidden numbers to the next e4m3; so
# does Hopper, which sums FP8 products with some 13 bits within a block of K.
BOUND = {"routed": 0.0025 if DEVICE.type == "cpu" else 0.01, "triton": 0.045}


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small shapes would be cut into many programs, which the interpreter runs one by one."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(grouped, "tile_table", lambda runner, shape, _: lambda _: wide(runner == "routed" and shape.quantized))


def wide(quantize: bool) -> Tiles:
    down = Tile(block=16, columns=128, warps=4, stages=2, swap=True)
    return Tiles(up=dataclasses.replace(down, columns=128, quantize=quantize), down=down)


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def experts(quantized: bool, width: int = WIDTH) -> ExpertWeights:
    def weight(rows: int, columns: int, seed: int) -> Weight:
        value = normal(rows, columns, seed=seed) * columns**-0.5
        weight = quantize_weight(value) if quantized else Weight(value.bfloat16())
        return dataclasses.replace(weight, data=weight.data.to(DEVICE), scale=None if weight.scale is None else weight.scale.to(DEVICE))

    return stack_experts([(weight(width, D, e), weight(width, D, 100 + e), weight(D, width, 200 + e)) for e in range(NUM_EXPERTS)])


def routing(kind: str, num_tokens: int) -> Routing:
    generator = torch.Generator().manual_seed(num_tokens)
    ids_TK = torch.stack([torch.randperm(NUM_EXPERTS, generator=generator)[:TOP_K] for _ in range(num_tokens)])
    if kind == "skewed":
        ids_TK[: num_tokens - 1] = torch.tensor([3, 0, 2])
    elif kind == "one expert":
        ids_TK = torch.full((num_tokens, 1), 3)
    elif kind == "padding":
        ids_TK[::2] = -1
    weights_TK = torch.rand(ids_TK.shape, generator=generator) + 0.1
    return Routing(ids_TK.int().to(DEVICE), weights_TK.to(DEVICE))


def oracle(x_TD: Tensor, chosen: Routing, weights: ExpertWeights) -> Tensor:
    """The reference's sum before it is rounded; for FP8, from the bfloat16 activations."""
    live_T = (chosen.ids_TK >= 0).all(-1)
    out_TD = torch.zeros(x_TD.shape, device=x_TD.device)
    some = Routing(chosen.ids_TK[live_T].long(), chosen.weights_TK[live_T])
    if weights.quantized:
        out_TD[live_T] = ReferenceRunner()(x_TD[live_T].float(), some, weights)
    else:  # hidden rows are rounded to bfloat16 here, as the activations are
        wide = ExpertWeights(Weight(weights.gate_up.data, parts=weights.gate_up.parts), weights.down)
        for row, token in enumerate(live_T.nonzero().flatten().tolist()):
            for expert, weight in zip(some.ids_TK[row].tolist(), some.weights_TK[row].tolist(), strict=True):
                gate, up = (x_TD[token].double() @ wide.gate_up.data[expert].double().T).chunk(2)
                hidden = (gate * gate.sigmoid() * up).bfloat16().double()
                out_TD[token] += (weight * (wide.down.data[expert].double() @ hidden)).float()
    return out_TD


def distance(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want).norm() / want.norm())


@pytest.mark.parametrize("name", RUNNERS)
@pytest.mark.parametrize(
    ("kind", "num_tokens"), [("uniform", 1), ("uniform", 9), ("skewed", 18), ("one expert", 17), ("padding", 1), ("padding", 5)]
)
def test_fp8_experts(name: str, kind: str, num_tokens: int) -> None:
    x_TD, chosen, weights = normal(num_tokens, D).bfloat16().to(DEVICE), routing(kind, num_tokens), experts(True)
    runner = RUNNERS[name]()
    got = runner(x_TD, chosen, runner.prepare(weights, torch.bfloat16))
    assert got.dtype == torch.bfloat16 and got.shape == x_TD.shape
    dead_T = (chosen.ids_TK < 0).any(-1)
    assert not got[dead_T].any()
    if not dead_T.all():
        assert distance(got, oracle(x_TD, chosen, weights)) < BOUND[name]


@pytest.mark.parametrize("name", RUNNERS)
def test_plain_experts(name: str) -> None:
    num_tokens = 6
    x_TD, chosen, weights = normal(num_tokens, D).bfloat16().to(DEVICE), routing("uniform", num_tokens), experts(False)
    runner = RUNNERS[name]()
    got = runner(x_TD, chosen, runner.prepare(weights, torch.bfloat16))
    assert distance(got, oracle(x_TD, chosen, weights)) < (0.0025 if name == "routed" else 0.006)


@pytest.mark.parametrize(("num_tokens", "given"), [(1, False), (1, True), (5, True), (16, True)])
def test_few_tokens_as_their_router_leaves_them(num_tokens: int, given: bool) -> None:
    x_TD, weights = normal(num_tokens, D).bfloat16().to(DEVICE), experts(True)
    gate_ED = normal(NUM_EXPERTS, D, seed=5).to(DEVICE) / D**0.5
    slots_T = torch.arange(num_tokens, device=DEVICE) - int(num_tokens > 1)  # the first is padding
    spec = RoutingSpec(num_experts=NUM_EXPERTS, top_k=TOP_K, score="sigmoid")
    runner = RoutedRunner(tiles=wide(True) if given else None)  # given tiles are used for every number of tokens
    rows = RouterInput(x_TD, gate_ED, None, 0, slots_T, None, None, counter=runner.counters(DEVICE))
    wanted = runner.wanted(num_tokens, TOP_K, weights)
    assert wanted == (Wanted(True, 0) if given else Wanted(False, num_tokens * TOP_K * WIDTH // 128))
    few = ROUTERS["triton"].run_few(rows, spec, wanted)
    got = summed(runner.run_few(few, weights))
    chosen = Routing(few.ids_TK, few.weights_TK)
    if given:
        assert torch.equal(got, runner(x_TD, chosen, weights)), "the bits of the chain, whatever rows of a block they are made in"
    else:
        assert distance(got, oracle(x_TD, chosen, weights)) < BOUND["routed"]
    assert num_tokens == 1 or not got[0].any()
    again = summed(route_and_run(rows, spec, ROUTERS["triton"], runner, weights))
    assert torch.equal(got, again), "the same bits again, through the layer's way"
    assert not rows.counter.any()


@pytest.mark.parametrize("name", RUNNERS)
def test_no_tokens(name: str) -> None:
    empty = Routing(torch.empty(0, 3, dtype=torch.int32, device=DEVICE), torch.empty(0, 3, device=DEVICE))
    assert RUNNERS[name]()(torch.empty(0, D, dtype=torch.bfloat16, device=DEVICE), empty, experts(True)).shape == (0, D)


def cuts() -> list[Tiles]:
    """Every kind of cut: swapped or not, hidden rows quantized at once, in two passes, or by the reader."""
    found = []
    for block, columns, swap, quantize in [
        (16, 16, True, False),
        (16, 64, False, False),
        (16, 128, True, True),
        (32, 128, False, True),
        (64, 64, False, True),
        (32, 64, True, True),
    ]:
        up = Tile(block=block, columns=columns, warps=4, stages=2, swap=swap, quantize=quantize)
        found.append(Tiles(up=up, down=Tile(block=block, columns=32 if swap else 128, warps=4, stages=2, swap=swap)))
    return found


@pytest.mark.parametrize("tiles", cuts(), ids=str)
def test_every_cut_computes_the_same(tiles: Tiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "tile_table", lambda *_: lambda _: tiles)
    x_TD, chosen, weights = normal(18, D).bfloat16().to(DEVICE), routing("skewed", 18), experts(True)
    assert distance(RoutedRunner()(x_TD, chosen, weights), oracle(x_TD, chosen, weights)) < BOUND["routed"]


@pytest.mark.parametrize("name", RUNNERS)
def test_a_token_alone_has_the_bits_it_has_in_company(name: str) -> None:
    x_TD, chosen, weights = normal(9, D).bfloat16().to(DEVICE), routing("uniform", 9), experts(True)
    runner = RUNNERS[name](deterministic=True)
    together = runner(x_TD, chosen, weights)
    assert torch.equal(together, runner(x_TD, chosen, weights))
    for token in (0, 8):
        alone = runner(x_TD[token : token + 1], Routing(*(part[token : token + 1].contiguous() for part in chosen)), weights)
        assert torch.equal(alone[0], together[token])


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="the interpreter has no tensor cores")
def test_cuts_for_wgmma_have_the_same_bits() -> None:
    x_TD, chosen, weights = normal(200, D).bfloat16().to(DEVICE), routing("uniform", 200), experts(True)
    down = Tile(block=16, columns=64, warps=4, stages=5, swap=True)
    results = []
    for block, columns, warps, swap, quantize in [
        (16, 128, 4, True, True),
        (16, 64, 4, True, False),
        (32, 128, 8, True, True),
        (64, 64, 4, False, True),
        (64, 128, 8, False, True),
        (128, 64, 8, False, True),
    ]:
        up = Tile(block=block, columns=columns, warps=warps, stages=3 if columns == 64 else 2, swap=swap, quantize=quantize)
        tiles = Tiles(
            up=up, down=dataclasses.replace(down, block=block, swap=swap, stages=3, warps=warps, columns=128 if warps == 8 else 64)
        )
        results.append(RoutedRunner(tiles=tiles)(x_TD, chosen, weights))
    assert all(torch.equal(results[0], result) for result in results[1:])


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="the interpreter has no copy engine")
@pytest.mark.parametrize("kind", ["uniform", "skewed", "one expert", "padding"])
@pytest.mark.parametrize("num_tokens", [1, 70, 700])
def test_wide_tiles_have_the_bits_of_the_others(kind: str, num_tokens: int) -> None:
    x_TD, chosen, weights = normal(num_tokens, D).bfloat16().to(DEVICE), routing(kind, num_tokens), experts(True)
    tiles = wide(quantize=True)
    want = RoutedRunner(tiles=tiles, deterministic=True)(x_TD, chosen, weights)
    assert torch.equal(RoutedRunner(wide_rows=0, deterministic=True)(x_TD, chosen, weights), want)
    live_T = (chosen.ids_TK >= 0).all(-1)
    if live_T.any():
        assert distance(RoutedRunner(wide_rows=0)(x_TD, chosen, weights), oracle(x_TD, chosen, weights)) < BOUND["routed"]


SPEC = RoutingSpec(num_experts=NUM_EXPERTS, top_k=TOP_K, score="sigmoid")


@pytest.mark.parametrize(
    ("form", "dtype", "reason"),
    [
        (ExpertForm(256, 128, (128, 128)), "float32", "it computes in bfloat16; the dtype is float32"),
        (ExpertForm(256, 128, (64, 128)), "bfloat16", "the checkpoint's are 64x128"),
        (ExpertForm(200, 128, None), "bfloat16", "multiples of 128; they are 200 and 128"),
        (ExpertForm(256, 192, (128, 128)), "bfloat16", "multiples of 128; they are 256 and 192"),
    ],
)
def test_what_the_kernels_were_not_written_for_is_refused(form: ExpertForm, dtype: str, reason: str) -> None:
    assert reason in (reason_against_form(SPEC, form, dtype) or "")
    fine = ExpertForm(256, 128, (128, 128))
    assert reason_against_form(SPEC, fine, "bfloat16") is None
    many = RoutingSpec(num_experts=2048, top_k=2, score="sigmoid")
    assert "at most 1024 experts; the model has 2048" in (reason_against_form(many, fine, "bfloat16") or "")


def test_runners_that_mind_their_company_are_refused_where_it_may_not_matter() -> None:
    form, hopper = ExpertForm(256, 128, (128, 128)), Device(type="cuda", capability=(9, 0), triton=(3, 6))
    assert runner_choice("auto", SPEC, form, device=hopper, dtype="bfloat16", deterministic=True).take() == "routed"
    assert runner_choice("auto", SPEC, form, device=hopper, dtype="bfloat16").take() == "routed"
    runner = make_runner("routed", deterministic=True)
    assert isinstance(runner, RoutedRunner) and runner.deterministic
    with pytest.raises(ValueError, match=f"'reference' cannot serve here: {VARIES}"):
        runner_choice("reference", SPEC, form, device=hopper, dtype="bfloat16", deterministic=True).take()


def test_devices_are_refused_by_name() -> None:
    form = ExpertForm(256, 128, (128, 128))
    ask = lambda runner, device: unsupported(runner.name, SPEC, form, device, "bfloat16")  # noqa: E731
    assert ask(RoutedRunner, Device(type="cpu")) == "it needs a CUDA device of compute capability 9.0; the device is cpu"
    for capability, routed, triton in [
        ((9, 0), None, None),
        ((8, 9), "it needs a CUDA device of compute capability 9.0; this one has 8.9", None),
        ((10, 0), "it needs a CUDA device of compute capability 9.0; this one has 10.0", None),
        ((8, 0), "9.0; this one has 8.0", None),
        ((7, 5), "9.0; this one has 7.5", "8.0 or later; this one has 7.5"),
        (None, "9.0; torch sees none", "8.0 or later; torch sees none"),
    ]:
        device = Device(type="cuda", capability=capability, triton=(3, 6))
        for runner, reason in ((RoutedRunner, routed), (TritonRunner, triton)):
            got = ask(runner, device)
            assert got is None if reason is None else reason in (got or "")
    hopper = Device(type="cuda", capability=(9, 0), triton=(3, 1))
    assert ask(RoutedRunner, hopper) == "it needs triton 3.4 or later; 3.1 is installed"
    assert ask(RoutedRunner, dataclasses.replace(hopper, triton=None)) == "it needs the triton package, which is not installed"


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("width", [128, 384, 1536])
@pytest.mark.parametrize("runner", RUNNERS)
def test_the_rule_cuts_evenly_at_every_size(runner: str, width: int, quantized: bool) -> None:
    shape = Shape(num_experts=256, top_k=8, hidden=3072, width=width, quantized=quantized)
    for num_tokens in [2**power for power in range(14)]:
        tiles = rule(runner, shape, num_tokens)
        assert tiles.up.block == tiles.down.block
        assert width % (128 if tiles.up.quantize else tiles.up.columns) == 0 and shape.hidden % tiles.down.columns == 0
        assert not tiles.up.quantize or (quantized and tiles.up.columns in (64, 128))


def test_shipped_tables_are_tiles_in_order() -> None:
    for shapes in load_tables().values():
        for runners in shapes.values():
            for rows in runners.values():
                assert [row["tokens"] for row in rows] == sorted({row["tokens"] for row in rows})
                for row in rows:
                    assert Tile(**row["up"]).block == Tile(**row["down"]).block


@pytest.mark.parametrize("name", RUNNERS)
def test_choices_of_other_ranks_are_left_out(name: str) -> None:
    """Some of a token's choices have no expert here, or all: what is here is summed, with the weights as they are."""
    x_TD, chosen, weights = normal(7, D).bfloat16().to(DEVICE), routing("uniform", 7), experts(True)
    ids_TK = torch.where(chosen.ids_TK < 2, chosen.ids_TK, -1)
    ids_TK[3] = -1
    runner = RUNNERS[name]()
    got = runner(x_TD, Routing(ids_TK, chosen.weights_TK), runner.prepare(weights, torch.bfloat16))
    want = ReferenceRunner()(x_TD.float(), Routing(ids_TK.long(), chosen.weights_TK), weights)
    assert distance(got, want) < BOUND[name] and not got[3].any()
