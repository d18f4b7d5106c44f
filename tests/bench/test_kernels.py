"""`bench kernels`: its check finds what is wrong, its bytes are those of the roofline, and without a GPU it says so."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
import torch

from pointsman import cli
from pointsman.bench.expert_layer import Layer
from pointsman.bench.kernels import BOUNDS, CONTENDERS, MINIMAX, Block, block_bytes, check, draw
from pointsman.bench.options import KernelsOptions
from pointsman.kernels.tiles import Shape
from pointsman.moe.grouped import RoutedRunner, TritonRunner
from pointsman.moe.routing import Routing
from tests.kernels.interpreter import correct
from tests.moe.libraries.flashinfer import Emulation

correct()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUTED_BOUND = 0.0025 if DEVICE.type == "cpu" else BOUNDS["routed"]  # tensor cores sum with fewer bits than the interpreter


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> Layer:
    monkeypatch.setattr("pointsman.kernels.tiles.MANY_PROGRAMS", 1)
    return Layer.draw(Shape(num_experts=4, top_k=2, hidden=256, width=128, quantized=True), DEVICE, 0)


@pytest.mark.parametrize(("runner", "bound"), [(TritonRunner, 0.03), (RoutedRunner, ROUTED_BOUND)])
def test_a_right_block_passes(layer: Layer, runner: type[RoutedRunner], bound: float) -> None:
    x_TD = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)).bfloat16().to(DEVICE)
    fault, error = check(layer, Block(layer, runner()), x_TD, bound)
    assert fault is None and 0 < error < bound


@pytest.mark.parametrize("name", [name for name in CONTENDERS if name.startswith("flashinfer")])
def test_blocks_of_the_library_are_checked_alike(layer: Layer, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the emulation, which rounds as the kernels do; those that choose experts themselves are asked which."""
    Emulation("0.7.2").install(monkeypatch)
    runner, options = CONTENDERS[name]
    x_TD = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)).bfloat16().to(DEVICE)
    fault, error = check(layer, Block(layer, runner(**options)), x_TD, BOUNDS[name])
    assert fault is None and 0 < error < BOUNDS[name]


@pytest.mark.parametrize(("runner", "bound"), [(TritonRunner, 0.006), (RoutedRunner, 0.0025)])
def test_plain_weights_are_checked_without_quantization(runner: type[RoutedRunner], bound: float) -> None:
    plain = Layer.draw(Shape(num_experts=4, top_k=2, hidden=256, width=128, quantized=False), DEVICE, 0)
    x_TD = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)).bfloat16().to(DEVICE)
    fault, error = check(plain, Block(plain, runner()), x_TD, bound)
    assert fault is None and 0 < error < bound


def test_what_is_wrong_is_found(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    x_TD = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)).bfloat16().to(DEVICE)
    block = Block(layer, RoutedRunner())
    good, out = block.route(x_TD), block(x_TD)
    monkeypatch.setattr(Block, "__call__", lambda *_: out * 1.02)
    assert f"off the reference where {ROUTED_BOUND} is allowed" in (check(layer, block, x_TD, ROUTED_BOUND)[0] or "")
    monkeypatch.setattr(Block, "__call__", lambda *_: torch.cat([out[:1], out[1:2] * float("nan"), out[2:]]))
    assert "not finite" in (check(layer, block, x_TD, ROUTED_BOUND)[0] or "")
    results = iter([out, out + 1])
    monkeypatch.setattr(Block, "__call__", lambda *_: next(results))
    assert "other bits" in (check(layer, block, x_TD, ROUTED_BOUND)[0] or "")
    for wrong, word in [
        (Routing((good.ids_TK + 1) % 4, good.weights_TK), "better than one it chose"),
        (Routing(good.ids_TK + 4, good.weights_TK), "do not exist"),
        (Routing(good.ids_TK, good.weights_TK.flip(1)), "weights are not the scores"),
    ]:
        monkeypatch.setattr(Block, "route", lambda *_, wrong=wrong: wrong)
        monkeypatch.setattr(Block, "__call__", lambda *_: out)
        assert word in (check(layer, block, x_TD, ROUTED_BOUND)[0] or "")


def test_bytes_are_those_of_the_roofline() -> None:
    # one token at tp 1 uses 8 experts of 14.16 MB; 128 tokens in 251.6 experts move 3.562 GB of weights
    assert block_bytes(MINIMAX[1], 1, 8) == pytest.approx(113.3e6 + 3.1e6, rel=2e-3)
    assert block_bytes(MINIMAX[1], 128, 251.6) == pytest.approx(3.562e9 + 3.1e6 + 4.8e6, rel=1e-3)
    assert block_bytes(MINIMAX[2], 128, 251.6) == pytest.approx(3.562e9 / 2 + 3.1e6 + 3.2e6, rel=1e-3)


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "kernels", "--quick"]) == 1
    assert "cannot be measured here: it needs a CUDA device of compute capability 8.9 or later; torch sees none" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--tp-sizes is 3; it must be 1, 2 or 4"):
        KernelsOptions(tp_sizes=(3,))


def test_the_plot_has_a_line_for_each_runner() -> None:
    rows = [{"M": size, "tp": tp, "runner": "routed", "us": 1.0, "read_fraction": 0.5} for size in (1, 8, 8192) for tp in (1, 2)]
    chart = ElementTree.fromstring(draw([*rows, {"M": 4, "tp": 1, "runner": "triton", "fault": "wrong"}]))
    lines = list(chart.iter("{http://www.w3.org/2000/svg}polyline"))
    assert [len(line.get("points", "").split()) for line in lines] == [3, 3]
