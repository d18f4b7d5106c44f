"""Vectors of sixteen floats and raw pointers for numba kernels.

Numba has scalars and arrays; whether a loop over them becomes vector code is up to LLVM, and arrays bring bounds, strides and
reference counts (an atomic add on a shared cache line) along. The step on a CPU needs neither: here is a value type `Lanes`
(sixteen float32 in a register, or in two or four where registers are narrower) with loads that widen bfloat16 and float8 e4m3,
the usual arithmetic, and an exponential. Each operation is one LLVM instruction or a short chain of them, so a sum has the one
order that is written down, on every machine and at every batch size.

A pointer is a numba CPointer. Its element type names the stored form: float32, uint16 (bfloat16) or uint8 (e4m3).
e4m3 values are read as their bits stand in a float32, which is 2**-120 of their value (E4M3_READ); whoever folds scales in,
folds that in too.
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

WIDTH = 16
E4M3_READ = 2.0**-120
E4M3_MAX = 448.0

# Division by zero gives infinity, as everywhere else in float32: a kernel has no way to raise.
kernel = njit(error_model="numpy")

FLOAT, INT8, INT16, INT32, INT64 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
STORED = (types.float32, types.uint16, types.uint8)
BITS = {FLOAT: 32, INT16: 16, INT8: 8}


class LanesType(types.Type):
    """Sixteen float32."""

    def __init__(self) -> None:
        super().__init__(name="Lanes")


LANES = LanesType()
VECTOR = ir.VectorType(FLOAT, WIDTH)


@register_model(LanesType)
class LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, frontend_type: Any) -> None:
        super().__init__(manager, frontend_type, VECTOR)


# What follows up to the next heading writes LLVM instructions; the tiles of cpu_tile use it too.


def integers(builder: Any, value: int, element: Any = INT32) -> Any:
    """The constant vector of sixteen times `value`."""
    return ir.Constant(ir.VectorType(element, WIDTH), [value] * WIDTH)


def floats(value: float) -> Any:
    return ir.Constant(VECTOR, [value] * WIDTH)


def call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    """Call an LLVM intrinsic or a C function by name."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def fused(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once."""
    return call(builder, "llvm.fma.v16f32", VECTOR, a, b, c)


def spread(builder: Any, scalar: Any) -> Any:
    one = builder.insert_element(ir.Constant(VECTOR, ir.Undefined), scalar, ir.Constant(INT32, 0))
    return builder.shuffle_vector(one, one, integers(builder, 0))


def first_lanes(builder: Any, count: Any, width: int = WIDTH) -> Any:
    """A mask of the first `count` lanes."""
    vector = ir.VectorType(INT32, width)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), builder.trunc(count, INT32), ir.Constant(INT32, 0))
    wide = builder.shuffle_vector(one, one, ir.Constant(vector, [0] * width))
    return builder.icmp_signed("<", ir.Constant(vector, list(range(width))), wide)


def read_stored(builder: Any, pointer: Any, count: Any, width: int) -> Any:
    """Load `width` elements as they are stored; with a count, that many of them and zeros."""
    element = pointer.type.pointee
    bits = BITS[element]
    vector = ir.VectorType(element, width)
    place = builder.bitcast(pointer, vector.as_pointer())
    if count is None:
        return builder.load(place, align=bits // 8)
    name = f"llvm.masked.load.v{width}{'f' if element == FLOAT else 'i'}{bits}.p0"
    return call(builder, name, vector, place, ir.Constant(INT32, bits // 8), first_lanes(builder, count, width), ir.Constant(vector, None))


def read(builder: Any, pointer: Any, count: Any = None) -> Any:
    """Load sixteen stored elements, or `count` of them and zeros, and widen them to float32."""
    raw, wide = read_stored(builder, pointer, count, WIDTH), ir.VectorType(INT32, WIDTH)
    bits = BITS[pointer.type.pointee]
    if bits == 32:
        return raw
    if bits == 16:
        return builder.bitcast(builder.shl(builder.zext(raw, wide), integers(builder, 16)), VECTOR)
    return _from_e4m3(builder, builder.shl(builder.sext(raw, wide), integers(builder, 20)))


def _from_e4m3(builder: Any, moved: Any) -> Any:
    """Keep the sign and the seven bits that follow at the exponent's low end."""
    return builder.bitcast(builder.and_(moved, integers(builder, 0x87F00000)), VECTOR)


def read_words(builder: Any, pointer: Any, count: Any = None) -> Any:
    """Load sixteen words of 32 bits, each of one, two or four stored elements; with a count of elements, those and zeros."""
    raw = read_stored(builder, pointer, count, WIDTH * 32 // BITS[pointer.type.pointee])
    return builder.bitcast(raw, ir.VectorType(INT32, WIDTH))


def split_words(builder: Any, words: Any, bits: int) -> list[Any]:
    """The elements of words as float32: first the first of each, then the second, ..."""
    if bits == 32:
        return [builder.bitcast(words, VECTOR)]
    if bits == 16:
        low, high = builder.shl(words, integers(builder, 16)), builder.and_(words, integers(builder, 0xFFFF0000))
        return [builder.bitcast(low, VECTOR), builder.bitcast(high, VECTOR)]
    tops = [builder.shl(words, integers(builder, left)) for left in (24, 16, 8, 0)]
    return [_from_e4m3(builder, builder.ashr(top, integers(builder, 4))) for top in tops]


def write(builder: Any, value: Any, pointer: Any, count: Any = None) -> None:
    """Round sixteen floats to the stored form and store them, or the first `count` of them."""
    element = pointer.type.pointee
    bits = BITS[element]
    vector = ir.VectorType(element, WIDTH)
    place = builder.bitcast(pointer, vector.as_pointer())
    value = {32: lambda _, v: v, 16: _to_bfloat16, 8: _to_e4m3}[bits](builder, value)
    if count is None:
        builder.store(value, place, align=bits // 8)
        return
    name = f"llvm.masked.store.v16{'f' if element == FLOAT else 'i'}{bits}.p0"
    call(builder, name, ir.VoidType(), value, place, ir.Constant(INT32, bits // 8), first_lanes(builder, count))


def _to_bfloat16(builder: Any, value: Any) -> Any:
    """Round to nearest, ties to even; a NaN stays one."""
    bits = builder.bitcast(value, ir.VectorType(INT32, WIDTH))
    odd = builder.and_(builder.lshr(bits, integers(builder, 16)), integers(builder, 1))
    rounded = builder.add(bits, builder.add(odd, integers(builder, 0x7FFF)))
    kept = builder.select(builder.fcmp_unordered("uno", value, value), integers(builder, 0x7FC00000), rounded)
    return builder.trunc(builder.lshr(kept, integers(builder, 16)), ir.VectorType(INT16, WIDTH))


def _to_e4m3(builder: Any, value: Any) -> Any:
    """Round to nearest, ties to even; beyond 448 stays 448; a NaN stays one.

    Normal results round in the integer bits, moved from exponent bias 127 to 7. Below 2**-6 the step is a constant 2**-9, and
    adding 2**14, whose own last bit is 2**-9, leaves the rounded count of steps in the low bits of the sum.
    """
    bits = builder.bitcast(value, ir.VectorType(INT32, WIDTH))
    sign = builder.and_(builder.lshr(bits, integers(builder, 24)), integers(builder, 0x80))
    size = builder.bitcast(builder.and_(bits, integers(builder, 0x7FFFFFFF)), VECTOR)
    size = builder.select(builder.fcmp_ordered(">", size, floats(E4M3_MAX)), floats(E4M3_MAX), size)
    whole = builder.bitcast(size, ir.VectorType(INT32, WIDTH))
    odd = builder.and_(builder.lshr(whole, integers(builder, 20)), integers(builder, 1))
    normal = builder.lshr(builder.add(whole, builder.add(odd, integers(builder, 0x7FFFF))), integers(builder, 20))
    normal = builder.sub(normal, integers(builder, (127 - 7) << 3))
    steps = builder.bitcast(builder.fadd(size, floats(2.0**14)), ir.VectorType(INT32, WIDTH))
    steps = builder.sub(steps, integers(builder, (127 + 14) << 23))
    code = builder.select(builder.fcmp_ordered("<", size, floats(2.0**-6)), steps, normal)
    code = builder.select(builder.fcmp_unordered("uno", value, value), integers(builder, 0x7F), code)
    return builder.trunc(builder.or_(code, sign), ir.VectorType(INT8, WIDTH))


# What kernels write.


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
            turned = ir.Constant(ir.VectorType(INT32, WIDTH), [(lane + half) % WIDTH for lane in range(WIDTH)])
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
        bits = builder.shl(builder.bitcast(arguments[0], ir.VectorType(INT32, WIDTH)), integers(builder, 23))
        return builder.bitcast(builder.add(bits, integers(builder, 127 << 23)), VECTOR)

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
