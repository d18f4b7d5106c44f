"""The kernels of `kernels.sampling` that find where a nucleus ends: among all tokens its level, and in that the lowest key.

Shape suffixes as there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pointsman.kernels.sampling_kernels import highest_of, keys_of, weights_of


@triton.jit
def _level_bound(highest, temperature, level, LEVELS: tl.constexpr):
    """The lowest logit of a level: 0 has nothing, the last has all."""
    bound = (highest.to(tl.float64) - temperature * 0.75 * level).to(tl.float32)
    bound = tl.where(level == 0, float("inf"), bound)
    return tl.where(level == LEVELS - 1, float("-inf"), bound)


@triton.jit
def level_kernel(
    logits_ptr,
    row_ptr,
    top_k_ptr,
    temperature_ptr,
    top_p_ptr,
    maxima_ptr,
    weight_ptr,
    V,
    NUM_CHUNKS: tl.constexpr,
    CHUNKS_PAD: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """For rows with a nucleus: the weight of a chunk's tokens down to each level."""
    b, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if (tl.load(top_k_ptr + b) > 0) | (tl.load(top_p_ptr + b) >= 1.0):
        return
    at = chunk * 4096 + tl.arange(0, 4096)
    x = tl.load(logits_ptr + tl.load(row_ptr + b) * V + at, mask=at < V, other=float("-inf")).to(tl.float32)
    temperature = tl.load(temperature_ptr + b)
    highest = highest_of(maxima_ptr, b, NUM_CHUNKS, CHUNKS_PAD)
    weights = tl.where(at < V, weights_of(x, highest, temperature), 0.0)
    largest = tl.max(x, axis=0)
    for level in range(1, LEVELS):
        bound = _level_bound(highest, temperature, level, LEVELS)
        total = tl.full((), 0.0, tl.float64)
        if largest >= bound:
            total = tl.sum(tl.where(x >= bound, weights, 0.0), axis=0)
        tl.store(weight_ptr + (b * LEVELS + level) * NUM_CHUNKS + chunk, total)


@triton.jit
def end_kernel(
    top_k_ptr,
    temperature_ptr,
    top_p_ptr,
    maxima_ptr,
    weight_ptr,
    level_ptr,
    goal_ptr,
    above_ptr,
    NUM_CHUNKS: tl.constexpr,
    CHUNKS_PAD: tl.constexpr,
    LEVELS: tl.constexpr,
    LEVELS_PAD: tl.constexpr,
):
    """The level in which a row's nucleus ends as its bounds [lowest, highest), the nucleus's weight, and the weight above the level."""
    b = tl.program_id(0).to(tl.int64)
    top_p = tl.load(top_p_ptr + b)
    if (tl.load(top_k_ptr + b) > 0) | (top_p >= 1.0):
        return
    level, chunk = tl.arange(0, LEVELS_PAD), tl.arange(0, CHUNKS_PAD)
    real = ((level > 0) & (level < LEVELS))[:, None] & (chunk < NUM_CHUNKS)[None, :]
    sums = tl.sum(tl.load(weight_ptr + (b * LEVELS + level[:, None]) * NUM_CHUNKS + chunk[None, :], mask=real, other=0.0), axis=1)
    goal = top_p * tl.sum(tl.where(level == LEVELS - 1, sums, 0.0), axis=0)
    found = tl.min(tl.where((level > 0) & (level < LEVELS) & (sums >= goal), level, LEVELS - 1), axis=0)
    tl.store(goal_ptr + b, goal)
    tl.store(above_ptr + b, tl.sum(tl.where(level == found - 1, sums, 0.0), axis=0))
    highest, temperature = highest_of(maxima_ptr, b, NUM_CHUNKS, CHUNKS_PAD), tl.load(temperature_ptr + b)
    tl.store(level_ptr + 2 * b, _level_bound(highest, temperature, found, LEVELS))
    tl.store(level_ptr + 2 * b + 1, _level_bound(highest, temperature, found - 1, LEVELS))


@triton.jit
def gather_kernel(
    logits_ptr,
    row_ptr,
    top_k_ptr,
    top_p_ptr,
    level_ptr,
    number_ptr,
    found_ptr,
    V,
    NUM_CHUNKS: tl.constexpr,
    CHUNKS_PAD: tl.constexpr,
    COUNT: tl.constexpr,
):
    """For rows with a nucleus: how many of a chunk's logits are in the level in which it ends (COUNT), or these, after those of the chunks
    before."""
    b, own = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if (tl.load(top_k_ptr + b) > 0) | (tl.load(top_p_ptr + b) >= 1.0):
        return
    at = own * 4096 + tl.arange(0, 4096)
    x = tl.load(logits_ptr + tl.load(row_ptr + b) * V + at, mask=at < V, other=float("nan")).to(tl.float32)
    inside = (x >= tl.load(level_ptr + 2 * b)) & (x < tl.load(level_ptr + 2 * b + 1))
    if COUNT:
        tl.store(number_ptr + b * NUM_CHUNKS + own, tl.sum(inside.to(tl.int32), axis=0))
    else:
        chunk = tl.arange(0, CHUNKS_PAD)
        before = tl.sum(tl.load(number_ptr + b * NUM_CHUNKS + chunk, mask=chunk < own, other=0), axis=0)
        tl.store(found_ptr + b * V + before + tl.cumsum(inside.to(tl.int32), axis=0) - 1, x, mask=inside)


@triton.jit
def nucleus_kernel(
    top_k_ptr,
    temperature_ptr,
    top_p_ptr,
    maxima_ptr,
    goal_ptr,
    above_ptr,
    number_ptr,
    found_ptr,
    bound_ptr,
    short_ptr,
    V,
    NUM_CHUNKS: tl.constexpr,
    CHUNKS_PAD: tl.constexpr,
    AT_ONCE: tl.constexpr,
    PASS: tl.constexpr,
):
    """The lowest key of a row's nucleus, bit by bit among the logits of its last level, and the weight that those at that key must add."""
    b = tl.program_id(0).to(tl.int64)
    if (tl.load(top_k_ptr + b) > 0) | (tl.load(top_p_ptr + b) >= 1.0):
        tl.store(bound_ptr + b, -1)
        tl.store(short_ptr + b, 0.0)
        return
    goal, above = tl.load(goal_ptr + b), tl.load(above_ptr + b)
    chunk = tl.arange(0, CHUNKS_PAD)
    num = tl.sum(tl.load(number_ptr + b * NUM_CHUNKS + chunk, mask=chunk < NUM_CHUNKS, other=0), axis=0)
    highest, temperature = highest_of(maxima_ptr, b, NUM_CHUNKS, CHUNKS_PAD), tl.load(temperature_ptr + b)
    found_ptr += b * V
    lowest, num, above = _narrow(found_ptr, num, above, goal, highest, temperature, AT_ONCE, PASS)
    at = tl.arange(0, AT_ONCE)
    x = tl.load(found_ptr + at, mask=at < num, other=float("-inf"))
    keys = tl.where(at < num, keys_of(x), 0) - 2147483648
    weights = tl.where(at < num, weights_of(x, highest, temperature), 0.0)
    keys = keys.to(tl.int32)
    bound = tl.full((), 0, tl.int64)
    for bit in range(32):
        tried = bound + (tl.full((), 1, tl.int64) << (31 - bit))
        reached = above + tl.sum(tl.where(keys >= (tried - 2147483648).to(tl.int32), weights, 0.0), axis=0)
        bound = tl.where(reached >= goal, tried, bound)
    # a sum in another order may fall short of the goal by its last bit
    bound = tl.maximum(bound, lowest)
    tl.store(bound_ptr + b, bound)
    tl.store(short_ptr + b, goal - above - tl.sum(tl.where(keys > (bound - 2147483648).to(tl.int32), weights, 0.0), axis=0))


@triton.jit
def _narrow(found_ptr, num, above, goal, highest, temperature, AT_ONCE: tl.constexpr, PASS: tl.constexpr):
    """Of the logits found, leave those of a range of keys that the nucleus ends in, until there are few or all are equal: (the lowest key,
    how many are left, the weight above the range). Each turn weighs sixteen parts of the range and moves those of one to the front."""
    at, part = tl.arange(0, PASS), tl.arange(0, 16)
    low = tl.full((), 4294967296, tl.int64)
    high = tl.full((), -1, tl.int64)
    for start in range(0, num, PASS):
        x = tl.load(found_ptr + start + at, mask=start + at < num, other=0.0)
        keys = keys_of(x)
        low = tl.minimum(low, tl.min(tl.where(start + at < num, keys, 4294967296), axis=0))
        high = tl.maximum(high, tl.max(tl.where(start + at < num, keys, -1), axis=0))
    high += 1
    while (num > AT_ONCE) & (high - low > 1):
        sums = tl.zeros((16,), tl.float64)
        for start in range(0, num, PASS):
            x = tl.load(found_ptr + start + at, mask=start + at < num, other=0.0)
            keys = tl.where(start + at < num, keys_of(x), -1)
            weights = tl.where(start + at < num, weights_of(x, highest, temperature), 0.0)
            for one in range(16):
                inside = keys >= low + (high - low) * one // 16
                sums += tl.where(part == one, tl.sum(tl.where(inside, weights, 0.0), axis=0), 0.0)
        # the highest part that reaches the goal; the first is the whole range, which does
        chosen = tl.max(tl.where((above + sums >= goal) | (part == 0), part, 0), axis=0)
        above += tl.sum(tl.where(part == chosen + 1, sums, 0.0), axis=0)
        top = low + (high - low) * (chosen + 1) // 16
        low = low + (high - low) * chosen // 16
        high = top
        left = num * 0
        for start in range(0, num, PASS):
            x = tl.load(found_ptr + start + at, mask=start + at < num, other=0.0)
            keys = keys_of(x)
            inside = (start + at < num) & (keys >= low) & (keys < high)
            place = left + tl.cumsum(inside.to(tl.int32), axis=0) - 1
            tl.debug_barrier()
            tl.store(found_ptr + place, x, mask=inside)
            left += tl.sum(inside.to(tl.int32), axis=0)
        tl.debug_barrier()
        num = left
    return low, num, above
