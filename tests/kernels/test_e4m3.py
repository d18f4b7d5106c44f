"""e4m3 as bytes, for GPUs that have no such type: the conversions against torch's, and the kernels' own tests with bytes in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from pointsman.kernels import e4m3
from pointsman.kernels.capability import has_e4m3
from pointsman.kernels.e4m3 import decode, encode, stored
from pointsman.kernels.weight import FP8, FP8_MAX
from pointsman.moe.grouped import TritonRunner
from tests.kernels import (
    test_arrange,
    test_block_gemm,
    test_gated,
    test_norm_quant,
    test_paged_attention,
    test_qkv_post,
    test_vector_products,
)
from tests.kernels.interpreter import correct
from tests.models.test_triton_decoder import test_a_model_of_kernels_is_the_model as check_model
from tests.moe import test_grouped

correct()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK = 1 << 16


@triton.jit
def decode_kernel(code_ptr, number_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(number_ptr + at, decode(tl.load(code_ptr + at, mask=at < count, other=0)), mask=at < count)


@triton.jit
def encode_kernel(number_ptr, code_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(code_ptr + at, encode(tl.load(number_ptr + at, mask=at < count, other=0.0)), mask=at < count)


def encoded(x: Tensor) -> Tensor:
    x = x.to(DEVICE)
    code = torch.full(x.shape, 0xAA, dtype=torch.uint8, device=DEVICE)
    encode_kernel[(triton.cdiv(len(x), BLOCK),)](x, code, len(x), BLOCK=BLOCK)
    return code.cpu()


def test_every_code_is_decoded() -> None:
    code = torch.arange(256, dtype=torch.uint8)
    got = torch.full((256,), 7.0, dtype=torch.float16, device=DEVICE)
    decode_kernel[(1,)](code.to(DEVICE), got, 256, BLOCK=256)
    want = code.view(FP8).float()
    torch.testing.assert_close(got.cpu().float(), want, rtol=0, atol=0, equal_nan=True)
    real = ~want.isnan()  # a GPU's arithmetic gives NaN no sign; zeros have theirs
    assert torch.equal(got.cpu().signbit()[real], want.signbit()[real]) and int(real.sum()) == 254


def saturated(x: Tensor) -> Tensor:
    """As the reference stores numbers."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(FP8).view(torch.uint8)


def neighbours(x: Tensor) -> Tensor:
    """Numbers with the float32 before and after each."""
    return torch.cat((x, torch.nextafter(x, torch.tensor(torch.inf)), torch.nextafter(x, torch.tensor(-torch.inf))))


def test_numbers_are_encoded_as_torch_rounds_them() -> None:
    """Every e4m3 number and every half between two of them with its neighbours, and the float32 of every exponent."""
    ladder = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    halves = (ladder[1:] + ladder[:-1]) / 2
    # each exponent with the top 12 bits of its fraction: e4m3 keeps 3 of them, and the rest decides how they round
    sweep = (torch.arange(1 << 20, dtype=torch.int64) << 12).to(torch.int32).view(torch.float32)
    x = torch.cat((neighbours(torch.cat((ladder, halves))), sweep[sweep.isfinite()], torch.tensor([448.0, 464.0, 480.0, 3e38, torch.inf])))
    x = torch.cat((x, -x))
    assert torch.equal(encoded(x), saturated(x))


def test_nan_stays_nan() -> None:
    for bits in (0x7FC00000, 0x7F800001, 0x7FFFFFFF):
        x = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
        assert int(encoded(x)) & 0x7F == 0x7F and int(encoded(-x)) & 0x7F == 0x7F


def test_what_is_encoded_is_decoded() -> None:
    code = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    assert torch.equal(encoded(code.view(FP8).float()), code)


@pytest.fixture
def in_bytes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels see e4m3 as bytes here, as on a GPU that does not know it; and some are launched that do."""
    asked: list[torch.device] = []
    monkeypatch.setattr(e4m3, "has_e4m3", asked.append)
    yield
    assert asked


def test_a_launch_passes_bytes_where_there_is_no_e4m3(monkeypatch: pytest.MonkeyPatch) -> None:
    x, plain = torch.ones(2, 3).to(FP8), torch.ones(2, 3, dtype=torch.bfloat16)
    assert stored(x) is x and stored(plain) is plain
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert not has_e4m3(torch.device("cuda")) and has_e4m3(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert has_e4m3(torch.device("cuda"))
    monkeypatch.setattr(e4m3, "has_e4m3", lambda device: False)
    assert stored(x).dtype == torch.uint8 and stored(x).data_ptr() == x.data_ptr() and stored(plain) is plain


CASES: dict[str, Callable[[], None]] = {
    "norm": lambda: test_norm_quant.test_the_norm_is_rounded_before_it_is_quantized(384),
    "quantization": lambda: test_norm_quant.test_quantization_has_the_references_bits(200),
    "activation": lambda: test_gated.test_it_is_silu_times_up(640),
    "arrangement": test_arrange.test_quantization_has_the_references_bits,
    "linear of few rows": lambda: test_block_gemm.test_every_tiling_is_the_reference(test_block_gemm.CUTS[1], 17, (192, 64), 384),
    "linear of many": lambda: test_block_gemm.test_every_tiling_is_the_reference(test_block_gemm.PLAIN, 70, (100, 30), 200),
    "linear of one": lambda: test_vector_products.test_a_linear_is_the_reference(test_vector_products.Cut(), 1, 128, 1000),
    "queries and cache": lambda: test_qkv_post.test_it_is_norm_rotate_and_write(6, 1, 128, 64, FP8, "all"),
    "attention": lambda: test_paged_attention.test_a_mixed_step_is_the_references(FP8),
    "attention, quantized": lambda: test_paged_attention.test_the_quantized_answer_is_the_answer_quantized(4),
}


@pytest.mark.usefixtures("in_bytes")
@pytest.mark.parametrize("name", CASES)
def test_kernels_pass_their_own_tests_with_bytes(name: str) -> None:
    """To the same bounds."""
    CASES[name]()


@pytest.mark.usefixtures("in_bytes")
@pytest.mark.skipif(DEVICE.type != "cpu", reason="it runs on the CPU")
def test_a_model_of_kernels_with_bytes_is_the_model(tmp_path: Path) -> None:
    check_model(tmp_path, "fp8, heads of 128", False)


@pytest.mark.parametrize(("kind", "num_tokens"), [("skewed", 18), ("padding", 5)])
def test_experts_with_bytes_are_the_experts(kind: str, num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x_TD = test_grouped.normal(num_tokens, test_grouped.D).bfloat16().to(DEVICE)
    chosen, weights = test_grouped.routing(kind, num_tokens), test_grouped.experts(True)
    runner = TritonRunner(tiles=test_grouped.wide(quantize=False))
    want = runner(x_TD, chosen, weights)
    asked: list[torch.device] = []
    monkeypatch.setattr(e4m3, "has_e4m3", asked.append)
    got = runner(x_TD, chosen, weights)
    live_T = (chosen.ids_TK >= 0).all(-1)
    assert asked and test_grouped.distance(got[live_T], test_grouped.oracle(x_TD, chosen, weights)[live_T]) < test_grouped.BOUND["triton"]
    if DEVICE.type == "cpu":  # in the interpreter both multiply the same numbers in the same order
        assert torch.equal(got, want)
