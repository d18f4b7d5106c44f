"""The phases of a step on a CPU, each over the share of one thread.

Two kinds of phase alternate. Row phases (norms, rotary, router, sums of experts) take whole rows: with many rows each thread takes
its own, with few every thread computes all of them for itself, which is cheaper than meeting once more. `base` is where a thread's
rows start in the buffers of row phases: zero where they are shared. Matrix phases share out panels of 64 outputs; they read what
row phases wrote and write buffers that all threads see.

Where weights or cache are e4m3, read as 2**-120 of their values, what multiplies them is kept times 2**60 and the stored scales have
the other 2**60 (`lift`): then no product leaves the normal range of float32. A power of two changes no digit.
"""

# Numba types what it compiles, from calls; annotations would say nothing to it.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, misc, no-any-return"

from __future__ import annotations

import numpy as np

from pointsman.kernels.cpu_tile import PANEL, panel_tile
from pointsman.kernels.vector import at, fma, kernel, load, load_some, root, sigmoid, splat, store, store_some, total

ROW_BLOCK = 64
ACTIVATIONS = PANEL // 2


@kernel
def embed(step, token, row):
    """Row of the embedding table into the residual stream."""
    target = row * step.hidden_stride
    for i in range(0, step.hidden, 16):
        count = step.hidden - i
        if step.embed_bfloat16:
            store_some(step.x, target + i, load_some(step.embed16, token * step.hidden + i, count), count)
        else:
            store_some(step.x, target + i, load_some(step.embed32, token * step.hidden + i, count), count)


@kernel
def norm(x, weight, y, width, padded, epsilon, lift):
    """y = lift * x / rms(x) * weight over `padded` floats, of which those from `width` on are zero."""
    squares = splat(np.float32(0))
    for i in range(0, padded, 16):
        value = load(x, i)
        squares = fma(value, value, squares)
    factor = splat(lift / root(total(squares) / np.float32(width) + epsilon))
    for i in range(0, padded, 16):
        store(y, i, load(x, i) * factor * load(weight, i))


@kernel
def add(x, y, width):
    """x += y."""
    for i in range(0, width, 16):
        store(x, i, load(x, i) + load(y, i))


@kernel
def multiply(linear, index, panel, x, x_stride, x_rows, y, y_stride, y_rows, num_rows):
    """y[y_rows[r], :64] = a panel of matrix `index` times x[x_rows[r]], for r < num_rows."""
    panel += index * linear.panels
    for row in range(0, num_rows, 4):
        height = min(4, num_rows - row)
        x_row, y_row = at(x_rows, row), at(y_rows, row)
        for block in range(linear.blocks):
            k = block * linear.block
            depth = min(linear.block, linear.inputs - k)
            w = at(linear.values, (panel * linear.inputs + k) * PANEL)
            scale = at(linear.scales, (panel * linear.blocks + block) * PANEL)
            first = block == 0
            if height == 4:
                panel_tile(4, w, depth, at(x, k), x_stride, x_row, scale, first, y, y_stride, y_row)
            elif height == 3:
                panel_tile(3, w, depth, at(x, k), x_stride, x_row, scale, first, y, y_stride, y_row)
            elif height == 2:
                panel_tile(2, w, depth, at(x, k), x_stride, x_row, scale, first, y, y_stride, y_row)
            else:
                panel_tile(1, w, depth, at(x, k), x_stride, x_row, scale, first, y, y_stride, y_row)


@kernel
def project(step, thread, linear, index, x, x_stride, x_rows, y, y_stride, num_rows):
    """y = matrix `index` times x, this thread's share of the panels and blocks of rows."""
    item, items = thread, linear.panels * ((num_rows + ROW_BLOCK - 1) // ROW_BLOCK)
    while item < items:
        panel, row = item % linear.panels, item // linear.panels * ROW_BLOCK
        height = min(ROW_BLOCK, num_rows - row)
        multiply(linear, index, panel, x, x_stride, at(x_rows, row), at(y, panel * PANEL), y_stride, at(step.counting, row), height)
        item += step.num_threads


@kernel
def judge(step, layer, row, num_rows):
    """The router's logits of rows from `row` on, into `scores`."""
    rows = at(step.counting, row)
    for panel in range(step.gate.panels):
        logits = at(step.scores, panel * PANEL)
        multiply(step.gate, layer, panel, step.h, step.hidden_stride, rows, logits, step.expert_stride, rows, num_rows)


@kernel
def route(step, layer, row, slot, forced):
    """From the router's logits in `scores`, choose a row's experts by sigmoid plus bias and weigh them by sigmoid alone.

    They are written down by cache slot, best first; a forced row takes those that stand there.
    """
    scores = at(step.scores, row * step.expert_stride)
    chosen, weights = at(step.chosen, row * step.top_k), at(step.weights, row * step.top_k)
    for i in range(0, step.expert_stride, 16):
        store(scores, i, sigmoid(load(scores, i)))
    place = (slot * step.layers + layer) * step.top_k
    if forced:
        for k in range(step.top_k):
            chosen[k] = np.int64(step.routes16[place + k]) if step.wide_routes else np.int64(step.routes8[place + k])
    else:
        choose(scores, at(step.bias, layer * step.experts), chosen, step.experts, step.top_k)
    sum_ = np.float32(0)
    for k in range(step.top_k):
        sum_ += scores[chosen[k]]
    for k in range(step.top_k):
        weights[k] = scores[chosen[k]] / sum_
        if step.wide_routes:
            step.routes16[place + k] = np.uint16(chosen[k])
        else:
            step.routes8[place + k] = np.uint8(chosen[k])


@kernel
def choose(scores, bias, chosen, experts, top_k):
    """The top_k experts by score plus bias, best first; of equals the lower number is better."""
    for k in range(top_k):
        best, most = -1, np.float32(-np.inf)
        for expert in range(experts):
            value = scores[expert] + bias[expert]
            if value > most or best < 0:
                taken = False
                for earlier in range(k):
                    taken |= chosen[earlier] == expert
                if not taken:
                    best, most = expert, value
        chosen[k] = best


@kernel
def sort_pairs(step, thread, base, num_rows):
    """List the (row, choice) pairs of each expert, in the order of rows, for this thread's own use."""
    starts, pairs, sources = lists(step, thread)
    for expert in range(step.experts + 1):
        starts[expert] = 0
    num_pairs = num_rows * step.top_k
    chosen = at(step.chosen, base * step.top_k)
    for pair in range(num_pairs):
        starts[chosen[pair] + 1] += 1
    for expert in range(step.experts):
        starts[expert + 1] += starts[expert]
    for pair in range(num_pairs):
        expert = chosen[pair]
        place = starts[expert]
        starts[expert] += 1
        pairs[place] = pair
        sources[place] = base + pair // step.top_k
    for expert in range(step.experts, 0, -1):
        starts[expert] = starts[expert - 1]
    starts[0] = 0


@kernel
def lists(step, thread):
    """This thread's starts [experts + 1], pairs and source rows."""
    size = step.max_rows * step.top_k
    return (
        at(step.starts, thread * (step.experts + 1)),
        at(step.pairs, thread * size),
        at(step.sources, thread * size),
    )


@kernel
def expand(step, thread, layer):
    """activations[pair] = silu(gate) * up. A panel holds 32 gate outputs and their 32 ups."""
    starts, pairs, sources = lists(step, thread)
    tile = at(step.tile, thread * 4 * PANEL)
    item = 0
    for expert in range(step.experts):
        first, last = starts[expert], starts[expert + 1]
        if first == last:
            continue
        for panel in range(step.gate_up.panels):
            item += 1
            if item % step.num_threads != thread:
                continue
            for place in range(first, last, 4):
                height, rows = min(4, last - place), at(sources, place)
                index = layer * step.experts + expert
                multiply(step.gate_up, index, panel, step.h, step.hidden_stride, rows, tile, PANEL, step.counting, height)
                for row in range(height):
                    target = pairs[place + row] * step.width_stride + panel * ACTIVATIONS
                    for i in range(0, ACTIVATIONS, 16):
                        gate, up = load(tile, row * PANEL + i), load(tile, row * PANEL + ACTIVATIONS + i)
                        store(step.activations, target + i, gate * sigmoid(gate) * up * splat(step.lift_experts))


@kernel
def contract(step, thread, layer):
    """outputs[pair] = down projection of activations[pair]."""
    starts, pairs, _ = lists(step, thread)
    item = 0
    for expert in range(step.experts):
        first, last = starts[expert], starts[expert + 1]
        if first == last:
            continue
        index = layer * step.experts + expert
        for panel in range(step.down.panels):
            item += 1
            if item % step.num_threads == thread:
                rows, y = at(pairs, first), at(step.outputs, panel * PANEL)
                multiply(step.down, index, panel, step.activations, step.width_stride, rows, y, step.hidden_stride, rows, last - first)


@kernel
def combine(step, base, row):
    """Add a row's experts, weighted, to the residual stream, in the order of choice."""
    weights, pair = at(step.weights, (base + row) * step.top_k), row * step.top_k
    x = at(step.x, (base + row) * step.hidden_stride)
    for i in range(0, step.hidden_stride, 16):
        value = load(x, i)
        for k in range(step.top_k):
            value = fma(splat(weights[k]), load(step.outputs, (pair + k) * step.hidden_stride + i), value)
        store(x, i, value)
