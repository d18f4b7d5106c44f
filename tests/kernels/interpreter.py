"""Corrections of Triton's interpreter (seen needed on 3.6.0, 3.7.1 and 3.9.0), so that it computes what a GPU does.

Its `tl.dot` multiplies the bit patterns of bfloat16 numbers, its cast to FP8 drops the carry out of the fraction, and its cast to
bfloat16 cuts rather than rounds. Before 3.9 its fma of float32 rounds twice. Assembly it does not run; that of our kernels runs in `ptx`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter

from tests.kernels import ptx

LARGEST = {"fp8e4nv": (torch.float8_e4m3fn, 448.0), "fp8e5": (torch.float8_e5m2, 57344.0)}
_dot = interpreter.InterpreterBuilder.create_dot
_convert = interpreter._convert_float
_fma = interpreter.InterpreterBuilder.create_fma


def _float32(handle: Any) -> Any:
    if not handle.dtype.scalar.is_bf16():
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
    return _dot(self, _float32(a), _float32(b), d, *rest)


def _convert_float(values: Any, source: Any, target: Any, mode: Any) -> Any:
    if target.scalar.is_bf16() and source.scalar.name == "fp32":
        x = np.ascontiguousarray(values).view(np.float32)
        return torch.from_numpy(x.copy()).bfloat16().view(torch.uint16).numpy()
    kind = LARGEST.get(target.scalar.name)
    if kind is None or source.scalar.name not in ("fp32", "fp16", "bf16"):
        return _convert(values, source, target, mode)
    x = np.ascontiguousarray(values)
    if source.scalar.is_bf16():
        x = (x.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        x = x.view(np.float32 if source.scalar.name == "fp32" else np.float16).astype(np.float32)
    return torch.from_numpy(x.copy()).clamp(-kind[1], kind[1]).to(kind[0]).view(torch.uint8).numpy()


def _create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    """x * y + z of float32, rounded once: the product is exact in float64, the sum is rounded to odd there, and float32 may round that."""
    if z.dtype.scalar != tl.float32:
        return _fma(self, x, y, z)
    with np.errstate(invalid="ignore", over="ignore"):
        product = x.data.astype(np.float64) * y.data.astype(np.float64)
        term = z.data.astype(np.float64)
        total = np.asarray(product + term)
        part = total - product
        rest = (product - (total - part)) + (term - part)
        bits = total.view(np.int64)
        even = (rest != 0) & (bits & 1 == 0) & np.isfinite(total)
        odd = np.where(even, bits + np.where((rest > 0) == (total > 0), 1, -1), bits).view(np.float64)
        return interpreter.TensorHandle(odd.astype(np.float32), z.dtype.scalar)


class _Results(NamedTuple):
    """As the compiler has the results of a block of assembly."""

    handles: list[Any]

    def get_result(self, index: int) -> Any:
        return self.handles[index]


def _create_inline_asm(self: Any, asm: str, constraints: str, values: list[Any], types: list[Any], is_pure: bool, pack: int) -> Any:
    """One tensor of bytes, four of them in a word, to one of 16-bit numbers."""
    assert constraints == "=r,=r,r" and pack == 4 and len(values) == len(types) == 1 and types[0].scalar.primitive_bitwidth == 16
    code = values[0].data.astype(np.uint8)
    padded = np.pad(code.ravel(), (0, -code.size % pack))
    words = np.stack(ptx.run(asm, [padded.view(np.uint32)], 2), axis=1)
    numbers = words.view(np.float16).ravel()[: code.size].reshape(code.shape)
    return _Results([interpreter.TensorHandle(numbers, types[0].scalar)])


def correct() -> None:
    """Put the corrections in; doing it again changes nothing."""
    interpreter.InterpreterBuilder.create_dot = _create_dot
    interpreter._convert_float = _convert_float
    interpreter.InterpreterBuilder.create_inline_asm = _create_inline_asm
    interpreter.InterpreterBuilder.create_fma = _create_fma
