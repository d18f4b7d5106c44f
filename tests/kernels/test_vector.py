"""Lanes against numpy and torch: exponentials to a stated error, conversions bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pointsman.kernels.instruction import E4M3_READ
from pointsman.kernels.vector import exp, kernel, load_some, pointer, sigmoid, store_some

REAL = np.float32(0)


@kernel
def _map(source, target, size, function, read, write):  # type: ignore[no-untyped-def]
    a, b = pointer(source, read), pointer(target, write)
    for i in range(0, size, 16):
        value = load_some(a, i, size - i)
        if function == 1:
            value = exp(value)
        elif function == 2:
            value = sigmoid(value)
        store_some(b, i, value, size - i)


def apply(values: Any, function: int = 0, dtype: Any = np.float32) -> Any:
    """The kernel over an array whose size is no multiple of sixteen, followed by room that must stay as it was."""
    out = np.full(len(values) + 16, 77, dtype)
    _map(values.ctypes.data, out.ctypes.data, len(values), function, values.dtype.type(0), out.dtype.type(0))
    assert (out[len(values) :] == 77).all()
    return out[: len(values)]


def all_floats() -> Any:
    """Every 997th float32, so that signs, exponents, ties and NaN are all among them, and each e4m3 and bfloat16 midpoint."""
    spread = np.arange(0, 1 << 32, 997, dtype=np.uint64).astype(np.uint32)
    ties = (np.arange(1 << 17, dtype=np.uint64) << 15).astype(np.uint32)
    near = np.concatenate([spread, ties, ties + np.uint32(1), ties - np.uint32(1)])
    return near.view(np.float32)


def test_exp_is_within_1e_7() -> None:
    x = np.linspace(-87, 88, 1_000_003).astype(np.float32)
    assert np.abs(apply(x, 1) / np.exp(x.astype(np.float64)) - 1).max() < 1e-7


def test_exp_at_the_ends() -> None:
    x = np.array([np.nan, -np.inf, -1e30, 0.0, -0.0, 1e30, np.inf], np.float32)
    y = apply(x, 1)
    assert np.isnan(y[0]) and (y[3:5] == 1).all()
    assert (y[1:3] < 2e-38).all() and (y[1:3] >= 0).all() and (y[5:] > 1e38).all()


def test_sigmoid_is_within_2e_7() -> None:
    x = np.linspace(-80, 80, 300_001).astype(np.float32)
    assert np.abs(apply(x, 2) * (1 + np.exp(-x.astype(np.float64))) - 1).max() < 2e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_rounding_is_torch_bit_for_bit(dtype: torch.dtype) -> None:
    """To nearest, ties to even. torch's e4m3 does not saturate, so it is given what does."""
    x = all_floats()
    bits = {torch.bfloat16: np.uint16, torch.float8_e4m3fn: np.uint8}[dtype]
    values = torch.from_numpy(x.copy())
    right = (values.clamp(-448, 448) if bits is np.uint8 else values).to(dtype).view(getattr(torch, np.dtype(bits).name)).numpy()
    got = apply(x, 0, bits)
    number = ~np.isnan(x)
    assert (got[number] == right[number]).all()
    back = torch.from_numpy(got[~number].copy()).view(dtype).float()
    assert bool(back.isnan().all())


def test_e4m3_reads_exactly() -> None:
    """All codes, at 2**-120 of their value; the two NaN codes read as 480, which packing refuses and rounding never makes of a number."""
    codes = np.arange(256, dtype=np.uint8)
    right = torch.from_numpy(codes).view(torch.float8_e4m3fn).double().numpy()
    got = apply(codes).astype(np.float64) / E4M3_READ
    finite = ~np.isnan(right)
    assert (got[finite] == right[finite]).all() and (np.abs(got[~finite]) == 480).all()


def test_bfloat16_reads_exactly() -> None:
    codes = np.arange(1 << 16).astype(np.uint16)
    assert (apply(codes).view(np.uint32) == codes.astype(np.uint32) << 16).all()
