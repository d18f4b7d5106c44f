"""The kernels of `kernels.sampling`, which says what they are for and in which order they run.

Shape suffixes as there.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def keys_of(x):
    """Numbers from 0 to 2^32 in the order of x."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return ordered.to(tl.int64) + 2147483648


@triton.jit
def _nth_largest(keys, n):
    """The n-th largest of the keys, bit by bit from the highest: the largest number that n of them reach."""
    bound = tl.max(keys, axis=0)
    if n > 1:
        bound = bound * 0
        for bit in range(32):
            tried = bound + (tl.full((), 1, tl.int64) << (31 - bit))
            bound = tl.where(tl.sum((keys >= tried).to(tl.int32), axis=0) >= n, tried, bound)
    return bound


@triton.jit
def _uniform(seed, position):
    """The number of `pointsman.sampling.philox`: 53 bits."""
    low, high = (position & 0xFFFFFFFF).to(tl.uint32), (position >> 32).to(tl.uint32)
    zero = (position * 0).to(tl.uint32)
    a, b, _, _ = tl.philox(seed, low, high, zero, zero)
    return ((a >> 5).to(tl.float64) * 67108864.0 + (b >> 6).to(tl.float64)) * 1.1102230246251565e-16


@triton.jit
def weights_of(x, highest, temperature):
    return tl.exp((x.to(tl.float64) - highest.to(tl.float64)) / temperature)


@triton.jit
def _pick(weights, ids, before, total, uniform, nothing):
    """The first id whose cumulative weight, on top of `before`, exceeds uniform * total; the last with a weight if rounding leaves none."""
    reached = tl.cumsum(weights, axis=0) + before
    token = tl.min(tl.where((weights > 0.0) & (reached > uniform * total), ids, nothing), axis=0)
    last = tl.max(tl.where(weights > 0.0, ids, -1), axis=0)
    return tl.where(token == nothing, last, token)


@triton.jit
def survey_kernel(logits_ptr, row_ptr, maxima_ptr, fault_ptr, sum_ptr, V, NUM_CHUNKS: tl.constexpr, SCORE: tl.constexpr):
    """The largest of each group; whether a chunk is not finite; and, to score, the sum of exp(x - the chunk's largest)."""
    b, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(row_ptr + b)
    at = chunk * 4096 + tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    x = tl.load(logits_ptr + row * V + at, mask=at < V, other=float("-inf")).to(tl.float32)
    odd = (at < V) & ((x != x) | (tl.abs(x) == float("inf")))
    tl.store(fault_ptr + b * NUM_CHUNKS + chunk, tl.sum(tl.sum(odd.to(tl.int32), axis=1), axis=0))
    largest = tl.max(x, axis=1)
    tl.store(maxima_ptr + (b * NUM_CHUNKS + chunk) * 64 + tl.arange(0, 64), largest)
    if SCORE:
        highest = tl.max(largest, axis=0)
        weights = tl.where(at < V, tl.exp(x.to(tl.float64) - highest.to(tl.float64)), 0.0)
        tl.store(sum_ptr + b * NUM_CHUNKS + chunk, tl.sum(tl.sum(weights, axis=1), axis=0))


@triton.jit
def _likeliest(logits_ptr, maxima_ptr, groups_ptr, k, V, NUM_CHUNKS: tl.constexpr, CHUNKS_PAD: tl.constexpr):
    """Of a row, the tokens of the k groups with the largest maxima, and which of these are the k likeliest: (keys, ids, logits, kept).
    Both times the lower of equals."""
    group = tl.arange(0, CHUNKS_PAD * 64)
    keys = keys_of(tl.load(maxima_ptr + group, mask=group < NUM_CHUNKS * 64, other=float("-inf")))
    chosen = _largest(keys, k)
    place = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    tl.store(groups_ptr + place, group, mask=chosen)
    tl.debug_barrier()

    candidate = tl.arange(0, 4096)
    filled = candidate // 64 < k
    ids = tl.load(groups_ptr + candidate // 64, mask=filled, other=0) * 64 + candidate % 64
    filled = filled & (ids < V)
    x = tl.load(logits_ptr + ids, mask=filled, other=float("-inf")).to(tl.float32)
    keys = tl.where(filled, keys_of(x), -1)
    return keys, ids, x, _largest(keys, k)


@triton.jit
def _largest(keys, n):
    """Which are the n largest; of equals the first."""
    bound = _nth_largest(keys, n)
    level = keys == bound
    missing = n - tl.sum((keys > bound).to(tl.int32), axis=0)
    return (keys > bound) | (level & (tl.cumsum(level.to(tl.int32), axis=0) <= missing))


@triton.jit
def few_kernel(
    logits_ptr,
    row_ptr,
    top_k_ptr,
    temperature_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    position_ptr,
    maxima_ptr,
    fault_ptr,
    groups_ptr,
    token_ptr,
    V,
    NUM_CHUNKS: tl.constexpr,
    CHUNKS_PAD: tl.constexpr,
):
    """Draw the rows with a top_k, from the groups that hold it."""
    b = tl.program_id(0).to(tl.int64)
    k = tl.load(top_k_ptr + b)
    if k == 0:
        return
    chunk = tl.arange(0, CHUNKS_PAD)
    faults = tl.sum(tl.load(fault_ptr + b * NUM_CHUNKS + chunk, mask=chunk < NUM_CHUNKS, other=0), axis=0)
    if faults > 0:
        tl.store(token_ptr + b, -1)
        return
    keys, ids, x, kept = _likeliest(
        logits_ptr + tl.load(row_ptr + b) * V, maxima_ptr + b * NUM_CHUNKS * 64, groups_ptr + b * 64, k, V, NUM_CHUNKS, CHUNKS_PAD
    )
    highest = highest_of(maxima_ptr, b, NUM_CHUNKS, CHUNKS_PAD)
    weights = tl.where(kept, weights_of(x, highest, tl.load(temperature_ptr + b)), 0.0)
    top_p = tl.load(top_p_ptr + b)
    if top_p < 1.0:
        goal = top_p * tl.sum(weights, axis=0)
        bound = tl.full((), 0, tl.int64)
        for bit in range(32):
            tried = bound + (tl.full((), 1, tl.int64) << (31 - bit))
            bound = tl.where(tl.sum(tl.where(keys >= tried, weights, 0.0), axis=0) >= goal, tried, bound)
        short = goal - tl.sum(tl.where(keys > bound, weights, 0.0), axis=0)
        level = kept & (keys == bound)
        rank = tl.cumsum(level.to(tl.int32), axis=0)
        each = tl.max(tl.where(level, weights, 0.0), axis=0)
        weights = tl.where((keys > bound) | (level & ((rank - 1).to(tl.float64) * each < short)), weights, 0.0)
    weights = tl.where(weights >= tl.load(min_p_ptr + b), weights, 0.0)
    uniform = _uniform(tl.load(seed_ptr + b), tl.load(position_ptr + b))
    tl.store(token_ptr + b, _pick(weights, ids, 0.0, tl.sum(weights, axis=0), uniform, V).to(tl.int64))


@triton.jit
def highest_of(maxima_ptr, b, NUM_CHUNKS: tl.constexpr, CHUNKS_PAD: tl.constexpr):
    group = tl.arange(0, CHUNKS_PAD * 64)
    return tl.max(tl.load(maxima_ptr + b * NUM_CHUNKS * 64 + group, mask=group < NUM_CHUNKS * 64, other=float("-inf")), axis=0)


@triton.jit
def _kept(x, inside, highest, temperature, min_p, bound):
    """Of a chunk: weights of the tokens above the nucleus's lowest key, weights of those at it, and which these are."""
    weights = tl.where(inside, weights_of(x, highest, temperature), 0.0)
    weights = tl.where(weights >= min_p, weights, 0.0)
    keys = keys_of(x)
    level = inside & (keys == bound)
    return tl.where(keys > bound, weights, 0.0), tl.where(level, weights, 0.0), level


@triton.jit
def weigh_kernel(
    logits_ptr,
    row_ptr,
    top_k_ptr,
    temperature_ptr,
    top_p_ptr,
    min_p_ptr,
    maxima_ptr,
    bound_ptr,
    above_ptr,
    level_ptr,
    each_ptr,
    V,
    NUM_CHUNKS: tl.constexpr,
    CHUNKS_PAD: tl.constexpr,
    NUCLEUS: tl.constexpr,
):
    """For rows without a top_k: each chunk's kept weight above the lowest key, how many tokens stand at that key, and what one weighs."""
    b, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(top_k_ptr + b) > 0:
        return
    at = chunk * 4096 + tl.arange(0, 4096)
    x = tl.load(logits_ptr + tl.load(row_ptr + b) * V + at, mask=at < V, other=float("-inf")).to(tl.float32)
    bound = tl.full((), -1, tl.int64)  # without a nucleus all keys are above the bound
    if NUCLEUS:
        bound = tl.load(bound_ptr + b)
    highest = highest_of(maxima_ptr, b, NUM_CHUNKS, CHUNKS_PAD)
    above, at_bound, level = _kept(x, at < V, highest, tl.load(temperature_ptr + b), tl.load(min_p_ptr + b), bound)
    place = b * NUM_CHUNKS + chunk
    tl.store(above_ptr + place, tl.sum(above, axis=0))
    tl.store(level_ptr + place, tl.sum(level.to(tl.int32), axis=0))
    tl.store(each_ptr + place, tl.max(at_bound, axis=0))


@triton.jit
def whole_kernel(
    logits_ptr,
    row_ptr,
    top_k_ptr,
    temperature_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    position_ptr,
    maxima_ptr,
    fault_ptr,
    bound_ptr,
    short_ptr,
    above_ptr,
    level_ptr,
    each_ptr,
    token_ptr,
    V,
    NUM_CHUNKS: tl.constexpr,
    CHUNKS_PAD: tl.constexpr,
    NUCLEUS: tl.constexpr,
):
    """Draw the rows without a top_k: to the chunk, and in it to the token."""
    b = tl.program_id(0).to(tl.int64)
    if tl.load(top_k_ptr + b) > 0:
        return
    chunk = tl.arange(0, CHUNKS_PAD)
    place = b * NUM_CHUNKS + chunk
    real = chunk < NUM_CHUNKS
    if tl.sum(tl.load(fault_ptr + place, mask=real, other=0), axis=0) > 0:
        tl.store(token_ptr + b, -1)
        return
    min_p, temperature = tl.load(min_p_ptr + b), tl.load(temperature_ptr + b)
    level = tl.load(level_ptr + place, mask=real, other=0)
    each = tl.max(tl.load(each_ptr + place, mask=real, other=0.0), axis=0)
    # of the tokens at the lowest key as many stay as the goal needs, by id
    short = tl.full((), 0.0, tl.float64)
    bound = tl.full((), -1, tl.int64)
    if NUCLEUS:
        short, bound = tl.load(short_ptr + b), tl.load(bound_ptr + b)
    needed = tl.where(each > 0.0, tl.ceil(short / tl.where(each > 0.0, each, 1.0)), 1.0).to(tl.int64)
    needed = tl.maximum(needed, 1)
    levels_before = (tl.cumsum(level, axis=0) - level).to(tl.int64)
    stay = tl.minimum(tl.maximum(needed - levels_before, 0), level.to(tl.int64))
    sums = tl.load(above_ptr + place, mask=real, other=0.0) + stay.to(tl.float64) * each
    total = tl.sum(sums, axis=0)
    uniform = _uniform(tl.load(seed_ptr + b), tl.load(position_ptr + b))
    here = _pick(sums, chunk, 0.0, total, uniform, CHUNKS_PAD)
    before = tl.sum(tl.where(chunk < here, sums, 0.0), axis=0)
    already = tl.sum(tl.where(chunk < here, level, 0), axis=0)
    at = here * 4096 + tl.arange(0, 4096)
    x = tl.load(logits_ptr + tl.load(row_ptr + b) * V + at, mask=at < V, other=float("-inf")).to(tl.float32)
    highest = highest_of(maxima_ptr, b, NUM_CHUNKS, CHUNKS_PAD)
    above, at_bound, at_level = _kept(x, at < V, highest, temperature, min_p, bound)
    rank = tl.cumsum(at_level.to(tl.int32), axis=0) + already
    weights = above + tl.where(rank.to(tl.int64) <= needed, at_bound, 0.0)
    tl.store(token_ptr + b, _pick(weights, at, before, total, uniform, V).to(tl.int64))


@triton.jit
def score_kernel(
    logits_ptr,
    row_ptr,
    token_ptr,
    maxima_ptr,
    sum_ptr,
    logprob_ptr,
    rank_ptr,
    V,
    NUM_CHUNKS: tl.constexpr,
    CHUNKS_PAD: tl.constexpr,
):
    """Log-probability of each row's token; each chunk adds how many of its tokens rank before it."""
    b, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = tl.load(token_ptr + b)
    if token < 0:
        return
    row_ptr_V = logits_ptr + tl.load(row_ptr + b) * V
    x_token = tl.load(row_ptr_V + token).to(tl.float32)
    at = chunk * 4096 + tl.arange(0, 4096)
    x = tl.load(row_ptr_V + at, mask=at < V, other=float("-inf")).to(tl.float32)
    tl.atomic_add(rank_ptr + b, tl.sum(((x > x_token) | ((x == x_token) & (at < token))).to(tl.int64), axis=0))
    if chunk == 0:
        tl.store(logprob_ptr + b, _logprobs(x_token, maxima_ptr, sum_ptr, b, NUM_CHUNKS, CHUNKS_PAD))


@triton.jit
def _logprobs(x, maxima_ptr, sum_ptr, b, NUM_CHUNKS: tl.constexpr, CHUNKS_PAD: tl.constexpr):
    """Log-probabilities of logits of a row."""
    highest = highest_of(maxima_ptr, b, NUM_CHUNKS, CHUNKS_PAD)
    chunks = tl.arange(0, CHUNKS_PAD)
    group = chunks[:, None] * 64 + tl.arange(0, 64)[None, :]
    maxima = tl.load(maxima_ptr + b * NUM_CHUNKS * 64 + group, mask=chunks[:, None] < NUM_CHUNKS, other=float("-inf"))
    sums = tl.load(sum_ptr + b * NUM_CHUNKS + chunks, mask=chunks < NUM_CHUNKS, other=0.0)
    total = tl.sum(sums * tl.exp(tl.max(maxima, axis=1).to(tl.float64) - highest.to(tl.float64)), axis=0)
    return x.to(tl.float64) - highest.to(tl.float64) - tl.log(total)


@triton.jit(do_not_specialize=["most"])
def top_kernel(
    logits_ptr,
    row_ptr,
    num_ptr,
    token_ptr,
    maxima_ptr,
    sum_ptr,
    groups_ptr,
    id_ptr,
    logprob_ptr,
    V,
    most,
    NUM_CHUNKS: tl.constexpr,
    CHUNKS_PAD: tl.constexpr,
):
    """The likeliest tokens of the rows that want some, as many as they want, by id, and their log-probabilities."""
    b = tl.program_id(0).to(tl.int64)
    num = tl.load(num_ptr + b)
    if (num == 0) | (tl.load(token_ptr + b) < 0):
        return
    _, ids, x, kept = _likeliest(
        logits_ptr + tl.load(row_ptr + b) * V, maxima_ptr + b * NUM_CHUNKS * 64, groups_ptr + b * 64, num, V, NUM_CHUNKS, CHUNKS_PAD
    )
    place = b * most + tl.cumsum(kept.to(tl.int32), axis=0) - 1
    tl.store(id_ptr + place, ids.to(tl.int64), mask=kept)
    tl.store(logprob_ptr + place, _logprobs(x, maxima_ptr, sum_ptr, b, NUM_CHUNKS, CHUNKS_PAD), mask=kept)
