"""What a product of many rows (`wide_gemm`) leaves: hidden rows activated and quantized, or rows of `down` where their pairs are.

Numbers have the bits that `grouped_gemm` gives them, in fewer instructions: one group of warps has nothing else to do meanwhile, and
while both store, no tensor core works.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, misc, no-any-return, no-untyped-call, attr-defined, import-untyped"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

STORED = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # 16 bytes of bfloat16 a thread
STORED_FP8 = gl.constexpr(gl.BlockedLayout([1, 16], [8, 4], [4, 1], [1, 0]))


@gluon.jit
def silu(x):
    """x / (1 + exp(-x)), with the bits of Triton's division and exponential, whose care for tiny divisors 1 + exp(-x) needs none of."""
    power = gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * -1.4426950408889634], gl.float32, True, 1)
    quarter = gl.fma(power, gl.full_like(power, 0.25), gl.full_like(power, 0.25))
    return x * 0.25 * gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [quarter], gl.float32, True, 1)


@gluon.jit
def rounded(x):
    """x as bfloat16 has it, two in one instruction."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 both; cvt.rn.bf16x2.f32 both, $3, $2; shl.b32 $0, both, 16; and.b32 $1, both, 0xffff0000; }",
        "=f,=f,f,f", [x], gl.float32, True, 2,
    )  # fmt: skip


@gluon.jit
def store_hidden(first_gate, second_gate, first_up, second_up, h_ptr, hs_ptr, start, across, num_rows, ACROSS: gl.constexpr):
    """silu(gate) * up, rounded to bfloat16 and quantized, as 64 rows of one group of 128 columns."""
    first = rounded(silu(first_gate) * first_up)
    second = rounded(silu(second_gate) * second_up)
    largest = gl.maximum(gl.max(gl.abs(first), axis=1), gl.max(gl.abs(second), axis=1))
    scale = gl.div_rn(largest, gl.full_like(largest, 448.0))
    divisor = gl.where(scale == 0, 1.0, scale)
    row = start + gl.arange(0, 64, layout=gl.SliceLayout(1, STORED_FP8))
    column = across * 128 + gl.arange(0, 64, layout=gl.SliceLayout(0, STORED_FP8))
    ptrs = h_ptr + row.to(gl.int64)[:, None] * (ACROSS * 128) + column[None, :]
    gl.store(ptrs, gl.convert_layout(quotient(first, divisor).to(gl.float8e4nv), STORED_FP8))
    gl.store(ptrs + 64, gl.convert_layout(quotient(second, divisor).to(gl.float8e4nv), STORED_FP8))
    gl.store(hs_ptr + across * num_rows + start + gl.arange(0, 64, layout=gl.SliceLayout(1, first_gate.type.layout)), scale)


@gluon.jit
def quotient(x, divisor):
    """`quotient.quotient`, in Gluon, but for the sign of zero."""
    lift = gl.where(divisor < 2.0**-64, 2.0**64, 1.0)
    divisor = divisor * lift
    inverse = gl.div_rn(gl.full_like(divisor, 1.0), divisor)[:, None] + gl.zeros_like(x)
    divisor = divisor[:, None] + gl.zeros_like(x)
    x = x * lift[:, None]
    q = x * inverse
    q = gl.fma(gl.fma(-q, divisor, x), inverse, q)
    q = gl.fma(gl.fma(-q, divisor, x), inverse, q)
    return q


@gluon.jit
def store_rows(y, y_ptr, pair, column, num_pairs, N: gl.constexpr):
    """64 rows of 64 columns to the rows of their pairs."""
    columns = column + gl.arange(0, 64, layout=gl.SliceLayout(0, STORED))
    y = gl.convert_layout(y.to(y_ptr.dtype.element_ty), STORED)
    gl.store(y_ptr + pair.to(gl.int64)[:, None] * N + columns[None, :], y, mask=(pair < num_pairs)[:, None])
