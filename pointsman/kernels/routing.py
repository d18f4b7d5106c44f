"""The router on a GPU: logits that are as good as float32, then scores, choice, weights and the routing row in one kernel.

The gate is float32 and stays so: each of its numbers is split into three bfloat16 that sum to it exactly enough (24 bits), and
three products with the bfloat16 activations are summed in float32. A small batch has too little to do for all processors, so K is
split over programs; the sums of the parts are added in a fixed order by the kernel that chooses.

The choice is by an integer: a score's bits in an order in which integers compare as the scores do, above the complement of the
expert's id, so that one maximum gives the best score and among equals the lowest id. NaN counts as the largest, as in torch's sort.

Shape suffixes: T tokens, D hidden, E experts, K experts per token, S parts of the sum over D, L layers, C cache slots.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, misc, no-any-return, no-untyped-call"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pointsman.kernels.triton_support import launch_options

BLOCK_D = 64


@triton.jit
def ordered(value):
    """An int64 for each float32 that compares as the floats do, -0 as 0 and NaN above all."""
    value = tl.where(value != value, float("nan"), value + 0.0)
    bits = value.to(tl.int32, bitcast=True)
    bits = tl.where(value != value, 0x7FFFFFFF, bits)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit(do_not_specialize=["num_tokens"])
def gate_kernel(
    x_ptr,
    gate_ptr,
    part_ptr,
    num_tokens,
    D: tl.constexpr,
    E: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """part[s, t, e] = the sum over the s-th STEPS blocks of D of x[t] * gate[e]."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    part = tl.program_id(2)
    column = part * STEPS * BLOCK_D + tl.arange(0, BLOCK_D)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    sums = tl.zeros((BLOCK_E, BLOCK_T), tl.float32)
    for step in range(STEPS):
        here = column + step * BLOCK_D
        gate = tl.load(gate_ptr + expert[:, None] * D + here[None, :], mask=(expert < E)[:, None] & (here < D)[None, :], other=0.0)
        x = tl.load(
            x_ptr + token[:, None].to(tl.int64) * D + here[None, :], mask=(token < num_tokens)[:, None] & (here < D)[None, :], other=0.0
        )
        high = gate.to(tl.bfloat16)
        rest = gate - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        sums += tl.dot(low, x.T)
        sums += tl.dot(middle, x.T)
        sums += tl.dot(high, x.T)
    target = part_ptr + (part * num_tokens + token).to(tl.int64)[None, :] * E + expert[:, None]
    tl.store(target, sums, mask=(expert < E)[:, None] & (token < num_tokens)[None, :])


@triton.jit
def scores(logits, real, SOFTMAX: tl.constexpr):
    if SOFTMAX:
        logits = tl.where(real, logits, float("-inf"))
        powers = tl.exp(logits - tl.max(logits, axis=0))
        return tl.div_rn(powers, tl.sum(powers, axis=0))
    else:
        return tl.div_rn(1.0, 1.0 + tl.exp(-logits))


@triton.jit
def best_experts(value, expert, real, choice, E_PADDED: tl.constexpr, K: tl.constexpr):
    """The K experts of the largest values, best first, at the places of `choice`; zeros beyond K."""
    key = (ordered(value) << 32) | (E_PADDED - 1 - expert).to(tl.int64)
    key = tl.where(real, key, -0x7FFFFFFFFFFFFFFF)
    ids = choice * 0
    for k in tl.static_range(K):
        best = tl.max(key, axis=0)
        ids = tl.where(choice == k, E_PADDED - 1 - (best & 0xFFFFFFFF).to(tl.int32), ids)
        key = tl.where(key == best, -0x7FFFFFFFFFFFFFFF, key)
    return ids


@triton.jit(do_not_specialize=["num_tokens", "scale", "given_stride", "row_stride", "row_offset", "first_own", "num_own"])
def choose_kernel(
    part_ptr, bias_ptr, given_ptr, slot_ptr, ids_ptr, weights_ptr, rows_ptr, alike_ptr,
    num_tokens, scale, given_stride, row_stride, row_offset, first_own, num_own,
    E: tl.constexpr, E_PADDED: tl.constexpr, K: tl.constexpr, K_PADDED: tl.constexpr, PARTS: tl.constexpr, SOFTMAX: tl.constexpr,
    RENORMALIZE: tl.constexpr, BIASED: tl.constexpr, REPLAY: tl.constexpr, SLOTS: tl.constexpr, RECORD: tl.constexpr,
    COMPARE: tl.constexpr, FIRST_LAYER: tl.constexpr, OWN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token: ids[t], weights[t], and the routing row of its slot."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    choose_token(
        tl.program_id(0), part_ptr, bias_ptr, given_ptr, slot_ptr, ids_ptr, weights_ptr, rows_ptr, alike_ptr,
        num_tokens, scale, given_stride, row_stride, row_offset, E, E_PADDED, K, K_PADDED, PARTS, SOFTMAX, RENORMALIZE, BIASED,
        REPLAY, SLOTS, RECORD, COMPARE, FIRST_LAYER, first_own, num_own, OWN,
    )  # fmt: skip


@triton.jit
def choose_token(
    token, part_ptr, bias_ptr, given_ptr, slot_ptr, ids_ptr, weights_ptr, rows_ptr, alike_ptr,
    num_tokens, scale, given_stride, row_stride, row_offset,
    E: tl.constexpr, E_PADDED: tl.constexpr, K: tl.constexpr, K_PADDED: tl.constexpr, PARTS: tl.constexpr, SOFTMAX: tl.constexpr,
    RENORMALIZE: tl.constexpr, BIASED: tl.constexpr, REPLAY: tl.constexpr, SLOTS: tl.constexpr, RECORD: tl.constexpr,
    COMPARE: tl.constexpr, FIRST_LAYER: tl.constexpr, first_own=0, num_own=0, OWN: tl.constexpr = False,
):  # fmt: skip
    """The choice of one token, and its routing row."""
    expert = tl.arange(0, E_PADDED)
    choice = tl.arange(0, K_PADDED)
    real = expert < E
    if REPLAY:
        given = tl.load(given_ptr + token.to(tl.int64) * given_stride + choice, mask=choice < K, other=0).to(tl.int32)
    logits = tl.zeros((E_PADDED,), tl.float32)
    for part in tl.static_range(PARTS):
        logits += tl.load(part_ptr + (part * num_tokens + token).to(tl.int64) * E + expert, mask=real, other=0.0)
    score = scores(logits, real, SOFTMAX)
    biased = score
    if BIASED:
        biased += tl.load(bias_ptr + expert, mask=real, other=0.0)
    ids = best_experts(biased, expert, real, choice, E_PADDED, K)
    if SLOTS:
        slot = tl.load(slot_ptr + token + choice * 0).to(tl.int64)
    if REPLAY:  # noqa: SIM102 - this one is asked when the kernel is compiled
        if tl.min(given, axis=0) >= 0:
            if COMPARE:
                compare_choices(ids, given, choice, alike_ptr, slot, K, FIRST_LAYER)
            ids = given
    weights = tl.sum(tl.where(expert[:, None] == ids[None, :], score[:, None], 0.0), axis=0)
    if RENORMALIZE:
        weights = tl.div_rn(weights, tl.sum(tl.where(choice < K, weights, 0.0), axis=0))
    weights = weights * scale
    if SLOTS:
        if RECORD:
            row_ptrs = rows_ptr + slot * row_stride + row_offset + choice
            tl.store(row_ptrs, ids.to(rows_ptr.dtype.element_ty), mask=(choice < K) & (slot >= 0))
        ids = tl.where(slot < 0, -1, ids)
        weights = tl.where(slot < 0, 0.0, weights)
    if OWN:
        ids = tl.where((ids >= first_own) & (ids < first_own + num_own), ids - first_own, -1)
    tl.store(ids_ptr + token.to(tl.int64) * K + choice, ids, mask=choice < K)
    tl.store(weights_ptr + token.to(tl.int64) * K + choice, weights, mask=choice < K)


@triton.jit
def compare_choices(ids, given, choice, alike_ptr, slot, K: tl.constexpr, FIRST_LAYER: tl.constexpr):
    """Count the layer in alike[slot] if the free choice is the set that is given; the first layer begins anew."""
    inside = (choice < K)[:, None] & (choice < K)[None, :]
    shared = tl.sum(tl.sum((inside & (ids[:, None] == given[None, :])).to(tl.int32), axis=1), axis=0) + choice * 0
    alike = (shared == K).to(tl.int16)
    mine = (choice == 0) & (slot >= 0)
    if not FIRST_LAYER:
        alike += tl.load(alike_ptr + slot, mask=mine, other=0)
    tl.store(alike_ptr + slot, alike, mask=mine)


@dataclass(frozen=True, eq=False, kw_only=True)
class Choice:
    """How the experts of rows are chosen, and what becomes of the choice.

    Attributes:
        top_k, softmax, renormalize, scale: how many; scores by softmax or else sigmoid; whether weights sum to 1, and by what they are
            multiplied.
        bias_E: float32, steers the choice alone.
        given_TK: experts to use instead, weighed live; a row with a negative id is free. Rows may be apart (a slice of a layer).
        rows_CLK: uint8 or uint16 routing rows by slot and layer.
        alike_C: int16 by slot, counts the layers in which a given choice is the same set as the free one; layer 0 begins anew.
        layer: of the routing row.
        own: ids are told relative to the first of these experts, and -1 for all others; rows have them as they are.
    """

    top_k: int
    softmax: bool
    renormalize: bool = True
    scale: float = 1.0
    bias_E: Tensor | None = None
    given_TK: Tensor | None = None
    rows_CLK: Tensor | None = None
    alike_C: Tensor | None = None
    layer: int = 0
    own: range | None = None

    def arguments(self, num_experts: int, absent: Tensor) -> dict[str, Any]:
        """What a kernel is told that calls `choose_token`, by name; `absent` stands where a tensor is not there."""
        given_TK, rows_CLK, own = self.given_TK, self.rows_CLK, self.own
        assert given_TK is None or given_TK.stride(1) == 1
        tensors = {"bias_ptr": self.bias_E, "given_ptr": given_TK, "rows_ptr": rows_CLK, "alike_ptr": self.alike_C}
        return {
            **{name: absent if tensor is None else tensor for name, tensor in tensors.items()},
            "scale": self.scale,
            "given_stride": 0 if given_TK is None else given_TK.stride(0),
            "row_stride": 0 if rows_CLK is None else rows_CLK.stride(0),
            "row_offset": 0 if rows_CLK is None else self.layer * rows_CLK.stride(1),
            "first_own": 0 if own is None else own.start,
            "num_own": 0 if own is None else len(own),
            "E": num_experts,
            "E_PADDED": triton.next_power_of_2(num_experts),
            "K": self.top_k,
            "K_PADDED": triton.next_power_of_2(self.top_k),
            "SOFTMAX": self.softmax,
            "RENORMALIZE": self.renormalize,
            "BIASED": self.bias_E is not None,
            "REPLAY": given_TK is not None,
            "RECORD": rows_CLK is not None,
            "COMPARE": given_TK is not None and self.alike_C is not None,
            "FIRST_LAYER": self.layer == 0,
            "OWN": own is not None,
        }


def counters(number: int, device: torch.device) -> Tensor:
    """What programs of a launch count with: zeros, and zeros again after it; for one stream at a time."""
    return torch.zeros(number, dtype=torch.int32, device=device)


@dataclass(frozen=True)
class GateTile:
    """How the gate's product is cut: tokens and experts of a program, and parts that the sum over D is split into."""

    tokens: int
    experts: int
    parts: int


def gate_tile(num_tokens: int, *, deterministic: bool = False) -> GateTile:
    """Parts enough for all processors of a large GPU; where results may not depend on the batch, one cut for all sizes."""
    if deterministic:
        return GateTile(64, 64, 12)
    if num_tokens <= 64:
        return GateTile(16, 64, 12)
    for most, parts in ((256, 12), (1024, 8), (4096, 4)):
        if num_tokens <= most:
            return GateTile(64, 64, parts)
    return GateTile(64, 64, 2)


def router_logits(x_TD: Tensor, gate_ED: Tensor, *, deterministic: bool = False, pdl: bool = False) -> Tensor:
    """Router logits in parts, float32 [S, T, E], whose sum over S is x @ gate.T as in float32.

    Args:
        x_TD: bfloat16.
        gate_ED: float32.
    """
    num_tokens, hidden = x_TD.shape
    num_experts = len(gate_ED)
    tile = gate_tile(num_tokens, deterministic=deterministic)
    steps = triton.cdiv(triton.cdiv(hidden, BLOCK_D), tile.parts)
    parts = triton.cdiv(triton.cdiv(hidden, BLOCK_D), steps)
    part_STE = torch.empty(parts, num_tokens, num_experts, device=x_TD.device)
    grid = (triton.cdiv(num_tokens, tile.tokens), triton.cdiv(num_experts, tile.experts), parts)
    gate_kernel[grid](
        x_TD,
        gate_ED,
        part_STE,
        num_tokens,
        D=hidden,
        E=num_experts,
        STEPS=steps,
        BLOCK_T=tile.tokens,
        BLOCK_E=tile.experts,
        BLOCK_D=BLOCK_D,
        PDL=pdl,
        num_warps=4,
        num_stages=2,
        **launch_options(pdl),
    )
    return part_STE


def choose_experts(part_STE: Tensor, choice: Choice, slots_T: Tensor | None = None, *, pdl: bool = False) -> tuple[Tensor, Tensor]:
    """Experts int32 [T, K], best first, and their float32 weights, from router logits in parts.

    Args:
        slots_T: where each token's routing row goes; a token of a negative slot is padding and gets ids of -1 and weights of 0.
    """
    parts, num_tokens, num_experts = part_STE.shape
    assert slots_T is not None or (choice.rows_CLK is None and choice.alike_C is None)
    ids_TK = torch.empty(num_tokens, choice.top_k, dtype=torch.int32, device=part_STE.device)
    weights_TK = torch.empty(num_tokens, choice.top_k, device=part_STE.device)
    choose_kernel[(num_tokens,)](
        part_STE,
        slot_ptr=ids_TK if slots_T is None else slots_T,
        ids_ptr=ids_TK,
        weights_ptr=weights_TK,
        num_tokens=num_tokens,
        **choice.arguments(num_experts, ids_TK),
        PARTS=parts,
        SLOTS=slots_T is not None,
        PDL=pdl,
        num_warps=1 if num_experts <= 256 else 4,
        **launch_options(pdl),
    )
    return ids_TK, weights_TK
