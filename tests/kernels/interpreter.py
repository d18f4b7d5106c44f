"""Corrections of Triton's interpreter (seen needed on 3.6.0 and 3.9.0), so that it computes what a GPU does.

Its `tl.dot` multiplies the bit patterns of bfloat16 numbers, its cast to FP8 drops the carry out of the fraction, and its cast to
bfloat16 cuts rather than rounds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter

LARGEST = {"fp8e4nv": (torch.float8_e4m3fn, 448.0), "fp8e5": (torch.float8_e5m2, 57344.0)}
_dot = interpreter.InterpreterBuilder.create_dot
_convert = interpreter._convert_float


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


def correct() -> None:
    """Put the corrections in; doing it again changes nothing."""
    interpreter.InterpreterBuilder.create_dot = _create_dot
    interpreter._convert_float = _convert_float
