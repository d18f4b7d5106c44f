"""The three inner loops of a step on a CPU: weights times activations, queries times keys, probabilities times values.

Every loop holds its sums in registers and adds to each in one fixed order: over k one after the other where an output has its own
lane (weights, values), over sixteen partial sums and then their tree where a lane is a channel (keys). How many rows a tile takes
changes which loads are shared, never the order of one sum; so a row's result is the same bits whatever rows run beside it.

Weights lie in panels of 64 outputs, [panel][k][64]: one step of k reads one line of 64 and multiplies it into up to four rows.
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

from pointsman.kernels.vector import FLOAT, INT32, INT64, VECTOR, WIDTH, floats, fused, read, spread

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

    `rows` is a literal from 1 to 4; x_rows and y_rows hold int64 row numbers; scale has 64 float32.
    """
    num_rows = rows.literal_value
    pointer = types.CPointer(types.int64)
    real = types.CPointer(types.float32)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, w, num_k, x, x_stride, x_rows, scale, first, y, y_stride, y_rows = arguments

        def row(base: Any, stride: Any, numbers: Any, r: int) -> Any:
            return _step(builder, base, (builder.load(_step(builder, numbers, r)), stride))

        inputs = [row(x, x_stride, x_rows, r) for r in range(num_rows)]
        outputs = [row(y, y_stride, y_rows, r) for r in range(num_rows)]
        zero = floats(0.0)
        for part in _parts(context, num_rows, PANEL // WIDTH):
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
    return types.void(rows, w, i64, real, i64, pointer, real, types.boolean, real, i64, pointer), generate


@intrinsic(prefer_literal=True)
def value_tile(
    context: Any, rows: Any, columns: Any, v: Any, v_stride: Any, num_k: Any, p: Any, p_stride: Any, y: Any, y_stride: Any, count: Any
) -> Any:
    """y[r, :columns] += sum over k of p[r, k] * v[k, :columns] for r < rows; k outermost, in its order.

    `rows` is a literal from 1 to 4, `columns` a literal 64 or 16. With 16, only the first `count` of them are read from v and
    the rest are zero; y has all sixteen.
    """
    num_rows, vectors = rows.literal_value, columns.literal_value // WIDTH
    real, i64 = types.CPointer(types.float32), types.int64

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, _, v, v_stride, num_k, p, p_stride, y, y_stride, count = arguments
        limit = count if vectors == 1 else None
        for part in _parts(context, num_rows, vectors):
            places = [
                builder.bitcast(_step(builder, y, (y_stride, _index(r)), WIDTH * i), VECTOR.as_pointer())
                for r in range(num_rows)
                for i in part
            ]
            sums = _sums(
                builder,
                num_k,
                [builder.load(place, align=4) for place in places],
                lambda k, part=part: [read(builder, _step(builder, v, (k, v_stride), WIDTH * i), limit) for i in part],
                lambda k: [builder.load(_step(builder, p, (p_stride, _index(r)), k)) for r in range(num_rows)],
            )
            for value, place in zip(sums, places, strict=True):
                builder.store(value, place, align=4)
        return context.get_dummy_value()

    return types.void(rows, columns, v, i64, i64, real, i64, real, i64, i64), generate


@intrinsic(prefer_literal=True)
def score_tile(
    context: Any, rows: Any, keys: Any, k: Any, k_stride: Any, dim: Any, q: Any, q_stride: Any, scores: Any, scores_stride: Any
) -> Any:
    """scores[r, p] = sum over d of q[r, d] * k[p, d] for r < rows, p < keys (literals: 1, 2 or 4 rows; 1 or 4 keys).

    Rows of q are padded with zeros to sixteen; of k nothing beyond `dim` is read.
    """
    num_rows, num_keys = rows.literal_value, keys.literal_value
    real, i64 = types.CPointer(types.float32), types.int64

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, _, k, k_stride, dim, q, q_stride, scores, scores_stride = arguments
        cells = [cgutils.alloca_once_value(builder, floats(0.0)) for _ in range(num_rows * num_keys)]

        def multiply(d: Any, limit: Any) -> None:
            key = [read(builder, _step(builder, k, (k_stride, _index(p)), d), limit) for p in range(num_keys)]
            for r in range(num_rows):
                query = read(builder, _step(builder, q, (q_stride, _index(r)), d))
                for p in range(num_keys):
                    cell = cells[r * num_keys + p]
                    builder.store(fused(builder, query, key[p], builder.load(cell)), cell)

        whole = builder.and_(dim, _index(-WIDTH))
        with cgutils.for_range_slice(builder, _index(0), whole, _index(WIDTH)) as (d, _count):
            multiply(d, None)
        with builder.if_then(builder.icmp_signed("<", whole, dim)):
            multiply(whole, builder.sub(dim, whole))
        sums = _lane_sums(builder, [builder.load(cell) for cell in cells])
        for r in range(num_rows):
            lanes = ir.Constant(ir.VectorType(INT32, num_keys), list(range(r * num_keys, (r + 1) * num_keys)))
            place = _step(builder, scores, (scores_stride, _index(r)))
            place = builder.bitcast(place, ir.VectorType(FLOAT, num_keys).as_pointer())
            builder.store(builder.shuffle_vector(sums, sums, lanes), place, align=4)
        return context.get_dummy_value()

    return types.void(rows, keys, k, i64, i64, real, i64, real, i64), generate


def _lane_sums(builder: Any, vectors: list[Any]) -> Any:
    """A vector whose lane i is the sum of the lanes of vectors[i]; their number is a power of two up to 16.

    Two vectors are merged by adding their halves, quarters, ... crosswise: half of the result belongs to each, and so on down.
    """
    half = WIDTH // 2
    while half >= len(vectors):
        turned = ir.Constant(ir.VectorType(INT32, WIDTH), [lane ^ half for lane in range(WIDTH)])
        vectors = [builder.fadd(vector, builder.shuffle_vector(vector, vector, turned)) for vector in vectors]
        half //= 2
    while half:
        near = [lane + WIDTH - half if lane & half else lane for lane in range(WIDTH)]
        far = [lane + WIDTH if lane & half else lane + half for lane in range(WIDTH)]
        near, far = (ir.Constant(ir.VectorType(INT32, WIDTH), lanes) for lanes in (near, far))
        pairs = zip(vectors[:half], vectors[half:], strict=True)
        vectors = [builder.fadd(builder.shuffle_vector(a, b, near), builder.shuffle_vector(a, b, far)) for a, b in pairs]
        half //= 2
    return vectors[0]
