"""What the phases of a step on a CPU do: norms, router and expert sums by rows, matrices by panels of 64 outputs.

Where weights or cache are e4m3, read as 2**-120 of their values, what multiplies them is kept times 2**60 and the stored scales have
the other 2**60 (`lift`): then no product leaves the normal range of float32. A power of two changes no digit.
"""

# Numba types what it compiles, from calls; annotations would say nothing to it.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, misc, no-any-return"

from __future__ import annotations

import numpy as np

from pointsman.kernels.cpu_tile import PANEL, panel_tile
from pointsman.kernels.vector import at, exp, fma, kernel, load, load_some, root, sigmoid, splat, store, store_some, total, whole

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
                panel_tile(4, 64, w, depth, at(x, k), x_stride, x_row, scale, first, y, y_stride, y_row)
            elif height == 3:
                panel_tile(3, 64, w, depth, at(x, k), x_stride, x_row, scale, first, y, y_stride, y_row)
            elif height == 2:
                panel_tile(2, 64, w, depth, at(x, k), x_stride, x_row, scale, first, y, y_stride, y_row)
            else:
                panel_tile(1, 64, w, depth, at(x, k), x_stride, x_row, scale, first, y, y_stride, y_row)


@kernel
def panels(linear, num_rows):
    """Items of a product: panels times blocks of rows."""
    return linear.panels * ((num_rows + ROW_BLOCK - 1) // ROW_BLOCK)


@kernel
def project(step, linear, index, item, x, x_stride, y, y_stride, num_rows):
    """y = matrix `index` times x, one panel and block of rows of it."""
    panel, row = item % linear.panels, item // linear.panels * ROW_BLOCK
    height, rows = min(ROW_BLOCK, num_rows - row), at(step.counting, row)
    multiply(linear, index, panel, x, x_stride, rows, at(y, panel * PANEL), y_stride, rows, height)


@kernel
def judge(step, layer, row, num_rows):
    """The router's logits of rows from `row` on, into `scores`."""
    rows = at(step.counting, row)
    for panel in range(step.gate.panels):
        logits = at(step.scores, panel * PANEL)
        multiply(step.gate, step.route_of[layer], panel, step.h, step.hidden_stride, rows, logits, step.expert_stride, rows, num_rows)


@kernel
def route(step, layer, row, slot, forced):
    """From the router's logits in `scores`, choose a row's experts by score plus bias and weigh them by score alone.

    What all tokens take follows, with weight one; in a dense layer, that alone. The chosen are written down by cache slot, best first; a
    forced row takes those that stand there, and how many layers would have chosen the same set is counted by slot.
    """
    scores = at(step.scores, row * step.expert_stride)
    number, choices = step.route_of[layer], step.choices_of[layer]
    chosen, weights = at(step.chosen, row * choices), at(step.weights, row * choices)
    for k in range(choices):
        chosen[k], weights[k] = step.experts + k - step.top_k, np.float32(1)
    if number < 0:
        for k in range(choices):
            chosen[k] = k
        return
    score(step, scores)
    place = (slot * step.routed_layers + number) * step.top_k
    choose(scores, at(step.bias, number * step.experts), chosen, step.experts, step.top_k)
    if forced:
        counted = np.int64(step.alike[slot]) if number > 0 else whole(0)
        step.alike[slot] = np.int16(counted + same_set(step, chosen, place))
        for k in range(step.top_k):
            chosen[k] = np.int64(step.routes16[place + k]) if step.wide_routes else np.int64(step.routes8[place + k])
    sum_ = np.float32(0)
    for k in range(step.top_k):
        sum_ += scores[chosen[k]]
    for k in range(step.top_k):
        weights[k] = scores[chosen[k]] / sum_ * step.routing_scale if step.renormalize else scores[chosen[k]] * step.routing_scale
        if step.wide_routes:
            step.routes16[place + k] = np.uint16(chosen[k])
        else:
            step.routes8[place + k] = np.uint8(chosen[k])


@kernel
def score(step, scores):
    """Logits become the router's scores, in place; what lies beyond the experts means nothing."""
    if not step.softmax:
        for i in range(0, step.expert_stride, 16):
            store(scores, i, sigmoid(load(scores, i)))
        return
    most, sum_ = scores[0], np.float32(0)
    for expert in range(step.experts):
        most = max(most, scores[expert])
    for i in range(0, step.expert_stride, 16):
        store(scores, i, exp(load(scores, i) - splat(most)))
    for expert in range(step.experts):
        sum_ += scores[expert]
    for i in range(0, step.expert_stride, 16):
        store(scores, i, load(scores, i) / splat(sum_))


@kernel
def same_set(step, chosen, place):
    """1 if the experts that stand at a place are those chosen, in whatever order; else 0."""
    for k in range(step.top_k):
        expert = np.int64(step.routes16[place + k]) if step.wide_routes else np.int64(step.routes8[place + k])
        found = False
        for other in range(step.top_k):
            found |= chosen[other] == expert
        if not found:
            return whole(0)
    return whole(1)


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
def sort_pairs(step, layer, num_rows, wanted_only):
    """List the (row, choice) pairs of each expert in the order of rows, and the experts that have any; returns their number."""
    starts, top_k, experts = step.starts, step.choices_of[layer], step.matrices_of[layer]
    for expert in range(experts + 1):
        starts[expert] = 0
    for pair in range(num_rows * top_k):
        if step.wanted[pair // top_k] or not wanted_only:
            starts[step.chosen[pair] + 1] += 1
    num_active = 0
    for expert in range(experts):
        if starts[expert + 1]:
            step.active[num_active] = expert
            num_active += 1
        starts[expert + 1] += starts[expert]
    for pair in range(num_rows * top_k):
        if step.wanted[pair // top_k] or not wanted_only:
            expert = step.chosen[pair]
            step.pairs[starts[expert]], step.sources[starts[expert]] = pair, pair // top_k
            starts[expert] += 1
    for expert in range(experts, 0, -1):
        starts[expert] = starts[expert - 1]
    starts[0] = 0
    return num_active


@kernel
def expand(step, thread, layer, item):
    """activations[pair] = silu(gate) * up, one panel of one expert: 32 gate outputs and their 32 ups."""
    expert, panel = step.active[item // step.gate_up.panels], item % step.gate_up.panels
    index, tile = step.first_of[layer] + expert, at(step.tile, thread * 4 * PANEL)
    for place in range(step.starts[expert], step.starts[expert + 1], 4):
        height = min(4, step.starts[expert + 1] - place)
        multiply(step.gate_up, index, panel, step.h, step.hidden_stride, at(step.sources, place), tile, whole(PANEL), step.counting, height)
        for row in range(height):
            target = step.pairs[place + row] * step.width_stride + panel * ACTIVATIONS
            for i in range(0, ACTIVATIONS, 16):
                gate, up = load(tile, row * PANEL + i), load(tile, row * PANEL + ACTIVATIONS + i)
                store(step.activations, target + i, gate * sigmoid(gate) * up * splat(step.lift_experts))


@kernel
def contract(step, layer, item):
    """outputs[pair] = down projection of activations[pair], one panel of one expert."""
    expert, panel = step.active[item // step.down.panels], item % step.down.panels
    first, last = step.starts[expert], step.starts[expert + 1]
    rows, y = at(step.pairs, first), at(step.outputs, panel * PANEL)
    index, activations, stride = step.first_of[layer] + expert, step.activations, step.width_stride
    multiply(step.down, index, panel, activations, stride, rows, y, step.hidden_stride, rows, last - first)


@kernel
def combine(step, layer, row, target):
    """target = a row of the residual stream and its experts of a layer, weighted, in the order of choice."""
    choices = step.choices_of[layer]
    weights, pair, x = at(step.weights, row * choices), row * choices, at(step.x, row * step.hidden_stride)
    for i in range(0, step.hidden_stride, 16):
        value = load(x, i)
        for k in range(choices):
            value = fma(splat(weights[k]), load(step.outputs, (pair + k) * step.hidden_stride + i), value)
        store(target, i, value)
