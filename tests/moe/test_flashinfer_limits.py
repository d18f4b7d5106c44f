"""What FlashInfer's kernels cannot do is told before a weight is read, and is the library's own limit; versions differ by signature."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pointsman.engine.device_models import MODELS
from pointsman.kernels import flashinfer as library_door
from pointsman.kernels import library
from pointsman.kernels.device import Device
from pointsman.kernels.flashinfer import member
from pointsman.moe import flashinfer_limits as limits
from pointsman.moe.candidates import runner_choice, unsupported
from pointsman.moe.flashinfer import CutlassRunner, RoutedTrtllmRunner, TrtllmRunner
from pointsman.moe.routing import Routing, RoutingSpec
from pointsman.moe.spec import ExpertForm
from tests.moe.libraries.flashinfer import VERSIONS, Emulation
from tests.moe.libraries.models import FORM, SPECS, experts, hidden_rows, routing
from tests.moe.libraries.signatures import known, signature

BLACKWELL = Device(type="cuda", capability=(10, 0), triton=(3, 6))
HOPPER = Device(type="cuda", capability=(9, 0), triton=(3, 6), cuda=(12, 8))


def there(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    """As if this version were installed."""
    monkeypatch.setattr(library, "installed", lambda names: version)
    monkeypatch.setattr(library_door, "installed", lambda names: version)
    monkeypatch.setattr(limits, "installed", lambda names: version)
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: object())


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

    assert why() == why(device=MODELS["h200"].device) == "None", "of a GPU that is not here, too"
    assert "sm_90; this one is sm_100" in why(device=BLACKWELL)
    assert "the dtype is float32" in why(dtype="float32")
    assert "blocks of 128x128" in why(FORM._replace(block=None)) and "they are 256 and 64" in why(FORM._replace(width=64))
    for cuda, told in ((12, 6), "12.6"), (None, "none"):
        assert f"CUDA 12.8 or later; torch is built for {told}" in why(device=dataclasses.replace(HOPPER, cuda=cuda))
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
