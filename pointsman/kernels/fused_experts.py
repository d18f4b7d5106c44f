"""Few tokens from the router's input to the experts' sum in one kernel: gate and quantization, choice, `up`, `down`, sum.

What a small step loses is not bandwidth but starts: each kernel of a chain begins with nothing in flight and ends with most processors
waiting for the last. Here one program or two on each processor stay for all phases. A phase begins when all have done with the one before:
a counter in global memory that each program raises and then watches. While a program waits, the weights that it will read next are on their
way to the second-level cache. The grid must be resident as a whole, so its launch is a cooperative one; who leaves last sets the counters
back to zero.

Tokens are few enough for one block, so nothing is sorted: an expert in use is multiplied with the rows of all tokens, and rows that did
not choose it are dropped. A sum's order is that of the token's choices, never that of time.

The phases can also be launched one by one, for a machine whose programs run one after the other.

Shape suffixes: T tokens, D hidden, F expert width, E experts, K experts per token, U experts in use, G groups of 128 columns, L layers,
C cache slots.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, misc, no-any-return, no-untyped-call"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pointsman.kernels.arrange import quantize_groups, quantize_some
from pointsman.kernels.expert_rows import combine_columns
from pointsman.kernels.grouped_gemm import hidden_columns, row_products
from pointsman.kernels.prefetch import fetch_line
from pointsman.kernels.routing import Choice, choose_token
from pointsman.kernels.triton_support import launch_options
from pointsman.kernels.weight import FP8, Weight

GROUP = tl.constexpr(128)
GROUPS_AT_ONCE = tl.constexpr(8)
SUM_COLUMNS = tl.constexpr(256)
ROWS = tl.constexpr(16)  # of a block of tokens
GATE, CHOOSE, UP, DOWN, SUM = range(5)
MOST_TOKENS = 16
# the counters: programs that have done with a phase, tokens that have chosen, programs that have left
NUM_COUNTERS = 3


@triton.jit
def raise_counter(counter_ptr):
    """One more; what this program wrote before is visible to whom the counter is."""
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release")


@triton.jit
def watch(counter_ptr, number):
    """Wait until the counter has reached the number."""
    while now(counter_ptr) < number:
        pass
    tl.debug_barrier()


@triton.jit
def now(counter_ptr):
    return tl.inline_asm_elementwise("ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [counter_ptr], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def leave(counter_ptr):
    """The last to leave sets the counters to zero: nobody watches them any more."""
    if tl.atomic_add(counter_ptr + 2, 1, sem="relaxed") == tl.num_programs(0) - 1:
        tl.store(counter_ptr, 0)
        tl.store(counter_ptr + 1, 0)
        tl.store(counter_ptr + 2, 0)


@triton.jit
def gate_logits(x_ptr, gate_ptr, logits_ptr, num_tokens, E: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr):
    """logits[t, e] = x[t] . gate[e] in float32, an expert at a time."""
    COLUMNS: tl.constexpr = min(1024, 4096 // TOKENS)
    token = tl.arange(0, TOKENS)
    for expert in range(tl.program_id(0), E, tl.num_programs(0)):
        sums = tl.zeros((TOKENS, COLUMNS), tl.float32)
        for start in tl.range(0, D, COLUMNS, num_stages=1, loop_unroll_factor=4 if TOKENS <= 4 else 1):
            column = start + tl.arange(0, COLUMNS)
            gate = tl.load(gate_ptr + expert * D + column, mask=column < D, other=0.0)
            inside = (token < num_tokens)[:, None] & (column < D)[None, :]
            x = tl.load(x_ptr + token[:, None] * D + column[None, :], mask=inside, other=0.0)
            sums += x.to(tl.float32) * gate[None, :]
        tl.store(logits_ptr + token * E + expert, tl.sum(sums, axis=1), mask=token < num_tokens)


@triton.jit
def expert_of(used, place, use, E_PADDED: tl.constexpr):
    """The use-th of the experts in use."""
    return tl.sum(tl.where((used > 0) & (place == use), tl.arange(0, E_PADDED), 0), axis=0).to(tl.int64)


@triton.jit
def ask(w_ptr, STRIDE: tl.constexpr, NUM: tl.constexpr, STEPS: tl.constexpr):
    """Ask for the first STEPS * 128 bytes of NUM rows of weights."""
    for step in tl.static_range(STEPS):
        fetch_line(w_ptr + tl.arange(0, NUM) * STRIDE + step * 128)


@triton.jit
def up_part(
    unit, ahead, ids, used, place, num_tokens, q_ptr, qs_ptr, w_ptr, ws_ptr, h_ptr, hs_ptr,
    D: tl.constexpr, F: tl.constexpr, E_PADDED: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Quantized hidden rows of 128 columns for one expert in use; `ahead` is the part whose weights are asked for, if not negative."""
    ACROSS: tl.constexpr = F // GROUP
    if AHEAD > 0 and ahead >= 0:
        later_ptr = w_ptr + expert_of(used, place, ahead // ACROSS, E_PADDED) * (2 * F * D) + ahead % ACROSS * (GROUP * D)
        ask(later_ptr, D, GROUP, AHEAD)
        ask(later_ptr + F * D, D, GROUP, AHEAD)
    use, column = unit // ACROSS, unit % ACROSS * GROUP
    expert = expert_of(used, place, use, E_PADDED)
    token = tl.arange(0, ROWS)
    w_ptr += expert * (2 * F * D)
    ws_ptr += expert * (2 * ACROSS * (D // GROUP))
    h = hidden_columns(q_ptr, qs_ptr, w_ptr, ws_ptr, token, token < num_tokens, column, D, F, ROWS, GROUP, GROUP, True, True, STAGES)
    q, scale = quantize_groups(h.to(tl.float32))
    mine = tl.max((ids == expert).to(tl.int32), axis=1) > 0
    row = use * ROWS + token
    tl.store(h_ptr + row[:, None] * F + column + tl.arange(0, GROUP)[None, :], q, mask=mine[:, None])
    tl.store(hs_ptr + row * ACROSS + column // GROUP, scale, mask=mine)


@triton.jit
def down_part(
    unit, ids, used, place, h_ptr, hs_ptr, w_ptr, ws_ptr, y_ptr,
    D: tl.constexpr, F: tl.constexpr, E_PADDED: tl.constexpr, K: tl.constexpr, K_PADDED: tl.constexpr, COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """What one expert in use makes of its tokens' hidden rows, in COLUMNS columns."""
    use, column = unit // (D // COLUMNS), unit % (D // COLUMNS) * COLUMNS
    expert = expert_of(used, place, use, E_PADDED)
    token = tl.arange(0, ROWS)
    mine = tl.max((ids == expert).to(tl.int32), axis=1) > 0
    pair = token * K + tl.sum(tl.where(ids == expert, tl.arange(0, K_PADDED)[None, :], 0), axis=1)
    w_ptr += expert * (D * F) + column * F
    ws_ptr += expert * ((D // GROUP) * (F // GROUP)) + column // GROUP * (F // GROUP)
    y = row_products(h_ptr, hs_ptr, w_ptr, ws_ptr, use * ROWS + token, mine, F, ROWS, COLUMNS, GROUP, True, False, True, STAGES)
    tl.store(y_ptr + pair[None, :] * D + column + tl.arange(0, COLUMNS)[:, None], y, mask=mine[None, :])


@triton.jit(do_not_specialize=["num_tokens", "scale", "given_stride", "row_stride", "row_offset", "first_own", "num_own"])
def fused_kernel(
    x_ptr, gate_ptr, bias_ptr, given_ptr, slot_ptr, up_ptr, up_scale_ptr, down_ptr, down_scale_ptr,
    q_ptr, qs_ptr, logits_ptr, h_ptr, hs_ptr, y_ptr, ids_ptr, weights_ptr, rows_ptr, alike_ptr, out_ptr, counter_ptr,
    num_tokens, scale, given_stride, row_stride, row_offset, first_own, num_own,
    D: tl.constexpr, F: tl.constexpr, E: tl.constexpr, E_PADDED: tl.constexpr, K: tl.constexpr, K_PADDED: tl.constexpr,
    TOKENS: tl.constexpr, SOFTMAX: tl.constexpr, RENORMALIZE: tl.constexpr, BIASED: tl.constexpr, REPLAY: tl.constexpr,
    RECORD: tl.constexpr, COMPARE: tl.constexpr, FIRST_LAYER: tl.constexpr, OWN: tl.constexpr,
    COLUMNS: tl.constexpr, UP_STAGES: tl.constexpr, DOWN_STAGES: tl.constexpr, UP_AHEAD: tl.constexpr, DOWN_AHEAD: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The phases from FIRST to LAST. UP_AHEAD, DOWN_AHEAD: steps of K whose weights are asked for before their turn."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if FIRST == 0:
        gate_logits(x_ptr, gate_ptr, logits_ptr, num_tokens, E, D, TOKENS)
        groups = num_tokens * (D // GROUP)
        for part in range(programs - 1 - pid, tl.cdiv(groups, GROUPS_AT_ONCE), programs):
            quantize_some(x_ptr, q_ptr, qs_ptr, groups, part, GROUPS_AT_ONCE)
        if LAST > 0:
            raise_counter(counter_ptr)
    if FIRST <= 1 and LAST >= 1:
        for turn in range(tl.cdiv(num_tokens - pid, programs)):
            if FIRST == 0:
                watch(counter_ptr, programs)
            choose_token(
                pid + turn * programs, logits_ptr, bias_ptr, given_ptr, slot_ptr, ids_ptr, weights_ptr, rows_ptr, alike_ptr,
                num_tokens, scale, given_stride, row_stride, row_offset, E, E_PADDED, K, K_PADDED, 1, SOFTMAX, RENORMALIZE, BIASED,
                REPLAY, True, RECORD, COMPARE, FIRST_LAYER, first_own, num_own, OWN,
            )  # fmt: skip
            if LAST > 1:
                raise_counter(counter_ptr + 1)
        if LAST > 1:
            watch(counter_ptr + 1, num_tokens)
    if LAST >= 2:
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
        token, choice = tl.arange(0, ROWS)[:, None], tl.arange(0, K_PADDED)[None, :]
        ids = tl.load(ids_ptr + token * K + choice, mask=(token < num_tokens) & (choice < K), other=-1)
        flat = tl.reshape(ids, (ROWS * K_PADDED,))
        used = (tl.histogram(tl.maximum(flat, 0), E_PADDED, mask=flat >= 0) > 0).to(tl.int32)
        place = tl.cumsum(used, axis=0) - used
        up_parts, down_parts = tl.sum(used, axis=0) * (F // GROUP), tl.sum(used, axis=0) * (D // COLUMNS)
        if FIRST <= 2:
            for turn in range(tl.cdiv(up_parts - pid, programs)):
                unit = pid + turn * programs
                ahead = tl.where(unit + programs < up_parts, unit + programs, -1)
                up_part(
                    unit, ahead, ids, used, place, num_tokens, q_ptr, qs_ptr, up_ptr, up_scale_ptr, h_ptr, hs_ptr,
                    D, F, E_PADDED, UP_STAGES, UP_AHEAD,
                )  # fmt: skip
            if LAST > 2:
                raise_counter(counter_ptr)
                if DOWN_AHEAD > 0 and pid < down_parts:
                    expert = expert_of(used, place, pid // (D // COLUMNS), E_PADDED)
                    ask(down_ptr + expert * (D * F) + pid % (D // COLUMNS) * (COLUMNS * F), F, COLUMNS, DOWN_AHEAD)
                watch(counter_ptr, 2 * programs)
        if FIRST <= 3 and LAST >= 3:
            for turn in range(tl.cdiv(down_parts - pid, programs)):
                unit = pid + turn * programs
                down_part(
                    unit, ids, used, place, h_ptr, hs_ptr, down_ptr, down_scale_ptr, y_ptr,
                    D, F, E_PADDED, K, K_PADDED, COLUMNS, DOWN_STAGES,
                )  # fmt: skip
            if LAST > 3:
                raise_counter(counter_ptr)
                watch(counter_ptr, 3 * programs)
    if LAST == 4:
        ACROSS: tl.constexpr = (D + SUM_COLUMNS - 1) // SUM_COLUMNS
        for turn in range(tl.cdiv(num_tokens * ACROSS - pid, programs)):
            unit = pid + turn * programs
            column = unit % ACROSS * SUM_COLUMNS + tl.arange(0, SUM_COLUMNS)
            combine_columns(y_ptr, ids_ptr, weights_ptr, out_ptr, unit // ACROSS, column, column < D, D, K)
        if FIRST == 0:
            leave(counter_ptr)


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How the kernel is cut.

    Attributes:
        programs: on each processor.
        warps: of a program.
        columns: of `down` in a part.
        up_stages, down_stages: of the products' loops.
        up_ahead, down_ahead: steps of 128 along K whose weights are asked for ahead: of a program's next part of `up`, and of its first
            part of `down` before it waits for the others.
    """

    programs: int = 2
    warps: int = 4
    columns: int = 128
    up_stages: int = 3
    down_stages: int = 5
    up_ahead: int = 2
    down_ahead: int = 6

    def options(self, hidden: int, width: int, *, pdl: bool) -> dict[str, int]:
        """Keywords of a launch."""
        return {
            "COLUMNS": self.columns,
            "UP_STAGES": self.up_stages,
            "DOWN_STAGES": self.down_stages,
            "UP_AHEAD": min(self.up_ahead, hidden // 128) if pdl else 0,
            "DOWN_AHEAD": min(self.down_ahead, width // 128) if pdl else 0,
            "num_warps": self.warps,
            "maxnreg": min(255, 65536 // (32 * self.warps * self.programs) // 8 * 8),  # so that all programs fit
        }


def run(
    x_TD: Tensor,
    gate_up: Weight,
    down: Weight,
    gate_ED: Tensor,
    slots_T: Tensor,
    choice: Choice,
    ids_TK: Tensor,
    weights_TK: Tensor,
    counter: Tensor,
    *,
    processors: int = 1,
    cut: Cut | None = None,
    together: bool = True,
    pdl: bool = False,
) -> Tensor:
    """The experts' weighted sum, bfloat16 [T, D], of up to `MOST_TOKENS` tokens.

    Args:
        x_TD: bfloat16.
        gate_up, down: block FP8, [E, 2F, D] and [E, D, F].
        ids_TK, weights_TK: where the experts, int32, -1 for none, and their float32 weights are written.
        gate_ED, slots_T, choice: float32, and as of `routing.choose_experts`.
        counter: `NUM_COUNTERS` of `routing.counters`.
        processors: multiprocessors of the device.
        together: one launch for all phases; else one for each.
    """
    num_experts, _, width = down.data.shape
    assert 0 < len(x_TD) <= MOST_TOKENS and gate_up.scale is not None and down.scale is not None
    assert len(gate_ED) == num_experts and choice.own is None, "it chooses among the experts that it has"
    cut = cut or Cut()
    out_TD = torch.empty_like(x_TD)
    names = ("q_ptr", "qs_ptr", "logits_ptr", "h_ptr", "hs_ptr", "y_ptr")
    given = {
        **dict(zip(names, buffers(x_TD, choice.top_k, num_experts, width), strict=True)),
        **choice.arguments(num_experts, ids_TK),
        **cut.options(x_TD.shape[1], width, pdl=pdl),
    }
    for first, last in [(GATE, SUM)] if together else [(phase, phase) for phase in range(SUM + 1)]:
        fused_kernel[(processors * cut.programs,)](
            x_TD,
            gate_ED,
            slot_ptr=slots_T,
            up_ptr=gate_up.data,
            up_scale_ptr=gate_up.scale,
            down_ptr=down.data,
            down_scale_ptr=down.scale,
            ids_ptr=ids_TK,
            weights_ptr=weights_TK,
            out_ptr=out_TD,
            counter_ptr=counter,
            num_tokens=len(x_TD),
            D=x_TD.shape[1],
            F=width,
            TOKENS=1 if len(x_TD) == 1 else 4 if len(x_TD) <= 4 else 16,
            **given,
            FIRST=first,
            LAST=last,
            PDL=pdl,
            **launch_options(pdl),
            **({"launch_cooperative_grid": True} if together else {}),
        )
    return out_TD


def buffers(x_TD: Tensor, top_k: int, num_experts: int, width: int) -> tuple[Tensor, ...]:
    """What the phases hand on: tokens quantized and their scales, logits, hidden rows and their scales, rows to be summed."""
    (num_tokens, hidden), device = x_TD.shape, x_TD.device
    used = min(num_tokens * top_k, num_experts)
    return (
        torch.empty(num_tokens, hidden, dtype=FP8, device=device),
        torch.empty(num_tokens, hidden // 128, device=device),
        torch.empty(num_tokens, num_experts, device=device),
        torch.empty(used, MOST_TOKENS, width, dtype=FP8, device=device),
        torch.empty(used, MOST_TOKENS, width // 128, device=device),
        torch.empty(num_tokens * top_k, hidden, device=device),
    )
