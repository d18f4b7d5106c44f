"""A name gets that implementation or every reason why not; "auto" says what it took."""

from __future__ import annotations

import logging

import pytest
import torch

from pointsman.config import EngineConfig, flags
from pointsman.kernels import candidates, operations, reference, triton_support
from pointsman.kernels.candidates import AttentionShape, attention_choice, glue_choice, linear_choice
from pointsman.kernels.choice import Choice
from pointsman.kernels.device import Device
from pointsman.kernels.operations import ATTENTIONS, INVARIANT_ATTENTIONS, INVARIANT_LINEARS, LINEARS
from pointsman.kernels.weight import Weight

CPU, CUDA = Device(type="cpu", triton=(3, 6)), Device(type="cuda", triton=(3, 6))
NONE = "it needs a CUDA device of compute capability 8.0 or later; torch sees none"
HEADS = AttentionShape(num_heads=48, num_kv_heads=8, head_dim=128)


def test_auto_takes_the_first_that_can_and_logs_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="pointsman.kernels"):
        assert linear_choice("auto", device=CPU, dtype="float32").take() == "cpu"
        assert linear_choice("auto", device=CUDA, dtype="bfloat16").take() == "reference"
        assert attention_choice("auto", device=CPU, dtype="float32", shape=HEADS).take() == "reference"
    assert [record.getMessage() for record in caplog.records] == [
        "FP8 linear backend: cpu (auto; triton: it needs a CUDA device of compute capability 8.0 or later; the device is cpu)",
        f"FP8 linear backend: reference (auto; triton: {NONE}; cpu: it is made for CPUs; the device is cuda)",
        "attention backend: reference (auto; triton: it needs a CUDA device of compute capability 8.0 or later; the device is cpu; "
        "flashinfer: it needs a CUDA device of compute capability 8.0 or later; the device is cpu)",
    ]


def test_a_name_is_obeyed_or_refused_with_the_alternatives() -> None:
    assert linear_choice("reference", device=CPU, dtype="float32").take() == "reference"
    with pytest.raises(ValueError, match=r"'cpu' cannot serve here: it is made for CPUs; the device is cuda; these can: reference"):
        linear_choice("cpu", device=CUDA, dtype="bfloat16").take()
    with pytest.raises(
        ValueError, match=r"'flashinfer' cannot serve here: it needs a CUDA device .*; torch sees none; these can: reference"
    ):
        attention_choice("flashinfer", device=CUDA, dtype="bfloat16", shape=HEADS).take()
    with pytest.raises(ValueError, match=r"unknown thing 'c'; known are auto, a, b"):
        Choice("thing", "c", {"a": None, "b": "no"}).take()
    with pytest.raises(ValueError, match=r"no thing can serve here \(a: broken; b: no\)"):
        Choice("thing", "auto", {"a": "broken", "b": "no"}).take()


def test_every_name_that_the_flags_allow_is_known() -> None:
    known = flags(EngineConfig)
    for flag, chooser in (
        ("fp8_gemm_backend", linear_choice),
        ("attention_backend", lambda name, **where: attention_choice(name, **where, shape=HEADS)),
    ):
        for name in known[flag].choices or ():
            refusal = chooser(name, device=CPU, dtype="float32").refusal
            assert refusal is None or "cannot serve here" in refusal


def test_a_mode_in_which_bits_do_not_vary_is_served_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"'reference' cannot serve here: on a GPU a row's bits depend there on the rows beside it"):
        attention_choice("reference", device=CUDA, dtype="bfloat16", shape=HEADS, invariant=True).take()
    monkeypatch.setattr(triton_support, "reason_against", lambda device, needs: None)
    assert linear_choice("auto", device=CUDA, dtype="bfloat16", invariant=True).take() == "triton"
    assert attention_choice("auto", device=CUDA, dtype="bfloat16", shape=HEADS, invariant=True).take() == "triton"
    assert ATTENTIONS.keys() >= INVARIANT_ATTENTIONS.keys()
    weight = reference.quantize_weight(torch.ones(8, 8))
    assert INVARIANT_LINEARS["triton"].prepare(weight, torch.bfloat16).invariant
    assert not LINEARS["triton"].prepare(weight, torch.bfloat16).invariant


def test_the_reasons_against_triton_linears(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_support, "reason_against", lambda device, needs: None)
    with pytest.raises(ValueError, match=r"it takes FP8 weights in blocks of 128 x 128; this model has 64 x 128; these can: reference"):
        linear_choice("triton", device=CUDA, dtype="bfloat16", block=(64, 128)).take()
    assert glue_choice(device=CUDA, dtype="bfloat16").take() == "triton"
    assert glue_choice(device=CUDA, dtype="float32").take() == "reference"
    assert glue_choice(device=CPU, dtype="float32").take() == "reference"


def test_the_reasons_against_triton_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(dtype: str, shape: AttentionShape) -> str | None:
        return candidates.ATTENTIONS["triton"](CUDA, dtype, shape, "fp8_e4m3")

    monkeypatch.setattr(triton_support, "reason_against", lambda device, needs: None)
    assert unsupported("bfloat16", HEADS) is None
    assert "computes in bfloat16; the model computes in float32" in str(unsupported("float32", HEADS))
    assert "heads of 16, 32, 64, 128, 256 channels; this model has 96" in str(unsupported("bfloat16", AttentionShape(4, 4, 96)))
    assert "up to 16 query heads per key/value head; this model has 17" in str(unsupported("bfloat16", AttentionShape(17, 1, 64)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linears_agree(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x_TK = torch.randn(5, 48, generator=generator).to(dtype)
    w_NK = torch.randn(30, 48, generator=generator)
    want = x_TK.float() @ w_NK.T
    for weight, bound in ((Weight(w_NK), 0.01), (reference.quantize_weight(w_NK), 0.06), (reference.quantize_weight(w_NK, (16, 32)), 0.06)):
        for name, linear in LINEARS.items():
            if name == "triton" and (dtype != torch.bfloat16 or weight.block != (128, 128)):
                continue
            got = linear.run(x_TK, linear.prepare(weight, dtype))
            # bfloat16 rounds by 2^-9, e4m3 weights and activations by 2^-4, relative to numbers of size 7
            assert got.dtype == dtype and float((got.float() - want).square().mean().sqrt() / want.square().mean().sqrt()) < bound, name


def test_every_candidate_has_an_implementation() -> None:
    """In the tables of reasons and of functions, under the same names; and what is said of one is so."""
    assert candidates.LINEARS.keys() == LINEARS.keys() and candidates.GLUES.keys() == operations.GLUES.keys()
    assert candidates.ATTENTIONS.keys() == ATTENTIONS.keys()
    assert candidates.INVARIANT == INVARIANT_LINEARS.keys() == INVARIANT_ATTENTIONS.keys()
    assert {name for name, entry in ATTENTIONS.items() if entry.reads_host} == candidates.UNCAPTURED_ATTENTIONS
