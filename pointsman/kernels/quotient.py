"""Division of many numbers by few, in a kernel.

A division that rounds as it should is some ten operations and a branch, one number after the other: hidden rows of a tile took a fifth of
its time. Here a first guess, made with the rounded inverse of the divisor, is corrected twice by its remainder, and then it is the
rounded quotient (Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor", 1990).
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, misc, no-any-return, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

TINY, LIFT = tl.constexpr(2.0**-64), tl.constexpr(2.0**64)


@triton.jit
def quotient(x, divisor):
    """x / divisor[:, None] of float32, bit by bit, where no quotient that matters is below 2^-60 and all are finite.

    Rows of tiny numbers are lifted by a power of two, so that no remainder underflows."""
    lift = tl.where(divisor < TINY, LIFT, 1.0)
    divisor = divisor * lift
    inverse = tl.broadcast_to(tl.div_rn(1.0, divisor)[:, None], x.shape)
    divisor = tl.broadcast_to(divisor[:, None], x.shape)
    x = x * lift[:, None]
    q = x * inverse
    q = tl.fma(tl.fma(-q, divisor, x), inverse, q)
    q = tl.fma(tl.fma(-q, divisor, x), inverse, q)
    return tl.where(x == 0, x, q)  # the remainder has lost the sign of a zero
