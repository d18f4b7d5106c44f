"""What stands between the joined projection and attention, in one kernel: q and k norm, rotary, and keys and values into the cache.

q and k are normed over all heads at once, over each head, or not at all, rounded, rotated in whole or in part and rounded again, as
the reference composes it; values go as they are. Two programs a row: one for the queries, one for keys and values. A row with a slot
below 0 is padding: its queries are computed, since nothing depends on them, and nothing is written to the cache. Where ranks each have
some of the heads that are normed at once, they send each other the sums of their squares in this kernel (`mailbox`).

Shape suffixes: T rows, N columns of the joined projection, Q query heads, H key/value heads, C channels of a head, R half the rotary
channels, P pages, S slots of a page.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pointsman.kernels.capability import chains
from pointsman.kernels.e4m3 import narrowed, stored
from pointsman.kernels.mailbox import Mailbox, sum_over_ranks
from pointsman.kernels.triton_support import launch_options

ALL, EACH, NONE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _tile(ptr, weight_ptr, head, channel, first, HEADS: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, NORM: tl.constexpr):
    """Channels first to first + WIDTH of all heads of a row, and their weights, as float32; zeros outside."""
    inside = (head[:, None] < HEADS) & (channel[None, :] < WIDTH)
    at = head[:, None] * C + first + channel[None, :]
    x = tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)
    if NORM == ALL:
        weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    elif NORM == EACH:
        weight = tl.load(weight_ptr + first + channel, mask=channel < WIDTH, other=0.0).to(tl.float32)[None, :]
    else:
        weight = 1.0
    return x, weight


@triton.jit
def _factor(
    squares,
    boxes_ptr,
    turns_ptr,
    place,
    epsilon,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    NORM: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
):
    """What a norm multiplies with, of the sum of squares of each head."""
    if NORM == ALL:
        total = tl.sum(squares, axis=0)
        if RANKS > 1:
            one = tl.arange(0, 1)
            total = tl.sum(sum_over_ranks(total + tl.zeros((1,), tl.float32), boxes_ptr, turns_ptr, place, one, one == 0, 1, RANK, RANKS))
        return tl.rsqrt(total / (RANKS * HEADS * C) + epsilon)
    elif NORM == EACH:
        return tl.rsqrt(squares / C + epsilon)[:, None]
    else:
        return 1.0


@triton.jit
def _store(ptr, head_stride, head, channel, first, x, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """Write those channels of each head in the dtype of the target; e4m3 saturates."""
    inside = (head[:, None] < HEADS) & (channel[None, :] < WIDTH)
    if ptr.dtype.element_ty.primitive_bitwidth == 8:
        x = tl.minimum(tl.maximum(x.to(tl.float32), -448.0), 448.0)
    tl.store(ptr + head[:, None] * head_stride + first + channel[None, :], narrowed(x, ptr.dtype.element_ty), mask=inside)


@triton.jit
def _norm_rotate_store(
    in_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    head_stride,
    boxes_ptr,
    turns_ptr,
    place,
    epsilon,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    NORM: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    R_PAD: tl.constexpr,
    REST_PAD: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
):
    head = tl.arange(0, HEADS_PAD)
    turning = tl.arange(0, R_PAD)
    dtype = in_ptr.dtype.element_ty
    low, low_weight = _tile(in_ptr, weight_ptr, head, turning, 0, HEADS, C, R, NORM)
    high, high_weight = _tile(in_ptr, weight_ptr, head, turning, R, HEADS, C, R, NORM)
    squares = tl.sum(low * low + high * high, axis=1)
    if C > 2 * R:
        passing = tl.arange(0, REST_PAD)
        rest, rest_weight = _tile(in_ptr, weight_ptr, head, passing, 2 * R, HEADS, C, C - 2 * R, NORM)
        squares += tl.sum(rest * rest, axis=1)
    factor = _factor(squares, boxes_ptr, turns_ptr, place, epsilon, HEADS, C, NORM, RANK, RANKS)
    if C > 2 * R:
        _store(out_ptr, head_stride, head, passing, 2 * R, (rest * factor * rest_weight).to(dtype), HEADS, C - 2 * R)
    low = (low * factor * low_weight).to(dtype).to(tl.float32)
    high = (high * factor * high_weight).to(dtype).to(tl.float32)
    cos = tl.load(cos_ptr + turning, mask=turning < R, other=0.0)[None, :]
    sin = tl.load(sin_ptr + turning, mask=turning < R, other=0.0)[None, :]
    _store(out_ptr, head_stride, head, turning, 0, (low * cos - high * sin).to(dtype), HEADS, R)
    _store(out_ptr, head_stride, head, turning, R, (high * cos + low * sin).to(dtype), HEADS, R)


@triton.jit
def qkv_post_kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    boxes_ptr,
    turns_ptr,
    epsilon,
    Q: tl.constexpr,
    H: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    NORM: tl.constexpr,
    PAGE: tl.constexpr,
    Q_PAD: tl.constexpr,
    H_PAD: tl.constexpr,
    C_PAD: tl.constexpr,
    R_PAD: tl.constexpr,
    REST_PAD: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    in_ptr = qkv_ptr + row * (Q + 2 * H) * C
    cos_ptr += row * R
    sin_ptr += row * R
    if tl.program_id(1) == 0:
        _norm_rotate_store(
            *(in_ptr, q_weight_ptr, cos_ptr, sin_ptr, q_ptr + row * Q * C, C, boxes_ptr, turns_ptr, row * 2, epsilon),
            *(Q, C, R, NORM, Q_PAD, R_PAD, REST_PAD, RANK, RANKS),
        )
    else:
        slot = tl.load(slots_ptr + row).to(tl.int64)
        if slot >= 0:
            at = (slot // PAGE * H * PAGE + slot % PAGE) * C
            in_ptr += Q * C
            _norm_rotate_store(
                *(in_ptr, k_weight_ptr, cos_ptr, sin_ptr, k_ptr + at, PAGE * C, boxes_ptr, turns_ptr, row * 2 + 1, epsilon),
                *(H, C, R, NORM, H_PAD, R_PAD, REST_PAD, RANK, RANKS),
            )
            head = tl.arange(0, H_PAD)
            channel = tl.arange(0, C_PAD)
            inside = (head[:, None] < H) & (channel[None, :] < C)
            v = tl.load(in_ptr + H * C + head[:, None] * C + channel[None, :], mask=inside, other=0.0)
            _store(v_ptr + at, PAGE * C, head, channel, 0, v, H, C)


def qkv_post(
    qkv_TN: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    epsilon: float,
    cos_TR: Tensor,
    sin_TR: Tensor,
    k_PHSC: Tensor,
    v_PHSC: Tensor,
    slots_T: Tensor,
    mailbox: Mailbox | None = None,
    *,
    pdl: bool | None = None,
) -> Tensor:
    """The queries [T, Q, C] in qkv's dtype; keys and values go to their slots of one layer's pages, in the pages' dtype.

    Args:
        qkv_TN: the rows of q, k and v side by side, N = (Q + 2 H) C.
        q_weight, k_weight: weights of the norms over all Q C and all H C columns, or over the C of each head; None norms nothing.
        cos_TR, sin_TR: float32, as `reference.rotary_angles`.
        slots_T: int32 or int64; a negative one writes nothing.
        mailbox: for norms over the heads of all ranks, of which each has as many, and each head is on as many ranks as any other. It is
            of float32, one number wide, with two rows for each of T.
        pdl: the kernel may be launched while the one before runs; None: where the device can.
    """
    num_rows, width = qkv_TN.shape
    _, kv_heads, page_size, channels = k_PHSC.shape
    heads = width // channels - 2 * kv_heads
    half = cos_TR.shape[1]
    assert heads > 0 and width == (heads + 2 * kv_heads) * channels and 0 < 2 * half <= channels
    norm = NONE.value
    if q_weight is not None and k_weight is not None:
        norm = EACH.value if mailbox is None and q_weight.shape == k_weight.shape == (channels,) else ALL.value
        assert norm == EACH.value or (q_weight.shape, k_weight.shape) == ((heads * channels,), (kv_heads * channels,))
    for tensor in (qkv_TN, cos_TR, sin_TR, k_PHSC, v_PHSC, slots_T):
        assert tensor.is_contiguous()
    if mailbox is not None:
        assert norm == ALL.value and mailbox.width == 1 and mailbox.dtype == torch.float32 and 2 * num_rows <= mailbox.num_rows
    q_TQC = torch.empty(num_rows, heads, channels, dtype=qkv_TN.dtype, device=qkv_TN.device)
    if num_rows:
        pdl = chains(qkv_TN.device) if pdl is None else pdl
        qkv_post_kernel[(num_rows, 2)](
            qkv_TN,
            qkv_TN if q_weight is None else q_weight,
            qkv_TN if k_weight is None else k_weight,
            cos_TR,
            sin_TR,
            slots_T,
            q_TQC,
            stored(k_PHSC),
            stored(v_PHSC),
            qkv_TN if mailbox is None else mailbox.boxes_R,
            qkv_TN if mailbox is None else mailbox.turns_P,
            epsilon,
            Q=heads,
            H=kv_heads,
            C=channels,
            R=half,
            NORM=norm,
            PAGE=page_size,
            Q_PAD=triton.next_power_of_2(heads),
            H_PAD=triton.next_power_of_2(kv_heads),
            C_PAD=triton.next_power_of_2(channels),
            R_PAD=triton.next_power_of_2(half),
            REST_PAD=triton.next_power_of_2(max(1, channels - 2 * half)),
            RANK=0 if mailbox is None else mailbox.rank,
            RANKS=1 if mailbox is None else mailbox.num_ranks,
            PDL=pdl,
            num_warps=max(1, triton.next_power_of_2(heads * channels) // 1024),
            **launch_options(pdl),
        )
    return q_TQC
