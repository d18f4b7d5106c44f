"""e4m3 on GPUs that have no such type: kernels there see its bytes.

Triton converts e4m3 from compute capability 8.9 on. For an older device a launch passes bytes (`stored`), and what a kernel loads goes
through `widened`, what it stores through `narrowed`: both look at the type when the kernel is compiled, and where it is e4m3 they add
nothing. Numbers become float16, which holds each of them exactly and whose products are summed in float32 as bfloat16's are. Their bits,
shifted, are those of the number times 2^-8: a product makes up for that, denormals included, two numbers at a time.

Four bytes are decoded by fourteen instructions. Written in Triton's own operations it were some forty, and the memory would wait for them.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, misc, no-any-return, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pointsman.kernels.capability import has_e4m3
from pointsman.kernels.weight import FP8


def stored(tensor: Tensor) -> Tensor:
    """A tensor as a launch on its device passes it: e4m3 as uint8 where the device has no such type, all others as they are."""
    return tensor.view(torch.uint8) if tensor.dtype == FP8 and not has_e4m3(tensor.device) else tensor


def _pair(result: str, bytes_to_halves: str) -> str:
    """Two bytes to two numbers: each at the top of a half, its exponent and fraction one place lower; 0x7f alone carries into bit 14."""
    return f"""
    prmt.b32 code, 0, $2, {bytes_to_halves};
    shr.u32 size, code, 1;
    and.b32 size, size, 0x3f803f80;
    add.u32 none, size, 0x00800080;
    and.b32 none, none, 0x40004000;
    or.b32 size, size, none;
    and.b32 code, code, 0x80008000;
    or.b32 size, size, code;
    mul.f16x2 {result}, size, scale;"""


DECODE = tl.constexpr(
    f"{{ .reg .b32 code, size, none, scale; mov.b32 scale, 0x5c005c00; {_pair('$0', '0x5040')} {_pair('$1', '0x7060')} }}"
)


@triton.jit
def decode(code):
    """The float16 numbers of e4m3 bytes, exactly: two zeros, denormals, and NaN for 0x7f and 0xff."""
    return tl.inline_asm_elementwise(DECODE, "=r,=r,r", [code], dtype=tl.float16, is_pure=True, pack=4)


@triton.jit
def encode(x):
    """The e4m3 bytes of float32 numbers, rounded to nearest, ties to even; beyond 448 it is 448, infinity included, and NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    whole = bits & 0x7FFFFFFF
    size = tl.minimum(whole, 0x43E00000)  # 448
    code = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # float32 numbers from 2^14 on are 2^-9 apart, as e4m3's denormals are
    tiny = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0x3C800000, tiny, code)  # 2^-6
    code = tl.where(whole > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def widened(x):
    """Numbers that were loaded, as a product takes them: bytes of e4m3 decoded, others as they are."""
    if x.dtype == tl.uint8:
        return decode(x)
    else:
        return x


@triton.jit
def narrowed(x, TYPE: tl.constexpr):
    """Numbers as what they are stored into wants them; bytes are those of e4m3."""
    if tl.uint8 == TYPE:
        return encode(x.to(tl.float32))
    else:
        return x.to(TYPE)
