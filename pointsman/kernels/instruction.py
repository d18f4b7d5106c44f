"""LLVM instructions for vectors of sixteen floats, and for the stored forms of weights and cache.

Written once here and used by whatever writes code: the operations of kernels (vector) and the inner loops (cpu_tile). A pointer's
element type names the stored form: float, i16 (bfloat16) or i8 (e4m3). e4m3 is read as its bits stand in a float32, which is 2**-120 of
its value (E4M3_READ); whoever folds scales in, folds that in too.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

WIDTH = 16
E4M3_READ = 2.0**-120
E4M3_MAX = 448.0

FLOAT, INT8, INT16, INT32, INT64 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
BITS = {FLOAT: 32, INT16: 16, INT8: 8}
VECTOR, WORDS = ir.VectorType(FLOAT, WIDTH), ir.VectorType(INT32, WIDTH)


def integers(value: int) -> Any:
    """The constant vector of sixteen times `value`."""
    return ir.Constant(WORDS, [value] * WIDTH)


def floats(value: float) -> Any:
    """The constant vector of sixteen times `value`."""
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
    return builder.shuffle_vector(one, one, integers(0))


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
    raw, wide = read_stored(builder, pointer, count, WIDTH), WORDS
    bits = BITS[pointer.type.pointee]
    if bits == 32:
        return raw
    if bits == 16:
        return builder.bitcast(builder.shl(builder.zext(raw, wide), integers(16)), VECTOR)
    return _from_e4m3(builder, builder.shl(builder.sext(raw, wide), integers(20)))


def _from_e4m3(builder: Any, moved: Any) -> Any:
    """Keep the sign and the seven bits that follow at the exponent's low end."""
    return builder.bitcast(builder.and_(moved, integers(0x87F00000)), VECTOR)


def read_words(builder: Any, pointer: Any, count: Any = None) -> Any:
    """Load sixteen words of 32 bits, each of one, two or four stored elements; with a count of elements, those and zeros."""
    raw = read_stored(builder, pointer, count, WIDTH * 32 // BITS[pointer.type.pointee])
    return builder.bitcast(raw, WORDS)


def split_words(builder: Any, words: Any, bits: int) -> list[Any]:
    """The elements of words as float32: first the first of each, then the second, ..."""
    if bits == 32:
        return [builder.bitcast(words, VECTOR)]
    if bits == 16:
        low, high = builder.shl(words, integers(16)), builder.and_(words, integers(0xFFFF0000))
        return [builder.bitcast(low, VECTOR), builder.bitcast(high, VECTOR)]
    tops = [builder.shl(words, integers(left)) for left in (24, 16, 8, 0)]
    return [_from_e4m3(builder, builder.ashr(top, integers(4))) for top in tops]


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
    bits = builder.bitcast(value, WORDS)
    odd = builder.and_(builder.lshr(bits, integers(16)), integers(1))
    rounded = builder.add(bits, builder.add(odd, integers(0x7FFF)))
    kept = builder.select(builder.fcmp_unordered("uno", value, value), integers(0x7FC00000), rounded)
    return builder.trunc(builder.lshr(kept, integers(16)), ir.VectorType(INT16, WIDTH))


def _to_e4m3(builder: Any, value: Any) -> Any:
    """Round to nearest, ties to even; beyond 448 stays 448; a NaN stays one.

    Normal results round in the integer bits, moved from exponent bias 127 to 7. Below 2**-6 the step is a constant 2**-9, and
    adding 2**14, whose own last bit is 2**-9, leaves the rounded count of steps in the low bits of the sum.
    """
    bits = builder.bitcast(value, WORDS)
    sign = builder.and_(builder.lshr(bits, integers(24)), integers(0x80))
    size = builder.bitcast(builder.and_(bits, integers(0x7FFFFFFF)), VECTOR)
    size = builder.select(builder.fcmp_ordered(">", size, floats(E4M3_MAX)), floats(E4M3_MAX), size)
    whole = builder.bitcast(size, WORDS)
    odd = builder.and_(builder.lshr(whole, integers(20)), integers(1))
    normal = builder.lshr(builder.add(whole, builder.add(odd, integers(0x7FFFF))), integers(20))
    normal = builder.sub(normal, integers((127 - 7) << 3))
    steps = builder.bitcast(builder.fadd(size, floats(2.0**14)), WORDS)
    steps = builder.sub(steps, integers((127 + 14) << 23))
    code = builder.select(builder.fcmp_ordered("<", size, floats(2.0**-6)), steps, normal)
    code = builder.select(builder.fcmp_unordered("uno", value, value), integers(0x7F), code)
    return builder.trunc(builder.or_(code, sign), ir.VectorType(INT8, WIDTH))
