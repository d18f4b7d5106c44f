"""Very few tokens from the sum before their norm to their experts in one kernel: sum, norm, quantization, logits, choice, the routing row.

A norm of one row costs more to begin and to end than it computes. Here a program has some whole rows of the gate, in its registers before
the token is there; it sums and norms the token by itself and multiplies in float32, without tensor cores. One program more for each token
stores the sum and the quantized row, waits for the logits and chooses.

A logit is its own sign of having been made: an empty place holds -0.0, which nobody stores, and who reads it empties it again. So there is
no counter, and no fence before it.

Programs that wait have the highest numbers: programs begin in ascending order, so all whom they wait for run or have run.

Shape suffixes: T tokens, D hidden, E experts, K experts per token, G groups of 128 columns, L layers, C cache slots.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, misc, no-any-return, no-untyped-call, assignment"
# ruff: noqa: RUF005 - Triton joins tuples by their sum

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pointsman.kernels.arrange import GROUP, quantize_groups
from pointsman.kernels.few_tokens import Few
from pointsman.kernels.fresh import Fresh
from pointsman.kernels.routing import Choice, choose_by
from pointsman.kernels.triton_support import launch_options
from pointsman.kernels.weight import FP8

MOST_TOKENS = 4
EMPTY = tl.constexpr(-(2**31))  # the bits of -0.0


@dataclass(frozen=True)
class Cut:
    """Experts of a program, and its warps."""

    experts: int = 2
    warps: int = 4


@triton.jit
def columns_of(chunk, BLOCKS: tl.constexpr):
    """The columns [BLOCKS, 128] of a chunk of a row."""
    return (chunk * BLOCKS + tl.arange(0, BLOCKS))[:, None] * GROUP + tl.arange(0, GROUP)[None, :]


@triton.jit
def load_row(x_ptr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, BLOCKS: tl.constexpr):
    """The chunks [BLOCKS, 128] of a row of WIDTH numbers, in float32."""
    chunks = ()
    for chunk in tl.static_range(CHUNKS):
        column = columns_of(chunk, BLOCKS)
        chunks = chunks + (tl.load(x_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32),)
    return chunks


@triton.jit
def load_rows(w_ptr, row, inside, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, BLOCKS: tl.constexpr):
    """The chunks [ROWS, BLOCKS, 128] of some rows of a matrix, each WIDTH numbers wide, as they are."""
    chunks = ()
    for chunk in tl.static_range(CHUNKS):
        column = columns_of(chunk, BLOCKS)[None, :, :]
        ptrs = w_ptr + row[:, None, None].to(tl.int64) * WIDTH + column
        mask = inside[:, None, None] & (column < WIDTH)
        chunks = chunks + (tl.load(ptrs, mask=mask, other=0.0, eviction_policy="evict_first"),)
    return chunks


@triton.jit
def sum_row(x_ptr, delta_ptr, D: tl.constexpr, CHUNKS: tl.constexpr, BLOCKS: tl.constexpr):
    """The chunks of x + delta, rounded as `norm_quant.norm` rounds, in float32."""
    x, delta = load_row(x_ptr, D, CHUNKS, BLOCKS), load_row(delta_ptr, D, CHUNKS, BLOCKS)
    sums = ()
    for chunk in tl.static_range(CHUNKS):
        sums = sums + ((x[chunk] + delta[chunk]).to(x_ptr.dtype.element_ty).to(tl.float32),)
    return sums


@triton.jit
def normed(x, norm, epsilon, dtype: tl.constexpr, D: tl.constexpr, CHUNKS: tl.constexpr, BLOCKS: tl.constexpr):
    """The chunks of a row's norm, rounded to the dtype, in float32."""
    squares = x[0] * x[0]
    for chunk in tl.static_range(1, CHUNKS):
        squares += x[chunk] * x[chunk]
    factor = tl.rsqrt(tl.sum(tl.reshape(squares, (BLOCKS * GROUP,)), axis=0) / D + epsilon)
    row = ()
    for chunk in tl.static_range(CHUNKS):
        row = row + ((x[chunk] * factor * norm[chunk]).to(dtype).to(tl.float32),)
    return row


@triton.jit
def make_logits(
    x_ptr, delta_ptr, norm_ptr, gate_ptr, logits_ptr, first, epsilon,
    D: tl.constexpr, E: tl.constexpr, T: tl.constexpr, EXPERTS: tl.constexpr, CHUNKS: tl.constexpr, BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """logits[t, e] of EXPERTS experts."""
    expert = first + tl.arange(0, EXPERTS)
    gate = load_rows(gate_ptr, expert, expert < E, D, CHUNKS, BLOCKS)
    norm = load_row(norm_ptr, D, CHUNKS, BLOCKS)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for t in tl.static_range(T):
        x = normed(sum_row(x_ptr + t * D, delta_ptr + t * D, D, CHUNKS, BLOCKS), norm, epsilon, x_ptr.dtype.element_ty, D, CHUNKS, BLOCKS)
        sums = gate[0] * x[0][None, :, :]
        for chunk in tl.static_range(1, CHUNKS):
            sums += gate[chunk] * x[chunk][None, :, :]
        logit = tl.sum(tl.reshape(sums, (EXPERTS, BLOCKS * GROUP)), axis=1)
        tl.store(logits_ptr + t * E + expert, tl.where(logit == 0.0, 0.0, logit), mask=expert < E)


@triton.jit
def take_logits(logits_ptr, expert, real):
    """Logits as soon as all are there; their places are empty again."""
    bits_ptr = logits_ptr.to(tl.pointer_type(tl.int32))
    bits = tl.load(bits_ptr + expert, mask=real, other=0, volatile=True)
    while tl.min(bits, axis=0) == EMPTY:
        bits = tl.load(bits_ptr + expert, mask=real, other=0, volatile=True)
    tl.debug_barrier()  # every thread has seen its numbers
    tl.store(bits_ptr + expert, tl.full(bits.shape, EMPTY, tl.int32), mask=real)
    return bits.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["scale", "given_stride", "row_stride", "row_offset", "first_own", "num_own"])
def vector_route_kernel(
    x_ptr, delta_ptr, norm_ptr, gate_ptr, bias_ptr, given_ptr, slot_ptr, logits_ptr, ids_ptr, weights_ptr, rows_ptr, alike_ptr,
    sum_ptr, q_ptr, qs_ptr, zeros_ptr, epsilon, scale, given_stride, row_stride, row_offset, first_own, num_own,
    D: tl.constexpr, E: tl.constexpr, E_PADDED: tl.constexpr, K: tl.constexpr, K_PADDED: tl.constexpr, T: tl.constexpr,
    EXPERTS: tl.constexpr, CHUNKS: tl.constexpr, BLOCKS: tl.constexpr, ZEROS: tl.constexpr, ZEROS_PADDED: tl.constexpr,
    SOFTMAX: tl.constexpr, RENORMALIZE: tl.constexpr, BIASED: tl.constexpr, REPLAY: tl.constexpr, RECORD: tl.constexpr,
    COMPARE: tl.constexpr, FIRST_LAYER: tl.constexpr, OWN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """First the programs that make logits, then one for each token."""
    pid = tl.program_id(0)
    MAKERS: tl.constexpr = (E + EXPERTS - 1) // EXPERTS
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if pid < MAKERS:
        make_logits(
            x_ptr, delta_ptr, norm_ptr, gate_ptr, logits_ptr, pid * EXPERTS, epsilon,
            D, E, T, EXPERTS, CHUNKS, BLOCKS, PDL,
        )  # fmt: skip
    else:
        token = pid - MAKERS
        norm = load_row(norm_ptr, D, CHUNKS, BLOCKS)
        if PDL:
            tl.extra.cuda.gdc_wait()
        row = token.to(tl.int64) * D
        total = sum_row(x_ptr + row, delta_ptr + row, D, CHUNKS, BLOCKS)
        x = normed(total, norm, epsilon, x_ptr.dtype.element_ty, D, CHUNKS, BLOCKS)
        for chunk in tl.static_range(CHUNKS):
            column, block = columns_of(chunk, BLOCKS), chunk * BLOCKS + tl.arange(0, BLOCKS)
            tl.store(sum_ptr + row + column, total[chunk].to(sum_ptr.dtype.element_ty), mask=column < D)
            q, q_scale = quantize_groups(x[chunk])
            tl.store(q_ptr + row + column, q, mask=column < D)
            tl.store(qs_ptr + token * (D // GROUP) + block, q_scale, mask=block < D // GROUP)
        place = tl.arange(0, ZEROS_PADDED)
        tl.store(zeros_ptr + token * ZEROS + place, place * 0, mask=place < ZEROS)
        expert = tl.arange(0, E_PADDED)
        logits = take_logits(logits_ptr + token * E, expert, expert < E)
        choose_by(
            logits, token, bias_ptr, given_ptr, slot_ptr, ids_ptr, weights_ptr, rows_ptr, alike_ptr,
            scale, given_stride, row_stride, row_offset, E, E_PADDED, K, K_PADDED, SOFTMAX, RENORMALIZE, BIASED, REPLAY, True, RECORD,
            COMPARE, FIRST_LAYER, first_own, num_own, OWN,
        )  # fmt: skip


def chunks(width: int) -> dict[str, int]:
    """How a row of so many columns is held."""
    blocks = triton.cdiv(width, GROUP.value)
    whole, third = triton.next_power_of_2(blocks), triton.next_power_of_2(triton.cdiv(blocks, 3))
    return {"CHUNKS": 3, "BLOCKS": third} if 3 * third < whole else {"CHUNKS": 1, "BLOCKS": whole}


def places(num_experts: int, device: torch.device) -> Tensor:
    """Where logits pass from program to program: empty, and empty again after each launch; for one stream at a time."""
    return torch.full((MOST_TOKENS * num_experts,), EMPTY.value, dtype=torch.int32, device=device)


def route(
    rows: Fresh, gate_ED: Tensor, slots_T: Tensor, places: Tensor, choice: Choice, *, num_zeros: int = 0, cut: Cut | None = None,
    pdl: bool = False,
) -> Few:  # fmt: skip
    """Route and quantize up to `MOST_TOKENS` tokens, and write their sum.

    Args:
        rows: bfloat16, D a multiple of 128.
        gate_ED: float32.
        slots_T: as of `routing.choose_experts`.
        places: `places` of this device and so many experts.
        num_zeros: zeros that the answer has.
    """
    x_TD = rows.x_TD
    (num_tokens, hidden), num_experts, device = x_TD.shape, len(gate_ED), x_TD.device
    assert 0 < num_tokens <= MOST_TOKENS and hidden % GROUP.value == 0 and len(places) == MOST_TOKENS * num_experts
    cut = cut or Cut()
    ids_TK = torch.empty(num_tokens, choice.top_k, dtype=torch.int32, device=device)
    weights_TK = torch.empty(num_tokens, choice.top_k, device=device)
    each = triton.cdiv(num_zeros, num_tokens)
    zeros = torch.empty(max(1, num_tokens * each), dtype=torch.int32, device=device)
    q_TD, scale_TG = torch.empty_like(x_TD, dtype=FP8), torch.empty(num_tokens, hidden // GROUP.value, device=device)
    vector_route_kernel[(triton.cdiv(num_experts, cut.experts) + num_tokens,)](
        x_TD,
        rows.delta_TD,
        rows.weight_D,
        gate_ED,
        slot_ptr=slots_T,
        logits_ptr=places.view(torch.float32),
        ids_ptr=ids_TK,
        weights_ptr=weights_TK,
        sum_ptr=rows.sum_TD,
        q_ptr=q_TD,
        qs_ptr=scale_TG,
        zeros_ptr=zeros,
        epsilon=rows.epsilon,
        **choice.arguments(num_experts, ids_TK),
        D=hidden,
        T=num_tokens,
        EXPERTS=cut.experts,
        **chunks(hidden),
        ZEROS=each,
        ZEROS_PADDED=triton.next_power_of_2(max(1, each)),
        PDL=pdl,
        num_warps=cut.warps,
        **launch_options(pdl),
    )
    return Few(ids_TK, weights_TK, None, q_TD, scale_TG, zeros[:num_zeros])
