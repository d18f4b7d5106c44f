"""Causal attention over the paged cache, many query heads to one key head.

The queries that share keys are done together: the heads of a key head, and rows of one lane that follow each other (up to sixteen
queries). Keys are turned into panels of 64 positions once for all of them, and scores and outputs are products with panels. Yet a
row is a unit of its own: positions are walked in blocks of a fixed length with a running maximum and sum, every sum in the order
of channels or positions, so that its result depends on its position alone and not on which rows it was grouped with.
"""

# Numba types what it compiles, from calls; annotations would say nothing to it.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, misc, no-any-return"

from __future__ import annotations

import numpy as np

from pointsman.kernels.cpu_table import ATTENTION_BLOCK as BLOCK
from pointsman.kernels.cpu_table import QUERIES
from pointsman.kernels.cpu_tile import PANEL, panel_tile, turn_tile, value_tile
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
def head_factor(step, heads, head, of_all):
    """What the norm multiplies one of the heads that stand side by side with: its own factor, that of all of them, or none."""
    if step.norms_each:
        return inverse_rms(at(heads, head * step.head_dim), step.head_dim, step.epsilon)
    return of_all


@kernel
def factor_of_all(step, heads, num_heads):
    return inverse_rms(heads, num_heads * step.head_dim, step.epsilon) if step.norms_all else np.float32(1)


@kernel
def prepare(step, thread, layer, row):
    """Norm queries and keys, turn them, keep the queries, and put keys and values into the cache."""
    dim, half, position = step.head_dim, step.half_rotary, step.positions[row]
    queries = at(step.qkv_out, row * step.qkv_stride)
    if step.biased:
        for i in range(0, step.qkv_stride, 16):
            store(queries, i, load(queries, i) + load(step.qkv_bias, layer * step.qkv_stride + i))
    keys, values = at(queries, step.heads * dim), at(queries, (step.heads + step.kv_heads) * dim)
    cos, sin = at(step.cos, position * half), at(step.sin, position * half)
    scale = step.cache_lift / root(np.float32(dim))
    of_all = factor_of_all(step, queries, step.heads)
    weight = at(step.q_norm, layer * step.heads * dim)
    for head in range(step.heads):
        target = at(step.queries, (row * step.heads + head) * step.head_stride)
        factor = splat(scale * head_factor(step, queries, head, of_all))
        rotate(at(queries, head * dim), at(weight, head * dim), factor, cos, sin, half, dim, target)
    of_all = factor_of_all(step, keys, step.kv_heads)
    weight, turned = at(step.k_norm, layer * step.kv_heads * dim), at(step.turned, thread * step.head_stride)
    page, offset = step.slots[row] // step.page_size, step.slots[row] % step.page_size
    for head in range(step.kv_heads):
        place = (((layer * step.num_pages + page) * step.kv_heads + head) * step.page_size + offset) * dim
        factor = splat(head_factor(step, keys, head, of_all))
        rotate(at(keys, head * dim), at(weight, head * dim), factor, cos, sin, half, dim, turned)
        for i in range(0, dim, 16):
            store_some(step.cache_k, place + i, load(turned, i), dim - i)
            store_some(step.cache_v, place + i, load_some(values, head * dim + i, dim - i), dim - i)


@kernel
def group_rows(step, num_rows):
    """Mark where groups of rows begin that attend together: of one lane, at positions that follow each other; returns their number."""
    most, num_groups = max(1, QUERIES // (step.heads // step.kv_heads)), 0
    for row in range(num_rows):
        begins = row == 0 or row - step.groups[num_groups - 1] == most
        if not begins:
            begins = step.lanes[row] != step.lanes[row - 1] or step.positions[row] != step.positions[row - 1] + 1
        if begins:
            step.groups[num_groups] = row
            num_groups += 1
    step.groups[num_groups] = num_rows
    return num_groups


@kernel
def fetch_first(step, layer, item):
    """Ask for the keys of an item's first panel, while something else is still being computed."""
    first, key_head = step.groups[item // step.kv_heads], item % step.kv_heads
    position, end = whole(0), min(whole(PANEL), step.positions[first] + 1)
    while position < end:
        place, run = locate(step, layer, key_head, step.lanes[first], position, end)
        for i in range(place, place + run * step.head_dim, 32):
            prefetch(step.cache_k, i)
        position += run


@kernel
def attend(step, thread, layer, item):
    """One group of rows and one key head."""
    first, last, key_head = step.groups[item // step.kv_heads], step.groups[item // step.kv_heads + 1], item % step.kv_heads
    heads, stride = step.heads // step.kv_heads, step.head_stride
    num_queries, longest = (last - first) * heads, step.positions[last - 1] + 1
    members, places = at(step.members, thread * step.most_queries), at(step.places, thread * (BLOCK + PANEL))
    scores, sums = at(step.scratch_scores, thread * step.most_queries * BLOCK), at(step.sums, thread * step.most_queries * stride)
    highest, weight = at(step.highest, thread * step.most_queries), at(step.weight, thread * step.most_queries)
    for query in range(num_queries):
        members[query] = (first + query // heads) * step.heads + key_head * heads + query % heads
        highest[query], weight[query] = LOWEST, np.float32(0)
        for i in range(0, stride, 16):
            store(sums, query * stride + i, splat(np.float32(0)))
    for start in range(0, longest, BLOCK):
        end = min(start + BLOCK, longest)
        find(step, layer, key_head, step.lanes[first], start, end, places)
        score(step, thread, places, end - start, members, num_queries, scores)
        for query in range(num_queries):
            count = min(end, step.positions[first + query // heads] + 1) - start
            if count > 0:
                normalize(step, at(scores, query * BLOCK), count, at(highest, query), at(weight, query), at(sums, query * stride))
        gather(step, first, last, start, end, places, scores, sums)
    for query in range(num_queries):
        row = first + query // heads
        target = at(step.attended, row * step.attended_stride + (key_head * heads + query % heads) * step.head_dim)
        factor = splat(step.cache_lift * step.lift_attention / weight[query])
        for i in range(0, step.head_dim, 16):
            store_some(target, i, load(sums, query * stride + i) * factor, step.head_dim - i)


@kernel
def locate(step, layer, key_head, lane, position, end):
    """Where a position lies in the cache, and how many from it on, before `end`, lie there side by side."""
    offset = position % step.page_size
    page = np.int64(step.page_table[lane * step.max_pages + position // step.page_size])
    head = (layer * step.num_pages + page) * step.kv_heads + key_head
    return (head * step.page_size + offset) * step.head_dim, min(step.page_size - offset, end - position)


@kernel
def find(step, layer, key_head, lane, start, end, places):
    """places[p] = where position start + p lies; behind the last, the last again, so that whole panels can be read."""
    position = start
    while position < end:
        place, run = locate(step, layer, key_head, lane, position, end)
        for p in range(run):
            places[position - start + p] = place + p * step.head_dim
        position += run
    for p in range(end - start, (end - start + 15) // 16 * 16):
        places[p] = places[end - start - 1]


@kernel
def score(step, thread, places, count, members, num_queries, scores):
    """scores[query, p] = query . key p for `count` keys, panel by panel."""
    dim, panel = step.head_dim, at(step.key_panel, thread * step.panel_size)
    for p in range(0, count, PANEL):
        for i in range(p, min(p + PANEL, count), 16):
            turn_tile(step.cache_k, step.cache_v, at(places, i), dim, at(panel, i - p))
        small = count - p <= PANEL // 2
        for query in range(0, num_queries, 4):
            height, x_rows, y = min(4, num_queries - query), at(members, query), at(scores, query * BLOCK + p)
            score_rows(step, height, small, panel, dim, x_rows, y)


@kernel
def score_rows(step, height, small, panel, dim, x_rows, y):
    """Up to four queries times a panel of keys, or its first half."""
    q, stride, lift, rows = step.queries, step.head_stride, step.lifts, step.counting
    if height == 4:
        if small:
            panel_tile(4, 32, panel, dim, q, stride, x_rows, lift, True, y, BLOCK, rows)
        else:
            panel_tile(4, 64, panel, dim, q, stride, x_rows, lift, True, y, BLOCK, rows)
    elif height == 3:
        panel_tile(3, 64, panel, dim, q, stride, x_rows, lift, True, y, BLOCK, rows)
    elif height == 2:
        panel_tile(2, 64, panel, dim, q, stride, x_rows, lift, True, y, BLOCK, rows)
    else:
        panel_tile(1, 64, panel, dim, q, stride, x_rows, lift, True, y, BLOCK, rows)


@kernel
def normalize(step, scores, count, highest, weight, sums):
    """Turn a block's scores into unnormed probabilities under the new maximum, and bring what was summed so far under it."""
    for p in range(count, (count + 15) // 16 * 16):
        scores[p] = LOWEST
    most = splat(LOWEST)
    for p in range(0, count, 16):
        most = larger(most, load(scores, p))
    before, now = highest[0], max(highest[0], largest(most))
    part, lift = splat(np.float32(0)), splat(step.cache_lift)
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
def gather(step, first, last, start, end, places, scores, sums):
    """sums[query] += probabilities[query, p] * value p: positions that all rows see for all queries, then the others row by row."""
    heads, common = step.heads // step.kv_heads, max(start, min(end, step.positions[first] + 1))
    weigh(step, places, common - start, scores, (last - first) * heads, sums)
    for row in range(first + 1, last):
        query, rest = (row - first) * heads, min(end, step.positions[row] + 1) - common
        weigh(step, at(places, common - start), rest, at(scores, query * BLOCK + common - start), heads, at(sums, query * step.head_stride))


@kernel
def weigh(step, places, count, probabilities, num_queries, sums):
    """sums[query] += probabilities[query, p] * value p for p < count, in tiles of up to four queries and 64 channels."""
    dim, stride = step.head_dim, step.head_stride
    for query in range(0, num_queries, 4):
        height, p, y = min(4, num_queries - query), at(probabilities, query * BLOCK), at(sums, query * stride)
        for i in range(0, dim - 63, 64):
            v, target = at(step.cache_v, i), at(y, i)
            if height == 4:
                value_tile(4, 64, v, places, count, p, BLOCK, target, stride, 64)
            elif height == 3:
                value_tile(3, 64, v, places, count, p, BLOCK, target, stride, 64)
            elif height == 2:
                value_tile(2, 64, v, places, count, p, BLOCK, target, stride, 64)
            else:
                value_tile(1, 64, v, places, count, p, BLOCK, target, stride, 64)
        for i in range(dim // 64 * 64, dim, 16):
            v, channels = at(step.cache_v, i), min(16, dim - i)
            for row in range(height):
                value_tile(1, 16, v, places, count, at(p, row * BLOCK), BLOCK, at(y, row * stride + i), stride, channels)
