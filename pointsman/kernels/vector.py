"""Vectors of sixteen floats and raw pointers for numba kernels.

Numba has scalars and arrays; whether a loop over them becomes vector code is up to LLVM, and arrays bring bounds, strides and
reference counts (an atomic add on a shared cache line) along. The step on a CPU needs neither: here is a value type `Lanes`
(sixteen float32 in a register, or in two or four where registers are narrower) with loads that widen bfloat16 and float8 e4m3,
the usual arithmetic, and an exponential. Each operation is one LLVM instruction or a short chain of them, so a sum has the one
order that is written down, on every machine and at every batch size.

A pointer is a numba CPointer to float32, uint16 (bfloat16) or uint8 (e4m3, read as 2**-120 of its value; see instruction).
"""

# Numba types what it compiles, from calls; annotations would say nothing to it.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, misc, no-any-return"

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

from pointsman.kernels.instruction import FLOAT, INT8, INT32, INT64, VECTOR, WIDTH, WORDS, call, fused, integers, read, spread, write

# Division by zero gives infinity, as everywhere else in float32: a kernel has no way to raise.
kernel = njit(error_model="numpy")

STORED = (types.float32, types.uint16, types.uint8)


class LanesType(types.Type):
    """Sixteen float32."""

    def __init__(self) -> None:
        super().__init__(name="Lanes")


LANES = LanesType()


@register_model(LanesType)
class LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, frontend_type: Any) -> None:
        super().__init__(manager, frontend_type, VECTOR)


def _pointer_to_stored(kind: Any) -> bool:
    return isinstance(kind, types.CPointer) and kind.dtype in STORED


@intrinsic
def pointer(context: Any, address: Any, sample: Any) -> Any:
    """A pointer to elements of the sample's type at an address."""
    result = types.CPointer(sample)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(result))

    return result(address, sample), generate


@intrinsic
def whole(context: Any, number: Any) -> Any:
    """The number as int64. A literal in a call has a type of its own, for which the function called is compiled once more."""
    return types.int64(number), lambda context, builder, signature, arguments: context.cast(
        builder, arguments[0], signature.args[0], types.int64
    )


@intrinsic
def at(context: Any, base: Any, index: Any) -> Any:
    """The pointer `index` elements on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.gep(arguments[0], [arguments[1]])

    return base(base, types.int64), generate


@intrinsic
def load(context: Any, base: Any, index: Any) -> Any:
    """Sixteen elements from base[index] on."""
    assert _pointer_to_stored(base), base

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return read(builder, builder.gep(arguments[0], [arguments[1]]))

    return LANES(base, types.int64), generate


@intrinsic
def load_some(context: Any, base: Any, index: Any, count: Any) -> Any:
    """min(count, 16) elements from base[index] on, then zeros; nothing beyond them is touched."""
    assert _pointer_to_stored(base), base

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place, count = builder.gep(arguments[0], [arguments[1]]), arguments[2]
        result = cgutils.alloca_once(builder, VECTOR)
        with builder.if_else(builder.icmp_signed(">=", count, ir.Constant(INT64, WIDTH))) as (full, part):
            with full:
                builder.store(read(builder, place), result)
            with part:
                builder.store(read(builder, place, count), result)
        return builder.load(result)

    return LANES(base, types.int64, types.int64), generate


@intrinsic
def store(context: Any, base: Any, index: Any, value: Any) -> Any:
    """Store sixteen elements at base[index], rounded to the pointer's stored form."""
    assert _pointer_to_stored(base), base

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        write(builder, arguments[2], builder.gep(arguments[0], [arguments[1]]))
        return context.get_dummy_value()

    return types.void(base, types.int64, LANES), generate


@intrinsic
def store_some(context: Any, base: Any, index: Any, value: Any, count: Any) -> Any:
    """Store the first min(count, 16) elements at base[index]; nothing beyond them is touched."""
    assert _pointer_to_stored(base), base

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place, count = builder.gep(arguments[0], [arguments[1]]), arguments[3]
        with builder.if_else(builder.icmp_signed(">=", count, ir.Constant(INT64, WIDTH))) as (full, part):
            with full:
                write(builder, arguments[2], place)
            with part:
                write(builder, arguments[2], place, count)
        return context.get_dummy_value()

    return types.void(base, types.int64, LANES, types.int64), generate


@intrinsic
def prefetch(context: Any, base: Any, index: Any) -> Any:
    """Ask for the cache line of base[index]; the address need not be one that may be read."""
    assert _pointer_to_stored(base), base

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.bitcast(builder.gep(arguments[0], [arguments[1]]), INT8.as_pointer())
        call(builder, "llvm.prefetch.p0", ir.VoidType(), place, *(ir.Constant(INT32, option) for option in (0, 3, 1)))
        return context.get_dummy_value()

    return types.void(base, types.int64), generate


@intrinsic
def splat(context: Any, scalar: Any) -> Any:
    """Sixteen times one float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return spread(builder, context.cast(builder, arguments[0], signature.args[0], types.float32))

    return LANES(scalar), generate


@intrinsic
def root(context: Any, value: Any) -> Any:
    """The square root of a float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return call(builder, "llvm.sqrt.f32", FLOAT, context.cast(builder, arguments[0], signature.args[0], types.float32))

    return types.float32(value), generate


@intrinsic
def fma(context: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once."""
    return LANES(LANES, LANES, LANES), lambda context, builder, signature, arguments: fused(builder, *arguments)


def _choose(relation: str) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.select(builder.fcmp_ordered(relation, *arguments), *arguments)

    return generate


@intrinsic
def larger(context: Any, a: Any, b: Any) -> Any:
    """The larger of each lane; where b is NaN, NaN."""
    return LANES(LANES, LANES), _choose(">")


@intrinsic
def smaller(context: Any, a: Any, b: Any) -> Any:
    """The smaller of each lane; where b is NaN, NaN."""
    return LANES(LANES, LANES), _choose("<")


def _fold(combine: Any) -> Any:
    """Combine the lanes of a vector in halves: eight pairs, four, two, one."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (value,) = arguments
        for half in (8, 4, 2, 1):
            turned = ir.Constant(WORDS, [(lane + half) % WIDTH for lane in range(WIDTH)])
            value = combine(builder, value, builder.shuffle_vector(value, value, turned))
        return builder.extract_element(value, ir.Constant(INT32, 0))

    return generate


@intrinsic
def total(context: Any, value: Any) -> Any:
    """The sum of the lanes, always in the same order."""
    return types.float32(LANES), _fold(lambda builder, a, b: builder.fadd(a, b))


@intrinsic
def largest(context: Any, value: Any) -> Any:
    """The largest lane."""
    return types.float32(LANES), _fold(lambda builder, a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))


def _operator(function: Any, instruction: str) -> None:
    template = type(f"Lanes_{instruction}", (ConcreteTemplate,), {"cases": [signature(LANES, LANES, LANES)]})
    infer_global(function)(template)
    lower_builtin(function, LanesType, LanesType)(lambda context, builder, signature, arguments: getattr(builder, instruction)(*arguments))


for _function, _instruction in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul"), (operator.truediv, "fdiv")):
    _operator(_function, _instruction)


@intrinsic
def _power_of_two(context: Any, shifted: Any) -> Any:
    """2**n, where n sits in the low bits of a float near 1.5 * 2**23."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.shl(builder.bitcast(arguments[0], WORDS), integers(23))
        return builder.bitcast(builder.add(bits, integers(127 << 23)), VECTOR)

    return LANES(LANES), generate


@kernel
def exp(x):
    """e**x within 1.2e-7 relative; arguments are held to [-87, 88], NaN stays NaN.

    x = n ln 2 + r with |r| <= 0.35, n read off the low bits after adding 1.5 * 2**23; 1 + r + r**2 times a
    polynomial fitted to (e**r - 1 - r) / r**2 for the least relative error of the whole, 3.1e-9.
    """
    x = smaller(splat(88.0), larger(splat(-87.0), x))
    shifted = fma(x, splat(1.4426950408889634), splat(12582912.0))
    n = shifted - splat(12582912.0)
    r = fma(n, splat(-0.693145751953125), x)
    r = fma(n, splat(-1.428606820309417e-06), r)
    p = fma(splat(0.0013814539), r, splat(0.008368745))
    p = fma(p, r, splat(0.04166839))
    p = fma(p, r, splat(0.16666521))
    p = fma(p, r, splat(0.49999994))
    p = fma(p, r * r, r) + splat(1.0)
    return p * _power_of_two(shifted)


@kernel
def sigmoid(x):
    """1 / (1 + e**-x)."""
    return splat(1.0) / (splat(1.0) + exp(splat(0.0) - x))
