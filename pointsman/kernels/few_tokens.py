"""Routing of few tokens in one kernel: logits, choice, weights, the routing row, pairs in the order of their experts, tokens quantized.

In a small step the gate, the choice and the arrangement are each a launch that waits for the one before and then does next to nothing. Here
some programs each make a part of all tokens' logits: their numbers of the gate are in registers, split into bfloat16, before the rows are
there. Then come programs that each choose for one token once all parts are made, and whoever chooses last arranges.

Programs that wait have the highest numbers: programs begin in ascending order, so all whom they wait for run or have run. Counters are zero
between launches.

A token names an expert once and there are no more tokens than rows of a block, so an expert has one block, and a token's row in it is its
number. Rows between stay padding.

Shape suffixes: T tokens, D hidden, E experts, K experts per token, S parts of the sum over D, G groups of 128 columns, L layers, C cache
slots.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, misc, no-any-return, no-untyped-call"

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pointsman.kernels.arrange import Arrangement, most_blocks, quantize_some
from pointsman.kernels.routing import Choice, choose_token
from pointsman.kernels.triton_support import launch_options
from pointsman.kernels.weight import FP8

ROWS = tl.constexpr(16)  # of a block of pairs
MOST_TOKENS = 16
GROUPS_AT_ONCE = tl.constexpr(8)
# parts of the logits that are made, tokens that have chosen
NUM_COUNTERS = 2


class Few(NamedTuple):
    """Few tokens routed. Attributes:

    ids_TK, weights_TK: as `routing.choose_experts`.
    arrangement: in blocks of 16, None where that was not asked for.
    q_TD, scale_TG: the tokens quantized, None twice where that was not asked for.
    zeros: int32, as many as were asked for.
    """

    ids_TK: Tensor
    weights_TK: Tensor
    arrangement: Arrangement | None
    q_TD: Tensor | None
    scale_TG: Tensor | None
    zeros: Tensor


@dataclass(frozen=True)
class GateCut:
    """Experts and columns of the gate that a program has, and its warps."""

    experts: int = 32
    columns: int = 256
    warps: int = 4


@triton.jit
def make_part(
    pid, x_ptr, gate_ptr, part_ptr, fill_ptr, q_ptr, qs_ptr, counter_ptr, num_tokens, num_pairs, num_places, num_filled,
    D: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr, FILL: tl.constexpr,
    QUANTIZE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """part[s, t, e] of BLOCK_E experts; and this program's share of padding, zeros and quantization."""
    part = pid % PARTS
    expert = pid // PARTS * BLOCK_E + tl.arange(0, BLOCK_E)
    column = part * BLOCK_D + tl.arange(0, BLOCK_D)
    token = tl.arange(0, ROWS)
    gate = tl.load(gate_ptr + expert[:, None] * D + column[None, :], mask=(expert < E)[:, None] & (column < D)[None, :], other=0.0)
    high = gate.to(tl.bfloat16)
    rest = gate - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    x = tl.load(x_ptr + token[:, None] * D + column[None, :], mask=(token < num_tokens)[:, None] & (column < D)[None, :], other=0.0)
    sums = tl.dot(low, x.T)
    sums += tl.dot(middle, x.T)
    sums += tl.dot(high, x.T)
    target = part_ptr + (part * num_tokens + token)[None, :] * E + expert[:, None]
    tl.store(target, sums, mask=(expert < E)[:, None] & (token < num_tokens)[None, :])
    place = pid * FILL + tl.arange(0, FILL)
    tl.store(fill_ptr + place, tl.where(place < num_places, num_pairs, 0), mask=place < num_filled)
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release")
    if QUANTIZE:
        groups = num_tokens * (D // 128)
        for turn in range(pid, tl.cdiv(groups, GROUPS_AT_ONCE), tl.cdiv(E, BLOCK_E) * PARTS):
            quantize_some(x_ptr, q_ptr, qs_ptr, groups, turn, GROUPS_AT_ONCE)


@triton.jit
def arrange_few(
    ids_ptr, pairs_ptr, expert_ptr, num_blocks_ptr, num_pairs, K: tl.constexpr, E_PADDED: tl.constexpr, PAIRS: tl.constexpr
):  # fmt: skip
    """Blocks in the order of experts, a token's pair at the row of its number."""
    pair = tl.arange(0, PAIRS)
    expert = tl.arange(0, E_PADDED)
    ids = tl.load(ids_ptr + pair, mask=pair < num_pairs, other=-1, cache_modifier=".cg")
    used = (tl.histogram(tl.maximum(ids, 0), E_PADDED, mask=ids >= 0) > 0).to(tl.int32)
    block = tl.cumsum(used, axis=0) - used
    place = tl.gather(block, tl.maximum(ids, 0), 0) * ROWS + pair // K
    tl.store(pairs_ptr + place, pair, mask=ids >= 0)
    tl.store(expert_ptr + block, expert, mask=used > 0)
    tl.store(num_blocks_ptr, tl.sum(used, axis=0))


@triton.jit(do_not_specialize=["num_tokens", "num_places", "num_filled", "scale", "given_stride", "row_stride", "row_offset",
                               "first_own", "num_own"])  # fmt: skip
def route_few_kernel(
    x_ptr, gate_ptr, bias_ptr, given_ptr, slot_ptr, part_ptr, ids_ptr, weights_ptr, rows_ptr, alike_ptr,
    fill_ptr, expert_ptr, num_blocks_ptr, q_ptr, qs_ptr, counter_ptr,
    num_tokens, num_places, num_filled, scale, given_stride, row_stride, row_offset, first_own, num_own,
    D: tl.constexpr, E: tl.constexpr, E_PADDED: tl.constexpr, K: tl.constexpr, K_PADDED: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, PAIRS: tl.constexpr, FILL: tl.constexpr,
    SOFTMAX: tl.constexpr, RENORMALIZE: tl.constexpr, BIASED: tl.constexpr, REPLAY: tl.constexpr, RECORD: tl.constexpr,
    COMPARE: tl.constexpr, FIRST_LAYER: tl.constexpr, OWN: tl.constexpr, QUANTIZE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """First the programs that make the parts of the logits, then one for each token."""
    pid = tl.program_id(0)
    PARTS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    MAKERS: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E * PARTS
    if pid < MAKERS:
        make_part(
            pid, x_ptr, gate_ptr, part_ptr, fill_ptr, q_ptr, qs_ptr, counter_ptr, num_tokens, num_tokens * K, num_places, num_filled,
            D, E, BLOCK_E, BLOCK_D, PARTS, FILL, QUANTIZE, PDL,
        )  # fmt: skip
    else:
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        while tl.atomic_add(counter_ptr, 0, sem="acquire") < MAKERS:
            pass
        tl.debug_barrier()
        choose_token(
            pid - MAKERS, part_ptr, bias_ptr, given_ptr, slot_ptr, ids_ptr, weights_ptr, rows_ptr, alike_ptr,
            num_tokens, scale, given_stride, row_stride, row_offset, E, E_PADDED, K, K_PADDED, PARTS, SOFTMAX, RENORMALIZE, BIASED,
            REPLAY, True, RECORD, COMPARE, FIRST_LAYER, first_own, num_own, OWN,
        )  # fmt: skip
        if PAIRS > 0:
            tl.debug_barrier()
        if tl.atomic_add(counter_ptr + 1, 1, sem="acq_rel" if PAIRS > 0 else "relaxed") == num_tokens - 1:
            if PAIRS > 0:
                arrange_few(ids_ptr, fill_ptr, expert_ptr, num_blocks_ptr, num_tokens * K, K, E_PADDED, PAIRS)
            tl.store(counter_ptr, 0)
            tl.store(counter_ptr + 1, 0)


def route_few(
    x_TD: Tensor,
    gate_ED: Tensor,
    slots_T: Tensor,
    counter: Tensor,
    choice: Choice,
    *,
    quantize: bool = True,
    arranged: bool = True,
    num_zeros: int = 0,
    cut: GateCut | None = None,
    pdl: bool = False,
) -> Few:
    """Route up to `MOST_TOKENS` tokens; arguments as those of `routing.router_logits`, `routing.choose_experts` and `arrange.arrange`.

    Args:
        counter: `NUM_COUNTERS` of `routing.counters`.
        arranged: the pairs are wanted in the order of experts.
        num_zeros: zeros that the answer has.
    """
    (num_tokens, hidden), num_experts, device = x_TD.shape, len(gate_ED), x_TD.device
    assert 0 < num_tokens <= MOST_TOKENS
    cut = cut or GateCut()
    num_pairs, parts = num_tokens * choice.top_k, triton.cdiv(hidden, cut.columns)
    makers = triton.cdiv(num_experts, cut.experts) * parts
    blocks = most_blocks(num_pairs, num_experts if choice.own is None else len(choice.own), ROWS.value)
    places = blocks * ROWS.value if arranged else 0
    sizes = (places, triton.cdiv(num_zeros, 4) * 4, triton.cdiv(blocks, 4) * 4, 1)
    # an empty part of it would have no address
    buffer, filled = torch.empty(sum(sizes), dtype=torch.int32, device=device), sum(sizes[:2])
    pairs_P, zeros, expert_B, num_blocks = buffer.split(sizes)
    ids_TK = torch.empty(num_tokens, choice.top_k, dtype=torch.int32, device=device)
    weights_TK = torch.empty(num_tokens, choice.top_k, device=device)
    part_STE = torch.empty(parts, num_tokens, num_experts, device=device)
    q_TD = scale_TG = None
    if quantize:
        q_TD, scale_TG = torch.empty_like(x_TD, dtype=FP8), torch.empty(num_tokens, hidden // 128, device=device)
    route_few_kernel[(makers + num_tokens,)](
        x_TD,
        gate_ED,
        slot_ptr=slots_T,
        part_ptr=part_STE,
        ids_ptr=ids_TK,
        weights_ptr=weights_TK,
        fill_ptr=buffer,
        expert_ptr=expert_B,
        num_blocks_ptr=num_blocks,
        q_ptr=x_TD if q_TD is None else q_TD,
        qs_ptr=x_TD if scale_TG is None else scale_TG,
        counter_ptr=counter,
        num_tokens=num_tokens,
        num_places=places,
        num_filled=filled,
        **choice.arguments(num_experts, ids_TK),
        D=hidden,
        BLOCK_E=cut.experts,
        BLOCK_D=cut.columns,
        PAIRS=triton.next_power_of_2(MOST_TOKENS * choice.top_k) if arranged else 0,
        FILL=triton.next_power_of_2(max(1, triton.cdiv(filled, makers))),
        QUANTIZE=quantize,
        PDL=pdl,
        num_warps=cut.warps,
        **launch_options(pdl),
    )
    arrangement = Arrangement(pairs_P, expert_B, num_blocks) if arranged else None
    return Few(ids_TK, weights_TK, arrangement, q_TD, scale_TG, zeros[:num_zeros])
