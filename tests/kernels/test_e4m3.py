"""e4m3 as bytes, for GPUs that have no such type: the conversions against torch's, and the kernels' own tests with bytes in its place."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from pointsman.kernels.e4m3 import decode, encode
from pointsman.kernels.weight import FP8, FP8_MAX
from tests.kernels.interpreter import correct

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
    # of NaN there are many: that it is one, and of zeros their signs
    torch.testing.assert_close(got.cpu().float(), want, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got.cpu().signbit(), want.signbit()) and int(got.isnan().sum()) == 2


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
