"""Causal attention of single rows over the paged cache, many query heads to one key head.

A row is a unit of its own: positions are walked in blocks of a fixed length, page by page, with a running maximum and sum, so its
result depends on its position and on nothing else in the step. The heads that share a key head are done together, so that each
key and value is read and widened once for all of them.
"""

# Numba types what it compiles, from calls; annotations would say nothing to it.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, misc, no-any-return"

from __future__ import annotations

import numpy as np

from pointsman.kernels.cpu_table import ATTENTION_BLOCK as BLOCK
from pointsman.kernels.cpu_tile import score_tile, value_tile
from pointsman.kernels.vector import (
    at,
    exp,
    fma,
    kernel,
    larger,
    largest,
    load,
    load_some,
    prefetch,
    root,
    splat,
    store,
    store_some,
    total,
    whole,
)

LOWEST = np.float32(-3.0e38)


@kernel
def rotate(source, weight, factor, cos, sin, half, dim, target):
    """target = rotary(source * factor * weight): the first 2 * half channels turn, in NeoX pairs, the rest are copied."""
    for i in range(0, half, 16):
        count = half - i
        a = load_some(source, i, count) * factor * load_some(weight, i, count)
        b = load_some(source, half + i, count) * factor * load_some(weight, half + i, count)
        c, s = load_some(cos, i, count), load_some(sin, i, count)
        store_some(target, i, a * c - b * s, count)
        store_some(target, half + i, b * c + a * s, count)
    for i in range(2 * half, dim, 16):
        count = dim - i
        store_some(target, i, load_some(source, i, count) * factor * load_some(weight, i, count), count)


@kernel
def inverse_rms(source, width, epsilon):
    squares = splat(np.float32(0))
    for i in range(0, width, 16):
        value = load_some(source, i, width - i)
        squares = fma(value, value, squares)
    return np.float32(1) / root(total(squares) / np.float32(width) + epsilon)


@kernel
def prepare(step, thread, layer, row):
    """Norm queries and keys over all heads, turn them, keep the queries, and put keys and values into the cache."""
    dim, half, position = step.head_dim, step.half_rotary, step.positions[row]
    queries = at(step.qkv_out, row * step.qkv_stride)
    keys, values = at(queries, step.heads * dim), at(queries, (step.heads + step.kv_heads) * dim)
    cos, sin = at(step.cos, position * half), at(step.sin, position * half)
    scale = step.cache_lift / root(np.float32(dim))
    factor = splat(scale * inverse_rms(queries, step.heads * dim, step.epsilon))
    weight = at(step.q_norm, layer * step.heads * dim)
    for head in range(step.heads):
        target = at(step.queries, (row * step.heads + head) * step.head_stride)
        rotate(at(queries, head * dim), at(weight, head * dim), factor, cos, sin, half, dim, target)
    factor = splat(inverse_rms(keys, step.kv_heads * dim, step.epsilon))
    weight, turned = at(step.k_norm, layer * step.kv_heads * dim), at(step.turned, thread * step.head_stride)
    page, offset = step.slots[row] // step.page_size, step.slots[row] % step.page_size
    for head in range(step.kv_heads):
        place = (((layer * step.num_pages + page) * step.kv_heads + head) * step.page_size + offset) * dim
        rotate(at(keys, head * dim), at(weight, head * dim), factor, cos, sin, half, dim, turned)
        for i in range(0, dim, 16):
            store_some(step.cache_k, place + i, load(turned, i), dim - i)
            store_some(step.cache_v, place + i, load_some(values, head * dim + i, dim - i), dim - i)


@kernel
def fetch_first(step, layer, row, group):
    """Ask for what `attend` will read first, while something else is still being computed."""
    pages = at(step.page_table, step.lanes[row] * step.max_pages)
    place, run = _run(step, layer, group, pages, whole(0), step.positions[row] + 1)
    _fetch(step.cache_k, place, run * step.head_dim)


@kernel
def attend(step, thread, layer, row, group):
    """One row, one key head, all of its query heads."""
    heads = step.heads // step.kv_heads
    stride, length = step.head_stride, step.positions[row] + 1
    q = at(step.queries, (row * step.heads + group * heads) * stride)
    probabilities, sums = at(step.probabilities, thread * heads * BLOCK), at(step.sums, thread * heads * stride)
    highest, weight = at(step.highest, thread * heads), at(step.weight, thread * heads)
    for head in range(heads):
        highest[head], weight[head] = LOWEST, np.float32(0)
        for i in range(0, stride, 16):
            store(sums, head * stride + i, splat(np.float32(0)))
    pages = at(step.page_table, step.lanes[row] * step.max_pages)
    for start in range(0, length, BLOCK):
        count = min(BLOCK, length - start)
        end, position = start + count, start
        while position < end:
            place, run = _run(step, layer, group, pages, position, end)
            if position + run < length:
                after, size = _run(step, layer, group, pages, position + run, length)
                _fetch(step.cache_k, after, size * step.head_dim)
            _fetch(step.cache_v, place, run * step.head_dim)
            _score(step, at(step.cache_k, place), run, q, heads, at(probabilities, position - start))
            position += run
        for head in range(heads):
            _normalize(step, at(probabilities, head * BLOCK), count, at(highest, head), at(weight, head), at(sums, head * stride))
        position = start
        while position < end:
            place, run = _run(step, layer, group, pages, position, end)
            _gather(step, at(step.cache_v, place), run, at(probabilities, position - start), heads, sums)
            position += run
    for head in range(heads):
        target = at(step.attended, row * step.attended_stride + (group * heads + head) * step.head_dim)
        factor = splat(step.cache_lift * step.lift_attention / weight[head])
        for i in range(0, step.head_dim, 16):
            store_some(target, i, load(sums, head * stride + i) * factor, step.head_dim - i)


@kernel
def _run(step, layer, group, pages, position, end):
    """Where a position lies in the cache, and how many from it on lie there side by side."""
    offset = position % step.page_size
    page = np.int64(pages[position // step.page_size])
    head = (layer * step.num_pages + page) * step.kv_heads + group
    return (head * step.page_size + offset) * step.head_dim, min(step.page_size - offset, end - position)


@kernel
def _fetch(base, place, size):
    """Ask for a stretch of the cache ahead of its use; pages lie anywhere, so no hardware guesses where the next one is."""
    for i in range(place, place + size, 32):
        prefetch(base, i)


@kernel
def _score(step, keys, run, q, heads, scores):
    """scores[head, p] = q[head] . keys[p], in tiles of four keys and four heads."""
    dim, stride = step.head_dim, step.head_stride
    for p in range(0, run - 3, 4):
        k, s = at(keys, p * dim), at(scores, p)
        for head in range(0, heads - 3, 4):
            score_tile(4, 4, k, dim, dim, at(q, head * stride), stride, at(s, head * BLOCK), BLOCK)
        head = heads // 4 * 4
        if heads & 2:
            score_tile(2, 4, k, dim, dim, at(q, head * stride), stride, at(s, head * BLOCK), BLOCK)
            head += 2
        if heads & 1:
            score_tile(1, 4, k, dim, dim, at(q, head * stride), stride, at(s, head * BLOCK), BLOCK)
    for p in range(run // 4 * 4, run):
        for head in range(heads):
            score_tile(1, 1, at(keys, p * dim), dim, dim, at(q, head * stride), stride, at(scores, p + head * BLOCK), BLOCK)


@kernel
def _normalize(step, scores, count, highest, weight, sums):
    """Turn a block's scores into unnormed probabilities under the new maximum, and bring what was summed so far under it."""
    for p in range(count, (count + 15) // 16 * 16):
        scores[p] = LOWEST
    lift, most = splat(step.cache_lift), splat(LOWEST)
    for p in range(0, count, 16):
        score = larger(splat(LOWEST), load(scores, p) * lift)
        store(scores, p, score)
        most = larger(most, score)
    before, now = highest[0], max(highest[0], largest(most))
    part = splat(np.float32(0))
    for p in range(0, count, 16):
        probability = exp(load(scores, p) - splat(now))
        part = part + probability
        store(scores, p, probability * lift)
    highest[0] = now
    if weight[0] == np.float32(0):
        weight[0] = total(part)
        return
    shrink = exp(splat(before - now))
    weight[0] = weight[0] * largest(shrink) + total(part)
    for i in range(0, step.head_stride, 16):
        store(sums, i, load(sums, i) * shrink)


@kernel
def _gather(step, values, run, probabilities, heads, sums):
    """sums[head] += probabilities[head, p] * values[p], in tiles of up to four heads and 64 channels."""
    dim, stride = step.head_dim, step.head_stride
    for head in range(0, heads, 4):
        height, p, y = min(4, heads - head), at(probabilities, head * BLOCK), at(sums, head * stride)
        for i in range(0, dim - 63, 64):
            v, target = at(values, i), at(y, i)
            if height == 4:
                value_tile(4, 64, v, dim, run, p, BLOCK, target, stride, 64)
            elif height == 3:
                value_tile(3, 64, v, dim, run, p, BLOCK, target, stride, 64)
            elif height == 2:
                value_tile(2, 64, v, dim, run, p, BLOCK, target, stride, 64)
            else:
                value_tile(1, 64, v, dim, run, p, BLOCK, target, stride, 64)
        for i in range(dim // 64 * 64, dim, 16):
            for row in range(height):
                value_tile(1, 16, at(values, i), dim, run, at(p, row * BLOCK), BLOCK, at(y, row * stride + i), stride, min(16, dim - i))
