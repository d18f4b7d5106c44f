"""The runner over DeepGEMM against the reference: our kernels in Triton's interpreter or on a GPU, the library's products emulated.

On a Hopper GPU with the library there the same tests run on it. Buffers are poisoned: torch fills what it hands out with NaN.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pointsman.kernels import library
from pointsman.kernels.device import Device
from pointsman.kernels.library import installed
from pointsman.kernels.weight import Weight
from pointsman.moe import deep_gemm as door
from pointsman.moe.candidates import DEEP_GEMM, runner_choice, unsupported
from pointsman.moe.deep_gemm import DeepGemmRunner, products
from pointsman.moe.reference import ReferenceRunner
from pointsman.moe.routing import Routing, RoutingSpec
from pointsman.moe.spec import ExpertForm
from pointsman.moe.weights import ExpertWeights
from tests.kernels.interpreter import correct
from tests.moe.libraries import deep_gemm
from tests.moe.libraries.models import NUM_EXPERTS, TOP_K, D, distance, experts, hidden_rows, oracle, routing

correct()
REAL = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0) and installed(DEEP_GEMM) is not None
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where our own kernels of the runner run
# gate and up, and the output of a choice, are rounded to bfloat16, as in runner `triton`, whose bound this is
BOUND = 0.045


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    products.cache_clear()
    called: list[str] = []
    if not REAL:
        deep_gemm.install(monkeypatch, called)
    yield called
    products.cache_clear()


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "contiguous"])
@pytest.mark.parametrize(("kind", "num_tokens"), [("uneven", 1), ("uneven", 9), ("one expert", 20), ("padding", 5)])
def test_it_computes_what_the_reference_does(
    masked: bool, kind: str, num_tokens: int, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "MASKED_TOKENS", 64 if masked else 0)
    x_TD, chosen, weights = hidden_rows(num_tokens).to(DEVICE), routing(kind, num_tokens, DEVICE), experts(device=DEVICE)
    runner = DeepGemmRunner()
    got = runner(x_TD, chosen, runner.prepare(weights, torch.bfloat16))
    assert got.dtype == torch.bfloat16 and got.shape == x_TD.shape
    dead_T = (chosen.ids_TK < 0).any(-1)
    assert not got[dead_T].any()
    if not dead_T.all():
        assert distance(got, oracle(x_TD, chosen, weights)) < BOUND
    if not REAL:
        assert calls == [f"m_grouped_fp8_fp4_gemm_nt_{'masked' if masked else 'contiguous'}"] * 2


@pytest.mark.parametrize(("num_tokens", "way"), [(128, "masked"), (129, "contiguous")])
def test_few_tokens_are_masked_and_many_contiguous(num_tokens: int, way: str, calls: list[str]) -> None:
    x_TD, weights = hidden_rows(num_tokens).to(DEVICE), experts(device=DEVICE)
    ids_TK = torch.arange(num_tokens, device=DEVICE).unsqueeze(-1) % NUM_EXPERTS
    chosen = Routing(ids_TK.int(), torch.ones(num_tokens, 1, device=DEVICE))
    got = DeepGemmRunner()(x_TD, chosen, weights)
    assert distance(got, oracle(x_TD, chosen, weights)) < BOUND
    if not REAL:
        assert set(calls) == {f"m_grouped_fp8_fp4_gemm_nt_{way}"}


def test_nothing_for_no_tokens(calls: list[str]) -> None:
    nothing = Routing(torch.empty(0, TOP_K, dtype=torch.int32), torch.empty(0, TOP_K))
    assert DeepGemmRunner()(torch.empty(0, D, dtype=torch.bfloat16), nothing, experts()).shape == (0, D)


def test_it_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, form = RoutingSpec(num_experts=8, top_k=2, score="sigmoid"), ExpertForm(256, 128, (128, 128))
    cpu, cuda = Device(type="cpu"), Device(type="cuda", capability=(9, 0), triton=(3, 6))
    assert "9.0; the device is cpu" in str(unsupported("deep_gemm", spec, form, cpu, "bfloat16"))
    assert "experts are plain" in str(unsupported("deep_gemm", spec, form._replace(block=None), cuda, "bfloat16"))
    assert "32x128" in str(unsupported("deep_gemm", spec, form._replace(block=(32, 128)), cuda, "bfloat16"))
    assert "multiples of 128" in str(unsupported("deep_gemm", spec, form._replace(width=192), cuda, "bfloat16"))
    assert "bfloat16" in str(unsupported("deep_gemm", spec, form, cuda, "float32"))
    many = RoutingSpec(num_experts=1025, top_k=2, score="sigmoid")
    for name in "deep_gemm", "routed", "fused", "triton":
        assert unsupported(name, many, form, cuda, "bfloat16") == "it sorts by at most 1024 experts; the model has 1025"
    with pytest.raises(ValueError, match=r"'deep_gemm' cannot serve here: .*9[.]0; the device is cpu; these can: cpu, reference"):
        runner_choice("deep_gemm", spec, form, device=cpu, dtype="float32").take()
    monkeypatch.setattr(library, "installed", lambda distributions: None)
    assert "not installed: pip install 'pointsman[deepgemm]'" in str(unsupported("deep_gemm", spec, form, cuda, "bfloat16"))


def test_a_library_of_other_names_is_refused(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if REAL:
        pytest.skip("the library is there as it is")
    module = deep_gemm.install(monkeypatch)
    monkeypatch.delattr(module, "fp8_m_grouped_gemm_nt_masked")
    with pytest.raises(ValueError, match="has none of m_grouped_fp8_gemm_nt_masked, fp8_m"):
        DeepGemmRunner()
    module.m_grouped_fp8_gemm_nt_masked = lambda a, b: None
    products.cache_clear()
    with pytest.raises(ValueError, match="is called otherwise"):
        DeepGemmRunner()


def test_the_emulation_refuses_what_the_library_does(calls: list[str]) -> None:
    """Otherwise the tests above would say nothing of layouts."""
    if REAL:
        pytest.skip("the library asserts by itself, and ends the process")
    contiguous, _ = products()
    weights = experts()
    a = torch.zeros(128, D).to(torch.float8_e4m3fn)
    scale, out = torch.ones(D // 128, 128).T, torch.empty(128, 2 * 128, dtype=torch.bfloat16)
    b, layout = (weights.gate_up.data, weights.gate_up.scale), torch.zeros(128, dtype=torch.int32)
    contiguous((a, scale), b, out, layout)
    for wrong in ((a, scale.contiguous()), b, out, layout), ((a, scale), b, out, layout.long()), ((a, scale), b, out.float(), layout):
        with pytest.raises(RuntimeError):
            contiguous(*wrong)
    layout[5] = 1
    with pytest.raises(RuntimeError, match="one expert"):
        contiguous((a, scale), b, out, layout)


def test_the_oracle_is_the_reference_runner() -> None:
    x_TD, chosen, weights = hidden_rows(7), routing("uneven", 7), experts()
    want = ReferenceRunner()(x_TD.float(), Routing(chosen.ids_TK.long(), chosen.weights_TK), weights)
    assert torch.equal(oracle(x_TD, chosen, weights), want)
    assert isinstance(weights, ExpertWeights) and isinstance(weights.down, Weight)
