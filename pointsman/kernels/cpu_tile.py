"""The inner loops of a step on a CPU: panels times rows, probabilities times values, and the turning of keys into panels.

Every sum is held in a register lane of its own and added to in one fixed order, over k one after the other. How many rows a tile takes
changes which loads are shared, never the order of a sum; so a row's result is the same bits whatever rows run beside it.

Weights lie in panels of 64 outputs, [panel][k][64]: one step of k reads one line of 64 and multiplies it into up to four rows. Keys are
turned into such panels too, of 64 positions, [channel][64], so that scores are one more product with a panel.
With 32 registers of sixteen floats (AVX-512) a tile is 64 outputs wide at every height; with narrower registers it walks the
panel in parts, so that the sums still fit.
"""

# Numba types what it compiles, from calls; annotations would say nothing to it.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, misc, no-any-return"

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pointsman.kernels.instruction import INT8, INT32, INT64, VECTOR, WIDTH, call, floats, fused, read, read_words, split_words, spread

PANEL = 64
MOST_ROWS = 4


def _parts(context: Any, rows: int, vectors: int) -> list[range]:
    """The vectors of a tile's width, in groups whose sums fit in registers beside their operands."""
    wide = "+avx512f" in context.codegen().magic_tuple()[2]
    group = vectors if wide else max(1, vectors // {1: 1, 2: 2}.get(rows, 4))
    return [range(first, min(first + group, vectors)) for first in range(0, vectors, group)]


def _sums(
    builder: Any, num_k: Any, start: Sequence[Any], weights: Callable[[Any], list[Any]], inputs: Callable[[Any], list[Any]]
) -> list[Any]:
    """start[r * v + i] + sum over k of weights(k)[i] * inputs(k)[r], each sum in the order of k."""
    cells = [cgutils.alloca_once_value(builder, value) for value in start]
    with cgutils.for_range(builder, num_k) as loop:
        weight, scalars = weights(loop.index), inputs(loop.index)
        for row, scalar in enumerate(scalars):
            wide = spread(builder, scalar)
            for column, vector in enumerate(weight):
                cell = cells[row * len(weight) + column]
                builder.store(fused(builder, vector, wide, builder.load(cell)), cell)
    return [builder.load(cell) for cell in cells]


def _step(builder: Any, base: Any, *terms: tuple[Any, Any] | Any) -> Any:
    """base + the sum of the terms, each an index or a pair to multiply."""
    for term in terms:
        offset = builder.mul(*term) if isinstance(term, tuple) else term
        base = builder.gep(base, [offset if isinstance(offset, ir.Value) else ir.Constant(INT64, offset)])
    return base


def _index(value: int) -> Any:
    return ir.Constant(INT64, value)


@intrinsic(prefer_literal=True)
def panel_tile(
    context: Any,
    rows: Any,
    columns: Any,
    w: Any,
    num_k: Any,
    x: Any,
    x_stride: Any,
    x_rows: Any,
    scale: Any,
    first: Any,
    y: Any,
    y_stride: Any,
    y_rows: Any,
) -> Any:
    """y[y_rows[r], :64] = (0 if first else y[y_rows[r], :64]) + scale[:64] * sum over k of w[k, :64] * x[x_rows[r], k], r < rows.

    `rows` is a literal from 1 to 4; x_rows and y_rows hold int64 row numbers; scale has 64 float32. With the literal 32 for
    `columns`, the first half of the panel.
    """
    num_rows, vectors = rows.literal_value, columns.literal_value // WIDTH
    pointer = types.CPointer(types.int64)
    real = types.CPointer(types.float32)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, _, w, num_k, x, x_stride, x_rows, scale, first, y, y_stride, y_rows = arguments

        def row(base: Any, stride: Any, numbers: Any, r: int) -> Any:
            return _step(builder, base, (builder.load(_step(builder, numbers, r)), stride))

        inputs = [row(x, x_stride, x_rows, r) for r in range(num_rows)]
        outputs = [row(y, y_stride, y_rows, r) for r in range(num_rows)]
        zero = floats(0.0)
        for part in _parts(context, num_rows, vectors):
            sums = _sums(
                builder,
                num_k,
                [zero] * (num_rows * len(part)),
                lambda k, part=part: [read(builder, _step(builder, w, (k, _index(PANEL)), WIDTH * i)) for i in part],
                lambda k: [builder.load(_step(builder, base, k)) for base in inputs],
            )
            for r, base in enumerate(outputs):
                for j, i in enumerate(part):
                    place = builder.bitcast(_step(builder, base, WIDTH * i), VECTOR.as_pointer())
                    before = builder.select(first, zero, builder.load(place, align=4))
                    scaled = fused(builder, sums[r * len(part) + j], read(builder, _step(builder, scale, WIDTH * i)), before)
                    builder.store(scaled, place, align=4)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(rows, columns, w, i64, real, i64, pointer, real, types.boolean, real, i64, pointer), generate


@intrinsic(prefer_literal=True)
def value_tile(
    context: Any, rows: Any, columns: Any, v: Any, places: Any, num_k: Any, p: Any, p_stride: Any, y: Any, y_stride: Any, count: Any
) -> Any:
    """y[r, :columns] += sum over k of p[r, k] * v[places[k] + (0 .. columns)] for r < rows; k outermost, in its order.

    `rows` is a literal from 1 to 4, `columns` a literal 64 or 16. With 16, only the first `count` of them are read from v and
    the rest are zero; y has all sixteen.
    """
    num_rows, vectors = rows.literal_value, columns.literal_value // WIDTH
    real, whole, i64 = types.CPointer(types.float32), types.CPointer(types.int64), types.int64

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, _, v, places, num_k, p, p_stride, y, y_stride, count = arguments
        limit = count if vectors == 1 else None
        for part in _parts(context, num_rows, vectors):
            targets = [
                builder.bitcast(_step(builder, y, (y_stride, _index(r)), WIDTH * i), VECTOR.as_pointer())
                for r in range(num_rows)
                for i in part
            ]

            def weights(k: Any, part: range = part) -> list[Any]:
                row = _step(builder, v, builder.load(_step(builder, places, k)))
                return [read(builder, _step(builder, row, WIDTH * i), limit) for i in part]

            sums = _sums(
                builder,
                num_k,
                [builder.load(target, align=4) for target in targets],
                weights,
                lambda k: [builder.load(_step(builder, p, (p_stride, _index(r)), k)) for r in range(num_rows)],
            )
            for value, target in zip(sums, targets, strict=True):
                builder.store(value, target, align=4)
        return context.get_dummy_value()

    return types.void(rows, columns, v, whole, i64, real, i64, real, i64, i64), generate


@intrinsic
def turn_tile(context: Any, k: Any, v: Any, places: Any, dim: Any, panel: Any) -> Any:
    """panel[d, p] = k[places[p] + d] for p < 16, d < dim; channels that pad `dim` to 64 may be written too, with zeros.

    Words of 32 bits are turned, as stored: one channel of float32, two of bfloat16, four of e4m3, which are told apart after that.
    On the way what comes next is asked for, because pages lie anywhere and no hardware guesses where: the values of the same
    positions, and the keys of those a panel on. Addresses behind the last position may be anything.
    """
    bits = {types.float32: 32, types.uint16: 16, types.uint8: 8}[k.dtype]
    channels = 32 // bits * WIDTH

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        k, v, places, dim, panel = arguments
        keys = [_step(builder, k, builder.load(_step(builder, places, p))) for p in range(WIDTH)]

        def fetch(base: Any, index: int, d: Any) -> None:
            place = builder.bitcast(_step(builder, base, builder.load(_step(builder, places, index)), d), INT8.as_pointer())
            call(builder, "llvm.prefetch.p0", ir.VoidType(), place, *(ir.Constant(INT32, option) for option in (0, 3, 1)))

        def turn(d: Any, limit: Any) -> None:
            for p in range(WIDTH):
                fetch(v, p, d)
                fetch(k, p + PANEL, d)
            for i, word in enumerate(_transposed(builder, [read_words(builder, _step(builder, key, d), limit) for key in keys])):
                for j, vector in enumerate(split_words(builder, word, bits)):
                    place = _step(builder, panel, (builder.add(d, _index(i * (32 // bits) + j)), _index(PANEL)))
                    builder.store(vector, builder.bitcast(place, VECTOR.as_pointer()), align=4)

        full = builder.and_(dim, _index(-channels))
        with cgutils.for_range_slice(builder, _index(0), full, _index(channels)) as (d, _count):
            turn(d, None)
        with builder.if_then(builder.icmp_signed("<", full, dim)):
            turn(full, builder.sub(dim, full))
        return context.get_dummy_value()

    real, whole = types.CPointer(types.float32), types.CPointer(types.int64)
    return types.void(k, k, whole, types.int64, real), generate


def _transposed(builder: Any, vectors: list[Any]) -> list[Any]:
    """Vectors exchanged in halves, quarters, ...: at each distance, lanes with that bit change places with vectors with that bit."""
    for half in (8, 4, 2, 1):
        near, far = (
            ir.Constant(ir.VectorType(INT32, WIDTH), [(lane ^ half) + WIDTH if lane & half else lane for lane in range(WIDTH)]),
            ir.Constant(ir.VectorType(INT32, WIDTH), [lane + WIDTH if lane & half else lane ^ half for lane in range(WIDTH)]),
        )
        for i in range(WIDTH):
            if not i & half:
                a, b = vectors[i], vectors[i + half]
                vectors[i], vectors[i + half] = builder.shuffle_vector(a, b, near), builder.shuffle_vector(a, b, far)
    return vectors
