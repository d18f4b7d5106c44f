"""e4m3 on GPUs that have no such type: kernels there see its bytes.

Triton converts e4m3 from compute capability 8.9 on. For an older device a launch passes bytes (`stored`), and what a kernel loads goes
through `widened`, what it stores through `narrowed`: both look at the type when the kernel is compiled, and where it is e4m3 they add
nothing. Numbers become float16, which holds each of them exactly and multiplies with float32 sums as bfloat16 does; a scale of 2^8 makes up
for the other bias of the exponent, denormals included, which in bfloat16 would be made in float32.
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


@triton.jit
def decode(code):
    """The float16 numbers of e4m3 bytes, exactly: two zeros, denormals, and NaN for 0x7f and 0xff."""
    code = code.to(tl.int16)
    size = (code & 0x7F) << 7
    # only 0x7f carries into this bit, which makes its exponent that of NaN
    size |= (size + 0x80) & 0x4000
    return (size | ((code & 0x80) << 8)).to(tl.float16, bitcast=True) * 256.0


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
    if TYPE == tl.uint8:
        return encode(x.to(tl.float32))
    else:
        return x.to(TYPE)
